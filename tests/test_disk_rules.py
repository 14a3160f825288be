"""Caches, outputs, journals and failing disks, rule by rule."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hints import said
from test_storage_rules import FULL, sealed

from finetune import console
from finetune.errors import DataError, SpaceError
from finetune.storage import cache, disk, files, journal, outputs
from finetune.storage.seen import SeenFiles, state_of

# --- caches, outputs, disks ----------------------------------------------------------------------


def test_a_damaged_entry_is_not_known_and_is_made_again_once(tmp_path: Path) -> None:
    made = []

    def build(folder: Path) -> dict[str, Any]:
        made.append(1)
        (folder / "x").write_text("whole")
        return {"n": len(made)}

    assert cache.known(tmp_path, "k") is None
    (tmp_path / ".staging-other").mkdir()
    for _ in range(2):
        assert cache.open_or_build(tmp_path, "k", build).facts == {"n": 1}
    assert not (tmp_path / ".staging-other").exists()
    entry = cache.known(tmp_path, "k")
    assert entry is not None
    assert entry.facts == {"n": 1}
    (tmp_path / "k/x").write_text("WHOLE")
    assert cache.known(tmp_path, "k") is None
    cache._build_missing(sealed(tmp_path / "fine"), build)  # another process was quicker
    assert cache.open_or_build(tmp_path, "k", build).facts == {"n": 2}


@pytest.mark.parametrize(("mode", "taken"), [(0o700, True), (0o755, True), (0o720, False), (0o702, False)])  # fmt: skip
def test_a_private_folder_is_one_that_nobody_else_may_write(
    tmp_path: Path, mode: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"glm4-finetune-{os.getuid()}"
    folder.mkdir()
    folder.chmod(mode)
    if taken:
        assert cache.private_folder("why") == folder
    else:
        assert "others may write to" in said(cache.private_folder, "why")


def test_a_file_that_changed_came_or_went_while_it_was_read_is_named(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("1", "2", "3"))
    one.write_text("x")
    two.write_text("x")
    seen = SeenFiles.of([one, two])
    seen.check([one, two], "read")
    three.write_text("x")
    two.unlink()
    one.write_text("y")
    text = said(seen.check, [one, two, three], "they were read")
    assert f"{one} (had 1 bytes, now 1), {two} (gone), {three} (new)" in text
    state = state_of(one)
    found = one.stat()
    os.utime(one, ns=(found.st_atime_ns, found.st_mtime_ns))  # sets its times as they were
    one.chmod(0o600)
    assert state_of(one) != state
    assert state_of(two) is None


def test_an_output_is_never_written_into_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    mine = tmp_path / "mine"
    mine.write_text("x")

    def check(output: Path, *inputs: Path, overwrite: bool = False, ours: bool = False) -> None:
        outputs.check_output(output, inputs, overwrite=overwrite, is_ours=lambda _: ours)

    assert "lies inside" in said(check, tmp_path / "link/sub/out", tmp_path / "data")
    assert "did not write it" in said(check, mine)
    check(mine, ours=True)
    check(mine, overwrite=True)
    mine.write_text("")
    check(mine)
    inside = tmp_path / "data/sub/cache"
    for source in (str(tmp_path / "data"), f"{tmp_path}/data/**/*.jsonl"):
        assert "lies inside" in said(outputs.check_not_read, inside, [source], "data.cache_dir")
    outputs.check_not_read(inside, [f"{tmp_path}/data/*.jsonl"], "data.cache_dir")
    assert "lies inside" in said(outputs.check_not_read, inside, [f"{tmp_path}/link"], "data.cache_dir")  # fmt: skip
    marked = tmp_path / "page.html"
    outputs.write_marked(marked, "x" * 4000 + "MARK", mark="MARK")
    assert outputs.write_marked(marked, "MARK again", mark="MARK") == marked
    assert "was not written by this program" in said(outputs.write_marked, marked, "x", mark="NO")


def caused(error: BaseException, *, by: str) -> BaseException:
    outer = RuntimeError("outer")
    setattr(outer, by, error)
    return outer


def test_a_full_or_failing_disk_is_known_by_number_words_and_cause() -> None:
    for error in (
        FULL, OSError(errno.EDQUOT, ""), OSError(errno.EFBIG, ""), RuntimeError("os error 28"),
        RuntimeError("No space left"), caused(FULL, by="__cause__"), caused(FULL, by="__context__"),
    ):  # fmt: skip
        assert disk.is_out_of_space(error), error
        assert disk.is_disk_error(error), error
    for number in disk.FAILING:
        assert disk.is_disk_error(OSError(number, "")), number
        assert not disk.is_out_of_space(OSError(number, ""))
        assert disk.is_disk_error(RuntimeError(f"x (os error {number})"))
    assert {errno.EIO, errno.EROFS, errno.ESTALE, errno.EMFILE, errno.EKEYEXPIRED} < set(
        disk.FAILING
    )
    for other in (None, OSError(errno.ENOENT, "No space left"), RuntimeError("os error 2")):
        assert not disk.is_disk_error(other), other


def test_what_is_worth_less_than_the_run_costs_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(console, "warn", told.append)
    writing = disk.BestEffort("a.json", "later")
    for _ in range(2):
        with writing():
            raise FULL
        assert writing.failed
    with writing():
        pass
    assert not writing.failed
    assert len(told) == 1
    assert told[0].startswith("no room to write a.json")
    with disk.BestEffort("b", "later")():
        raise OSError(errno.EIO, "x")
    assert told[1].startswith("unable to write b")
    with pytest.raises(ZeroDivisionError), writing():
        raise ZeroDivisionError


def test_a_second_name_is_given_refused_or_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("x")
    assert files.second_name(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        files.second_name(tmp_path / "gone", tmp_path / "c")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "")))
    assert not files.second_name(tmp_path / "a", tmp_path / "b")


def test_batches_of_a_window_are_those_behind_the_rows_that_are_there(tmp_path: Path) -> None:
    growing = journal.Journal(tmp_path / "a", window=2)
    growing.open(dict)
    growing.note(0, ["x"])
    growing.note(1, ["y"])
    again = journal.Journal(tmp_path / "a", window=2)
    again.open(dict)
    assert again.batches() == {0: ["x"], 1: ["y"]}
    again.append([{"n": 1}, {"n": 2}])
    assert not (tmp_path / "a.batches").exists()
    assert again.batches() == {}
    again.note(0, ["z"])
    (tmp_path / "a").write_text('{"n": 1}\n')  # half a window
    late = journal.Journal(tmp_path / "a", window=2)
    assert late.open(dict) == []
    assert late.batches() == {}


def test_a_disk_error_of_a_journal_is_told_and_others_go_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, kind in ((FULL, SpaceError), (OSError(errno.ENOENT, ""), FileNotFoundError)):
        monkeypatch.setattr(journal, "append", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(kind):
            journal.Journal(tmp_path / "a").append([{"n": 1}])


def test_a_cache_that_cannot_be_written_is_an_error_of_data(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError):
        cache.open_or_build(tmp_path / "file", "k", lambda _: {})


def test_an_output_whose_end_was_cut_short_is_there_already(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    first = journal.ResumableOutput(output, "id")
    first.open(dict)
    first.journal.append([{"n": 1}])
    before = first._label.read_text()
    first.finish()
    files.write_file(
        first._label, before.replace("}", f', "sha256": "{files.file_digest(output)}"}}')
    )
    again = journal.ResumableOutput(output, "id")
    assert again.open(dict) == [{"n": 1}]
    again.finish()
    assert output.read_text() == '{"n": 1}\n'


def test_the_label_of_an_output_tells_its_hash_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = journal.ResumableOutput(tmp_path / "out.jsonl", "id")
    growing.open(dict)
    growing.journal.append([{"n": 1}])
    labels: list[str] = []
    finish = growing.journal.finish
    monkeypatch.setattr(
        growing.journal,
        "finish",
        lambda to: (labels.append(growing._label.read_text()), finish(to)),
    )
    growing.finish()
    assert files.file_digest(tmp_path / "out.jsonl") in labels[0]


def test_a_link_above_the_folder_that_is_written_into_is_nobodys_business(tmp_path: Path) -> None:
    (tmp_path / "real/out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real/out/sub").symlink_to("..")
    folder = tmp_path / "link/out"
    files.refuse_odd(folder / "a", inside=folder)
    assert "is a link to" in said(files.refuse_odd, folder / "sub/a", inside=folder)


# --- words of a disk -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_full", "is_failing"),
    [
        *((text, True, True) for text in (
            "I/O error: x (os error 28)", "(os error 122)", "(os error 27)", "NO SPACE LEFT on device", "File too large", "Disk quota exceeded",
            "PytorchStreamWriter failed writing file", "unexpected pos 64 vs 0", "basic_ios::clear: iostream error")),
        ("(os error 5)", False, True), ("(os error 30)", False, True), ("Input/output error", False, True), ("(os error 13)", False, True),
        ("(os error 280)", False, False), ("(os error 2)", False, False), ("another", False, False),
    ],
)  # fmt: skip
def test_a_disk_is_known_by_the_words_of_every_library(
    text: str, is_full: bool, is_failing: bool
) -> None:
    error = RuntimeError(text)
    assert (disk.is_out_of_space(error), disk.is_disk_error(error)) == (is_full, is_failing)


@pytest.mark.parametrize(
    "name",
    ["EIO", "EROFS", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENOTCONN", "ENXIO", "ENODEV", "EHOSTDOWN", "EHOSTUNREACH", "EBUSY", "ENFILE", "EMFILE", "EACCES", "EPERM", "EKEYEXPIRED"],
)  # fmt: skip
def test_every_way_in_which_disks_and_mounts_fail_costs_one_output(name: str) -> None:
    assert disk.is_disk_error(OSError(getattr(errno, name), "x"))
    assert not disk.is_out_of_space(OSError(getattr(errno, name), "x"))


def test_errors_that_cause_each_other_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = RuntimeError("a"), RuntimeError("b")
    one.__cause__, other.__cause__ = other, one
    assert not disk.is_disk_error(one)
    one.__context__ = FULL
    assert not disk.is_disk_error(one), "what it was raised from hides what it was raised in"
    told: list[str] = []
    monkeypatch.setattr(console, "warn", told.append)
    with disk.BestEffort("a.json", "it comes later")():
        raise FULL
    assert told == [f"no room to write a.json ({FULL}); it comes later"]


def test_a_cache_without_room_is_an_error_of_data_that_names_its_option(tmp_path: Path) -> None:
    def full(_: Path) -> dict[str, Any]:
        raise FULL

    with pytest.raises(DataError, match=r"no space left for tokenised data \(.*No space") as caught:
        cache.open_or_build(tmp_path, "key", full)
    assert "set data.cache_dir or FINETUNE_CACHE" in str(caught.value)
    assert isinstance(caught.value.__cause__, SpaceError)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_a_key_is_of_what_is_said_and_not_of_its_order(tmp_path: Path) -> None:
    key = cache.key_of({"a": 1, "b": {"c": "你", "d": [1, 2]}})
    assert key == cache.key_of({"b": {"d": [1, 2], "c": "你"}, "a": 1})
    others = [{"a": 2}, {"a": "1"}, {"b": 1}, {"a": 1, "b": {"c": "你", "d": [2, 1]}}]
    assert len({key, *map(cache.key_of, others)}) == 5
    assert len(key) == 64


def test_a_home_that_is_no_folder_has_no_cache_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(console, "warn_once", told.append)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("FINETUNE_CACHE", raising=False)
    (tmp_path / "home").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    private = tmp_path / f"glm4-finetune-{os.getuid()}"
    assert cache.default_root() == private
    assert told[0].startswith(f"{tmp_path}/home/.cache/glm4-finetune cannot be written: the cache is kept in {private}")  # fmt: skip
    monkeypatch.setattr(cache.os, "getuid", lambda: 12345)
    (tmp_path / "glm4-finetune-12345").mkdir(mode=0o700)
    assert "others may write to" in said(cache.default_root), "it is another user's"
    (tmp_path / "glm4-finetune-12345").rmdir()
    (tmp_path / "glm4-finetune-12345").symlink_to(private)
    assert "others may write to" in said(cache.default_root)
