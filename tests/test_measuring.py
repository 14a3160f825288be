"""The model in between: what an evaluation asks, which checkpoint it chooses, what it leaves as it was."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finetune.config.forgetting import KeepSection
from finetune.config.schema import EvaluationSection
from finetune.data.examples.preparation import ExampleCounts
from finetune.data.examples.stream import START, Position
from finetune.distributed.map_batches import EvaluationStoppedError
from finetune.distributed.signals import StopFlag
from finetune.errors import CheckpointError, DataError, NonFiniteError
from finetune.evaluation.scores.statistics import Measure
from finetune.training.loading import prepare_data, streams
from finetune.training.loading.streams import StreamFeed, from_checkpoint
from finetune.training.measuring import choosing, load, validation
from finetune.training.measuring.choosing import CHOICES, CHOSEN, Chooser
from finetune.training.measuring.keeping import CALLS, LOSS, KeptData
from finetune.training.measuring.validation import Validation

SECTION = EvaluationSection(generate=False)


def kept(**options: Any) -> Any:
    section = KeepSection(**{"loss_margin": 0.25, "score_margin": 4.0} | options)
    return KeptData(section, None, None, (), 1, SECTION)  # type: ignore[arg-type]


def measure(*values: float, name: str = "loss") -> Measure:
    rows = np.array([[value, 1.0] for value in values])
    return Measure((name,), rows, lambda sums: sums[:, :1] / sums[:, 1:])


# --- the choice ------------------------------------------------------------------------------------


def test_a_loss_and_a_score_have_margins_of_their_own() -> None:
    assert [kept().margin(name) for name in (LOSS, CALLS, "calls:x")] == [0.25, 4.0, 4.0]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is judged by: criteria, and the p of the checkpoints before."""
    seen: list[Any] = []
    monkeypatch.setattr(choosing.forgetting, "criteria_of", lambda *given: seen.append(given) or ())
    monkeypatch.setattr(choosing.forgetting, "p_of", lambda criteria: 0.01 * len(seen))
    monkeypatch.setattr(
        choosing.forgetting, "qualifies", lambda criteria, earlier: seen.append(earlier) or True
    )
    return seen


