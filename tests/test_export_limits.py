"""How far a merge may be off, and what its writer does when buffers, blocks and formats change under it."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter, make_base
from export_parts import EMBEDDING, HEAD, adapter, stored, tensor

from finetune.errors import ConfigError, ModelError
from finetune.export import card, merge, parity, push, shards
from finetune.export.adapter import Update
from finetune.export.checks import ProductCheck
from finetune.export.convert import export_model
from finetune.export.numbers import STORAGE, rounded, to_float32
from finetune.export.shards import Output, ShardPlan, make_header, write_shard

EPS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("rows", "off", "passes"),
    [(1, 30, True), (1, 40, False), (10, 30, True), (10, 40, False), (100, 50, True), (100, 64, False)],
)  # fmt: skip
def test_a_sum_of_64_numbers_may_be_off_by_some_30_of_their_spacings_and_no_more(
    dtype: str, rows: int, off: int, passes: bool
) -> None:
    """By chance the sum of 64 rounding errors is 2 spacings off; never 40, and never 64 among 100 rows."""
    spacing = torch.finfo(EPS[dtype]).eps * (8 if dtype == "F32" else 1)  # sums in float32, too
    still = Update(np.zeros((1, 64), np.float32), np.zeros((rows, 1), np.float32), np.float32(1))
    check = ProductCheck("w", still, dtype)
    values = np.ones((rows, 64), np.float32)
    before = check.before(values)
    values[rows // 2, 3] += off * spacing
    if passes:
        check.after(0, before, values)
        return
    with pytest.raises(ModelError, match=rf"\(off by {off * spacing:.3g}, rounding explains"):
        check.after(0, before, values)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def written(file: Path, *outputs: Output) -> bytes:
    plan = ShardPlan("x", make_header(outputs, {}), outputs)
    write_shard(plan, file, stop=threading.Event(), advance=lambda size: None)
    return file.read_bytes()[len(plan.header) :]


@pytest.mark.parametrize("target", list(STORAGE))
@pytest.mark.parametrize("block", [1, 4, 12, 1 << 17])
def test_formats_may_change_from_tensor_to_tensor_and_blocks_end_anywhere(
    target: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_BLOCK", block)
    arrays = {name: ("BF16" if name == "b" else "F16" if name == "c" else "F32", floats(9, 5)) for name in "abcd"}  # fmt: skip
    kept = {name: (dtype, rounded(values, dtype)) for name, (dtype, values) in arrays.items()}
    source = stored(tmp_path / "a", **kept)
    change = Update(floats(2, 5), floats(9, 2), np.float32(0.5))
    outputs = [Output(name, target, (9, 5), (source[name],), change if name == "d" else None) for name in "abcd"]  # fmt: skip
    found = written(tmp_path / "x", *outputs)
    wanted = b""
    for name, (dtype, values) in kept.items():
        plain = to_float32(values.tobytes(), dtype, (9, 5))
        wanted += rounded(plain + 0.5 * change.b @ change.a if name == "d" else plain, target).tobytes()  # fmt: skip
    size = len(found) * 3 // 4
    assert found[:size] == wanted[:size]
    last = [to_float32(one[size:], target, (9, 5)) for one in (found, wanted)]
    assert np.allclose(*last, rtol=torch.finfo(EPS[target]).eps, atol=1e-6)


def test_numbers_that_are_rounded_stay_as_they_were() -> None:
    values = floats(7)
    before = values.copy()
    for dtype in STORAGE:
        rounded(values, dtype)
    assert np.array_equal(values, before)


def test_a_slow_disk_gets_every_buffer_before_it_is_filled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_BUFFER", 4096)
    content = np.arange(12 * 4096 // 4, dtype=np.float32)
    some = os.write

    def slow(descriptor: int, data: Any) -> int:
        time.sleep(0.003)
        return some(descriptor, data)

    monkeypatch.setattr(os, "write", slow)
    source = stored(tmp_path / "a", w=("F32", content))["w"]
    assert (
        written(tmp_path / "x", Output("w", "F32", content.shape, (source,))) == content.tobytes()
    )


# --- bases and adapters ----------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A tied base whose file holds both matrices all the same."""
    base = tmp_path / "plain"
    base.mkdir()
    (base / "config.json").write_text('{"tie_word_embeddings": true}')
    stored(base / "model.safetensors", **{EMBEDDING: ("F32", floats(4, 3)), HEAD: ("F32", floats(4, 3) + 1)})  # fmt: skip
    return base


