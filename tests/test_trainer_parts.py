"""What is overridden of transformers' Trainer, each method alone: shares of rows, guard, errors, evaluation."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import TrainerState

from finetune.distributed.signals import StopFlag
from finetune.errors import CheckpointError, DataError, NonFiniteError, ProcessError
from finetune.training import trainer as module
from finetune.training.callbacks.progress import ProgressCallback
from finetune.training.callbacks.schedule import RunComplete
from finetune.training.objective import StepCounts, SupervisedTokens
from finetune.training.trainer import FineTuner


def tuner(**others: Any) -> Any:
    """A trainer with what a test needs of it, and nothing else."""
    one: Any = FineTuner.__new__(FineTuner)
    one.stop, one.progress, one.sharing, one._loader = StopFlag(), ProgressCallback(), 1, None
    one._samples, one._losses, one.state = [], [], TrainerState(global_step=3, max_steps=9)
    one._has_begun = False
    one.data = SimpleNamespace(
        lengths=np.array([4, 2, 3], np.int32), objective=SupervisedTokens(), feed=None,
        places=lambda samples: " ".join(str(list(map(int, sample))) for sample in samples),
    )  # fmt: skip
    one.is_deepspeed_enabled = False
    one.accelerator = SimpleNamespace(scaler=None)
    for name, value in others.items():
        setattr(one, name, value)
    return one


# --- shares --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "sharing", "part"), [(3, 1, 3), (3, 2, 1), (2, 2, 1), (1, 4, 0)])
def test_processes_that_share_rows_load_the_same_batches(
    rank: int, sharing: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rank_and_world", lambda: (rank, 4))
    asked: dict[str, Any] = {}
    one = tuner(sharing=sharing)
    one.data.loader = lambda **options: asked.update(options) or "loader"
    one.args = SimpleNamespace(dataloader_num_workers=2, ddp_timeout=90)
    assert one.get_train_dataloader() == one._loader == "loader"
    assert asked == {"rank": part, "workers": 2, "seconds": 90}


@pytest.mark.parametrize(("sharing", "weight"), [(1, 8.0), (2, 4.0)])
def test_what_is_counted_by_all_who_share_a_row_counts_once(
    sharing: int, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "reduce_sum", lambda numbers: [4 * number for number in numbers])
    one = tuner(sharing=sharing)
    batch = {
        "labels": torch.tensor([[-100, 1, 2]]), "input_ids": torch.zeros(1, 3),
        "sample_ids": torch.tensor([0]),
    }  # fmt: skip
    batches, normaliser = one.get_batch_samples(iter([dict(batch), dict(batch)]), 1, None)
    assert len(batches) == 1
    assert "sample_ids" not in batches[0]
    assert normaliser == weight
    assert one.counts == StepCounts(weight, weight, 16.0 / sharing, 12.0 / sharing)
    assert one.progress.throughput.steps == 1
    empty = {**batch, "labels": torch.full((1, 3), -100)}
    assert one.get_batch_samples(iter([empty]), 1, None)[1] == 1.0  # nothing is divided by zero


def test_a_loss_is_summed_over_processes_whose_gradients_are_averaged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "rank_and_world", lambda: (1, 4))
    one = tuner()
    one.data.objective = SimpleNamespace(loss=lambda model, inputs, total: torch.tensor(3.0))
    assert float(one.compute_loss(None, {}, num_items_in_batch=2)) == 12.0
    assert one.compute_loss(None, {}, return_outputs=True) == (torch.tensor(12.0), None)
    assert [float(loss) for loss in one._losses] == [3.0, 3.0]
    assert one.floating_point_ops({}) == 0


# --- the guard -----------------------------------------------------------------------------------

NAN = float("nan")


def guarded(losses: list[float], norm: float | None, **others: Any) -> Any:
    one = tuner(**others)
    one._losses = [torch.tensor(loss) for loss in losses]
    one._samples = [np.array([number]) for number in range(len(losses))]
    one._guard(None if norm is None else torch.tensor(norm))
    return one


@pytest.mark.parametrize(
    ("losses", "norm", "said"),
    [
        ([1.0, NAN, 2.0], 1.0, r"the loss of step 4 .*\n  \[1\]\n"),
        ([NAN, 1.0, float("inf")], 1.0, r"the loss of step 4 .*\n  \[0\] \[2\]\n"),
        ([1.0, 2.0], NAN, r"the gradient of step 4 .*\n  \[0\] \[1\]\n"),
        ([1.0, NAN], NAN, r"the loss of step 4 .*\n  \[1\]\n"),
        ([1.0, NAN], None, r"the loss of step 4 .*\n  \[1\]\n"),
    ],
)
def test_what_is_not_finite_is_named_with_the_examples_of_its_forward_passes(
    losses: list[float], norm: float | None, said: str
) -> None:
    with pytest.raises(NonFiniteError, match=f"(?s){said}"):
        guarded(losses, norm)


@pytest.mark.parametrize("norm", [None, 0.0, 1e30])
def test_a_step_of_finite_numbers_goes_on(norm: float | None) -> None:
    assert not guarded([1.0, 2.0], norm).stop.is_set


def test_before_each_step_every_process_hears_of_a_signal() -> None:
    stop = StopFlag()
    stop.local_signal = 15
    assert guarded([1.0], 1.0, stop=stop).stop.agreed_signal == 15


def test_a_process_whose_numbers_are_fine_ends_for_the_error_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def others() -> Any:
        yield
        raise NonFiniteError("of process 1")

    monkeypatch.setattr(module, "fail_together", others)
    stop: Any = SimpleNamespace(sync=lambda outcome: 1)
    with pytest.raises(NonFiniteError, match="of process 1"):
        guarded([1.0], 1.0, stop=stop)


@pytest.mark.parametrize(
    ("scaler", "sharded", "norm", "seen"),
    [
        (None, False, 2.0, [2.0]),
        ("scaler", False, float("inf"), [None]),  # loss scaling makes it normal
        (None, True, 2.0, []),  # the engine's guard has looked
    ],
)
def test_the_norm_is_looked_at_once_and_not_where_losses_are_scaled(
    scaler: Any, sharded: bool, norm: float, seen: list[Any]
) -> None:
    found: list[Any] = []
    one = tuner(_guard=found.append, is_deepspeed_enabled=sharded)
    one.accelerator.scaler = scaler
    assert one._get_grad_norm(None, norm) == norm
    assert found == seen


def test_without_clipping_the_norm_is_that_of_all_gradients() -> None:
    asked: list[float] = []
    one = tuner(_guard=lambda norm: None, trained_weights=[1])
    one.accelerator.clip_grad_norm_ = lambda weights, most: asked.append(most) or 5.0
    one.args = SimpleNamespace(max_grad_norm=0.5)
    assert (one._get_grad_norm(None), one._clip_grad_norm(None)) == (5.0, 5.0)
    assert asked == [float("inf"), 0.5]


def test_gradients_are_forgotten_of_what_is_trained() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    model.weight.grad = torch.ones(2, 2)
    one = tuner(model=model)
    one._forget_gradients()
    assert model.weight.grad is None
    assert one.trained_weights == [model.weight]


# --- training mode ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_switching_to_training_is_left_out_only_where_it_changes_nothing(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1))
    model.train(training)

    def step() -> None:
        with module._already_training(model):
            model.train()
            assert model[0].training
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        step()
    model.eval()  # the method is there again
    assert not any(part.training for part in model.modules())


# --- the end of a run ------------------------------------------------------------------------------


class Run:
    """A run whose loop raises or returns, and what is done then."""

    def __init__(self, ending: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []

        def train(_: Any, resume: Any, **__: Any) -> Any:
            if isinstance(ending, BaseException):
                raise ending
            return ending

        monkeypatch.setattr(Trainer, "train", train)
        self.worker = SimpleNamespace(kill=lambda: self.events.append("kill"))
        monkeypatch.setattr(module, "active_children", lambda: [self.worker])
        saver = SimpleNamespace(
            finish=lambda: self.events.append("finish"),
            training=SimpleNamespace(deterministic=False),
        )
        loader = SimpleNamespace(close=lambda: self.events.append("close"))
        stop = SimpleNamespace(install=lambda: None)
        wrapped = nn.Linear(1, 1)
        wrapped.__dict__["zero_grad"] = "ours"
        self.tuner = tuner(saver=saver, _loader=loader, stop=stop, model_wrapped=wrapped)


def test_a_run_that_is_done_waits_for_its_last_save_and_ends_its_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for ending, result in (("result", "result"), (RunComplete(), None)):
        run = Run(ending, monkeypatch)
        assert run.tuner.train() == result
        assert run.events == ["finish", "close"]
        assert "zero_grad" not in run.tuner.model_wrapped.__dict__


@pytest.mark.parametrize(
    ("error", "kind", "events"),
    [
        (DataError("x"), DataError, ["finish", "close", "kill"]),
        (NonFiniteError("x"), NonFiniteError, ["finish", "close", "kill"]),
        (ProcessError("x"), ProcessError, ["close", "kill"]),  # the others may be gone
        (KeyError("x"), KeyError, ["kill"]),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), ProcessError, ["kill"]),
        (RuntimeError("of torch"), RuntimeError, ["kill"]),
    ],
)  # fmt: skip
def test_an_error_lets_a_save_end_that_all_processes_began_and_leaves_no_worker(
    error: Exception, kind: type[Exception], events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(error, monkeypatch)
    with pytest.raises(kind) as caught:
        run.tuner.train()
    assert run.events == events
    assert (caught.value is error) is (kind is type(error))
    if caught.value is not error:
        assert "process 0: a loader process failed: DataLoader worker" in str(caught.value)


@pytest.mark.parametrize("begun", [False, True])
def test_what_fails_between_two_steps_of_a_resumed_run_is_not_called_the_checkpoints_fault(
    begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ValueError("broken")
    run = Run(error, monkeypatch)
    if begun:
        monkeypatch.setattr(module.Trainer, "training_step", lambda *_: torch.tensor(1.0))
        run.tuner.training_step(nn.Linear(1, 1))
    monkeypatch.setattr(module, "reduce_sum", lambda numbers: numbers)
    # No loss of this step is there yet; without a step before it, states are opened behind this.
    run.tuner.get_batch_samples(iter([]), 1, None)
    with pytest.raises(ValueError if begun else CheckpointError, match="broken"):
        run.tuner.train("checkpoint-2")


def test_an_error_of_the_save_does_not_hide_the_one_that_ended_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(DataError("first"), monkeypatch)

    def finish() -> None:
        raise ProcessError("second")

    run.tuner.saver.finish = finish
    with pytest.raises(DataError, match="first"):
        run.tuner.train()


@pytest.mark.parametrize(("rank", "step"), [(0, 0), (1, 0), (0, 5), (2, 3)])
def test_dropout_is_another_in_every_process_and_behind_every_checkpoint(
    rank: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rank_and_world", lambda: (rank, 4))
    model = nn.Dropout().eval()
    begun: list[Any] = []
    saver = SimpleNamespace(training=SimpleNamespace(seed=7))
    one = tuner(model=model, saver=saver, add_callback=lambda callback: None)
    one.train = lambda folder: begun.append((folder, float(torch.rand(())), model.training))
    one.run(Path("checkpoint-5") if step else None, step)
    torch.manual_seed(7 + rank + step * 2**32)
    assert begun == [("checkpoint-5" if step else None, float(torch.rand(())), True)]


# --- evaluation ------------------------------------------------------------------------------------


def evaluating(scores: dict[str, float] | None, **others: Any) -> Any:
    logged: list[Any] = []
    heard: list[Any] = []
    validation = SimpleNamespace(
        section=SimpleNamespace(every_steps=2), scores=lambda model, step: scores
    )
    handler = SimpleNamespace(
        on_evaluate=lambda args, state, control, metrics: heard.append(metrics) or "control"
    )
    one = tuner(
        validation=validation, trained_weights=[], model=None, log=logged.append, args=None,
        callback_handler=handler, control=None, logged=logged, heard=heard,
    )  # fmt: skip
    for name, value in others.items():
        setattr(one, name, value)
    return one


def test_scores_are_logged_and_heard_under_names_of_evaluation() -> None:
    one = evaluating({"loss": 1.0, "bleu-4": 2.0})
    expected = {"eval_loss": 1.0, "eval_bleu-4": 2.0}
    assert one.evaluate() == expected
    assert (one.logged, one.heard, one.control) == ([expected], [expected], "control")


def test_an_evaluation_that_a_signal_aborts_is_not_logged_and_the_run_hears_of_the_signal() -> None:
    one = evaluating(None)
    one.stop.local_signal = 15
    assert one.evaluate() == {}
    assert (one.logged, one.heard) == ([], [{}])
    assert one.stop.is_set


def test_nothing_is_measured_without_held_out_data_or_of_weights_that_are_not_finite() -> None:
    assert evaluating({"loss": 1.0}, validation=None).evaluate() == {}
    with pytest.raises(NonFiniteError, match="after step 3"):
        evaluating({"loss": 1.0}, trained_weights=[torch.tensor([NAN])]).evaluate()


# --- the log -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_a_loss_is_logged_with_speed_and_without_an_epoch_where_there_is_none(
    streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start: logged.append(logs))
    one = tuner()
    one.data.feed = "feed" if streamed else None
    one.state.epoch = 0.5
    one.log({"loss": 1.0})
    one.log({"eval_loss": 1.0})
    one.log({"train_runtime": 1.0, "loss": 2.0})
    assert len(logged) == 2
    assert logged[0].keys() >= {"loss", "tokens_per_second", "padding", "memory_gb"}
    assert logged[1] == {"eval_loss": 1.0}
    assert one.state.epoch == (None if streamed else 0.5)


def test_the_mean_loss_is_that_of_all_logged_ones() -> None:
    one = tuner()
    assert one.mean_loss() is None
    one.state.log_history = [{"loss": 1.0}, {"eval_loss": 9.0}, {"loss": 2.0}]
    assert one.mean_loss() == 1.5


def test_saving_is_no_time_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("finetune.training.callbacks.progress.time.monotonic", lambda: clock[0])
    one = tuner()
    one.progress.throughput.start()
    one.progress.throughput.steps = 2
    clock[0] += 4

    def save(trainer: Any) -> None:
        assert trainer is one
        clock[0] += 60

    one._save_with(save)
    assert one.progress.throughput.numbers()["seconds_per_step"] == 2.0