def test_a_checkpoint_is_judged_beside_those_before_it_and_not_beside_itself(
    tmp_path: Path, judged: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    chooser = Chooser(tmp_path, kept())
    both = {"loss": measure(3.0, 2.0), LOSS: measure(1.0, name=LOSS)}
    assert not chooser.chosen(0, both)
    for step in (2, 4):
        assert chooser.chosen(step, both)
    again = Chooser(tmp_path, kept())  # resumed from step 2, whose evaluation is repeated
    assert again.chosen(2, both)
    assert again.chosen(4, both)
    earlier = [seen for seen in judged if isinstance(seen, list)]
    assert [len(one) for one in earlier] == [0, 1, 0, 1]
    _, untuned, margins = judged[0]
    assert margins == {"loss": 4.0, LOSS: 0.25}
    assert untuned["loss"].units.tolist() == both["loss"].units.tolist()
    assert "step 2  beside the untuned model" in capsys.readouterr().out


def test_a_run_that_begins_anew_forgets_the_choices_of_the_one_before(
    tmp_path: Path, judged: list[Any]
) -> None:
    chooser = Chooser(tmp_path, kept())
    chooser.chosen(0, {"loss": measure(3.0)})
    chooser.chosen(2, {"loss": measure(3.0)})
    assert len((tmp_path / CHOICES).read_text().splitlines()) == 1
    chooser.chosen(0, {"loss": measure(5.0)})
    assert not (tmp_path / CHOICES).exists()
    assert Chooser(tmp_path, kept()).chosen(4, {"loss": measure(3.0)})
    assert judged[-1] == []


@pytest.mark.parametrize(
    ("now", "lost"),
    [
        ({"loss": measure(1.0, 2.0)}, "loss"),  # of other data
        ({"loss": measure(1.0), "bleu-4": measure(1.0, name="bleu-4")}, "bleu-4"),
    ],
)
def test_what_cannot_be_compared_is_named_and_nothing_is_chosen(
    now: dict[str, Measure], lost: str, tmp_path: Path, judged: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chooser = Chooser(tmp_path, kept())
    chooser.chosen(0, {"loss": measure(3.0)})
    assert not chooser.chosen(2, now)
    assert f"step 2: the untuned model's {lost} is not known or was of other data" in capsys.readouterr().err  # fmt: skip
    assert judged == []


def test_other_processes_choose_alike_and_write_nothing(
    tmp_path: Path, judged: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    chooser = Chooser(tmp_path, kept())
    chooser.chosen(0, {"loss": measure(3.0)})
    assert chooser.chosen(2, {"loss": measure(3.0)})
    assert list(tmp_path.iterdir()) == []


def test_names_of_any_letters_come_back_from_the_file(tmp_path: Path, judged: list[Any]) -> None:
    named = {name: measure(1.0) for name in ("calls/北", 'a "quoted"', "back\\slash")}
    Chooser(tmp_path, kept()).chosen(0, named)
    assert Chooser(tmp_path, kept()).chosen(2, named)


# --- an evaluation ---------------------------------------------------------------------------------


def validating(monkeypatch: pytest.MonkeyPatch, run_dir: Path, **others: Any) -> Validation:
    losses = SimpleNamespace(
        loss=others.pop("loss", 1.5), scores={"loss": 1.5, "perplexity": 4.5},
        names=("loss",), measure=lambda: measure(1.5),
    )  # fmt: skip
    monkeypatch.setattr(validation, "validation_loss", lambda *_, **__: losses)
    given = {
        "section": SECTION, "examples": None, "prompts": (), "collate": None, "batch_size": 1,
        "run_dir": run_dir, "stop": StopFlag(),
    }  # fmt: skip
    return Validation(**given | others)


def test_an_evaluation_that_draws_leaves_every_random_stream_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = validating(monkeypatch, tmp_path)

    def draws(*_: Any, **__: Any) -> Any:
        random.random(), np.random.random(), torch.rand(1)
        return SimpleNamespace(loss=1.0, scores={"loss": 1.0}, names=("loss",))

    monkeypatch.setattr(validation, "validation_loss", draws)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert one.scores(None, 2) == {"loss": 1.0}
    now = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert now == before


def test_a_signal_aborts_an_evaluation_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = validating(monkeypatch, tmp_path)
    polls: list[Any] = []

    def stopped(*_: Any, should_stop: Any, **__: Any) -> Any:
        polls.append(should_stop())
        one.stop.local_signal = 15  # others have not heard of it yet
        polls.append(should_stop())
        raise EvaluationStoppedError("stopped")

    monkeypatch.setattr(validation, "validation_loss", stopped)
    assert one.scores(None, 2) is None
    assert polls == [False, True]
    assert "step 2  evaluation aborted" in capsys.readouterr().out


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run(
    loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NonFiniteError, match="the validation loss is"):
        validating(monkeypatch, tmp_path, loss=loss).scores(None, 2)


@pytest.mark.parametrize(
    ("metric", "names"), [("loss", {"loss"}), ("perplexity", {"loss", "perplexity"})]
)
def test_the_loss_and_the_score_that_chooses_are_told(
    metric: str, names: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = SimpleNamespace(best_metric=metric)
    found = validating(monkeypatch, tmp_path, section=section).scores(None, 2)
    assert found is not None
    assert found.keys() == names


@pytest.mark.parametrize("rank", ["0", "1"])
def test_replies_are_scored_and_kept_by_the_leading_process(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    asked: list[Any] = []

    def evaluated(model: Any, prompts: Any, **options: Any) -> Any:
        asked.append((prompts, options["max_new_tokens"], options["batch_size"]))
        return SimpleNamespace(scores={"bleu-4": 7.0, "chrf": None}, predictions=())

    monkeypatch.setattr(validation, "evaluate_model", evaluated)
    monkeypatch.setattr(validation, "write_predictions", lambda path, rows: path.touch())
    section = SimpleNamespace(best_metric="bleu-4", max_new_tokens=5, batch_size=3)
    one = validating(monkeypatch, tmp_path, section=section, prompts=("a", "b"))
    assert one.scores(None, 2) == {"loss": 1.5, "bleu-4": 7.0}
    assert asked == [(("a", "b"), 5, 3)]
    written = ["predictions-2.jsonl"] if rank == "0" else []
    assert [path.name for path in tmp_path.iterdir()] == written


def test_what_is_kept_is_measured_beside_and_the_choice_is_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []

    class Chooses:
        def chosen(self, step: int, measures: Any) -> bool:
            chosen.append((step, list(measures)))
            return True

    general = SimpleNamespace(measures=lambda model, stop: {LOSS: measure(2.0, 4.0, name=LOSS)})
    one = validating(monkeypatch, tmp_path, kept=general, chooser=Chooses())
    assert one.scores(None, 2) == {"loss": 1.5, LOSS: 3.0, CHOSEN: 1.0}
    assert chosen == [(2, ["loss", LOSS])]


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("choose", ["best_metric", "domain_without_forgetting"])
def test_an_evaluation_asks_what_the_section_says(
    generate: bool, choose: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialogues = [SimpleNamespace(tools=()), SimpleNamespace(tools=("t",))]
    monkeypatch.setattr(load, "rows_at_once", lambda model, size, length: (size, length)[1])
    monkeypatch.setattr(load, "read_conversations", lambda sources, reading: list(dialogues))
    asked: list[Any] = []
    monkeypatch.setattr(
        load, "prompts_of", lambda found, *given: asked.append(given) or tuple(found)
    )
    monkeypatch.setattr(load, "context_length", lambda model: 99)
    section = EvaluationSection(
        generate=generate, max_new_tokens=6, choose=choose, keep=KeepSection(data="x")
    )
    data: Any = SimpleNamespace(
        validation="held", validation_sources=(), kept="general", kept_sources=("x",), max_length=32,
        template=SimpleNamespace(pad_id=0, image=None), plan=SimpleNamespace(batch_size=3),
        reading=SimpleNamespace(for_checkpoint=lambda template: None),
    )  # fmt: skip
    found: Any = load.load_validation(section, data, None, tmp_path, StopFlag())
    assert (found.section.batch_size, found.batch_size, found.examples) == (38, 3, "held")
    assert found.prompts == (tuple(dialogues) if generate else ())
    assert asked == [(data.template, found.section, 99)] * (2 if generate else 0)
    assert found.kept.prompts == (tuple(dialogues[1:]) if generate else ())  # those with tools
    assert (found.kept.examples, found.kept.batch_size) == ("general", 3)
    assert (found.chooser is None) is (choose == "best_metric")
    data.validation = None
    assert load.load_validation(section, data, None, tmp_path, StopFlag()) is None


# --- a stream ------------------------------------------------------------------------------------


def passed(number: int, position: Position | None = None, **read: Any) -> Any:
    documents = {number: (10 + number, f"train.jsonl:{number}")}
    return {"ids": number}, streams._Passed(documents, position, ExampleCounts(**read))


def feed_of() -> StreamFeed:
    run: Any = SimpleNamespace(described=lambda feed: feed)
    return StreamFeed(run, None)  # type: ignore[arg-type]


def test_a_feed_knows_the_documents_of_the_step_at_hand_alone_and_where_it_is_behind_it() -> None:
    feed, behind = feed_of(), Position(steps=1)
    assert feed.take(passed(0)) == {"ids": 0}
    assert feed.position == START
    feed.take(passed(1, behind))
    assert (feed.position, feed[np.array([1, 0])].tolist()) == (behind, [11, 10])
    assert (feed.location(1), feed.location(-1)) == ("train.jsonl:1", "a blank")
    feed.take(passed(2))  # of the next step
    assert feed[np.array([2])].tolist() == [12]
    for gone in (0, 1):
        with pytest.raises(KeyError):
            feed.location(gone)
    with pytest.raises(DataError, match="row 7"):
        feed.take(DataError("row 7"))
    assert feed.described() is feed


def test_what_is_left_out_of_a_stream_is_said_when_it_is_met_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    feed = feed_of()
    feed.take(passed(0, unread={"note": 1}, named=("a:1: too long",)))
    feed.take(passed(1, unread={"note": 2}, doubts={"a call": 1}, named=("a:1: too long",)))
    feed.take(passed(2, unread={"note": 3}, doubts={"a call": 1}, dropped={"too long": 1}, named=("a:1: too long", "a:9: x")))  # fmt: skip
    told = capsys.readouterr()
    assert [line.split(": ", 2)[2] for line in told.err.splitlines()] == [
        "note: text is not read (counted in data.json)",
        "a call: is trained (counted in data.json)",
        "too long: is left out (counted in data.json)",
    ]
    assert told.out == "  a:1: too long\n  a:9: x\n"
    assert feed.read.unread == {"note": 3}


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"steps": "x"}', '{"steps": -1}'])
def test_a_checkpoint_that_does_not_say_where_its_stream_was_is_named(
    text: str | None, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "stream.json").write_text(text)
    run: Any = SimpleNamespace(stream="a stream")
    with pytest.raises(CheckpointError, match="does not say where the stream of training rows was"):
        from_checkpoint(None, run, tmp_path)  # type: ignore[arg-type]


def test_a_stream_goes_on_where_the_checkpoint_says(tmp_path: Path) -> None:
    position = Position(steps=3)
    (tmp_path / "stream.json").write_text(json.dumps(position.as_json()))
    from finetune.training.loading.batches import TrainingData

    plain = TrainingData(None, None, str, None, dict, None)  # type: ignore[arg-type]
    run: Any = SimpleNamespace(stream="a stream")
    resumed: Any = from_checkpoint(plain, run, tmp_path).feed
    fresh: Any = from_checkpoint(plain, run, None).feed
    assert (resumed.position, fresh.position) == (position, START)
    assert from_checkpoint(plain, SimpleNamespace(stream=None), None) is plain  # type: ignore[arg-type]


# --- what is replayed and kept -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keeps", "own", "general"),
    [(False, False, []), (True, False, ["held.jsonl"]), (True, True, ["own.jsonl"])],
)
def test_replies_that_replay_holds_out_are_the_general_set_where_there_is_no_other(
    keeps: bool, own: bool, general: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = SimpleNamespace(replies=5, cut=1, train="replay.jsonl", held_out="held.jsonl")
    monkeypatch.setattr(prepare_data, "replay_of", lambda *_: files)
    monkeypatch.setattr(
        prepare_data, "sources_of", lambda section, data: (SimpleNamespace(path=data),)
    )
    section: Any = SimpleNamespace(replay=SimpleNamespace(weight=0.5), cache_dir=None)
    model: Any = SimpleNamespace(path="m", revision=None)
    keep = KeepSection(data="own.jsonl" if own else None) if keeps else None
    trained, found = prepare_data._replay(section, model, keep)
    assert [(one.path, one.weight, one.format) for one in trained] == [("replay.jsonl", 0.5, "messages")]  # fmt: skip
    assert [one.path for one in found] == general
    section.replay = None
    assert prepare_data._replay(section, model, None) == ((), ())


def test_what_is_held_out_is_kept_out_of_what_is_trained(
    tiny_glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import runs

    from finetune.config.schema import RunConfig

    rows = runs.write_dialogues(tmp_path / "train.jsonl", 6)
    held = tmp_path / "held.jsonl"
    held.write_text("".join(rows.read_text().splitlines(keepends=True)[:2]))
    settings = runs.config(
        tiny_glm, rows, tmp_path / "run", data__validation=str(held), data__deduplicate="exact",
        data__cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    config = RunConfig.model_validate(settings)
    found = prepare_data.load_run_data(config.data, config.training, config.model)
    assert (len(found.train), len(found.validation or ())) == (4, 2)
    assert "held-out dialogues" not in capsys.readouterr().err  # none is trained
