"""Parts of the loop on their own: rates, schedule of evaluations, random streams, objectives, guards."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch
from torch import nn

from finetune import methods
from finetune.config.schema import EvaluationSection, LoraMethod, TrainingSection
from finetune.distributed import device
from finetune.distributed.device import preserve_rng
from finetune.distributed.signals import StopFlag
from finetune.errors import ConfigError, ModelError, NonFiniteError
from finetune.training.arguments import Rates
from finetune.training.callbacks.schedule import Schedule
from finetune.training.checkpointing import check_weights
from finetune.training.run_data import RunData

# --- learning rates ------------------------------------------------------------------------------


def test_lora_plus_raises_b_and_not_a() -> None:
    rates = Rates(0.01, scale=methods.rate_scale(LoraMethod(lora_plus_ratio=16)))
    assert rates.of("model.layers.0.q_proj.lora_B.default.weight") == pytest.approx(0.16)
    assert rates.of("model.layers.0.q_proj.lora_A.default.weight") == 0.01
    assert not rates.is_one


def test_the_first_pattern_that_is_found_decides() -> None:
    rates = Rates(1.0, {"vision.transformer": 0.1, "vision": 0.5})
    assert [rates.of(name) for name in ("vision.transformer.0", "vision.proj", "layers.0")] == [
        0.1, 0.5, 1.0,
    ]  # fmt: skip
    assert Rates(1.0).is_one
    with pytest.raises(ConfigError, match="'tower' is in the name of no weight"):
        Rates(1.0, {"tower": 0.5}).check(["vision.proj"])


def test_norms_and_biases_keep_their_size_at_every_learning_rate(
    tiny_chatglm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.training.trainer import FineTuner

    seen: dict[str, tuple[float, float]] = {}
    original = FineTuner.create_optimizer

    def created(self: Any, *arguments: Any, **others: Any) -> Any:
        optimizer = original(self, *arguments, **others)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                seen[names[parameter]] = group["lr"], group["weight_decay"]
        return optimizer

    monkeypatch.setattr(FineTuner, "create_optimizer", created)
    data = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=1, training__weight_decay=0.1,
        training__learning_rate=1e-3, training__learning_rates={"layers.0": 1e-4},
    )  # fmt: skip
    settings["method"] = {"kind": "full"}
    runs.run_here(settings)
    for name, (rate, decay) in seen.items():
        is_small = "layernorm" in name or name.endswith("bias")
        assert decay == (0.0 if is_small else 0.1), name
        assert rate == (1e-4 if "layers.0" in name else 1e-3), name
    assert {decay for _, decay in seen.values()} == {0.0, 0.1}


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40])
def test_a_seed_that_numpy_has_no_room_for_is_refused_with_the_config(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        TrainingSection(output_dir="x", seed=seed)
    assert TrainingSection(output_dir="x", seed=2**32 - 1).seed == 2**32 - 1


# --- the schedule of the rate ---------------------------------------------------------------------


def applied_rates(*runs_of: dict[str, Any]) -> list[float]:
    """The rate of every optimizer step, over several starts."""
    from finetune.training.trainer import FineTuner

    rates: list[float] = []
    original = FineTuner._guard

    def guarded(self: Any, norm: Any) -> None:
        rates.append(self.optimizer.param_groups[0]["lr"])
        original(self, norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuner, "_guard", guarded)
        for settings in runs_of:
            runs.run_here(settings)
    return rates


@pytest.mark.parametrize(
    ("shape", "warmup", "expected"),
    [
        ("constant", 4, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]),
        ("linear", 2, [1 / 3, 2 / 3, 1.0, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 0, [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("constant", 0, [1.0] * 6),
    ],
)
def test_the_rate_rises_from_the_first_step_on_and_falls_as_the_schedule_says(
    tiny_chatglm: Path, tmp_path: Path, shape: str, warmup: int, expected: list[float]
) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=6, training__learning_rate=0.5,
        training__lr_schedule=shape, training__warmup_steps=warmup,
    )  # fmt: skip
    rates = applied_rates(settings)
    assert rates == pytest.approx([0.5 * share for share in expected])
    assert runs.history(tmp_path / "run", "learning_rate") == pytest.approx(rates)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_run_that_is_made_longer_learns_on_at_the_rates_of_the_longer_one(
    tiny_chatglm: Path, tmp_path: Path, shape: str
) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 4)

    def settings(name: str, steps: int) -> dict[str, Any]:
        return runs.config(
            tiny_chatglm, data, tmp_path / name, training__max_steps=steps,
            training__lr_schedule=shape, training__warmup_steps=1,
        )  # fmt: skip

    extended = applied_rates(settings("run", 2), settings("run", 6))
    whole = applied_rates(settings("whole", 6))[:6]
    assert extended[2:] == pytest.approx(whole[2:])
    assert min(extended) > 0


def test_a_run_of_one_step_learns_something(tiny_chatglm: Path, tmp_path: Path) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=1, training__warmup_steps=0.03
    )
    runs.run_here(settings)
    learned = runs.weights(tmp_path / "run/checkpoint-1")
    assert any(bool(w.abs().max() > 0) for name, w in learned.items() if "lora_B" in name)


def test_deterministic_kernels_change_no_bit_on_a_cpu_and_are_left_as_they_were(
    tiny_glm: Path, tmp_path: Path
) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    found = []
    for chosen in (False, True):
        settings = runs.config(
            tiny_glm, data, tmp_path / str(chosen), training__max_steps=2,
            training__deterministic=chosen,
        )  # fmt: skip
        runs.run_here(settings)
        found.append(runs.weights(tmp_path / str(chosen) / "checkpoint-2"))
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())
    assert not torch.are_deterministic_algorithms_enabled()
    with device.deterministic():
        assert torch.are_deterministic_algorithms_enabled()


# --- when to evaluate ----------------------------------------------------------------------------


def schedule(**options: Any) -> Schedule:
    return Schedule(
        EvaluationSection(every_steps=2, **options),
        training=TrainingSection(output_dir="x", save_every_steps=100), stop=StopFlag(),
        evaluate=dict, save_scores=lambda: None, save_weights=lambda: None,
    )  # fmt: skip


def state(step: int, *scored: int, **others: Any) -> Any:
    log = [{"step": step, "eval_loss": 1.0} for step in scored]
    return SimpleNamespace(
        global_step=step, max_steps=9, log_history=[{"step": 1, "loss": 1.0}, *log], **others
    )


@pytest.mark.parametrize(
    ("step", "scored", "at_start", "due"),
    [
        (4, (), False, True),  # a signal cut it short
        (4, (2,), False, True),
        (4, (4,), False, False),
        (3, (2,), False, False),
        (9, (8,), False, True),  # the last one is always evaluated
        (9, (9,), False, False),
        (0, (), True, True),
        (0, (), False, False),
    ],
)
def test_an_evaluation_that_is_missing_is_repeated_after_a_resume(
    step: int, scored: tuple[int, ...], at_start: bool, due: bool
) -> None:
    assert schedule(at_start=at_start).evaluation_is_due(state(step, *scored)) is due


@pytest.mark.parametrize("anew", [False, True])
def test_only_a_run_that_compares_something_else_forgets_its_best(anew: bool) -> None:
    resumed = state(4, 2, 4, best_metric=1.0, best_global_step=2)
    begun = schedule()
    begun.compares_anew = anew
    begun.on_train_begin(Any, resumed, Any)  # type: ignore[arg-type]
    assert (resumed.best_metric is None, resumed.best_global_step is None) == (anew, anew)


# --- random streams ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.random, lambda: float(torch.rand(()))],
    ids=["python", "numpy", "torch"],
)
def test_an_evaluation_leaves_the_random_streams_where_they_were(draw: Any) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    draw()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with preserve_rng():
        random.random(), np.random.random(), torch.rand(3)
    assert draw() == expected


# --- finite weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 4])
def test_one_number_that_is_not_finite_is_found_in_any_trained_weight(
    dtype: torch.dtype, value: float, place: int
) -> None:
    first, second = torch.ones(3, 2, dtype=dtype), torch.ones(5, dtype=dtype)
    check_weights([first, torch.ones(0), second], 3)
    second[place] = value
    with pytest.raises(NonFiniteError, match="after step 3"):
        check_weights([first, second], 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_great_numbers_are_finite_though_their_sum_is_not(dtype: torch.dtype) -> None:
    check_weights([torch.full((9,), torch.finfo(dtype).max, dtype=dtype)], 3)


# --- the seam to the loss ------------------------------------------------------------------------


def test_any_objective_trains_through_the_model_s_own_forward_pass(
    tiny_chatglm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.training.loading import batches

    class Margin:
        """The first token's hidden state, squared: no labels, its own normaliser."""

        def normaliser(self, batch: Any) -> float:
            return 10.0 * len(batch["input_ids"])

        def loss(self, model: Any, batch: Any, total: Any) -> torch.Tensor:
            def head_loss(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
                return head(hidden[:, -1]).pow(2).sum() / total

            ids = batch["input_ids"]
            loss: torch.Tensor = model(ids, head_loss=head_loss, use_cache=False).loss
            return loss

    monkeypatch.setattr(batches, "SupervisedTokens", Margin)
    data = runs.write_dialogues(tmp_path / "train.jsonl", 8)
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=6, training__learning_rate=1e-2
    )
    runs.run_here(settings)
    losses = runs.history(tmp_path / "run")
    assert losses[-1] < losses[0]


