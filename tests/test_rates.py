"""The optimizer's groups, the rates that a schedule says of a step, and what a run starts from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from finetune import methods
from finetune.config.schema import LoraMethod, ModelSection, PTuningV2Method
from finetune.errors import ConfigError
from finetune.training import adapter_start, prepare_model
from finetune.training.adapter_start import start_from_adapter
from finetune.training.arguments import Rates
from finetune.training.optimizer import groups_of, muon, set_rates, warm_up, warmed_up


def scheduler_of(*bases: float, share: Any = lambda step: 1 / (step + 1)) -> Any:
    weights = [{"params": [nn.Parameter(torch.ones(1))], "lr": base} for base in bases]
    return LambdaLR(torch.optim.SGD(weights), share)


def test_the_rates_are_those_of_the_step_that_the_schedule_has_come_to() -> None:
    scheduler = scheduler_of(1.0, 0.5)
    scheduler.last_epoch = 3
    scheduler.optimizer.param_groups[0]["lr"] = torch.tensor(9.0)  # as torchao's are
    for given in (scheduler, SimpleNamespace(scheduler=scheduler)):
        set_rates(given)
        rates = [group["lr"] for group in scheduler.optimizer.param_groups]
        assert isinstance(rates[0], torch.Tensor)
        assert [float(rate) for rate in rates] == [0.25, 0.125]
        assert scheduler.get_last_lr() == [0.25, 0.125]
    set_rates(SimpleNamespace())  # of a kind that has no shares


@pytest.mark.parametrize(("steps", "first"), [(0, 1.0), (3, 0.25)])
def test_a_warm_up_goes_before_the_shares_of_every_group(steps: int, first: float) -> None:
    scheduler = scheduler_of(1.0, 2.0)
    warm_up(scheduler, steps)
    set_rates(scheduler)
    assert scheduler.get_last_lr() == [first, 2 * first]


def test_the_first_step_behind_the_warm_up_is_the_plain_schedules() -> None:
    shares = [warmed_up(lambda step: 10.0 + step, 2, step) for step in range(4)]
    assert shares == [1 / 3, 2 / 3, 12.0, 13.0]


@pytest.mark.parametrize("for_muon", [False, True])
def test_weights_alike_in_rate_decay_and_optimizer_are_one_group(for_muon: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.still = nn.Linear(2, 2).requires_grad_(False)

        def get_output_embeddings(self) -> None:
            return None

    model = Model()
    groups = groups_of(
        model, Rates(1.0, {r"^b\.": 0.5}), 0.1, {"a.weight", "b.weight"}, for_muon=for_muon
    )
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = {
        (tuple(names[id(w)] for w in one["params"]), one["lr"], one["weight_decay"], one.get("muon"))
        for one in groups
    }  # fmt: skip
    matrix, rest = (True, False) if for_muon else (None, None)
    assert found == {
        (("a.weight",), 1.0, 0.1, matrix), (("a.bias",), 1.0, 0.0, rest),
        (("b.weight",), 0.5, 0.1, matrix), (("b.bias",), 0.5, 0.0, rest),
    }  # fmt: skip
    if for_muon:
        made = muon(groups, {"betas": (0.8, 0.9), "eps": 1e-3})
        plain = [group for group in made.param_groups if not group["muon"]]
        assert {(group["betas"], group["eps"]) for group in plain} == {((0.8, 0.9), 1e-3)}
    with pytest.raises(ConfigError, match="'tower' is in the name of no weight"):
        groups_of(model, Rates(1.0, {"tower": 0.5}), 0.1, set(), for_muon=False)


# --- what a run starts from ------------------------------------------------------------------------


def prepared(adapter: str | None, *, apart: bool = False) -> Any:
    model = nn.Linear(2, 2)
    if apart:
        model.weight.ds_id = 0  # type: ignore[attr-defined]
    section = ModelSection(path="base", adapter=adapter)
    return SimpleNamespace(model=model, method=LoraMethod(rank=4, alpha=8), section=section)


def test_a_checkpoint_of_the_run_takes_the_adapters_place_though_that_has_gone() -> None:
    start_from_adapter(prepared("nowhere"), resumed=True)
    start_from_adapter(prepared(None), resumed=False)
    with pytest.raises(ConfigError, match="not a directory"):
        start_from_adapter(prepared("nowhere"), resumed=False)
    with pytest.raises(ConfigError, match="without ZeRO-3"):
        start_from_adapter(prepared("nowhere", apart=True), resumed=False)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"r": 8}, "r 8 (now 4)"),
        ({"lora_alpha": 32}, "lora_alpha 32 (now 8.0)"),
        ({"use_rslora": True}, "use_rslora True (now False)"),
        ({"use_dora": True}, "use_dora True (now False)"),
        ({"use_dora": None, "r": 2}, "r 2 (now 4), use_dora None (now False)"),
        ({"peft_type": "PREFIX_TUNING"}, "is of method.kind ptuning_v2, not lora; set method"),
    ],
)
def test_every_option_that_shapes_an_adapter_must_be_that_of_the_run(
    changed: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    saved = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "use_dora": False,
    } | changed  # fmt: skip
    restored: list[Any] = []
    monkeypatch.setattr(adapter_start, "find_source", lambda path: (path, ["the best of its run"]))
    monkeypatch.setattr(adapter_start, "adapter_config", lambda folder: saved)
    monkeypatch.setattr(adapter_start, "local_folder", lambda path, revision: Path(path))
    monkeypatch.setattr(adapter_start, "check_base", lambda folder, base: [f"of {base}"])
    monkeypatch.setattr(methods, "restore", lambda model, folder: restored.append(folder))
    if said is None:
        start_from_adapter(prepared("there"), resumed=False)
        assert capsys.readouterr().out.splitlines() == [
            "the best of its run", "of base", "starting from the adapter in there",
        ]  # fmt: skip
        assert restored == [Path("there")]
        return
    with pytest.raises(ConfigError) as caught:
        start_from_adapter(prepared("there"), resumed=False)
    assert said in str(caught.value)
    assert restored == []


def test_a_prefix_goes_on_from_one_whose_length_the_weights_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    restored: list[Any] = []
    monkeypatch.setattr(adapter_start, "find_source", lambda path: (path, []))
    monkeypatch.setattr(adapter_start, "adapter_config", lambda folder: {"peft_type": "PREFIX_TUNING", "r": 9})  # fmt: skip
    monkeypatch.setattr(adapter_start, "local_folder", lambda path, revision: Path(path))
    monkeypatch.setattr(adapter_start, "check_base", lambda folder, base: [])
    monkeypatch.setattr(methods, "restore", lambda *given: restored.append(given))
    one = prepared("there")
    one.method = PTuningV2Method()
    start_from_adapter(one, resumed=False)
    assert restored == [(one.model, Path("there"))]


# --- small parts of a prepared model -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("deepspeed", "bf16", "fp16", "casts"),
    [
        (None, False, False, False), (None, True, False, True), (None, False, True, True),
        ({}, True, False, False), ({}, False, True, False),
    ],
)  # fmt: skip
def test_autocast_surrounds_a_pass_of_narrow_computation_without_deepspeed(
    deepspeed: Any, bf16: bool, fp16: bool, casts: bool
) -> None:
    one: Any = SimpleNamespace(deepspeed=deepspeed, arguments=SimpleNamespace(bf16=bf16, fp16=fp16))
    assert prepare_model.PreparedModel.casts.fget(one) is casts  # type: ignore[attr-defined]


def test_a_base_is_remembered_by_its_full_path_and_a_hub_id_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert prepare_model._lasting("model") == str(tmp_path / "model")
    assert prepare_model._lasting("org/name") == "org/name"


def test_the_width_is_that_of_the_text() -> None:
    assert prepare_model._hidden_size({"hidden_size": 32}) == 32
    wide = {"hidden_size": 7, "text_config": {"hidden_size": 64}}
    assert prepare_model._hidden_size(wide) == 64
    assert prepare_model._hidden_size({"hidden_size": 32, "text_config": None}) == 32


@pytest.mark.parametrize("parts", [1, 2])
def test_rows_are_shared_out_where_heads_allow_it(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(prepare_model, "num_heads", lambda folder: (4, 2))
    monkeypatch.setattr(prepare_model, "check_heads", lambda *given: asked.append(given))
    monkeypatch.setattr(prepare_model, "split_of_this_process", lambda parts: f"of {parts}")
    found: Any = prepare_model._split(parts, Path("x"))
    assert found == f"of {parts}"
    assert asked == ([] if parts == 1 else [(2, 4, 2)])
