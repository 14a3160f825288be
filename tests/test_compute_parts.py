"""The steps of one evaluation with nothing behind them: what is asked, skipped, kept and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import finetune.evaluation.loss as losses
from finetune.config.schema import DataSection, EvaluationSection
from finetune.data.dialogue.conversation import Message
from finetune.errors import DataError, NonFiniteError
from finetune.evaluation import compute, job, predictions
from finetune.evaluation.options import Options
from finetune.evaluation.store import Results
from finetune.evaluation.targets import Target
from finetune.evaluation.tasks.table import TaskScore, TaskTable
from finetune.generation.backends.choice import BackendChoice, Replying
from finetune.generation.settings import Sampling, Settings
from finetune.generation.structured import Form
from finetune.storage.journal import Journal


def made(tmp_path: Path, *, options: Options | None = None, seen: Any = None, **section: Any) -> Any:  # fmt: skip
    """A job whose prompts are numbers."""
    settings = Settings(
        DataSection(train=[], validation=["d.jsonl"], max_length=100),
        EvaluationSection(max_new_tokens=20, batch_size=4, **section),
    )
    results = Results(tmp_path, "key")
    results.folder.mkdir(parents=True, exist_ok=True)
    stream = SimpleNamespace(counts=SimpleNamespace(say=lambda: None))
    return SimpleNamespace(
        target=Target("t", "model", "base"), settings=settings, options=options or Options(), results=results,
        template=SimpleNamespace(pad_id=0, image=None), losses={"loss": ["examples"]}, prompts=lambda _: stream,
        seen=seen or SimpleNamespace(check=lambda *_: None), tasks_name="tasks-x", is_done=False,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune.distributed.processes as processes

    monkeypatch.setattr(processes, "broadcast_from_rank0", lambda of: of())
    monkeypatch.setattr(processes, "is_rank0", lambda: True)
    monkeypatch.setattr(processes, "joined_processes", nullcontext)


# --- batches, losses, tasks --------------------------------------------------------------------


def test_an_evaluation_goes_on_with_the_batch_size_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune.generation.generate as generate

    asked: list[Any] = []
    monkeypatch.setattr(generate, "rows_at_once", lambda *words: asked.append(words) or 6)
    one = made(tmp_path)
    assert compute._rows_at_once(one, "model", False) == 6
    assert one.results.note("batch_size") is None, "the first process alone writes it down"
    assert compute._rows_at_once(one, "model", True) == 6
    assert asked[-1] == ("model", 4, 120), "a prompt and its reply"
    monkeypatch.setattr(generate, "rows_at_once", lambda *_: 9)
    assert compute._rows_at_once(one, "model", True) == 6


def measured(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> list[Any]:
    asked: list[Any] = []

    def loss(model: Any, examples: Any, collate: Any, *, batch_size: int) -> Any:
        asked.append((examples, batch_size))
        return SimpleNamespace(losses=np.array(values), weights=np.arange(1.0, len(values) + 1))

    monkeypatch.setattr(losses, "validation_loss", loss)
    return asked


def test_a_loss_is_measured_once_and_kept_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(tmp_path)
    collated: list[Any] = []
    monkeypatch.setattr(compute, "Collator", lambda pad, *, image: collated.append((pad, image)))
    one.template.image = "rule"
    one.losses = {"loss": ["a"], "general-1": ["b"]}
    asked = measured(monkeypatch, [3.0, 4.0])
    compute._measure_losses(one, None, False)
    assert one.results.losses("loss") is None
    compute._measure_losses(one, None, True)
    assert asked[2:] == [(["a"], 8), (["b"], 8)]
    found, weights = one.results.losses("general-1")
    assert (found.tolist(), weights.tolist()) == ([3.0, 4.0], [1.0, 2.0])
    compute._measure_losses(one, None, True)
    assert len(asked) == 4
    assert set(collated) == {(0, "rule")}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_loss_that_is_no_number_is_enough_to_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    measured(monkeypatch, [1.0, value, 2.0])
    one = made(tmp_path)
    with pytest.raises(NonFiniteError, match="model: the loss on 1 of 3 held-out examples"):
        compute._measure_losses(one, None, True)
    assert one.results.losses("loss") is None
    one.results.write_losses("loss", np.array([1.0, value]), np.ones(2))
    assert one.results.losses("loss") is None, "kept by an earlier version"


def test_tasks_are_asked_once_with_their_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    asked: list[Any] = []

    def ask(model: Any, template: Any, names: Any, how: Any) -> dict[str, TaskScore]:
        asked.append((names, how))
        return {"mmlu/acc": TaskScore("said", ("q:1", "q:2"), (100.0, 0.0))}

    monkeypatch.setattr(compute, "ask", ask)
    none = made(tmp_path)
    compute._ask_tasks(none, None, 5)
    assert asked == []
    options = Options(tasks=("mmlu",), tasks_data="data")
    one = made(tmp_path, options=options, max_samples=7)
    compute._ask_tasks(one, None, 5)
    compute._ask_tasks(one, None, 5)
    [(names, how)] = asked
    assert (names, how.batch_size, how.max_samples, how.data) == (("mmlu",), 5, 7, "data")
    kept = TaskTable.of(one.results.note("tasks-x"))
    assert kept.scores["mmlu/acc"].ids == ("q:1", "q:2")
    assert kept.described()["mmlu/acc"]["value"] == 50.0


@pytest.mark.parametrize(
    ("score", "low", "high"),
    [(TaskScore("s", value=10.0, error=2.0, n=5), 10 - 3.92, 10 + 3.92), (TaskScore("s", value=10.0, n=5), None, None), (TaskScore("s", error=2.0), None, None)],
)  # fmt: skip
def test_a_score_that_is_no_mean_has_the_interval_of_its_error(
    score: TaskScore, low: float | None, high: float | None
) -> None:
    found = score.described("x")
    assert (found["low"], found["high"], found["n"]) == (
        low if low is None else pytest.approx(low), high if high is None else pytest.approx(high), score.n,
    )  # fmt: skip
    table = TaskTable({"needle/4": TaskScore("s", ("en:4:0",), (100.0,)), "x": score})
    assert table.needles == {"en:4:0": 100.0}
    assert TaskTable({"t/acc": TaskScore("s", ("q",), (1.0,))}).needles == {}
    assert [name for name, _, _ in table.measures()] == ["needle/4"]
    assert TaskTable.of(json.loads(json.dumps(table.note))).scores == table.scores


# --- replies -----------------------------------------------------------------------------------


def replying(**facts: Any) -> Replying:
    return Replying("backend", 50, 3, lambda: facts)  # type: ignore[arg-type]


class Answered:
    """Stands where replies are asked for; keeps how."""

    def __init__(self, patch: pytest.MonkeyPatch, windows: list[int]) -> None:
        self.how: Any = None
        self.behind = -1
        self.windows = windows
        patch.setattr(compute, "answered", self.ask)
        patch.setattr(compute, "predicted", lambda prompt, ids, stopped: SimpleNamespace(unscored_row=row(prompt)))  # fmt: skip

    def ask(self, backend: Any, prompts: Any, how: Any, *, behind: int) -> Iterator[Any]:
        self.how, self.behind = how, behind
        for size in self.windows:
            yield [(f"d:{n}", SimpleNamespace(ids=(1,), stopped=True)) for n in range(size)]


def row(location: str) -> dict[str, Any]:
    said = Message("assistant", "yes")
    return predictions.Prediction(said, said, location=location).unscored_row


def test_replies_are_kept_window_by_window_and_finished_with_their_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []
    seen = SimpleNamespace(check=lambda files, doing: checked.append((files, doing)))
    options = Options(temperature=0.5, seed=11, form=Form(must_call=True))
    one = made(tmp_path, options=options, seen=seen)
    monkeypatch.setattr(compute, "held_out_files", lambda *_: ["files"])
    asked = Answered(monkeypatch, [3, 2])
    compute._generate_replies(one, replying(dtype="x"))
    assert (asked.behind, asked.how.batch_size) == (0, 3)
    assert (asked.how.sampling, asked.how.seed, asked.how.form) == (Sampling(0.5), 11, options.form)
    assert checked == [(["files"], "they were evaluated")]
    facts = one.results.facts
    assert (facts["replies"], facts["batch_size"], facts["dtype"]) == (5, 3, "x")
    asked.behind = -1
    compute._generate_replies(one, replying())
    assert asked.behind == -1, "all are there"


def test_what_was_answered_before_is_counted_and_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = made(tmp_path)
    window = compute.window_size(3)
    Journal(one.results.folder / "answers.jsonl.part", 1).append(row(f"d:{n}") for n in range(window + 3))  # fmt: skip
    monkeypatch.setattr(compute, "held_out_files", lambda *_: [])
    asked = Answered(monkeypatch, [2])
    compute._generate_replies(one, replying())
    assert asked.behind == window
    assert one.results.facts["replies"] == window + 2
    assert f"{window} replies are there already" in capsys.readouterr().out


def test_data_other_than_at_the_start_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def changed(*_: Any) -> None:
        raise DataError("d.jsonl changed")

    one = made(tmp_path, seen=SimpleNamespace(check=changed))
    monkeypatch.setattr(compute, "held_out_files", lambda *_: [])
    Answered(monkeypatch, [1])
    with pytest.raises(DataError, match="changed"):
        compute._generate_replies(one, replying())
    assert one.results.facts is None


def test_without_replies_or_data_nothing_is_generated_and_all_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "held_out_files", lambda *_: [])
    asked = Answered(monkeypatch, [1])
    loss_alone = made(tmp_path / "a", generate=False)
    tasks_alone = made(tmp_path / "b")
    data = tasks_alone.settings.data.model_copy(update={"validation": None})
    tasks_alone.settings = replace(tasks_alone.settings, data=data)
    for one in (loss_alone, tasks_alone):
        compute._generate_replies(one, replying())
        assert one.results.facts["replies"] == 0
    assert asked.behind == -1


def test_a_model_is_opened_for_what_is_missing_and_not_for_an_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import finetune.generation.load as load

    done: list[Any] = []

    class Models:
        def __init__(self, placement: Any) -> None:
            done.append(placement)

        def open(self, path: str, **how: Any) -> Any:
            done.append((path, how))
            return SimpleNamespace(model=path)

    monkeypatch.setattr(load, "Models", Models)
    for name in ("_rows_at_once", "_ask_tasks", "_measure_losses", "_through_model", "_through_endpoint", "_through_vllm", "_generate_replies"):  # fmt: skip
        monkeypatch.setattr(compute, name, lambda *_, name=name: done.append(name) or nullcontext())
    ready, missing, away, fast = (made(tmp_path / name) for name in "abcd")
    ready.is_done = True
    missing.target = Target("m", "model", "base", base="b", like="l")
    away.options = Options(by=BackendChoice(endpoint="openai:m@http://x"))
    fast.options = Options(by=BackendChoice("vllm"))
    compute.run([ready])
    assert done == []
    assert f"evaluated before, kept in {ready.results.folder}" in capsys.readouterr().out
    compute.run([ready, missing])
    steps = ["_rows_at_once", "_ask_tasks", "_measure_losses"]
    assert done[1:] == [("model", {"base": "b", "like": "l"}), *steps, "_through_model", "_generate_replies"]  # fmt: skip
    assert (missing.results.folder / ".lock").exists()
    assert not (ready.results.folder / ".lock").exists()
    done.clear()
    compute.run([away])
    assert done[1:] == ["_through_endpoint", "_generate_replies"]
    done.clear()
    compute.run([fast])
    assert [one for one in done if isinstance(one, str)] == [*steps, "_through_vllm", "_generate_replies"]  # fmt: skip
    placed = [place for place, one in enumerate(done) if one == fast.options.placement]
    assert placed == [0, 5], "ours is let go of before vLLM takes its memory"


# --- a job -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["nothing", "loss", "tasks", "replies"])
def test_a_job_is_done_when_nothing_of_it_is_missing(tmp_path: Path, gone: str) -> None:
    one = made(tmp_path, options=Options(tasks=("mmlu",)))
    whole: Any = job.EvaluationJob(one.target, one.settings, one.options, one.template, one.losses, one.results, one.seen)  # fmt: skip
    if gone != "loss":
        one.results.write_losses("loss", np.ones(1), np.ones(1))
    if gone != "tasks":
        one.results.write_note(whole.tasks_name, {})
    if gone != "replies":
        one.results.journal(1).append([row("d:1")])
        one.results.finish({})
    assert whole.is_done is (gone == "nothing")


def test_the_images_of_the_data_are_among_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    data = tmp_path / "d.jsonl"
    data.write_text("{}\n")
    settings = Settings(DataSection(train=[], validation=[str(data)]), EvaluationSection())
    shown = [SimpleNamespace(images=["a.png", "b.png"]), SimpleNamespace(images=["a.png"])]
    monkeypatch.setattr(job, "read_conversations", lambda *_: shown)
    text, sees = (SimpleNamespace(image=image) for image in (None, "rule"))
    assert job.held_out_files(settings, text) == [data]  # type: ignore[arg-type]
    assert job.held_out_files(settings, sees) == [data, Path("a.png"), Path("b.png")]  # type: ignore[arg-type]  # fmt: skip


# --- the loss of a batch -----------------------------------------------------------------------


def test_the_weights_of_a_row_are_those_of_the_tokens_that_are_predicted() -> None:
    labels = torch.tensor([[5, -100, 6, 7], [-100, -100, -100, 8]])
    assert losses._row_weights({"labels": labels}).tolist() == [2.0, 1.0]
    weights = torch.tensor([[9.0, 9.0, 0.5, 2.0], [9.0, 9.0, 9.0, 0.0]])
    assert losses._row_weights({"labels": labels, "loss_weights": weights}).tolist() == [2.5, 0.0]


def test_every_process_calls_the_head_as_often_whatever_is_left_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def rows(model: Any, inputs: Any, *, num_rows: int) -> torch.Tensor:
        asked.append(num_rows)
        return torch.tensor([float(len(inputs["labels"]))] * num_rows)

    monkeypatch.setattr(losses, "row_losses", rows)
    polled: list[Any] = []
    monkeypatch.setattr(losses, "map_batches", lambda _, batches, work, *, label, should_stop: polled.append(should_stop) or map(work, batches))  # fmt: skip

    class Examples:
        lengths = np.array([3, 9, 5, 7, 4], dtype=np.int32)

        def __len__(self) -> int:
            return len(self.lengths)

        def __getitem__(self, index: int) -> Any:
            return index

    collate = lambda batch: {"sample_ids": 0, "labels": torch.ones(len(batch), 3, dtype=torch.long)}  # noqa: E731  # fmt: skip
    found = losses.validation_loss(SimpleNamespace(device="cpu"), Examples(), collate, batch_size=2, should_stop=bool)  # type: ignore[arg-type]  # fmt: skip
    assert polled == [bool]
    assert asked == [2, 2, 2]
    assert found.losses.tolist() == [1.0, 2.0, 2.0, 2.0, 2.0], "the shortest is alone in the last"
    assert found.weights.tolist() == [2.0] * 5
