"""What is on the disk before what, and what is told before anything is moved."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
from test_storage import no_locks
from test_storage_rules import FULL, result, sealed

from finetune.errors import CheckpointError, ConfigError, OutputInUseError
from finetune.storage import files, folders, hashed, journal, lock, manifest


def test_what_is_synced_has_all_of_its_bytes(tmp_path: Path, synced: list[str]) -> None:
    sizes: dict[str, int] = {}
    noted = os.fsync

    def measured(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        sizes.setdefault(name, os.fstat(descriptor).st_size)  # what it has when it is synced first
        noted(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", measured)
        hashed.hashed_text(tmp_path / "a", "12345")
        manifest.seal(tmp_path)
        (tmp_path / "half.jsonl").write_text('{"n": 1}\n{"n"')
        assert journal.recover(tmp_path / "half.jsonl", lambda row: row["n"]) == [1]
    assert sizes["a"] == 5
    assert sizes["manifest.json"] == (tmp_path / "manifest.json").stat().st_size > 0
    assert sizes["half.jsonl"] == 9, "what was cut off stays off"
    assert synced


@pytest.mark.parametrize("links", [True, False])
def test_every_file_of_a_changed_folder_is_on_the_disk(
    tmp_path: Path, synced: list[str], links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sealed(tmp_path / "a", x="one", y="two")
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "")))
    synced.clear()
    folders.amend(folder, "x", "three")
    before = synced[: synced.index("rename")]
    assert sorted(before) == sorted(["x", *["y"] * (not links), "manifest.json", ".staging-a"])
    assert synced[-3:] == ["rename", "rename", tmp_path.name] or synced.count(tmp_path.name) == 2


def test_a_deletion_and_a_tidying_last_and_so_does_an_outputs_name(
    tmp_path: Path, synced: list[str]
) -> None:
    folder = sealed(tmp_path / "a")
    synced.clear()
    folders.delete(folder)
    assert synced == ["rename", tmp_path.name]
    (tmp_path / ".trash-b").mkdir()
    (tmp_path / ".trash-b/x").touch()
    folders.delete(sealed(tmp_path / "b"))
    synced.clear()
    folders.clean(tmp_path)
    assert synced == [tmp_path.name]
    output = journal.ResumableOutput(tmp_path / "out.jsonl", "id")
    output.open(dict)
    output.journal.append([{"n": 1}])
    synced.clear()
    output.finish()
    assert synced[-2:] == ["rename", tmp_path.name]


def test_bytes_that_change_after_they_were_written_change_no_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        def __init__(self) -> None:
            self.seen = b""

        def update(self, piece: memoryview) -> None:
            time.sleep(0.01)
            self.seen += bytes(piece)

        def hexdigest(self) -> str:
            return self.seen.decode()

    monkeypatch.setattr(hashed.hashlib, "sha256", Slow)
    monkeypatch.setattr(hashed, "_BESIDE", 2)
    data = bytearray(b"good")
    with hashed.hashed_file(tmp_path / "a") as file:
        file.write(data)
        data[:] = b"evil"
    assert file.digest() == "good"


def test_what_stands_in_the_way_of_a_result_is_told_before_anything_is_moved(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").symlink_to("elsewhere")
    with pytest.raises(ConfigError, match="a is a link"):
        result(tmp_path, overwrite=True, a="1")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "a").unlink()
    result(tmp_path, a="1")
    (tmp_path / folders.READY).mkdir()
    held = lock.try_lock(tmp_path)
    assert held is not None
    with held, pytest.raises(OutputInUseError):
        folders.finish_result(tmp_path)
    assert folders.finish_result(tmp_path) == []
    assert not (tmp_path / folders.READY).exists()


def test_what_a_checkpoint_took_is_told_of_another_than_the_one_that_is_replaced(
    tmp_path: Path,
) -> None:
    sealed(tmp_path / "a", x="x" * 3_000_000)
    sealed(tmp_path / ".staging-a", x="x" * 100)
    text = str(folders._space_error(FULL, tmp_path / "a", tmp_path / ".staging-a"))
    assert "0.0 MB were written" in text
    assert "the checkpoint before" not in text


# --- what happens once in a thousand times -------------------------------------------------------


def test_a_temporary_file_that_a_sweep_took_away_is_made_again_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = files.try_lock, []

    def swept(path: Path, *, make: bool) -> Any:
        tries.append(path)
        if len(tries) == 1:
            path.unlink()
            return None
        return real(path, make=make)

    monkeypatch.setattr(files, "try_lock", swept)
    files.write_file(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"
    assert len(set(tries)) == 2


def test_a_stage_that_was_swept_meanwhile_is_made_again_and_one_that_cannot_be_emptied_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = folders.try_lock, []

    def swept(path: Path, *, make: bool) -> Any:
        tries.append(path)
        if len(tries) == 1:
            path.rmdir()
            return None
        return real(path, make=make)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "try_lock", swept)
        folders.open_stage(tmp_path / "a").release()
    assert len(tries) == 2
    (tmp_path / ".staging-a/x").touch()
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_remove", lambda _: (_ for _ in ()).throw(PermissionError))
        with pytest.raises(PermissionError):
            folders.open_stage(tmp_path / "a")
    assert not lock.is_held(tmp_path / ".staging-a")
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match="exists already; choose another place"):
        folders.commit(tmp_path / ".staging-a", tmp_path / "a")


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_lock_that_fails_otherwise_fails_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(*_: object) -> None:
        raise OSError(number, "of the disk")

    assert not lock.is_held(tmp_path / "none")
    (tmp_path / "a").touch()
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    monkeypatch.setattr(lock.fcntl, "flock", failing)
    for ask in (lock.try_lock, lock.is_held):
        with pytest.raises(OSError, match="of the disk"):
            ask(tmp_path / "a")
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
    monkeypatch.setattr(lock.os, "open", failing)
    with pytest.raises(OSError, match="of the disk"):
        lock.try_lock(tmp_path / "a")


def test_an_owner_file_that_another_took_away_is_no_lock_and_one_that_cannot_be_read_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_PAUSE_SECONDS", 0.0)
    owner, taken = tmp_path / ".a.owner", []

    def pause(_: float) -> None:
        if not taken:  # another one that met the same dead owner
            taken.append(owner.unlink())

    monkeypatch.setattr(lock.time, "sleep", pause)
    with monkeypatch.context() as patch:
        no_locks(patch, errno.ENOLCK)
        held = lock.try_lock(tmp_path / "a")
        assert held is not None
        assert owner.exists()
        assert lock.is_held(tmp_path / "a")
        held.release()
        owner.write_bytes(b"\xff")
        assert lock.is_held(tmp_path / "a")
        assert lock.try_lock(tmp_path / "a") is None


def test_a_folder_that_cannot_be_read_is_no_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sealed(tmp_path / "a", x="one")

    def failing(*given: object, **_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "walk", failing)
        assert manifest.verify(folder) == [f"{folder} cannot be read (Input/output error)"]
        assert not manifest.is_untouched(folder)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_hash", failing)
        (folder / "y").touch()
        assert manifest.verify(folder) == ["y is not in the manifest", f"{folder} cannot be read (Input/output error)"]  # fmt: skip
    (folder / "manifest.json").unlink()
    assert not manifest.is_untouched(folder)


def test_a_file_is_hashed_for_every_folder_that_is_watched_and_for_no_other(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    with hashed.hashing(tmp_path) as all_, hashed.hashing(tmp_path / "a") as of_a, hashed.hashing(tmp_path / "b") as of_b:  # fmt: skip
        hashed.hashed_text(tmp_path / "a/x", "1")
    assert (list(all_), list(of_a), of_b) == (["a/x"], ["x"], {})


def test_a_result_whose_files_are_gone_is_finished_and_told(tmp_path: Path) -> None:
    result(tmp_path, a="1")
    (tmp_path / folders.READY).mkdir()
    text = manifest._manifest_text(manifest.Manifest({"sub/x": (1, "0" * 64)}, {}))
    (tmp_path / folders.READY / "manifest.json").write_text(text)
    assert folders.finish_result(tmp_path) == ["sub/x is missing"]
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"], "the old file went"
