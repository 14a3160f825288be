"""Folders, files, locks and caches, rule by rule: what stays, what goes, who is told."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hints import said

from finetune import console
from finetune.errors import CheckpointError, ConfigError, SpaceError
from finetune.storage import folders, hashed, journal, lock, manifest

FULL = OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def sealed(folder: Path, facts: dict[str, Any] | None = None, **content: str) -> Path:
    for name, text in (content or {"a": "one"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    manifest.seal(folder, facts=facts)
    return folder


# --- what is forced to the disk, and when --------------------------------------------------------


def test_a_file_that_is_hashed_while_it_is_written_is_on_the_disk(
    tmp_path: Path, synced: list[str]
) -> None:
    with hashed.hashing(tmp_path) as written:
        hashed.hashed_text(tmp_path / "a", "one")
        (tmp_path / "sub").mkdir()
        hashed.hashed_copy(tmp_path / "a", tmp_path / "sub/b")
    hashed.hashed_text(tmp_path / "c", "later")
    assert synced == ["a", "b", "c"]
    digest = hashlib.sha256(b"one").hexdigest()
    assert written == {"a": (3, digest), "sub/b": (3, digest)}
    assert hashed._ledgers == []


def test_large_pieces_are_hashed_as_small_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashed, "_BESIDE", 4)
    monkeypatch.setattr(hashed, "_PIECE", 6)
    data = bytes(range(100))
    with hashed.hashed_file(tmp_path / "a") as file:
        for start in range(0, 100, 7):
            file.write(data[start : start + 7])
    assert (tmp_path / "a").read_bytes() == data
    assert (file.size, file.digest()) == (100, hashlib.sha256(data).hexdigest())


def test_a_folder_is_sealed_inside_out(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "x/y").mkdir(parents=True)
    (tmp_path / "x/y/a").write_text("1")
    manifest.seal(tmp_path)
    assert synced == ["a", "y", "x", "manifest.json", tmp_path.name]


def test_results_are_whole_before_they_take_their_places(tmp_path: Path, synced: list[str]) -> None:
    with folders.result_files(tmp_path, belongs=bool) as stage:
        (stage / "a").write_text("1")
    name, staging = tmp_path.name, ".staging-files"
    assert synced == ["a", "manifest.json", staging, "rename", name, "rename", name, "rename", name]


def test_a_journals_lines_are_on_the_disk_if_they_are_to_last(
    tmp_path: Path, synced: list[str]
) -> None:
    journal.append(tmp_path / "a", [{"n": 1}])
    assert synced == ["a", tmp_path.name]
    journal.append(tmp_path / "b", [{"n": 1}], durable=False)
    assert synced == ["a", tmp_path.name]


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "outcome"), [(FULL, folders.NO_ROOM), (ZeroDivisionError(), folders.FAILED)]
)
def test_a_part_that_fails_is_told_to_the_others_by_its_kind(error: Any, outcome: int) -> None:
    told: list[int] = []
    with pytest.raises(type(error)), folders.together(lambda n: told.append(n) or n, Path("x")):
        raise error
    assert told == [outcome]


@pytest.mark.parametrize(
    ("outcome", "kind"), [(folders.NO_ROOM, SpaceError), (folders.FAILED, CheckpointError)]
)
def test_what_failed_elsewhere_fails_here_as_an_echo(outcome: int, kind: Any) -> None:
    with pytest.raises(kind) as caught, folders.together(lambda _: outcome, Path("x")):
        pass
    assert caught.value.is_echo
    assert type(caught.value) is kind


def test_a_signal_ends_a_save_by_its_number_and_is_handled_as_before_afterwards(
    tmp_path: Path,
) -> None:
    mine: Callable[..., None] = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGHUP, mine), signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def save() -> None:
        with folders.staged(tmp_path / "a") as stage:
            assert signal.getsignal(signal.SIGHUP) is mine
            (stage / "x").write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)

    def write() -> None:
        with folders.result_files(tmp_path / "out", belongs=bool):
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        for act in (save, write):
            with pytest.raises(SystemExit) as caught:
                act()
            assert caught.value.code == 128 + signal.SIGTERM
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            assert signal.getsignal(signal.SIGHUP) is mine
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert names(tmp_path) == {"out"}


def test_a_link_to_nowhere_is_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("nowhere")
    assert "exists already" in said(folders.open_stage, tmp_path / "a")
    (tmp_path / ".staging-b").write_text("x")
    assert "is in the way" in said(folders.open_stage, tmp_path / "b")


def test_what_an_interrupted_save_left_in_its_stage_is_no_part_of_the_next(tmp_path: Path) -> None:
    (tmp_path / ".staging-a/sub").mkdir(parents=True)
    (tmp_path / ".staging-a/sub/x").write_text("old")
    with folders.staged(tmp_path / "a") as stage:
        (stage / "y").write_text("new")
    assert names(tmp_path) == {"a", "a/y", "a/manifest.json"}
    with folders.staged(tmp_path / "a", replace=True) as stage:
        (stage / "z").write_text("newer")
    assert names(tmp_path) == {"a", "a/z", "a/manifest.json"}


@pytest.mark.parametrize("links", [True, False])
def test_a_changed_file_of_a_folder_leaves_the_others_and_its_facts(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sealed(tmp_path / "a", {"rows": 3}, x="one", **{"sub/y": "two"})
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "")))
    folders.amend(folder, "x", "three")
    assert manifest.verify(folder) == []
    assert (folder / "x").read_text() == "three"
    assert manifest.recorded(folder).facts == {"rows": 3}


def test_a_folder_set_aside_comes_back_only_where_none_took_its_place(tmp_path: Path) -> None:
    for name in (".replaced-a", ".replaced-b", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name.removeprefix(".replaced-")).touch()
    assert folders.clean(tmp_path) == ["put back a: its replacement was not finished"]
    assert names(tmp_path) == {"a", "a/a", "b", "b/b"}


def test_in_a_users_folder_only_stages_with_our_files_are_swept(tmp_path: Path) -> None:
    for name, content in (("ours", ["a.json"]), ("mixed", ["a.json", "mine.txt"]), ("theirs", ["x"])):  # fmt: skip
        (tmp_path / f".staging-{name}").mkdir()
        for file in content:
            (tmp_path / f".staging-{name}" / file).touch()
    (tmp_path / ".staging-file.json.1234").touch()
    assert len(folders.sweep(tmp_path, names=["*.json"])) == 1
    assert not (tmp_path / ".staging-ours").exists()
    assert (tmp_path / ".staging-mixed/mine.txt").exists()
    assert (tmp_path / ".staging-file.json.1234").exists()
    assert len(folders.sweep(tmp_path)) == 3


def result(folder: Path, overwrite: bool = False, **content: str) -> None:
    with folders.result_files(folder, belongs=bool, overwrite=overwrite) as stage:
        for name, text in content.items():
            (stage / name).write_text(text)


def test_a_new_result_takes_the_old_ones_place_but_not_what_the_user_changed(
    tmp_path: Path,
) -> None:
    result(tmp_path, a="1", b="1", c="1")
    (tmp_path / "b").write_text("mine now")
    result(tmp_path, a="2")
    assert names(tmp_path) == {"a", "b", "manifest.json"}
    assert (tmp_path / "a").read_text() == "2"
    (tmp_path / "d").write_text("mine")
    with pytest.raises(ConfigError, match="did not write it"):
        result(tmp_path, d="3")
    assert (tmp_path / "d").read_text() == "mine"
    result(tmp_path, overwrite=True, d="3")
    assert (tmp_path / "d").read_text() == "3"


def test_a_full_disk_is_told_with_what_the_newest_checkpoint_took(tmp_path: Path) -> None:
    for step, size in ((1, 3_000_000), (2, 7_000_000)):
        folder = sealed(tmp_path / f"checkpoint-{step}", a="x" * size)
        os.utime(folder, (step, step))
    text = str(folders._space_error(FULL, tmp_path / "checkpoint-3", tmp_path / ".staging-3"))
    assert text.startswith("no room to write")
    (tmp_path / ".staging-3").mkdir()
    text = str(folders._space_error(FULL, tmp_path / "checkpoint-3", tmp_path / ".staging-3"))
    assert "the checkpoint before took 7.0 MB" in text
    failing = folders._space_error(OSError(errno.EIO, "x"), tmp_path / "a", tmp_path)
    assert str(failing).startswith("unable to write")
    for other in (ZeroDivisionError(), CheckpointError("No space left")):
        assert folders._space_error(other, tmp_path / "a", tmp_path) is None


# --- manifests -----------------------------------------------------------------------------------


def test_every_difference_from_a_manifest_is_told(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "a", x="one", y="two", z="six", w="ten")
    assert manifest.verify(folder) == []
    (folder / "x").unlink()
    (folder / "y").write_text("three")
    (folder / "z").write_text("SIX")
    (folder / "v").symlink_to("w")
    (folder / "new").touch()
    assert set(manifest.verify(folder)) == {
        "v is neither a file nor a folder", "x is missing", "new is not in the manifest",
        "y has 5 bytes instead of 3", "z has other content than manifest.json says",
    }  # fmt: skip
    assert len(manifest.verify(folder, others_allowed=True)) == 3


def test_a_manifest_is_exactly_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sealed(tmp_path / "a")
    text = (folder / "manifest.json").read_text()
    for other in (text + " ", text.replace('"format": 1', '"format": 2'), "[]", "x"):
        (folder / "manifest.json").write_text(other)
        assert "damaged" in manifest.verify(folder)[0]
    (folder / "manifest.json").write_text(text)
    monkeypatch.setattr(manifest, "LARGEST", len(text))
    assert manifest.verify(folder) == []
    monkeypatch.setattr(manifest, "LARGEST", len(text) - 1)
    assert "is larger than" in manifest.verify(folder)[0]


def test_a_folder_is_untouched_until_a_name_a_size_or_a_time_changes(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "a", x="one", y="two")
    assert manifest.is_untouched(folder)

    def touched(folder: Path) -> None:
        later = (folder / "manifest.json").stat().st_mtime_ns + 1_000_000
        os.utime(folder / "x", ns=(later, later))

    changes: dict[str, Callable[[Path], Any]] = {
        "new": lambda f: (f / "new").touch(),
        "gone": lambda f: (f / "x").unlink(),
        "longer": lambda f: ((f / "x").write_text("ones"), os.utime(f / "x", (1, 1))),
        "later": touched,
    }
    for name, change in changes.items():
        again = sealed(tmp_path / name, x="one", y="two")
        change(again)
        assert not manifest.is_untouched(again), name


# --- locks ---------------------------------------------------------------------------------------


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refused)
    monkeypatch.setattr(console, "_warned", set())


@pytest.mark.parametrize(
    ("text", "lives"),
    [
        ("process 7 on elsewhere, started 1\n", True),
        (f"process {os.getpid()} on {socket.gethostname()}, started {lock._started(os.getpid())}\n", True),
        (f"process {os.getpid()} on {socket.gethostname()}, started 1\n", False),
        (f"process 999999999 on {socket.gethostname()}, started 1\n", False),
        ("process 7 on elsewhere", False), ("", False),
    ],
    ids=["elsewhere", "this one", "an earlier one of its number", "gone", "half a line", "empty"],
)  # fmt: skip
def test_an_owner_lives_while_its_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, lives: bool
) -> None:
    without_locks(monkeypatch)
    (tmp_path / "a").touch()
    (tmp_path / ".a.owner").write_text(text)
    assert lock.is_held(tmp_path / "a") == lives
    held = lock.try_lock(tmp_path / "a")
    assert (held is None) == lives
    if held is not None:
        assert lock.holder(tmp_path / "a") == lock.this_process()
        held.release()
        assert not (tmp_path / ".a.owner").exists()


def test_a_lock_on_a_file_that_was_replaced_meanwhile_is_taken_on_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "a", lock._open
    tries = []

    def replaced(place: Path, *, make: bool) -> int:
        descriptor = opened(place, make=make)
        if not tries:
            place.unlink()
        tries.append(1)
        return descriptor

    monkeypatch.setattr(lock, "_open", replaced)
    with lock.try_lock(path) as held:  # type: ignore[union-attr]
        assert os.path.samestat(os.fstat(held._descriptor), path.stat())
    assert len(tries) == 2
    assert lock.try_lock(tmp_path / "none", make=False) is None
    with pytest.raises(FileNotFoundError):
        lock.try_lock(tmp_path / "none/a")


def test_a_wait_for_a_lock_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(console, "say", told.append)
    monkeypatch.setattr(lock, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(lock, "_PAUSE_SECONDS", 0.005)
    held = lock.try_lock(tmp_path / "a")
    assert held is not None
    threading.Timer(0.15, held.release).start()
    with lock.locked(tmp_path / "a", "waiting"):
        assert told == ["waiting"]


def test_when_a_process_began_is_read_behind_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = " ".join(["S", *map(str, range(4, 60))])
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"1 (a (b) c) {fields}")
    assert lock._started(1) == "22"