# --- from an adapter -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny_chatglm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best checkpoint is its first."""
    folder = tmp_path_factory.mktemp("adapter")
    data = runs.write_dialogues(folder / "train.jsonl", 6)
    settings = runs.config(
        tiny_chatglm, data, folder / "run", training__max_steps=2, training__save_every_steps=1
    )
    runs.run_here(settings)
    return folder / "run"


@pytest.mark.parametrize("named", ["run", "run/checkpoint-2"])
def test_a_run_starts_from_an_adapter_and_learns_new_data(
    tiny_chatglm: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    from finetune.training.trainer import FineTuner

    begun: dict[str, torch.Tensor] = {}
    original = FineTuner.train

    def train(self: Any, *arguments: Any, **others: Any) -> Any:
        trained = ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        begun.update({name.replace(".default", ""): p.detach().clone() for name, p in trained})
        return original(self, *arguments, **others)

    monkeypatch.setattr(FineTuner, "train", train)
    data = runs.write_dialogues(tmp_path / "new.jsonl", 6, seed=9)
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=1,
        model__adapter=str(adapter.parent / named),
    )  # fmt: skip
    runs.run_here(settings)
    saved = runs.weights(adapter / "checkpoint-2")
    assert begun.keys() == saved.keys()
    assert all(torch.equal(begun[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method__alpha": 8.0}, "lora_alpha 32"),
        ({"method__rank": 2}, "r 4"),
        ({"method__use_rslora": True}, "use_rslora False"),
        ({"method__use_dora": True}, "use_dora False"),
        ({"method__kind": "ptuning_v2"}, "method.kind lora, not ptuning_v2"),
        ({"method__kind": "full"}, "method.kind lora, not full"),
        ({"model__adapter": "nowhere"}, "not a directory"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    tiny_chatglm: Path, adapter: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    data = adapter.parent / "train.jsonl"
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", **({"model__adapter": str(adapter)} | changes)
    )
    if kind := changes.get("method__kind"):
        settings["method"] = {"kind": kind}
    with pytest.raises(ConfigError, match=said):
        runs.run_here(settings)


@pytest.mark.parametrize("named", ["run", "run/checkpoint-2"])
def test_an_adapter_as_the_model_is_told_where_it_belongs(
    adapter: Path, tmp_path: Path, named: str
) -> None:
    model = adapter.parent / named
    settings = runs.config(model, adapter.parent / "train.jsonl", tmp_path / "run")
    with pytest.raises(ModelError, match=f"model.path to its base and model.adapter to {model}"):
        runs.run_here(settings)


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    import tiny

    other = tiny.save_model(tmp_path / "other", "chatglm", seed=1)
    settings = runs.config(
        other, adapter.parent / "train.jsonl", tmp_path / "run", model__adapter=str(adapter)
    )
    with pytest.raises(ModelError, match="was trained on"):
        runs.run_here(settings)


def test_a_run_has_as_many_steps_as_its_config_or_its_epochs_say() -> None:
    data: Any = SimpleNamespace(plan=SimpleNamespace(steps_per_epoch=7))

    def steps(max_steps: int | None, epochs: float = 1.5) -> int:
        section: Any = SimpleNamespace(max_steps=max_steps, epochs=epochs)
        return RunData.steps(data, section)

    assert steps(None) == 11
    assert steps(None, epochs=2) == 14
    assert steps(5) == 5
