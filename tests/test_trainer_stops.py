"""Law 8 on tiny models: runs that stop, by plan, by a signal or by a number, and how they go on."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from finetune.errors import CheckpointError, NonFiniteError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_dialogues(tmp_path_factory.mktemp("data") / "train.jsonl", 21)


@pytest.fixture(scope="module")
def weighted_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return runs.write_dialogues(folder / "weighted.jsonl", 21, weights=True)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """The examples of every step that is trained in this process, in order."""
    from finetune.training.trainer import FineTuner

    steps: list[list[int]] = []
    original = FineTuner.get_batch_samples

    def recording(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        steps.append([int(sample) for batch in self._samples for sample in batch])
        return result

    monkeypatch.setattr(FineTuner, "get_batch_samples", recording)
    return steps


# --- law 8 ---------------------------------------------------------------------------------------

# 21 examples in batches of 2 are 11 steps an epoch; of 2 x 3 they are 4; rows of 256 tokens fewer.
CASES: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "plain": ({}, 13, (1, 5, 11)),
    "accumulation": ({"training__gradient_accumulation_steps": 3}, 6, (1, 3, 4)),
    "shuffled": ({"data__group_by_length": False, "training__batch_size": 4}, 8, (1, 3, 6)),
    "packed": ({"data__packing": True}, 5, (1, 2)),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_resumed_run_ends_in_the_same_bits(
    tiny_chatglm: Path, data: Path, tmp_path: Path, seen: list[list[int]], case: str
) -> None:
    changes, steps, stops = CASES[case]
    changes = changes | {"training__max_steps": steps, "training__save_every_steps": 1}
    whole = tmp_path / "whole"
    runs.run_here(runs.config(tiny_chatglm, data, whole, **changes))
    whole_seen = list(seen)
    if case == "plain":  # each epoch has its own order
        assert len({tuple(step) for step in whole_seen}) == steps
    for stop in stops:
        part = tmp_path / f"part-{stop}"
        part.mkdir()
        shutil.copytree(whole / f"checkpoint-{stop}", part / f"checkpoint-{stop}")
        seen.clear()
        summary = runs.run_here(runs.config(tiny_chatglm, data, part, **changes))
        assert summary["resumed_from"] == str(part / f"checkpoint-{stop}")
        assert seen[: steps - stop] == whole_seen[stop:steps]
        for key in ("loss", "learning_rate", "grad_norm"):
            assert runs.history(part, key) == runs.history(whole, key)
        assert runs.adapter_hash(part, steps) == runs.adapter_hash(whole, steps)


def test_saving_and_evaluating_leave_no_trace_in_what_is_learned(
    tiny_chatglm: Path, data: Path, tmp_path: Path
) -> None:
    runs.run_here(runs.config(tiny_chatglm, data, tmp_path / "bare"))
    busy = runs.config(
        tiny_chatglm, data, tmp_path / "busy", training__save_every_steps=2,
        data__validation=str(data), evaluation__every_steps=2, evaluation__at_start=True,
        evaluation__max_samples=5,
    )  # fmt: skip
    runs.run_here(busy)
    assert runs.adapter_hash(tmp_path / "bare", 6) == runs.adapter_hash(tmp_path / "busy", 6)


@pytest.mark.parametrize("family", ["chatglm", "glm", "glm4"])
def test_activation_checkpointing_and_loader_workers_train_the_same_weights(
    request: pytest.FixtureRequest, data: Path, tmp_path: Path, family: str
) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    runs.run_here(runs.config(model, data, tmp_path / "plain", training__max_steps=3))
    saving = runs.config(
        model, data, tmp_path / "saving", training__max_steps=3,
        training__activation_checkpointing=True,
    )  # fmt: skip
    if family == "glm":
        saving["data"]["loader_workers"] = 1
    runs.run_here(saving)
    # What is recomputed has the shapes and the kernels that it had.
    for key in ("loss", "grad_norm"):
        assert runs.history(tmp_path / "saving", key) == runs.history(tmp_path / "plain", key)
    assert runs.adapter_hash(tmp_path / "saving", 3) == runs.adapter_hash(tmp_path / "plain", 3)


def test_a_resumed_run_logs_as_often_as_its_own_config_says(
    tiny_chatglm: Path, data: Path, tmp_path: Path
) -> None:
    first = runs.config(tiny_chatglm, data, tmp_path / "run", training__max_steps=2)
    runs.run_here(first)
    more = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=8, training__log_every_steps=3
    )
    runs.run_here(more)
    assert runs.history(tmp_path / "run", "step")[2:4] == [3, 6]


def test_a_finished_run_that_is_started_again_does_nothing(
    tiny_chatglm: Path, data: Path, tmp_path: Path, seen: list[list[int]]
) -> None:
    settings = runs.config(tiny_chatglm, data, tmp_path / "run", training__max_steps=2)
    first = runs.run_here(settings)
    seen.clear()
    second = runs.run_here(settings)
    assert seen == []
    assert (second["steps"], second["train_loss"]) == (2, first["train_loss"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training__batch_size": 3}, "training.batch_size"),
        ({"training__seed": 7}, "training.seed"),
        ({"method__rank": 8}, "method.rank"),
        ({"data__max_length": 128}, "data.max_length"),
    ],
)
def test_another_runs_checkpoint_is_refused_with_what_differs(
    tiny_chatglm: Path, data: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    runs.run_here(runs.config(tiny_chatglm, data, tmp_path / "run", training__max_steps=1))
    before = (tmp_path / "run/config.yaml").read_bytes()
    changed = runs.config(tiny_chatglm, data, tmp_path / "run", **changes)
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")) as caught:
        runs.run_here(changed)
    assert caught.value.exit_code == 3
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def test_other_data_and_another_base_are_refused(
    tiny_chatglm: Path, data: Path, weighted_data: Path, tmp_path: Path
) -> None:
    import tiny

    runs.run_here(runs.config(tiny_chatglm, data, tmp_path / "run", training__max_steps=1))
    with pytest.raises(CheckpointError, match="training examples"):
        runs.run_here(runs.config(tiny_chatglm, weighted_data, tmp_path / "run"))
    other = tiny.save_model(tmp_path / "other", "chatglm", seed=1)
    with pytest.raises(CheckpointError, match="base model's weights"):
        runs.run_here(runs.config(other, data, tmp_path / "run"))


# --- when something is wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("location", ["loss", "gradient"])
def test_a_number_that_is_not_finite_ends_the_run_before_it_is_learned(
    tiny_chatglm: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    from finetune.training.trainer import FineTuner

    original = FineTuner.compute_loss

    def poisoned(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 3 and location == "loss":
            self._losses[-1] = self._losses[-1] * float("nan")
        if self.state.global_step == 3 and location == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(FineTuner, "compute_loss", poisoned)
    settings = runs.config(tiny_chatglm, data, tmp_path / "run", training__save_every_steps=1)
    with pytest.raises(NonFiniteError, match=f"the {location} of step 4") as caught:
        runs.run_here(settings)
    assert caught.value.exit_code == 4
    assert str(caught.value).count(f"{data}:") == 2  # a batch of two examples
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert all(
        torch.isfinite(w).all() for w in runs.weights(tmp_path / "run/checkpoint-3").values()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved_and_cost_no_checkpoint(
    tiny_chatglm: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    from finetune.training.callbacks.schedule import Schedule

    original = Schedule.on_step_end

    def poisoned(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 4:  # after the guard, by the update itself
            weight = next(p for p in others["model"].parameters() if p.requires_grad)
            weight.data.view(-1)[-1] = value
        original(self, args, state, control, **others)

    monkeypatch.setattr(Schedule, "on_step_end", poisoned)
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__save_every_steps=2,
        training__keep_checkpoints=1, training__max_steps=6,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="the weights after step 4 are not finite") as caught:
        runs.run_here(settings)
    assert caught.value.exit_code == 4
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert runs.run_here(settings)["resumed_from"] == str(tmp_path / "run/checkpoint-2")


def test_an_absurd_learning_rate_ends_the_run_with_exit_code_4_and_no_checkpoint(
    tiny_chatglm: Path, data: Path, tmp_path: Path
) -> None:
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=2,
        training__learning_rate=1e308, training__warmup_steps=0,
        data__validation=str(data), evaluation__generate=False,
    )  # fmt: skip
    with pytest.raises(NonFiniteError) as caught:
        runs.run_here(settings)
    assert caught.value.exit_code == 4
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run/best.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_so_by_the_exit_code(
    tiny_chatglm: Path, data: Path, tmp_path: Path, number: int, code: int
) -> None:
    changes = {
        "training__max_steps": 4000,
        "training__lr_schedule": "constant",
        "training__warmup_steps": 0,
    }
    settings = runs.config(tiny_chatglm, data, tmp_path / "run", **changes)
    process = runs.start_command(settings, tmp_path, launcher=False)
    runs.wait_for_steps(tmp_path / "run", process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert len(runs.history(tmp_path / "run")) == step
    # Going on from there ends in the same bits as a run that was never stopped.
    more = changes | {"training__max_steps": step + 2}
    runs.run_here(runs.config(tiny_chatglm, data, tmp_path / "run", **more))
    runs.run_here(runs.config(tiny_chatglm, data, tmp_path / "whole", **more))
    assert runs.adapter_hash(tmp_path / "run", step + 2) == runs.adapter_hash(
        tmp_path / "whole", step + 2
    )


@pytest.mark.slow
def test_a_signal_to_torchrun_makes_all_processes_stop_after_the_same_step(
    tiny_chatglm: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = runs.config(tiny_chatglm, data, run, training__max_steps=4000)
    process = runs.start_command(settings, tmp_path, processes=2)
    runs.wait_for_steps(run, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    (saved,) = run.glob("checkpoint-*")
    assert len(runs.history(run)) == int(saved.name.removeprefix("checkpoint-"))
    assert process.returncode == 1  # torchrun's own
    assert "second signal" not in err
