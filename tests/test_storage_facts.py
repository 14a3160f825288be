"""What stays open, who may read it, what is known of a file, and how a disk is known to be full."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hints import said
from test_storage import no_locks
from test_storage_rules import FULL, result, sealed

from finetune import console
from finetune.artifacts.run_dir import RunDirectory
from finetune.errors import CheckpointError, ConfigError, DataError, OutputInUseError
from finetune.storage import cache, files, folders, given, hashed, journal, lock, manifest
from finetune.storage.outputs import check_output

# --- what stays open, and who may read it --------------------------------------------------------


def failing(act: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def ended(folder: Path) -> None:
        with pytest.raises((ZeroDivisionError, ConfigError, OSError, CheckpointError)):
            act(folder)

    return ended


def half(opened: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The block that a writer opens, ended by an error."""

    def act(folder: Path) -> None:
        with opened(folder / "half"):
            raise ZeroDivisionError

    return failing(act)


def held_twice(folder: Path) -> None:
    first = lock.try_lock(folder / "twice")
    assert first is not None
    assert lock.try_lock(folder / "twice") is None
    assert lock.is_held(folder / "twice")
    first.release()
    first.release()
    assert not lock.is_held(folder / "twice")


def piped(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(ConfigError):
        lock.try_lock(folder / "pipe")


def resumed(folder: Path) -> None:
    output = journal.ResumableOutput(folder / "out.jsonl", "this")
    output.open(dict)
    with pytest.raises(OutputInUseError):
        journal.ResumableOutput(folder / "out.jsonl", "this").open(dict)
    output.journal.append([{"n": 1}])
    output.finish()


def opened_run(folder: Path) -> None:
    with RunDirectory.open(folder / "run"):
        assert RunDirectory.user(folder / "run") == lock.this_process()
    assert RunDirectory.user(folder / "run") is None
    (folder / "run/best.json").symlink_to("elsewhere")
    with pytest.raises(ConfigError):
        RunDirectory.open(folder / "run")


def built(folder: Path) -> None:
    cache.open_or_build(folder / "cache", "key", lambda stage: {"files": len(list(stage.iterdir()))})  # fmt: skip
    assert not lock.is_held(folder / "cache/key.lock")


def staged(folder: Path) -> None:
    with folders.staged(folder / "a") as stage:
        (stage / "x").touch()


ACTS: dict[str, Callable[[Path], Any]] = {
    "a file": lambda f: files.write_file(f / "a", "x"),
    "a file that fails": half(files.whole_file),
    "bytes that fail": half(files.whole_binary),
    "a hashed file": lambda f: hashed.hashed_text(f / "a", "x"),
    "a hashed file that fails": half(hashed.hashed_file),
    "a copy": lambda f: (files.write_file(f / "a", "x"), hashed.hashed_copy(f / "a", f / "b")),
    "a journal": lambda f: journal.append(f / "a", [{"n": 1}]),
    "rows": lambda f: (journal.append(f / "a", [{"n": 1}]), journal.recover(f / "a", dict)),
    "an output": resumed,
    "a folder": staged,
    "a folder that fails": half(folders.staged),
    "a folder in the way": failing(lambda f: (sealed(f / "a"), folders.open_stage(f / "a"))),
    "a result": lambda f: result(f, a="1"),
    "a result that fails": half(lambda path: folders.result_files(path, belongs=bool)),
    "a seal": lambda f: (sealed(f / "a", x="1"), manifest.verify(f / "a"), manifest.is_untouched(f / "a")),
    "another file": lambda f: folders.amend(sealed(f / "a", x="1", y="2"), "x", "3"),
    "a deletion": lambda f: folders.delete(sealed(f / "a")),
    "a lock": held_twice,
    "a pipe": piped,
    "a run": opened_run,
    "a cache": built,
    "leavings": lambda f: ((f / ".staging-x.1234").touch(), folders.sweep(f)),
    "a given file": lambda f: (files.write_file(f / "a", "x"), given.read_given(f / "a", "a")),
    "a digest": lambda f: (files.write_file(f / "a", "x"), files.file_digest(f / "a")),
}  # fmt: skip


@pytest.mark.parametrize("what", ACTS)
@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_no_descriptor_and_no_owner_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, locks: bool
) -> None:
    if not locks:
        no_locks(monkeypatch, errno.ENOLCK)
        monkeypatch.setattr(lock, "_PAUSE_SECONDS", 0.001)
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    ACTS[what](tmp_path)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
    assert not list(tmp_path.rglob(".*.owner"))


