"""What weights, checkpoints, runs and bases on disk mean, rule by rule; no model is loaded."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hints import said

from finetune import console
from finetune.artifacts import (
    base_record,
    checkpoint,
    hub,
    plain_files,
    remote_files,
    resolve,
    weights,
)
from finetune.artifacts.base_record import BaseRecord
from finetune.artifacts.experts import of_prediction, separate_names
from finetune.artifacts.model_config import read_model_config
from finetune.artifacts.run_dir import RunDirectory
from finetune.errors import ConfigError, DataError, ModelError
from finetune.storage.manifest import seal

Tensors = dict[str, tuple[int, ...]]


def write_tensors(file: Path, tensors: Tensors, dtype: str = "F32", content: int = 0) -> Path:
    """A safetensors file of equal bytes."""
    header, end = {}, 0
    for name, shape in tensors.items():
        size = math.prod(shape) * weights.ITEM_SIZE[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes([content]) * end)
    return file


# --- weights -------------------------------------------------------------------------------------


def test_rows_of_a_tensor_are_where_they_lie_in_the_file(tmp_path: Path) -> None:
    shard = weights.read_shard(write_tensors(tmp_path / "m", {"a": (1, 4), "b": (3, 2)}))
    (a, b), data = shard.tensors, len(shard.header)
    assert (a.start, a.end, b.start, b.end) == (data, data + 16, data + 16, data + 40)
    part = b.rows(1, 3)
    assert (part.shape, part.start, part.end, part.size) == ((2, 2), b.start + 8, b.end, 16)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_file_with_a_byte_more_or_less_is_not_whole(tmp_path: Path, by: int) -> None:
    file = write_tensors(tmp_path / "m", {"a": (4,)})
    whole = file.read_bytes()
    file.write_bytes(whole[:by] if by < 0 else whole + b"x")
    with pytest.raises(ModelError, match="instead of"):
        weights.read_shard(file)


def model(folder: Path, dtype: str = "F32", content: int = 0, **config: Any) -> Path:
    write_tensors(folder / "model.safetensors", {"a.weight": (64, 8)}, dtype, content)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_fingerprint_is_of_config_and_weights_and_not_of_what_tools_write(
    tmp_path: Path,
) -> None:
    before = weights.model_fingerprint(model(tmp_path / "a", hidden_size=8))
    tools = {"_name_or_path": "x", "transformers_version": "9", "auto_map": {"A": "b"}}
    assert weights.model_fingerprint(model(tmp_path / "b", hidden_size=8, **tools)) == before
    for number, other in enumerate((
        model(tmp_path / "c", hidden_size=9), model(tmp_path / "d", content=1, hidden_size=8),
        model(tmp_path / "e", dtype="I32", hidden_size=8),
    )):  # fmt: skip
        assert weights.model_fingerprint(other) != before, number


def test_an_index_names_files_of_its_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_tensors(tmp_path / "out.safetensors", {"a": (1,)})
    folder.mkdir()
    for name in ("../out.safetensors", "gone.safetensors", "x" * 300, "a\0b"):
        index = {"weight_map": {"a": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=f"has no {name}"):
            weights.weight_files(folder)


IDS_TAKEN, IDS_REFUSED = [0, -1, 2**31 - 1, [0, 1], [-1]], [-2, 2**31, True, [True], 1.5]


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id", "bos_token_id", "boi_token_id"])
def test_a_token_id_is_a_number_from_minus_one_on(tmp_path: Path, key: str) -> None:
    for value in IDS_TAKEN:
        assert read_model_config(model(tmp_path, **{key: value}))[key] == value
    for value in IDS_REFUSED:
        with pytest.raises(ModelError, match=f"{key} is"):
            read_model_config(model(tmp_path, **{key: value}))


@pytest.mark.parametrize("inside", [(), ("vision_config",), ("text_config",)])
def test_sizes_of_a_config_are_those_that_the_weights_have(
    tmp_path: Path, inside: tuple[str, ...]
) -> None:
    def read(**values: Any) -> Any:
        for section in inside:
            values = {section: values}
        return read_model_config(model(tmp_path, **values))

    read(num_layers=1, hidden_size=64, num_labels=10_000, seq_length=1 << 31, rope_ratio=0.5)
    read(image_size=80, patch_size=10)
    for wrong in (
        {"num_layers": 2}, {"depth": 2}, {"hidden_size": 65}, {"num_labels": 10_001}, {"seq_length": 0},
        {"rope_ratio": True}, {"use_cache": 1}, {"image_size": 90, "patch_size": 10},
    ):  # fmt: skip
        with pytest.raises(ModelError, match=next(iter(wrong))):
            read(**wrong)


# --- checkpoints and runs ------------------------------------------------------------------------


def test_the_best_checkpoint_is_one_of_the_run_that_is_still_there(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoint-2").mkdir(parents=True)
    (tmp_path / "checkpoint-9").mkdir()
    run = tmp_path / "run"
    (run / "elsewhere").mkdir()
    checkpoint.set_best(run, run / "checkpoint-2", "loss", 0.1)
    assert checkpoint.best(run) == run / "checkpoint-2"
    for name in ("checkpoint-3", "elsewhere", "../checkpoint-9"):
        (run / "best.json").write_text(json.dumps({"checkpoint": name}))
        assert checkpoint.best(run) is None
    checkpoint.forget_best(run)
    assert checkpoint.best(run) is None


def test_of_one_step_the_checkpoint_with_states_comes_first(tmp_path: Path) -> None:
    for name in ("weights-10", "checkpoint-10", "checkpoint-9", "weights-3"):
        (tmp_path / name).mkdir()
    assert checkpoint.of_step(tmp_path, 10) == tmp_path / "checkpoint-10"
    assert checkpoint.of_step(tmp_path, 3) == tmp_path / "weights-3"
    assert checkpoint.of_step(tmp_path, 4) is None
    names = [folder.name for folder in checkpoint.checkpoints(tmp_path)]
    assert names == ["weights-3", "checkpoint-9", "checkpoint-10", "weights-10"]


def test_a_protected_checkpoint_stays_by_whatever_name_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for step in (1, 2, 3):
        (tmp_path / f"run/checkpoint-{step}").mkdir(parents=True)
        seal(tmp_path / f"run/checkpoint-{step}")
    done = checkpoint.rotate(tmp_path / "run", 1, [tmp_path / "link/checkpoint-1"])
    assert [path.name for path in done.removed] == ["checkpoint-2"]


def test_a_damaged_best_is_passed_over_for_the_newest_good_one(tmp_path: Path) -> None:
    for step in (1, 2):
        write_tensors(tmp_path / f"checkpoint-{step}/m", {"a": (1,)})
        seal(tmp_path / f"checkpoint-{step}")
    checkpoint.set_best(tmp_path, tmp_path / "checkpoint-1", "loss", 0.1)
    assert resolve.find_source(tmp_path)[0].name == "checkpoint-1"
    (tmp_path / "checkpoint-1/m").write_bytes(b"")
    assert resolve.find_source(tmp_path)[0].name == "checkpoint-2"


def test_a_whole_model_without_a_tokenizer_has_that_of_its_base_at_its_revision(
    tmp_path: Path,
) -> None:
    BaseRecord("owner/base", "v2", "f").write(tmp_path, method="full")
    mine = resolve.Weights(str(tmp_path))
    assert resolve.tokenizer_source(mine) == resolve.Weights("owner/base", "v2")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve.tokenizer_source(mine) == mine


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "best.json", "metrics.jsonl"])
def test_a_folder_with_files_that_a_run_would_write_over_is_refused(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"would write over {name}"):
        RunDirectory.open(tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / ".lock").touch()  # a run was here
    RunDirectory.open(tmp_path).close()


def test_a_folder_that_is_refused_is_not_held(tmp_path: Path) -> None:
    RunDirectory.open(tmp_path).close()
    (tmp_path / "best.json").symlink_to("elsewhere")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"best\.json is a link"):
            RunDirectory.open(tmp_path)


# --- bases and hubs ------------------------------------------------------------------------------


def test_another_base_is_refused_and_with_force_only_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BaseRecord("owner/base", "v2", "f" * 64).write(tmp_path, method="lora")
    monkeypatch.setattr(base_record, "model_fingerprint", lambda _: "f" * 64)
    assert base_record.check_base(tmp_path, tmp_path) == []
    monkeypatch.setattr(base_record, "model_fingerprint", lambda _: "e" * 64)
    refused = said(base_record.check_base, tmp_path, tmp_path)
    assert f"was trained on owner/base at v2 (fingerprint {'f' * 16})" in refused
    [told] = base_record.check_base(tmp_path, tmp_path, force=True)
    assert f"has fingerprint {'e' * 16}" in told
    assert base_record.recorded_base(tmp_path) == ("owner/base", "f" * 64)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "moved"}')
    assert base_record.recorded_base(tmp_path) == ("moved", "f" * 64)


def test_a_fetched_revision_is_said_again_only_when_it_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(console, "say", told.append)
    monkeypatch.setattr(hub, "fetched", {})
    found = hub.Repository("huggingface", "owner/name")
    for commit in ("a", "a", "b"):
        hub._note(found, "model", commit, "here")
    assert [text.partition("revision ")[2] for text in told] == ["a: here", "b: here"]
    assert hub.fetched == {"huggingface:owner/name": "b"}


def test_the_revision_of_an_address_counts_before_that_of_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(hub, "_fetched", lambda found, *_: asked.append(found.revision))
    hub.fetch("hf://owner/name@v1", "model", [], "v2")
    hub.fetch("hf://owner/name", "model", [], "v2")
    assert asked == ["v1", "v2"]


def test_what_cannot_be_fetched_is_an_error_of_data_or_of_a_model() -> None:
    found = hub.Repository("huggingface", "owner/name")
    for content, kind in (("model", ModelError), ("dataset", DataError)):
        with pytest.raises(kind), hub._explained(found, content):  # type: ignore[arg-type]
            raise OSError("no network")


def test_a_branch_is_pinned_to_the_commit_that_it_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40
    for folder, pinned in ((tmp_path / commit, commit), (tmp_path / "v1", "main")):
        monkeypatch.setattr(resolve, "local_folder", lambda *_, folder=folder, **__: folder)
        assert resolve.pinned_revision("owner/name", "main") == pinned
    assert resolve.pinned_revision(str(tmp_path), "main") == "main"


def test_files_of_a_hub_are_the_same_when_size_and_hash_are() -> None:
    one = {"Size": 1, "Sha256": "a"}
    assert remote_files._same(one, {**one, "Path": "x"})
    for other in (None, {**one, "Size": 2}, {**one, "Sha256": "b"}):
        assert not remote_files._same(one, other)


def test_a_large_file_and_a_link_out_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("12345")
    plain_files.check_plain(file, largest=5)
    with pytest.raises(ModelError, match="larger than"):
        plain_files.check_plain(file, largest=4)
    blobs = tmp_path / "m/blobs"
    blobs.mkdir(parents=True)
    (blobs / "0").write_text("{}")
    for name, allowed in (("snapshots", True), ("others", False)):
        folder = tmp_path / "m" / name / "v1"
        folder.mkdir(parents=True)
        (folder / "a").symlink_to(blobs / "0")
        if allowed:
            plain_files.check_plain(folder / "a")
        else:
            with pytest.raises(ModelError, match="leads out of its folder"):
                plain_files.check_plain(folder / "a")


# --- experts -------------------------------------------------------------------------------------


def test_layers_behind_the_last_one_predict_further_tokens() -> None:
    names = [
        "model.layers.1.a",
        "model.layers.2.a",
        "model.layers.3.a",
        "x.visual.layers.7.a",
        "b",
    ]
    assert of_prediction(names, {"num_hidden_layers": 2}) == names[1:3]
    assert of_prediction(names, {"text_config": {"num_hidden_layers": 3}}) == names[2:3]
    assert of_prediction(names, {}) == []


def test_fused_experts_lie_on_disk_expert_by_expert() -> None:
    assert separate_names("x.experts.gate_up_proj", 2) == [
        "x.experts.0.gate_proj.weight", "x.experts.0.up_proj.weight",
        "x.experts.1.gate_proj.weight", "x.experts.1.up_proj.weight",
    ]  # fmt: skip
    assert separate_names("x.experts.down_proj", 2) == [
        f"x.experts.{e}.down_proj.weight" for e in (0, 1)
    ]
    assert separate_names("x.weight", 2) == ["x.weight"]