def test_a_tied_model_that_stores_its_head_gets_one_head_that_is_the_embedding(plain: Path) -> None:
    change = Update(floats(2, 3), floats(4, 2), np.float32(1))
    plan, untied, more = merge._plan(plain, adapter({EMBEDDING: change}), None, checked=True)
    assert (untied, more) == (True, 0)
    (shard,) = plan.shards
    told = {output.name: (output.sources[0].name, output.update is change) for output in shard.outputs}  # fmt: skip
    assert told == {EMBEDDING: (EMBEDDING, True), HEAD: (EMBEDDING, False)}
    assert len(shard.outputs) == 2
    assert json.loads(plan.texts["config.json"]) == {"tie_word_embeddings": False}


def test_embeddings_of_another_width_are_no_longer_vocabulary(plain: Path) -> None:
    tuned = adapter({}, {name: tensor(name, 6, 2) for name in (EMBEDDING, HEAD)})
    with pytest.raises(ModelError, match=r"is \(4, 3\), the adapter's is \(6, 2\)"):
        merge._plan(plain, tuned, None, checked=True)


def test_an_export_opens_no_file_that_leads_out_and_believes_no_size_beyond_the_weights(
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path / "base")
    (base / "vocab.txt").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="is a link that leads out"):
        export_model(base, tmp_path / "out", layout="published")
    (base / "vocab.txt").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(ModelError, match=r"num_hidden_layers.*belongs to these weights"):
        export_model(base, tmp_path / "out", layout="published")
    assert {file.name for file in tmp_path.iterdir()} == {"base"}


def test_both_models_of_a_full_check_are_placed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    model = SimpleNamespace(config=None)
    monkeypatch.setattr(parity.gc, "collect", lambda: 0)
    monkeypatch.setattr(parity, "load_model", lambda folder, device_map: opened.append((folder, device_map)) or model)  # type: ignore[func-returns-value]  # fmt: skip
    for name, value in (("_prompts", []), ("_adapted", model), ("_logits", [torch.ones(1)]), ("_in_float32", True)):  # fmt: skip
        monkeypatch.setattr(parity, name, lambda *_, value=value: value)
    assert parity.check_parity(Path("a"), [], Path("b"), device_map="auto") == 0
    assert opened == [(Path("a"), "auto"), (Path("b"), "auto")]


def test_dropout_of_the_training_does_not_disturb_the_full_check(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=1)
    one, two = (make_adapter(tmp_path / f"{n}", base, seed=n, lora_dropout=0.5, target_modules=["q_proj"]) for n in (1, 2))  # fmt: skip
    report = merge.merge([(one, 1.0), (two, 0.5)], tmp_path / "out", check="full")
    assert report.largest_difference is not None
    assert report.largest_difference < 1e-4


# --- pushing and the card --------------------------------------------------------------------------


def test_a_failed_upload_names_what_lies_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("outer") from OSError("no route to host")

    monkeypatch.setattr(push, "HfApi", lambda: SimpleNamespace(create_repo=fail, endpoint="https://hub"))  # fmt: skip
    with pytest.raises(ConfigError, match=r"the upload to https://hub failed \(no route to host\)"):
        push._send({}, "me/x", public=False)


def test_scores_of_an_evaluation_are_found_by_any_way_to_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run/checkpoint-2").mkdir(parents=True)
    (tmp_path / "run/evaluation-x").mkdir()
    target = {"path": str(tmp_path / "run/checkpoint-2"), "scores": {"rouge-l": {"value": 41.5}}}
    (tmp_path / "run/evaluation-x/evaluation.json").write_text(json.dumps({"targets": [target]}))
    monkeypatch.chdir(tmp_path)
    for folder in (Path("run/checkpoint-2"), tmp_path / "run/checkpoint-2"):
        assert "| rouge-l | 41.5 |" in card._scores(folder, {})
    assert card._scores(Path("run/checkpoint-3"), {}) == ""