def test_what_is_written_may_be_read_by_whom_the_user_lets(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        held = lock.try_lock(tmp_path / "lock")
        assert held is not None
        held.release()
        with pytest.MonkeyPatch.context() as patch:
            no_locks(patch, errno.ENOLCK)
            owned = lock.try_lock(tmp_path / "owned")
            assert owned is not None
            assert (tmp_path / ".owned.owner").stat().st_mode & 0o777 == 0o644
            owned.release()
        files.write_file(tmp_path / "a", "x")
        journal.append(tmp_path / "b", [{"n": 1}])
        hashed.hashed_text(tmp_path / "c", "x")
        with folders.staged(tmp_path / "d") as stage:
            (stage / "e").touch()
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("a", "b", "c", "d", "d/manifest.json", "lock")}  # fmt: skip
    assert modes == dict.fromkeys(modes, 0o666) | {"d": 0o777, "lock": 0o644}


def test_a_journal_is_written_whole_by_short_writes_and_through_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.fdopen

    class Short:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Short:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: memoryview) -> int:
            return int(self.file.write(data[:3]))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(journal.os, "fdopen", lambda *how, **more: Short(opened(*how, **more)))
    rows = [{"text": "你好" * 5}, {"n": 2}]
    journal.append(tmp_path / "a", rows)
    assert list(journal.rows(tmp_path / "a")) == rows
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links") as caught:
        journal.append(tmp_path / "link", rows)
    assert caught.value.errno == errno.ELOOP


def test_bytes_that_are_hashed_are_counted_as_work_of_the_disk(tmp_path: Path) -> None:
    before = files.moved()
    (tmp_path / "a").write_text("12345")
    manifest.seal(tmp_path)
    assert files.moved() - before == 5
    assert manifest.verify(tmp_path) == []
    assert files.moved() - before == 10
    hashed.hashed_text(tmp_path / "b", "x" * 7)
    assert files.moved() - before == 17
    big = bytes(hashed._PIECE + 3)
    with hashed.hashed_file(tmp_path / "c") as file:
        assert file.write(big) == len(big)
    assert files.moved() - before == 17 + len(big)
    assert (file.size, file.digest()) == (len(big), hashlib.sha256(big).hexdigest())
    assert not [one for one in threading.enumerate() if one.name.startswith("hash")]


# --- files, manifests ----------------------------------------------------------------------------


