"""Numbers of a plan beside each other and by hand on small shapes, and what a run says of its memory."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import ROOT
from rows import turns, write_rows
from test_counting import CEILINGS, SIZES, small
from test_plan_parts import PLAN, memory

from finetune.cli.inputs import planned as planned_of
from finetune.config.schema import (
    DataSection,
    EvaluationSection,
    LoraMethod,
    ModelSection,
    PTuningV2Method,
    RunConfig,
)
from finetune.distributed import device
from finetune.errors import ConfigError, ModelError
from finetune.models.kernels import NAMES
from finetune.planning import evaluating, run_memory, step
from finetune.planning.counting import KINDS, shapes_only
from finetune.planning.evaluating import HeldOut
from finetune.planning.plan import NF4_BYTES, Gpu, Plan, _format, _sizes, _sizes_with
from finetune.planning.run_memory import RunMemory
from finetune.planning.step import Cost, Shape, Subject, count_layers
from finetune.planning.subjects import (
    PackedLayer,
    narrow,
    on_the_host,
    own,
    own_loss,
    states_per_token,
)

# --- plans of small shapes ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small(tmp_path, num_layers=4)


def planned(folder: Path, *, kind: str = "lora", gpu: Gpu | None = None, **changes: Any) -> Plan:
    tree: dict[str, Any] = {
        "model": {"path": str(folder)}, "data": {"train": "x", "max_length": 64}, "method": {"kind": kind},
        "training": {"output_dir": "x", "keep_checkpoints": 3},
    }  # fmt: skip
    for name, value in changes.items():
        section, _, option = name.partition("__")
        tree.setdefault(section, {})[option] = value
    return planned_of(RunConfig.model_validate(tree), gpu or Gpu())[1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Subject, Shape]]:
    """What was to be counted; a token takes 7 bytes and 100 FLOPs, and a pass 2 ms."""
    found: list[tuple[Subject, Shape]] = []

    def count(subject: Subject, shape: Shape) -> Cost:
        found.append((subject, shape))
        held = dict.fromkeys(KINDS, 10) | {"optimizer": 8888}
        flops = {"bfloat16": 90 * shape.tokens, "float32": 0, "attention": 10 * shape.tokens}
        return Cost(1, 1, flops, {"forward": held}, 7 * shape.tokens, 0, 2.0)

    monkeypatch.setattr("finetune.planning.plan.count_step", count)
    return found


TRAINED = 4 * 8 * (64 + 128 + 64 + 64 + 64 + 2 * 96 + 96 + 64)
"""Rank 8 beside four matrices of four layers."""


@pytest.mark.usefixtures("asked")
def test_a_checkpoint_holds_the_trained_weights_and_their_states(folder: Path) -> None:
    lora = planned(folder)
    assert lora.checkpoint_bytes == 4 * TRAINED + 8888
    assert lora.disk_bytes == 5 * lora.checkpoint_bytes, "three, the best and one being written"
    assert planned(folder, deepspeed__zero_stage=2).checkpoint_bytes == (4 + 12) * TRAINED
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        eight = planned(folder, training__optimizer=name)
        assert eight.checkpoint_bytes == 4 * TRAINED + int(2.03125 * TRAINED)
    assert planned(folder, training__optimizer="paged_adamw").checkpoint_bytes == lora.checkpoint_bytes  # fmt: skip
    full = planned(folder, kind="full")
    assert full.checkpoint_bytes == 4 * full.parameters + 8888
    assert planned(folder, kind="full", deepspeed__zero_stage=2).checkpoint_bytes == (2 + 12) * full.parameters  # fmt: skip
    assert full.parameters == lora.parameters == lora.active_parameters
    assert full.layers == 4


def test_passes_of_a_step_take_as_long_as_one_each(folder: Path, asked: Any) -> None:
    one = planned(folder, training__batch_size=2)
    assert (one.model_milliseconds, one.flops, one.steps) == (2.0, 100 * 2 * 64, None)
    three = planned(folder, training__batch_size=2, training__gradient_accumulation_steps=3, training__max_steps=7)  # fmt: skip
    assert (three.model_milliseconds, three.flops, three.steps) == (6.0, one.flops, 7)
    assert (one.batch, one.length, one.accumulation, three.accumulation) == (2, 64, 1, 3)
    assert [shape for _, shape in asked[:2]] == [Shape(2, 64), Shape(2, 128)]
    assert {subject.optimizer for subject, _ in asked} == {"adamw"}


def test_what_is_counted_is_what_the_options_say(folder: Path, asked: Any) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"model__kernels": "torch"}, {"kind": "full"}, {"kind": "full", "deepspeed__zero_stage": 2}, {"training__optimizer": "muon"},
        {"training__activation_checkpointing": True}, {"model__quantization": "nf4"},
    ]  # fmt: skip
    for change in changes:
        planned(folder, **change)
    plain, unfused, full, cut, muon, recomputed, narrow = (subject for subject, _ in asked[::2])
    assert plain.kernels == NAMES
    assert unfused.kernels == ()
    assert (plain.autocast, full.autocast, cut.autocast) == (None, torch.bfloat16, None)
    assert muon.optimizer == "muon"
    with shapes_only():
        models = {name: subject.build(1) for name, subject in (("plain", plain), ("recomputed", recomputed), ("narrow", narrow))}  # fmt: skip
    recomputes = {name: any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) for name, model in models.items()}  # fmt: skip
    assert recomputes == {"plain": False, "recomputed": True, "narrow": False}
    assert any(isinstance(module, PackedLayer) for module in models["narrow"].modules())
    assert not any(isinstance(module, PackedLayer) for module in models["plain"].modules())


def test_rows_that_are_shared_out_cost_each_gpu_its_part(folder: Path, asked: Any) -> None:
    two = Gpu(number=2)
    whole = planned(folder, data__max_length=1001)
    half = planned(folder, data__max_length=1001, training__sequence_parallel=2, gpu=two)
    assert (half.length, half.sharing, whole.sharing) == (1001, 2, 1)
    assert [shape.length for _, shape in asked] == [1001, 2002, 501, 1002]
    assert (whole.per_token, half.per_token) == (7, 7 * 501 // 1001)
    assert whole.host_bytes == half.host_bytes == 0
    assert [subject.loss is own_loss for subject, _ in asked] == [True, True, False, False]
    away = {"training__offload_activations": True, "training__activation_checkpointing": True}
    both = planned(folder, data__max_length=1001, training__sequence_parallel=2, training__batch_size=3, gpu=two, **away)  # fmt: skip
    assert both.host_bytes == 3 * 501 * 4 * 64 * 2
    assert states_per_token(folder, torch.float16) == 2 * states_per_token(folder, torch.bfloat16)
    with shapes_only():
        models = [asked[place][0].build(1) for place in (2, 4)]
    away_from = [{getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()} - {None} for model in models]  # fmt: skip
    assert {one.func.__name__ for one in away_from[1]} == {"away"}
    assert not away_from[0], "nothing is recomputed there"
    three = Gpu(number=3)
    with pytest.raises(ConfigError, match="4 attention heads"):
        planned(folder, training__sequence_parallel=3, gpu=three)


def test_what_is_recomputed_from_the_host_is_recomputed_whole(folder: Path) -> None:
    kept = own(folder, LoraMethod(), checkpointing=True)
    here, away = (count_layers(one, Shape(2, 64), CEILINGS, 2) for one in (kept, on_the_host(kept)))
    assert (away.flops, away.working) == (here.flops, here.working)
    few = count_layers(kept, Shape(2, 64, 0.25), CEILINGS, 2)
    assert few.flops["attention"] == here.flops["attention"]
    head = 2 * 64 * 512 * (2 * 64)  # of all tokens, forward and for what comes before it
    assert here.flops["bfloat16"] - few.flops["bfloat16"] == 2 * head * 3 // 4


def test_all_of_a_step_follows_from_two_depths_behind_the_dense_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def at(_: Any, __: Any, ___: Any, layers: int) -> Cost:
        asked.append(layers)
        of = lambda start, each: start + each * layers  # noqa: E731
        held = {kind: of(100 * place, place) for place, kind in enumerate(KINDS)}
        return Cost(of(7, 1), of(9, 2), {"bfloat16": of(0, 3)}, {"forward": held}, of(5, 4), 6, of(1, 0.5))  # fmt: skip

    monkeypatch.setattr(step, "count_layers", at)
    subject = Subject(lambda _: torch.nn.Module(), own_loss, layers=40, dense=3)
    found = step.count_step(subject, Shape(1, 1))
    assert found == at(None, None, None, 40)
    assert asked[:2] == [4, 5]
    assert found.peak_bytes == sum(found.peak.values())
    for layers, dense in ((7, 0), (7, 1)):
        asked.clear()
        assert step.count_step(replace(subject, layers=layers, dense=dense), Shape(1, 1)) == at(None, None, None, layers)  # fmt: skip
        assert asked[:2] == [2, 3]


def test_four_bits_are_those_of_the_frozen_layers_alone(folder: Path) -> None:
    how = {quantization: _sizes(ModelSection(path="m", quantization=quantization), LoraMethod(), folder, torch.bfloat16) for quantization in (None, "nf4")}  # type: ignore[arg-type]  # fmt: skip
    linear = 4 * (64 * 128 + 64 * 64 + 64 * 192 + 96 * 64)
    assert how[None].frozen - how["nf4"].frozen == int(linear * (2 - NF4_BYTES))
    assert how[None].trained == how["nf4"].trained == TRAINED
    prefix = _sizes(ModelSection(path="m"), PTuningV2Method(), folder, torch.bfloat16)
    assert prefix.everything == prefix.active == how[None].everything
    layer = PackedLayer(torch.nn.Linear(512, 64, dtype=torch.bfloat16))
    assert sum(one.nbytes for one in layer.buffers()) == 512 * 64 * NF4_BYTES
    assert (layer.shape, layer.wide_dtype, layer.bias.shape) == ((64, 512), torch.bfloat16, (64,))
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"0": torch.nn.ModuleDict({"dense": torch.nn.Linear(64, 64), "lora_A": torch.nn.Linear(64, 8)})}), "head": torch.nn.Linear(64, 64)})  # fmt: skip
    narrow(torch.nn.ModuleDict({"text": model}))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert (kinds["layers.0.dense"], kinds["layers.0.lora_A"], kinds["head"]) == ("PackedLayer", "Linear", "Linear")  # fmt: skip


def test_a_plan_is_in_the_number_format_that_the_gpu_multiplies(tmp_path: Path) -> None:
    old, new = Gpu(native_bf16=False), Gpu()
    auto, wide = ModelSection(path="m"), ModelSection(path="m", dtype="float32")
    for vision, formats in (({}, ("bfloat16", "float16")), ({"vision_config": {"hidden_size": 8}}, ("bfloat16", "float32"))):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(SIZES | vision))
        found = [str(_format(auto, gpu, tmp_path)) for gpu in (new, old)]
        assert found == [f"torch.{name}" for name in formats]
        assert _format(wide, new, tmp_path) is torch.float32


@pytest.mark.usefixtures("asked")
def test_the_format_of_a_plan_is_that_of_its_weights(folder: Path) -> None:
    narrow, wide = planned(folder), planned(folder, model__dtype="float32")
    assert (narrow.dtype, wide.dtype) == ("bfloat16", "float32")
    assert wide.model_bytes == 2 * narrow.model_bytes == 4 * wide.parameters
    assert planned(folder, gpu=Gpu(native_bf16=False)).dtype == "float16"


@pytest.mark.usefixtures("asked")
def test_a_mixture_is_planned_in_no_format_that_it_is_not_computed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    import mixture_plans

    (tmp_path / "config.json").write_text(json.dumps(mixture_plans.MODELS["GLM-4.5-Air"]))
    with pytest.raises(ModelError, match="holds linear layers in 4 bits"):
        planned(tmp_path, model__quantization="nf4")
    with pytest.raises(ModelError, match="not computed in float16"):
        planned(tmp_path, gpu=Gpu(native_bf16=False))


def test_the_products_of_a_step_are_what_its_weights_come_to(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    found = planned(tmp_path, data__max_length=4096, training__activation_checkpointing=True, training__batch_size=1)  # fmt: skip
    layers, head = 8.16e9, 0.62e9
    # Forward, again, and back: 2 FLOPs a weight and token; the head's are not computed again.
    products = 2 * 4096 * (3 * layers + 2 * head)
    attention = 40 * 4 * 32 * 4096 * 4096 * 128 // 2 * 9 // 2
    assert found.flops == pytest.approx(products + attention, rel=0.02)
    assert found.model_milliseconds > 1000 * (products / 650e12 + attention / 350e12)


@pytest.mark.parametrize("vision", [None, {"hidden_size": 8}])
def test_a_model_that_sees_images_is_counted_on_embeddings_as_it_would_look_for_images_in_ids(
    vision: Any,
) -> None:
    asked: list[dict[str, Any]] = []
    model: Any = lambda **given: asked.append(given) or SimpleNamespace(loss="loss")  # noqa: E731
    model.config = SimpleNamespace(vision_config=vision)
    model.get_input_embeddings = lambda: lambda ids: f"embedded {ids}"
    assert own_loss(model, "ids", "labels", "places", documents=3) == "loss"  # type: ignore[arg-type, comparison-overlap]
    given = {"inputs_embeds": "embedded ids"} if vision else {"input_ids": "ids"}
    rest = {"labels": "labels", "supervised": "places", "num_items_in_batch": 1.0, "use_cache": False, "documents": 3}  # fmt: skip
    assert asked == [given | rest]


# --- the memory of a run -----------------------------------------------------------------------


def test_a_run_is_told_what_is_planned_for_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.distributed import processes

    asked: list[Gpu] = []
    monkeypatch.setattr(RunMemory, "plan", lambda _, gpu: asked.append(gpu) or PLAN)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(processes, "is_rank0", lambda: True)
    monkeypatch.setattr(device, "card", lambda: None)
    assert memory().rows() == []
    monkeypatch.setattr(device, "card", lambda: SimpleNamespace(bytes=7 * 10**9, native_bf16=False))
    assert memory().rows() == [
        ["planned", "24.0 GB (weights 20.0, activations 4.0) on each GPU"],
        ["a forward pass", "fills 29 % of what this GPU could take at once"],  # 2,000 of 6,999 tokens
    ]  # fmt: skip
    assert asked == [Gpu(7 * 10**9, 4, native_bf16=False)]
    monkeypatch.setattr(RunMemory, "plan", lambda _, gpu: replace(PLAN, memory={"weights": 10**12}))
    assert "fills 200000 %" in memory().rows()[1][1]
    monkeypatch.setattr(processes, "is_rank0", lambda: False)
    assert memory().rows() == []


def test_a_run_is_planned_for_its_longest_example_in_the_models_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(run_memory, "local_folder", lambda path, revision, files: tmp_path / path)
    monkeypatch.setattr("finetune.planning.plan.plan", lambda *words, **how: asked.append((words, how)))  # fmt: skip
    one, gpu = memory(), Gpu(number=3)
    one.plan(gpu)
    one.plan(gpu, tmp_path)
    words = (one.model, one.method, one.training, one.deepspeed, gpu)
    assert asked == [(words, {"folder": place, "length": 300}) for place in (tmp_path / "m", tmp_path)]  # fmt: skip


def test_out_of_memory_is_said_with_what_was_held_and_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Gpu] = []
    monkeypatch.setattr(RunMemory, "plan", lambda _, gpu: asked.append(gpu) or PLAN)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(device, "memory_gb", lambda: 3.25)
    monkeypatch.setattr(device, "memory", lambda: device.Memory(1 * 10**9, 24 * 10**9, 20 * 10**9, 22 * 10**9, 0, 0))  # fmt: skip
    text = memory()._text(RuntimeError("x" * 400 + "\nmore"))
    assert text.startswith(f"out of memory: {'x' * 300}\nThe most this process has used is 3.25 GB; now 20.00 GB are ")  # fmt: skip
    assert "20.00 GB are allocated and 22.00 reserved of the GPU's 24.0, 1.00 free" in text
    assert "Planned were 24.0 GB (weights 20.0, activations 4.0) for the training itself." in text
    assert asked == [Gpu(number=4)]
    monkeypatch.setattr(device, "memory", lambda: None)
    assert memory()._text(MemoryError()).startswith("out of memory: MemoryError\nThe most this process has used is 3.25 GB. Planned")  # fmt: skip


def test_a_mixture_is_told_by_its_experts_and_a_model_that_is_not_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_memory, "local_folder", lambda *_, **__: tmp_path)
    assert not memory()._is_mixture()
    for experts, is_mixture in ((4, True), (0, False)):
        (tmp_path / "config.json").write_text(json.dumps({"n_routed_experts": experts}))
        assert memory()._is_mixture() is is_mixture

    def gone(*_: Any, **__: Any) -> Path:
        raise ModelError("not there")

    monkeypatch.setattr(run_memory, "local_folder", gone)
    assert not memory()._is_mixture()


# --- what is asked at an evaluation ------------------------------------------------------------


def test_a_part_of_a_source_is_asked_for_its_part_and_bad_rows_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "_sees_images", lambda _: False)
    file = write_rows(tmp_path / "d.jsonl", [{"messages": turns("a", "b", "c", "d")}] * 10)
    with file.open("a") as opened:
        opened.write("{\n")
    section = EvaluationSection(max_samples=None)

    def held(**data: Any) -> Any:
        asked = DataSection(max_length=1000, **data)
        return evaluating._held_out(ModelSection(path="m"), asked, section)

    tokens = file.stat().st_size / 3
    assert held(train=[], validation=[str(file)]) == HeldOut(
        20, math.ceil(tokens), math.ceil(tokens)
    )
    part = math.ceil(0.25 * tokens)
    assert held(train=[str(file)], validation="25%") == HeldOut(5, part, part)
    last = section.model_copy(update={"replies": "last_reply"})
    asked = DataSection(train=[str(file)], validation="25%", max_length=1000)
    found = evaluating._held_out(ModelSection(path="m"), asked, last)
    assert found == HeldOut(3, part, part * 3 // 5), "3 of 10 rows, begun ones are whole"


@pytest.mark.parametrize(("vision", "sees"), [({}, False), ({"vision_config": {"hidden_size": 8}}, True)])  # fmt: skip
def test_a_model_that_sees_images_is_told_by_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vision: dict[str, Any], sees: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | vision))
    monkeypatch.setattr(evaluating, "local_folder", lambda path, revision, files: tmp_path)
    assert evaluating._sees_images(ModelSection(path="m")) is sees


def test_bytes_are_those_of_each_tensors_own_format() -> None:
    def build(_: int) -> torch.nn.Module:
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 5, dtype=torch.bfloat16), torch.nn.Linear(5, 4)
        )
        model[0].requires_grad_(False)
        model.register_buffer("table", torch.zeros(3, dtype=torch.float64))
        return model

    sizes = _sizes_with(build, 1)
    assert sizes["frozen"] == 2 * (30 + 5) + 8 * 3
    assert (sizes["trained"], sizes["trained bytes"]) == (24, 96)
