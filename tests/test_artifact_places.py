"""Bases, checkpoints, runs, hubs: what a path or a name stands for, and what is said where it stands for nothing."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hints import said
from test_adapter_rules import adapter
from test_artifact_rules import model

from finetune import console
from finetune.artifacts import (
    base_record,
    checkpoint,
    hub,
    plain_files,
    regex,
    remote_files,
    resolve,
)
from finetune.artifacts.base_record import BaseRecord
from finetune.artifacts.hub import Repository
from finetune.artifacts.run_dir import RunDirectory
from finetune.errors import CheckpointError, ConfigError, DataError, ModelError
from finetune.storage.manifest import seal

# --- bases and checkpoints -----------------------------------------------------------------------


def test_the_record_of_a_base_is_written_and_read_and_damage_is_named(tmp_path: Path) -> None:
    BaseRecord("甲/b", None, "f").write(tmp_path, method="lora")
    file = tmp_path / "finetune.json"
    assert json.loads(file.read_text()) == {"format": 1, "method": "lora", "base": {"path": "甲/b", "revision": None, "fingerprint": "f"}}  # fmt: skip
    assert "甲" in file.read_text(encoding="utf-8")
    assert base_record.read_base_record(tmp_path) == BaseRecord("甲/b", None, "f")
    assert base_record.read_base_record(tmp_path / "none") is None
    for base in ({"path": 1, "fingerprint": "f"}, {"path": "a", "fingerprint": None}, {"path": "a"}, {"path": "a", "revision": None, "fingerprint": "f", "more": 1}, [], None):  # fmt: skip
        file.write_text(json.dumps({"base": base}))
        assert "finetune.json is damaged" in said(base_record.read_base_record, tmp_path)
    file.write_text("{}")
    assert "finetune.json is damaged" in said(base_record.read_base_record, tmp_path)
    file.unlink()
    [told] = base_record.check_base(tmp_path, tmp_path / "none")
    assert told == f"{tmp_path} does not say which base it belongs to; only shapes were compared"
    assert base_record.recorded_base(tmp_path) == (None, None)
    BaseRecord("own/base", None, "f" * 64).write(tmp_path, method="lora")
    (tmp_path / "base").mkdir()
    refused = said(base_record.check_base, tmp_path, model(tmp_path / "base"))
    assert f"was trained on own/base (fingerprint {'f' * 16}), but {tmp_path}/base has" in refused
    assert "only `finetune merge --force` takes another" in refused


def saved(run: Path, *folders: str, damaged: str = "") -> Path:
    for name in folders:
        (run / name).mkdir(parents=True)
        (run / name / "x").write_text(name)
        seal(run / name)
        if name == damaged:
            (run / name / "x").write_text("")
    return run


def test_a_run_goes_on_from_what_has_its_states_and_is_opened_at_what_is_newest(
    tmp_path: Path,
) -> None:
    run = saved(tmp_path / "run", "checkpoint-1", "checkpoint-3", "weights-4", damaged="checkpoint-3")  # fmt: skip
    assert checkpoint.newest_good(run) == (run / "weights-4", [])
    found, skipped = checkpoint.newest_good(run, resumable=True)
    assert found == run / "checkpoint-1"
    assert [folder.name for folder, _ in skipped] == ["checkpoint-3"]
    assert checkpoint.newest_good(tmp_path / "none") == (None, [])
    assert [checkpoint.is_resumable(Path(name)) for name in ("checkpoint-1", "weights-1", "mine")] == [True, False, True]  # fmt: skip
    assert [checkpoint.step_of(Path(name)) for name in ("checkpoint-10", "weights-2", "checkpoint-x", "xcheckpoint-1", "checkpoint-1x")] == [10, 2, None, None, None]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LARGEST_JSON", 3)
        (run / "best.json").write_text("    ")
        assert "best.json is larger than" in said(checkpoint.best, run)
    for text in ("{", "[]", '{"metric": 1}'):
        (run / "best.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"best\.json is damaged; delete it"):
            checkpoint.best(run)
    checkpoint.set_best(run, run / "checkpoint-1", "chrf", 41.5)
    assert json.loads((run / "best.json").read_text()) == {"checkpoint": "checkpoint-1", "metric": "chrf", "value": 41.5}  # fmt: skip


def test_folders_of_either_kind_are_kept_for_themselves(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", *(f"{kind}-{step}" for kind in ("checkpoint", "weights") for step in (1, 2, 3)))  # fmt: skip
    done = checkpoint.rotate(run, 2)
    assert {path.name for path in done.removed} == {"checkpoint-1", "weights-1"}
    (run / "weights-3/x").write_text("")
    done = checkpoint.rotate(run, 1)
    assert done.removed == ()
    assert str(done.problem).startswith(f"{run}/weights-3 is damaged (x has 0 bytes")
    assert (run / "checkpoint-2").is_dir(), "nothing goes where one of the newest is damaged"


# --- what a path stands for ----------------------------------------------------------------------


def test_what_was_taken_of_a_run_is_told_with_what_was_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path / "run", "checkpoint-1", "checkpoint-2", "checkpoint-3", damaged="checkpoint-3")  # fmt: skip
    found, notes = resolve.find_source(run)
    assert found == run / "checkpoint-2"
    assert notes == ["passed over checkpoint-3: x has 0 bytes instead of 12", f"took checkpoint-2, the newest good one of {run}"]  # fmt: skip
    checkpoint.set_best(run, run / "checkpoint-1", "loss", 1.0)
    assert resolve.find_source(run) == (run / "checkpoint-1", [f"took checkpoint-1, the best of {run}"])  # fmt: skip
    told: list[str] = []
    monkeypatch.setattr(console, "say", told.append)
    assert resolve.model_in(str(run)) == str(run / "checkpoint-1")
    assert told == [f"took checkpoint-1, the best of {run}"]
    assert resolve.model_in("owner/name") == "owner/name"
    assert "not a directory" in said(resolve.model_in, str(tmp_path / "none"))
    only = saved(tmp_path / "only", "checkpoint-9", damaged="checkpoint-9")
    with pytest.raises(CheckpointError) as caught:
        resolve.find_source(only)
    assert "\n  checkpoint-9: x has 0 bytes" in str(caught.value)
    sealed_model = model(tmp_path / "model")
    seal(sealed_model)
    assert resolve.find_source(sealed_model) == (sealed_model, [])
    assert resolve.model_in(str(sealed_model)) == str(sealed_model)
    (sealed_model / "config.json").write_text("{} ")
    with pytest.raises(CheckpointError, match="model is damaged: config"):
        resolve.find_source(sealed_model)


def test_nothing_is_trained_on_top_of_an_adapter_or_of_a_run_of_them(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    run = saved(tmp_path / "run", "checkpoint-1", "checkpoint-2")
    assert f"{tmp_path}/adapter is an adapter; to train its adapter further" in said(resolve.check_no_adapter, tmp_path / "adapter")  # fmt: skip
    assert f"is a run; name one of its checkpoints, such as {run}/checkpoint-2" in said(resolve.check_no_adapter, run)  # fmt: skip
    (run / "checkpoint-1/adapter_config.json").write_text("{}")
    assert "run is a run; to train its adapter further" in said(resolve.check_no_adapter, run)
    for path in (model(tmp_path / "base"), "owner/name", tmp_path):
        resolve.check_no_adapter(path)
    assert resolve.is_hub_name("a/b.c")
    assert not resolve.is_hub_name("a/b/c")


def test_a_model_of_a_hub_is_fetched_at_its_revision_with_the_files_that_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    commit = tmp_path / ("c" * 40)
    monkeypatch.setattr(hub, "fetch", lambda *given: asked.append(given) or commit)  # type: ignore[func-returns-value]
    assert resolve.local_folder("owner/name", "v1") == commit
    assert resolve.pinned_revision("owner/name", "v1") == "c" * 40
    assert [given[:2] for given in asked] == [("owner/name", "model")] * 2
    assert [given[3] for given in asked] == ["v1", "v1"]
    assert set(asked[0][2]) == {"*.safetensors", "*.json", "*.jinja", "tokenizer.model"}
    assert set(asked[1][2]) == {
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "chat_template.json",
        "config.json", "generation_config.json", "preprocessor_config.json",
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer.model"):
        BaseRecord("owner/base", None, "f").write(tmp_path, method="full")
        (tmp_path / name).touch()
        assert resolve.tokenizer_source(resolve.Weights(str(tmp_path))).path == str(tmp_path)
        (tmp_path / name).unlink()
    bare = resolve.Weights(str(tmp_path / "bare"))
    (tmp_path / "bare").mkdir()
    assert resolve.tokenizer_source(bare) == bare
    assert resolve.tokenizer_source(resolve.Weights("owner/name", "v1")).revision == "v1"


# --- hubs ----------------------------------------------------------------------------------------


def library(name: str, **functions: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(functions)
    return made


def test_each_hub_is_asked_through_its_own_library_for_what_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(kind: str) -> Any:
        return lambda *given, **named: asked.append((kind, *given, named)) or str(tmp_path)  # type: ignore[func-returns-value]

    monkeypatch.setitem(sys.modules, "huggingface_hub", library("h", snapshot_download=download("hf"), hf_hub_download=download("hf file")))  # fmt: skip
    monkeypatch.setitem(sys.modules, "modelscope", library("m", snapshot_download=download("ms"), dataset_snapshot_download=download("ms data")))  # fmt: skip
    monkeypatch.setattr(remote_files, "modelscope_commit", lambda name, content, revision: {"a/b": "c" * 40}.get(name))  # fmt: skip
    api = SimpleNamespace(download_file=download("ms file"))
    monkeypatch.setattr(remote_files, "_modelscope_api", lambda name, content: api)
    hub._fetched.cache_clear()
    monkeypatch.setattr(hub, "fetched", {})
    monkeypatch.setattr(console, "say", lambda _: None)
    for _ in range(2):
        assert hub.fetch("hf://a/b@v1", "model", ["*.json"]) == tmp_path
    hub.fetch("ms://a/b@v1", "model", ["*.json"])
    hub.fetch("ms://c/d@v1", "dataset", ["*"])
    files = {"allow_patterns": ["*.json"]}
    assert asked == [
        ("hf", "a/b", {"repo_type": "model", "revision": "v1", **files}),
        ("ms", "a/b", {"revision": "c" * 40, **files}), ("ms data", "c/d", {"revision": "v1", "allow_patterns": ["*"]}),
    ]  # fmt: skip
    assert hub.fetched == {"huggingface:a/b": "v1", "modelscope:a/b": "v1", "modelscope:c/d": "v1"}
    asked.clear()
    for which in ("huggingface", "modelscope"):
        found = Repository(which, "a/b", "v1")  # type: ignore[arg-type]
        assert hub.fetch_file(found, "data/x", tmp_path / "to") == tmp_path
    assert asked == [
        ("hf file", "a/b", "data/x", {"repo_type": "dataset", "revision": "v1", "local_dir": tmp_path / "to"}),
        ("ms file", "a/b", "dataset", "data/x", {"revision": "v1", "local_dir": tmp_path / "to"}),
    ]  # fmt: skip
    hub._fetched.cache_clear()


def test_what_a_data_set_holds_is_listed_at_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class HfApi:
        def repo_info(self, name: str, **how: Any) -> Any:
            asked.append((name, how))
            return SimpleNamespace(sha="s" * 40)

        def list_repo_tree(self, name: str, **how: Any) -> Any:
            asked.append((name, how))
            return [SimpleNamespace(path="a", size=3), SimpleNamespace(path="folder")]

    class Legacy:
        def list_dataset_files_paginated(self, name: str, **how: Any) -> Any:
            asked.append(("data", name, how))
            return [{"Path": "d/a", "Size": "5", "Type": "blob"}, {"Name": "b", "Size": 6}, {"Path": "d", "Type": "tree", "Size": 0}]  # fmt: skip

        def list_repo_files(self, name: str, content: str, **how: Any) -> Any:
            asked.append((content, name, how))
            return []

    monkeypatch.setitem(sys.modules, "huggingface_hub", library("h", HfApi=HfApi))
    monkeypatch.setattr(remote_files, "_modelscope_api", lambda *_: SimpleNamespace(legacy=Legacy()))  # fmt: skip
    hub.listed.cache_clear()
    monkeypatch.setattr(hub, "fetched", {})
    monkeypatch.setattr(console, "say", lambda _: None)
    for _ in range(2):
        found = hub.listed(Repository("huggingface", "a/b", "v1"))
    assert (found.commit, found.sizes) == ("s" * 40, {"a": 3})
    assert hub.fetched == {"huggingface:a/b": "s" * 40}
    assert asked == [
        ("a/b", {"repo_type": "dataset", "revision": "v1"}), ("a/b", {"repo_type": "dataset", "revision": "s" * 40, "recursive": True}),
    ]  # fmt: skip
    asked.clear()
    found = remote_files.listing("modelscope", "a/b", "dataset", None)
    assert (found.commit, found.sizes) == (None, {"d/a": 5, "b": 6})
    assert {how["revision"] for *_, how in asked} == {"master"}
    assert remote_files._modelscope_entries("a/b", "model", "v1") == {}
    assert asked[-1] == ("model", "a/b", {"revision": "v1", "recursive": True})
    hub.listed.cache_clear()


def test_what_cannot_be_fetched_says_where_it_was_asked_for_and_what_went_wrong() -> None:
    found = Repository("modelscope", "a/b", "v1")
    with pytest.raises(DataError) as caught, hub._explained(found, "dataset"):
        raise OSError("first line\nsecond")
    text = str(caught.value)
    assert text.startswith("a/b at v1: no such folder here, and it cannot be fetched from modelscope (OSError: first line); check the name")  # fmt: skip
    assert "modelscope download --dataset a/b --local_dir FOLDER" in text
    with pytest.raises(ModelError, match=r"a/b: .*\(ValueError: \)"), hub._explained(found._replace(revision=None), "model"):  # fmt: skip
        raise ValueError
    with pytest.raises(DataError, match=r"a/b at v1: ModelScope needs its library"), hub._explained(found, "dataset"):  # fmt: skip
        raise ImportError
    assert hub.commit_of(Path("x") / ("0123456789abcdef" * 2 + "01234567")) is not None
    assert [hub.commit_of(Path(name)) for name in ("a" * 39, "a" * 41, "g" * 40)] == [None] * 3


# --- run directories, odd files ------------------------------------------------------------------


def test_a_folder_that_holds_a_model_is_no_run(tmp_path: Path) -> None:
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ConfigError, match=rf"holds a model \({name}\)"):
            RunDirectory.open(tmp_path)
        (tmp_path / name).unlink()
    saved(tmp_path, "weights-1")
    (tmp_path / "config.yaml").write_text("")
    with RunDirectory.open(tmp_path) as run:
        assert run.write_data({"甲": {"rows": 2}}).read_text(encoding="utf-8") == '{\n "甲": {\n  "rows": 2\n }\n}\n'  # fmt: skip
        assert RunDirectory.user(tmp_path)
    assert RunDirectory.user(tmp_path) is None


@pytest.mark.parametrize(("name", "refused"), [("a.json", True), ("a.jsonl", True), ("a.yaml", True), ("a.txt", False), ("folder.json", False)])  # fmt: skip
def test_a_run_writes_through_no_link(tmp_path: Path, name: str, refused: bool) -> None:
    RunDirectory.open(tmp_path).close()
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("/dev/null")
    if refused:
        assert f"{name} is a link, and a run would write there" in said(RunDirectory.open, tmp_path)
    else:
        RunDirectory.open(tmp_path).close()


def test_who_uses_a_folder_that_cannot_be_read_is_told_by_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(_: Path) -> bool:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("finetune.artifacts.run_dir.is_held", denied)
    text = said(RunDirectory.user, tmp_path)
    assert text.startswith(f"training.output_dir: '{tmp_path}' cannot be used as a run directory (Permission denied)")  # fmt: skip


def test_json_of_strangers_is_an_object_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    assert f"{tmp_path} has no a.json; copy the whole folder again" in said(plain_files.read_json, file)  # fmt: skip
    assert plain_files.read_json_if_there(file) == {}
    for text, reason in (("[1]", "it holds no object"), ("{", "is damaged")):
        file.write_text(text)
        assert reason in said(plain_files.read_json, file)
        assert reason in said(plain_files.read_json_if_there, file)
    file.write_text('{"a": 1}')
    assert plain_files.read_json_if_there(file) == {"a": 1}
    file.rename(tmp_path / "b.json")
    file.symlink_to("gone.json")
    assert "is a link to what is not there" in said(plain_files.read_json_if_there, file)
    file.unlink()
    (tmp_path / "inner").mkdir()
    plain_files.check_folder(tmp_path)
    assert "none cannot be read (No such file" in said(plain_files.check_folder, tmp_path / "none")
    monkeypatch.setattr(plain_files, "LARGEST_JSON", 3)
    assert "is larger than 0 MiB" in said(plain_files.read_json, tmp_path / "b.json")


def test_a_pattern_that_is_none_is_named_by_its_place(tmp_path: Path) -> None:
    assert "x: key: '(' is not a regex" in said(regex.match_names, ["("], ["a"], location="x: key")
    found = regex.match_names(["a+", "b"], ["aa", "b", "ab", "a"], location="x")
    assert found == {"a+": {"aa", "a"}, "b": {"b"}}, "two at once, in a process of their own"


def test_what_is_called_like_a_checkpoint_and_is_a_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").touch()
    assert checkpoint.checkpoints(tmp_path) == []
    (tmp_path / "outside").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/inner").symlink_to(tmp_path / "outside")
    assert "inner is a link that leads out of its folder" in said(plain_files.check_folder, tmp_path / "model")  # fmt: skip


def test_a_revision_that_no_hub_confirms_is_told_as_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "say", lambda _: None)
    monkeypatch.setattr(hub, "fetched", {})
    monkeypatch.setattr(remote_files, "listing", lambda *_: remote_files.Listing(None, {}))
    monkeypatch.setattr(hub, "_DOWNLOADS", dict.fromkeys(hub._DOWNLOADS, lambda *_: tmp_path))
    for cached in (hub.listed, hub._fetched):
        cached.cache_clear()
    for name, revision, told in (("a/a", "v1", "v1"), ("b/b", None, "the newest")):
        hub.listed(Repository("modelscope", name, revision))
        assert hub.fetched[f"modelscope:{name}"] == told
        assert hub.fetch(f"hf://{name}", "model", [], revision) == tmp_path
        assert hub.fetched[f"huggingface:{name}"] == told
    for cached in (hub.listed, hub._fetched):
        cached.cache_clear()


def test_what_a_folder_is_counts_before_what_lies_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = saved(tmp_path / "both", "checkpoint-1")
    (both / "config.json").write_text("{}")
    assert resolve.models_in([str(both)]) == [str(both)]
    os.mkfifo(both / "pipe")
    assert "pipe is not a plain file" in said(resolve.check_openable, both)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    assert resolve.is_hub_id("owner/name")
    (tmp_path / "owner/name").symlink_to("nowhere")
    assert not resolve.is_hub_id("owner/name"), "something of that name lies here"
    asked: list[str] = []
    monkeypatch.setattr(remote_files, "modelscope_commit", lambda *_: "c" * 40)
    monkeypatch.setattr(remote_files, "_modelscope_entries", lambda name, content, revision: asked.append(revision) or {})  # type: ignore[func-returns-value]  # fmt: skip
    assert remote_files.listing("modelscope", "a/b", "dataset", "v1").commit == "c" * 40
    assert asked == ["c" * 40], "what is listed is of the commit that is told"
    (tmp_path / "run/.lock").mkdir(parents=True)
    assert ".lock is a folder" in said(RunDirectory.open, tmp_path / "run")
