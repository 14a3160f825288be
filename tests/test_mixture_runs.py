"""A mixture of experts from a run to its replies: the log, resuming, batches, merging, commands, the endpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mixtures
import pytest
import runs
import serving
import tiny
import torch
from command_line import ROOT, exit_code
from safetensors.torch import load_file
from test_generate import Stops, by_hand, prompts

from finetune.config.schema import LoraMethod, ModelSection
from finetune.export.merge import merge
from finetune.generation import batch
from finetune.generation.generate import Reply, cache_tokens, generate
from finetune.generation.load import OpenedModel, open_model
from finetune.models.load import load_model
from finetune.planning.plan import _sizes
from finetune.training.callbacks.throughput import work_of


@pytest.fixture(scope="module", params=mixtures.FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over packed rows with evaluations, and its settings beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = mixtures.save_model(folder / "model", request.param)
    data = runs.write_dialogues(folder / "train.jsonl", 9)
    settings = runs.config(
        model, data, folder / "run", data__packing=True, data__max_length=96, data__validation=str(data),
        training__max_steps=4, training__save_every_steps=2, evaluation__max_samples=3,
        training__activation_checkpointing=True,
    )  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    runs.run_here(settings)
    return folder / "run"


@pytest.fixture(scope="module")
def opened(run: Path) -> OpenedModel:
    return open_model(run / "checkpoint-4")


def logged(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


def test_every_log_line_says_how_evenly_experts_are_used(run: Path) -> None:
    records = logged(run)
    assert len(records) == 4
    for record in records:
        shares = [record[f"experts_share_{layer}"] for layer in (1, 2)]
        entropies = [record[f"experts_entropy_{layer}"] for layer in (1, 2)]
        assert all(0.25 <= share <= 0.5 for share in shares)  # two experts of four, never one twice
        assert all(0.5 - 1e-9 <= entropy <= 1 for entropy in entropies)
        assert record["experts_largest_share"] == max(shares)
        assert record["experts_lowest_entropy"] == min(entropies)


def test_a_run_goes_on_bit_for_bit(run: Path) -> None:
    settings = json.loads((run.parent / "settings.json").read_text(encoding="utf-8"))
    again = run.parent / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoint-4")
    settings["training"]["output_dir"] = str(again)
    runs.run_here(settings)
    whole, part = (
        load_file(one / "checkpoint-4/adapter_model.safetensors") for one in (run, again)
    )
    assert whole.keys() == part.keys()
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert [one["loss"] for one in logged(again)] == [one["loss"] for one in logged(run)]


def test_a_batch_gives_what_each_prompt_gives_alone(opened: OpenedModel) -> None:
    asked = prompts(6)
    stops = Stops(stop_ids=(*tiny.EOS_IDS, *range(0, tiny.NUM_RANKS, 5)))
    alone = [by_hand(opened.model, prompt, stops, 12) for prompt in asked]
    for size in (1, 6):
        replies = generate(opened.model, stops, asked, max_new_tokens=12, batch_size=size)
        assert replies == [Reply(i, *one) for i, one in enumerate(alone)]


def test_what_a_cache_holds_of_a_token_is_known(opened: OpenedModel) -> None:
    model: Any = opened.model
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    cache = model(input_ids=ids, past_key_values=batch._new_cache(model), use_cache=True)
    held = [t for layer in cache.past_key_values.layers for t in (layer.keys, layer.values)]
    assert cache_tokens(model, sum(t.numel() * t.element_size() for t in held)) == 5


def test_a_run_is_merged_evaluated_and_predicts(run: Path, tmp_path: Path) -> None:
    report = merge(run, tmp_path / "merged", check="full")
    assert report.largest_difference is not None
    assert report.largest_difference < 1e-4
    data = str(run.parent / "train.jsonl")
    out = tmp_path / "predictions.jsonl"
    words = ["--data", data, "--output", str(out), "--max-new-tokens", "4"]
    assert exit_code("predict", str(tmp_path / "merged"), *words) == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) >= 9


def test_the_endpoint_answers(opened: OpenedModel) -> None:
    with serving.served(opened) as server:
        create = server.client.chat.completions.create
        answers = [create(model="tiny", messages=serving.HELLO, max_tokens=5) for _ in range(2)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage is not None
    assert answers[0].usage.completion_tokens > 0


def test_the_work_of_a_token_counts_the_experts_that_it_takes(run: Path) -> None:
    model = load_model(run.parent / "model")
    matrices = sum(
        weight.numel() // 2 if ".experts." in name else weight.numel()
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and "embed" not in name
    )
    model.requires_grad_(False)
    assert work_of(model, 0, 1).per_token == 4 * matrices


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Sizes of published models by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    import mixture_plans

    return mixture_plans.MODELS


@pytest.mark.parametrize(
    ("name", "billions", "active"), [("GLM-4.5-Air", 106.85, 12.80), ("GLM-4.7-Flash", 29.94, 3.58)]
)
def test_a_plan_knows_the_weights_of_a_mixture_and_those_that_a_token_takes(
    name: str, billions: float, active: float, tmp_path: Path, published: dict[str, dict[str, Any]]
) -> None:
    """Published as 106 billion, 12 active, and 30 billion, 3 active; here with the output layer."""
    (tmp_path / "config.json").write_text(json.dumps(published[name]), encoding="utf-8")
    sizes = _sizes(ModelSection(path=str(tmp_path)), LoraMethod(), tmp_path, torch.bfloat16)
    assert sizes.everything / 1e9 == pytest.approx(billions, abs=0.01)
    assert sizes.active / 1e9 == pytest.approx(active, abs=0.01)


def test_a_plan_of_shards_holds_a_layers_experts_whole(
    tmp_path: Path, published: dict[str, dict[str, Any]]
) -> None:
    from mixture_plans import plan_of

    text = published["GLM-4.7-Flash"]
    (tmp_path / "config.json").write_text(json.dumps(text), encoding="utf-8")
    plan = plan_of(tmp_path, {"kind": "lora"}, 3, 8)
    experts = text["n_routed_experts"] * text["moe_intermediate_size"] * text["hidden_size"] * 3
    assert plan.memory["weights"] == pytest.approx(2 * (plan.parameters / 8 + experts), rel=1e-3)
    # Forward, recomputed and backward: 2 FLOPs a weight that is gone through, each, and attention.
    products = 6 * plan.active_parameters * plan.length
    assert products < plan.flops < 2 * products
