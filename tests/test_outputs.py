"""Outputs replace nothing of others, appear together, and a disk that fails costs one of them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from disk_faults import ended_at

from finetune import console
from finetune.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    OutputInUseError,
    SpaceError,
)
from finetune.evaluation.folder import belongs, check_place
from finetune.evaluation.options import Options
from finetune.storage import cache, disk, folders, manifest
from finetune.storage.outputs import check_not_read, check_output, write_marked
from finetune.storage.seen import SeenFiles, state_of


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what may be written over --------------------------------------------------------------------


def test_an_input_is_never_written_over_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("rows")
    os.link(tmp_path / "in.jsonl", tmp_path / "same.jsonl")
    for output in (tmp_path / "in.jsonl", tmp_path / "same.jsonl", tmp_path / "x/../in.jsonl"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="is read as"):
            check_output(output, [tmp_path / "in.jsonl"], overwrite=True, is_ours=lambda _: True)
    with pytest.raises(ConfigError, match="lies inside"):
        check_output(tmp_path / "new", [tmp_path], overwrite=True, is_ours=lambda _: True)


@pytest.mark.parametrize("kind", ["a file", "a link to nowhere", "a link to itself", "a pipe"])
def test_what_stands_where_a_folder_of_the_path_should_be_is_named(
    tmp_path: Path, kind: str
) -> None:
    blocking = tmp_path / "out"
    if kind == "a file":
        blocking.write_text("mine")
    elif kind == "a pipe":
        os.mkfifo(blocking)
    else:
        blocking.symlink_to("out" if kind == "a link to itself" else "nowhere")
    for path in (blocking / "train.jsonl", blocking / "below/train.jsonl"):
        with pytest.raises(ConfigError, match=f"{blocking} is a (file|link|pipe) and no folder"):
            check_output(path, (), overwrite=True, is_ours=lambda _: True)
    (tmp_path / "alias").symlink_to(tmp_path)
    check_output(tmp_path / "alias/new", (), overwrite=False, is_ours=lambda _: False)


def test_a_page_is_written_over_one_of_its_kind_and_over_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for number in range(2):
        assert write_marked(page, f"<meta ours {number}>", mark="ours") == page
    assert page.read_text() == "<meta ours 1>"
    page.write_text("mine")
    with pytest.raises(ConfigError, match="was not written by this program"):
        write_marked(page, "<meta ours>", mark="ours")
    assert page.read_text() == "mine"


def test_a_file_of_others_is_replaced_when_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="--overwrite"):
        check_output(tmp_path / "out", [], overwrite=False, is_ours=lambda _: False)
    check_output(tmp_path / "out", [], overwrite=True, is_ours=lambda _: False)
    check_output(tmp_path / "out", [], overwrite=False, is_ours=lambda _: True)
    check_output(tmp_path / "empty", [], overwrite=False, is_ours=lambda _: False)


@pytest.mark.parametrize(
    ("source", "is_read"),
    [("data", True), ("data/**/*.jsonl", True), ("**/*.jsonl", True), ("data/*.jsonl", False),
     ("data/train.jsonl", False), ("other", False)],
)  # fmt: skip
def test_an_output_folder_inside_the_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, is_read: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data", "other"):
        Path(name).mkdir()
    if is_read:
        with pytest.raises(ConfigError, match="lies inside"):
            check_not_read(Path("data/run"), [source], "training.output_dir")
    else:
        check_not_read(Path("data/run"), [source], "training.output_dir")


def appended(file: Path) -> None:
    file.write_text(file.read_text() + "more")


def same_size_and_time(file: Path) -> None:
    before = file.stat()
    file.write_text(file.read_text().upper())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced_by_a_copy(file: Path) -> None:
    other = file.with_name("other")
    other.write_text(file.read_text().upper())
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)


CHANGES = [appended, same_size_and_time, replaced_by_a_copy, Path.unlink]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_source_is_named(tmp_path: Path, change: Callable[[Path], Any]) -> None:
    (tmp_path / "a").write_text("rows"), (tmp_path / "b").write_text("rows")
    seen, state = SeenFiles.of([tmp_path / "a", tmp_path / "b"]), state_of(tmp_path / "a")
    seen.check(seen.states, "nothing went on")
    change(tmp_path / "a")
    with pytest.raises(DataError, match=r"while it went on: \S+/a \([^/]*$"):
        seen.check(seen.states, "it went on")
    assert state_of(tmp_path / "a") != state
    (tmp_path / "new").touch()
    with pytest.raises(DataError, match=r"new \(new\)"):
        seen.check([*seen.states, tmp_path / "new"], "it went on")


# --- a full or failing disk ----------------------------------------------------------------------

DISK = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE]


@pytest.mark.parametrize("number", DISK, ids=lambda number: errno.errorcode[number])
def test_what_a_disk_costs_is_said_once_and_the_run_goes_on(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    writing = disk.BestEffort("metrics", "they come later")
    for _ in range(2):
        with writing():
            raise OSError(number, os.strerror(number))
        assert writing.failed
    with writing():
        pass
    assert not writing.failed
    assert capsys.readouterr().err.count("write metrics") == 1
    with pytest.raises(ValueError, match="ours"), writing():
        raise ValueError("ours")


@pytest.mark.parametrize("number", DISK, ids=lambda number: errno.errorcode[number])
def test_a_save_that_a_disk_fails_is_a_space_error_and_leaves_nothing(
    tmp_path: Path, number: int
) -> None:
    def fail() -> None:
        with folders.staged(tmp_path / "out") as stage:
            (stage / "a").write_text("x")
            raise OSError(number, os.strerror(number))

    with pytest.raises(SpaceError):
        fail()
    assert names(tmp_path) == set()


# --- several files of one result -----------------------------------------------------------------


def put(folder: Path, texts: dict[str, str], **options: Any) -> None:
    with folders.result_files(folder, belongs=belongs, **options) as stage:
        for name, text in texts.items():
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_text(text)


OLD = {"scores.json": "old", "predictions/a": "old a", "predictions/b": "old b"}
NEW = {"scores.json": "new", "predictions/a": "new a", "predictions/c": "new c"}


def contents(folder: Path) -> dict[str, str]:
    there, _, _ = manifest.walk(folder)
    return {name: (folder / name).read_text() for name in there if name != "manifest.json"}


def test_killed_anywhere_all_files_of_a_result_are_old_or_all_are_new(tmp_path: Path) -> None:
    outcomes = set()
    for last in range(200):
        folder = tmp_path / str(last)
        put(folder, OLD)
        (folder / "notes").write_text("mine")
        code = ended_at(last, partial(put, folder, NEW))
        assert folders.finish_result(folder) == []
        folders.sweep(folder)
        found = contents(folder)
        assert found.pop("notes") == "mine"
        assert found in (OLD, NEW)
        outcomes.add(found["scores.json"])
        if code == 0:
            break
    assert outcomes == {"old", "new"}


def test_a_result_replaces_its_own_files_and_no_others(tmp_path: Path) -> None:
    tmp_path.joinpath("scores.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"scores.json is there, and this program did not"):
        put(tmp_path, NEW)
    assert contents(tmp_path) == {"scores.json": "mine"}
    put(tmp_path, OLD, overwrite=True)
    put(tmp_path, NEW)
    assert contents(tmp_path) == NEW
    tmp_path.joinpath("predictions/a").write_text("edited")
    assert folders.finish_result(tmp_path) == ["predictions/a has 6 bytes instead of 5"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["adapter_model.safetensors", "adapter_config.json"],
        ["model.safetensors"],
        ["scores.json", "checkpoint/x"],
    ],
)
def test_what_another_command_sealed_is_no_earlier_result(
    tmp_path: Path, names: list[str], overwrite: bool
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hours of work")
    manifest.seal(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="is what another command wrote"):
        put(tmp_path, NEW, overwrite=overwrite)
    assert contents(tmp_path) == before
    assert manifest.verify(tmp_path) == []


@pytest.mark.parametrize("what", ["config.json", "adapter_config.json", "config.yaml"])
def test_an_evaluation_is_written_into_no_model_and_no_run(tmp_path: Path, what: str) -> None:
    (tmp_path / what).write_text("{}")
    with pytest.raises(ConfigError, match="is a model or a run"):
        check_place(tmp_path, [], Options(overwrite=True))


@pytest.mark.parametrize(
    ("source", "output", "is_refused"),
    [
        ("data", "data/scores", True),
        ("data", "data", True),
        ("data/*.jsonl", "data", True),
        ("data/*.jsonl", "data/scores", False),
        ("data/**/*.jsonl", "data/scores", True),
        ("data/rows.jsonl", "data", False),
        ("data/train-*", "data", False),
    ],
)
def test_an_evaluation_is_not_written_where_the_next_one_reads_it(
    tmp_path: Path, source: str, output: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    if is_refused:
        with pytest.raises(ConfigError, match="read as"):
            check_place(Path(output), [], Options(), [source])
    else:
        check_place(Path(output), [], Options(), [source])


def ready(folder: Path, name: str) -> None:
    """What a stranger may put into a folder: a result that is about to take its place."""
    (folder / folders.READY).mkdir()
    entry = {"size": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    text = json.dumps({"format": 1, "files": {name: entry}}, indent=1) + "\n"
    (folder / folders.READY / "manifest.json").write_text(text)
    (folder / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    "name",
    [
        "../mine",
        "/{parent}/mine",
        "a/../../mine",
        "./mine",
        "",
        "a//b",
        "a\0b",
        "x" * 256,
        "a/" + "模" * 86,
        "a\ud800b",
        "manifest.json",
    ],
)
def test_a_manifest_of_a_stranger_moves_and_removes_nothing_outside_its_folder(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (tmp_path / "mine").write_text("mine")
    (folder / "mine").write_text("evil")
    ready(folder, name.format(parent=tmp_path))
    with pytest.raises(CheckpointError, match="missing or damaged"):
        folders.finish_result(folder)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("where", ["the place", "what is moved", "what is removed"])
def test_a_link_in_the_folder_of_a_stranger_is_not_written_or_read_through(
    tmp_path: Path, where: str
) -> None:
    folder, outside = tmp_path / "theirs", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "mine").write_text("mine")
    ready(folder, "predictions/mine")
    if where == "the place":
        (folder / folders.READY / "predictions").mkdir()
        (folder / folders.READY / "predictions/mine").write_text("evil")
        (folder / "predictions").symlink_to(outside)
    elif where == "what is moved":
        (folder / folders.READY / "predictions").symlink_to(outside)
    else:
        seal_of_none = {"format": 1, "files": {}}
        (folder / folders.READY / "manifest.json").write_text(
            json.dumps(seal_of_none, indent=1) + "\n"
        )
        (folder / "predictions").symlink_to(outside)
    with pytest.raises(ConfigError, match="is a link"):
        folders.finish_result(folder)
    assert (outside / "mine").read_text() == "mine"


def test_what_a_killed_merge_left_is_swept_and_what_others_keep_there_stays(tmp_path: Path) -> None:
    for name, file in (("left", "model.safetensors"), ("other", "notes.doc")):
        (tmp_path / f".staging-{name}").mkdir()
        (tmp_path / f".staging-{name}" / file).touch()
    with folders.staged(tmp_path / "live") as stage:
        (stage / "model.safetensors").touch()
        [line] = folders.sweep(tmp_path, names=["*.safetensors"])
    assert ".staging-left" in line
    assert names(tmp_path) == {".staging-other", "live"}


def test_two_results_are_not_written_to_one_folder_at_once(tmp_path: Path) -> None:
    with folders.result_files(tmp_path, belongs=belongs), pytest.raises(OutputInUseError):
        put(tmp_path, NEW)


# --- the cache's place ---------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without a home and without an entry in the user database."""
    import pwd
    import tempfile

    def unknown(_: int) -> Any:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.delenv("FINETUNE_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(console, "_warned", set())
    return tmp_path


def test_without_a_home_the_cache_is_a_private_folder(
    nobody: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = cache.default_root()
    assert root.parent == nobody
    assert root.stat().st_mode & 0o777 == 0o700
    assert "FINETUNE_CACHE" in capsys.readouterr().err
    root.chmod(0o777)
    with pytest.raises(DataError, match="FINETUNE_CACHE"):
        cache.default_root()


def test_the_facts_of_a_manifest_are_checked_like_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    manifest.seal(tmp_path, facts={"rows": 3})
    assert manifest.recorded(tmp_path).facts == {"rows": 3}
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"facts": {"rows": 4}}))
    assert manifest.verify(tmp_path) == ["manifest.json is damaged, or of an older version"]
