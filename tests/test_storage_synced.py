"""What is on the disk before what, and what is told before anything is moved."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from test_storage_rules import FULL, result, sealed

from finetune.errors import ConfigError, OutputInUseError
from finetune.storage import folders, hashed, journal, lock, manifest


def test_what_is_synced_has_all_of_its_bytes(tmp_path: Path, synced: list[str]) -> None:
    sizes: dict[str, int] = {}
    noted = os.fsync

    def measured(descriptor: int) -> None:
        sizes[Path(f"/proc/self/fd/{descriptor}").readlink().name] = os.fstat(descriptor).st_size
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