def test_a_device_is_called_one_and_a_second_name_takes_the_place_of_an_earlier(
    tmp_path: Path,
) -> None:
    assert files.kind_of(Path("/dev/null")) == "a device"
    assert [files.kind_of(tmp_path / name) for name in ("none", ".")] == ["", "a folder"]
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("other")
    assert files.second_name(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")


def test_only_temporary_files_of_a_name_are_swept_where_one_is_told(tmp_path: Path) -> None:
    for name in (".staging-a.json.12", ".staging-b.json.12", ".a.json.7.part"):
        (tmp_path / name).touch()
    (tmp_path / ".staging-a.json.34").mkdir()
    (tmp_path / ".staging-a.json.56").symlink_to(".staging-b.json.12")
    assert files.sweep(tmp_path, "a.json") == [".staging-a.json.12"]
    assert files.sweep(tmp_path) == [".a.json.7.part", ".staging-b.json.12"]
    assert files.sweep(tmp_path / "none") == []
    (tmp_path / ".staging-c.12").touch()
    folders.finish_result(tmp_path)
    assert not (tmp_path / ".staging-c.12").exists()


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF", "EIO"])
def test_a_folder_that_cannot_be_synced_is_used_and_one_that_fails_is_not(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: int) -> None:
        raise OSError(getattr(errno, name), "x")

    monkeypatch.setattr(files.os, "fsync", refused)
    monkeypatch.setattr(console, "_warned", set())
    if name == "EIO":
        with pytest.raises(OSError, match="x"):
            files.fsync_folder(tmp_path)
    else:
        files.fsync_folder(tmp_path)


def test_files_are_noted_one_by_one_and_missed_when_they_change(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert not manifest.is_whole(tmp_path, name)
        (tmp_path / name).write_text(name)
        assert not manifest.is_whole(tmp_path, name), "it is there, and nobody noted it"
        manifest.add(tmp_path, name)
    assert manifest.noted_files(tmp_path).keys() == {"a", "b"}
    assert all(manifest.is_whole(tmp_path, name) for name in ("a", "b"))
    (tmp_path / "a").write_text("c")
    (tmp_path / "b").unlink()
    assert not any(manifest.is_whole(tmp_path, name) for name in ("a", "b"))


def test_what_is_known_of_a_file_is_not_read_again_and_stands_in_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    hash_ = manifest._hash
    monkeypatch.setattr(manifest, "_hash", lambda path, **how: read.append(path.name) or hash_(path, **how))  # type: ignore[func-returns-value]  # fmt: skip
    with folders.staged(tmp_path / "a", known={"x": (1, "0" * 64)}) as stage:
        (stage / "x").write_text("x")
        (stage / "y").write_text("y")
    assert read == ["y"]
    assert manifest.recorded(tmp_path / "a").files["x"] == (1, "0" * 64)
    os.mkfifo(tmp_path / "a/pipe")
    assert "is neither a file nor a folder; remove it" in said(manifest.seal, tmp_path / "a")


def test_a_save_that_another_machine_cannot_see_says_what_is_shared(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"cannot see it; put training\.output_dir on storage"):
        folders.staged(tmp_path / "a", is_rank0=False).__enter__()
    (tmp_path / ".staging-a").mkdir()
    with folders.staged(tmp_path / "a", is_rank0=False) as stage:
        assert stage == tmp_path / ".staging-a"
    assert stage.is_dir(), "the first process puts it in its place"


def test_a_hangup_ends_a_save_as_a_termination_does(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as caught, folders.staged(tmp_path / "a"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught.value.code == 128 + signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way_of_a_result_is_told_with_how_much_it_is(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "a", x="1", y="2", z="3")
    text = said(folders.refuse_another_result, folder, lambda name: name == "z")
    assert "is what another command wrote (x and 1 more files)" in text
    (tmp_path / "notes.txt").write_text("of an older version")
    with folders.result_files(tmp_path, belongs=bool, ours=["notes.txt"]) as stage:
        (stage / "notes.txt").write_text("new")
    assert (tmp_path / "notes.txt").read_text() == "new"


def test_a_full_disk_is_told_with_what_was_written_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 2_500_000, "total": 9_000_000, "used": 6_500_000}))  # fmt: skip
    (tmp_path / ".staging-a/sub").mkdir(parents=True)
    for name in ("x", "sub/y"):
        (tmp_path / ".staging-a" / name).write_bytes(bytes(700_000))
    text = str(folders._space_error(FULL, tmp_path / "a", tmp_path / ".staging-a"))
    assert "1.4 MB were written, 2.5 MB are free with them. Earlier" in text


# --- small files ---------------------------------------------------------------------------------


def test_a_given_file_is_refused_by_the_error_and_the_name_that_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    monkeypatch.setattr(given, "LARGEST", 2 << 20)

    def refused(read: Callable[..., Any] = given.read_given) -> str:
        with pytest.raises(DataError) as caught:
            read(file, "--schema a", DataError)
        assert str(caught.value).startswith("--schema a ")
        return str(caught.value)

    assert "cannot be read: No such file" in refused()
    file.write_bytes(bytes(2 << 20))
    assert len(given.read_given(file, "a")) == 2 << 20
    file.write_bytes(bytes((2 << 20) + 1))
    assert "is larger than 2 MiB" in refused()
    file.write_bytes(b"abc\xff")
    assert "is not UTF-8 (byte 0xff at 3); save it as UTF-8" in refused()
    file.write_text("{")
    assert "is no JSON" in refused(given.read_given_json)
    with pytest.raises(ConfigError, match="is no JSON"):
        given.read_given_json(file, "a")


def test_an_output_is_checked_beside_all_its_inputs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("x")
    inputs = [tmp_path / "none", tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ConfigError, match=f"{tmp_path}/b is read as {tmp_path}/b"):
        check_output(tmp_path / "b", inputs, overwrite=True, is_ours=lambda _: True)


def test_an_output_of_another_content_than_its_label_says_is_made_again(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    first = journal.ResumableOutput(output, "id")
    first.open(dict)
    first._write_label({"sha256": "0" * 64})
    output.write_text('{"n": 7}\n')
    first.close()
    (tmp_path / ".staging-out.jsonl.part.json.12").touch()
    again = journal.ResumableOutput(output, "id")
    assert again.open(dict) == []
    again.journal.append([{"n": 1}])
    again.finish()
    assert list(journal.rows(output)) == [{"n": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_folder_may_be_sealed_again_and_is_walked_in_the_order_of_names(tmp_path: Path) -> None:
    for name in "hgfedcba":
        (tmp_path / f"{name}/sub").mkdir(parents=True)
        (tmp_path / f"{name}/file").touch()
    for _ in range(2):
        manifest.seal(tmp_path)
        assert manifest.verify(tmp_path) == []
    found, inner, odd = manifest.walk(tmp_path)
    assert found == [*(f"{name}/file" for name in "abcdefgh"), "manifest.json"]
    assert (inner[:2], odd) == (["h/sub", "h"], []), "the deepest first"
    assert list(manifest.recorded(tmp_path).files) == found[:-1]


def test_no_temporary_file_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "ab" * size)
    (tmp_path / ".staging-a.abababab").write_text("of another")
    with pytest.raises(FileExistsError):
        files.write_file(tmp_path / "a", "x")
    assert (tmp_path / ".staging-a.abababab").read_text() == "of another"
