"""`training.optimizer`: each learns, resumes to the bit, is refused where it cannot work, and is planned for."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from command_line import ROOT
from config_text import MINIMAL
from safetensors.torch import load_file
from test_counting import SIZES
from torch import nn

from finetune import methods
from finetune.cli.inputs import planned as planned_of
from finetune.config import extras
from finetune.config.load import load_config
from finetune.config.schema import FullMethod, LoraMethod
from finetune.errors import ConfigError
from finetune.methods import optimizers
from finetune.methods.optimizers import MuonWithAdamW, for_counting, matrices
from finetune.models.load import load_model
from finetune.planning.plan import Gpu, Plan

bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'glm4-finetune[qlora]'",
)


def test_muon_updates_matrices_and_adamw_tables_heads_and_the_rest(tiny_chatglm: Path) -> None:
    model = methods.attach(load_model(tiny_chatglm), FullMethod())
    left = {name for name, _ in model.named_parameters()} - matrices(model)
    assert all("norm" in n or "bias" in n or "embedding" in n or "output_layer" in n for n in left)
    assert sum("output_layer" in name or "word_embeddings" in name for name in left) == 2
    tuned = methods.attach(load_model(tiny_chatglm), LoraMethod())
    assert len(matrices(tuned)) == sum(w.requires_grad for w in tuned.parameters())


def two_groups(weights: list[nn.Parameter]) -> MuonWithAdamW:
    groups = [
        {"params": weights[:1], "muon": True, "lr": 0.1, "weight_decay": 0.01},
        {"params": weights[1:], "muon": False, "lr": 0.1, "weight_decay": 0.01},
    ]
    return MuonWithAdamW(groups, betas=(0.9, 0.95), eps=1e-6)


def test_each_part_does_what_torchs_own_optimizer_does() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))]
    theirs = copy.deepcopy(ours)
    both = two_groups(ours)
    apart: list[Any] = [
        torch.optim.Muon(theirs[:1], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[1:], lr=0.1, weight_decay=0.01, betas=(0.9, 0.95), eps=1e-6),
    ]
    for step in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            other.grad = one.grad.clone()
        both.step()
        for optimizer in apart:
            optimizer.step()
        if step == 1:  # a schedule and a resumed run change groups and states under it
            both.load_state_dict(copy.deepcopy(both.state_dict()))
            for group in [*both.param_groups, *(o.param_groups[0] for o in apart)]:
                group["lr"] = 0.02
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def learns_and_resumes(
    model: Path, folder: Path, name: str, *, method: dict[str, Any] | None = None, **changes: Any
) -> None:
    """Six steps in one go and four and two: the same weights, and a lower loss."""
    data = runs.write_dialogues(folder / "train.jsonl", 16)
    for run, steps in (("whole", (6,)), ("cut", (4, 6))):
        for number in steps:
            config = runs.config(
                model, data, folder / run, training__optimizer=name, training__max_steps=number,
                training__lr_schedule="constant", training__warmup_steps=0, **changes,
            )  # fmt: skip
            runs.run_here(config | ({"method": method} if method else {}))
    losses = runs.history(folder / "whole")
    assert losses[-1] < losses[0] - 0.05
    whole, cut = (next((folder / r / "checkpoint-6").glob("*model.safetensors")) for r in ("whole", "cut"))  # fmt: skip
    expected = load_file(cut)
    for key, tensor in load_file(whole).items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.slow
def test_muon_learns_and_resumes_to_the_bit(tiny_glm: Path, tmp_path: Path) -> None:
    learns_and_resumes(tiny_glm, tmp_path, "muon", training__weight_decay=0.1)


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for inner in value.values() for tensor in tensors_in(inner)]
    return [value] if isinstance(value, torch.Tensor) else []


@bitsandbytes
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_bitsandbytes_optimizers_learn_and_resume_to_the_bit(
    name: str, tiny_chatglm: Path, tmp_path: Path
) -> None:
    """All weights, of which the tables are wide enough for 8 bits."""
    learns_and_resumes(tiny_chatglm, tmp_path, name, method={"kind": "full"}, training__learning_rate=1e-3)  # fmt: skip
    state = torch.load(tmp_path / "whole/checkpoint-6/optimizer.pt", weights_only=True)["state"]
    assert ("torch.uint8" in str({t.dtype for t in tensors_in(state)})) == ("8bit" in name)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("  optimizer: adam\n", "must be one of adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, muon"),
        ("  optimizer: muon\ndeepspeed: {zero_stage: 2}\n", "muon does not run under DeepSpeed"),
        ("  optimizer: adamw_8bit\ndeepspeed: {zero_stage: 0}\n", "adamw_8bit does not run under DeepSpeed"),
        ("  optimizer: muon\n  extra: {optim: sgd}\n", "contradicts training.extra.optim"),
        ("  extra: {optim: paged_adamw_32bit}\n", "is set by training.optimizer: paged_adamw"),
    ],
)  # fmt: skip
def test_an_optimizer_that_cannot_work_is_refused_with_the_config(
    more: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(MINIMAL + more, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x\.yaml:9: training") as caught:
        load_config(path)
    assert said in str(caught.value)


def test_muon_is_refused_for_a_prefix_that_has_no_matrix(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    text = MINIMAL.replace("lora", "ptuning_v2") + "  optimizer: muon\n"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="a prefix without prefix_projection has none"):
        load_config(path)


def test_before_data_is_prepared_the_extra_to_install_is_named(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    missing = tmp_path / "there is none.jsonl"
    config = runs.config(tiny_glm, missing, tmp_path / "run", training__optimizer="adamw_8bit")
    with pytest.raises(ConfigError, match=r"pip install 'glm4-finetune\[qlora\]'"):
        runs.run_here(config)


@pytest.fixture(scope="module")
def nine_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    (folder / "config.json").write_text(json.dumps(SIZES))
    return folder


def planned(name: str, folder: Path) -> Plan:
    config = load_config(
        ROOT / "configs/lora.yaml", [f"training.optimizer={name}", f"model.path={folder}"]
    )
    return planned_of(config, Gpu())[1]


def test_a_plan_knows_the_state_of_every_optimizer(nine_billion: Path) -> None:
    # Rank 8 on query_key_value, dense, dense_h_to_4h and dense_4h_to_h of 40 layers.
    widths = 4096 + 4608, 2 * 4096, 4096 + 2 * 13696, 13696 + 4096
    trained = 40 * 8 * sum(widths)
    assert planned("adamw_8bit", nine_billion).memory["optimizer"] == pytest.approx(2.03 * trained, rel=0.01)  # fmt: skip
    muon = planned("muon", nine_billion)
    assert muon.memory["optimizer"] == pytest.approx(4 * trained, rel=0.01)
    assert muon.checkpoint_bytes == pytest.approx(8 * trained, rel=0.01)


def test_muon_takes_a_closure_empty_groups_and_no_tensor_of_more_dimensions() -> None:
    weight, bias = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [weight], "muon": True, "lr": 0.1}, {"params": [bias], "muon": False, "lr": 0.1}, {"params": [], "muon": True, "lr": 0.1}]  # fmt: skip
    optimizer = MuonWithAdamW(groups, betas=(0.9, 0.99), eps=1e-6)
    assert len(optimizer.param_groups) == 2

    def closure() -> torch.Tensor:
        loss = (weight * torch.arange(9.0).view(3, 3)).sum() + bias.sum()
        optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 39.0
    assert not torch.equal(weight.detach(), torch.ones(3, 3))
    assert not torch.equal(bias.detach(), torch.ones(3))
    assert {len(state) for state in optimizer.state.values()} > {0} or len(optimizer.state) == 2
    model = nn.Module()
    model.layer, model.conv = nn.Linear(2, 2), nn.Conv2d(2, 2, 2)
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    assert optimizers.matrices(model) == {"layer.weight"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_of_a_count_updates_what_learns(name: str) -> None:
    model = nn.Module()
    model.layer, model.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    found = for_counting(model, name)
    held = [weight for group in found.param_groups for weight in group["params"]]
    assert {id(weight) for weight in held} == {id(weight) for weight in model.layer.parameters()}
    assert isinstance(found, MuonWithAdamW) is (name == "muon")
    if name == "muon":
        by_kind = {group["muon"]: group["params"] for group in found.param_groups}
        assert by_kind[True][0] is model.layer.weight
        assert by_kind[False][0] is model.layer.bias


def test_states_of_8_bits_are_two_bytes_and_two_scales_for_256_numbers() -> None:
    assert optimizers.STATE_BYTES["adamw_8bit"] * 256 == 2 * (256 + 4)
    assert {name for name, size in optimizers.STATE_BYTES.items() if not size} == {"paged_adamw", "paged_adamw_8bit"}  # fmt: skip
