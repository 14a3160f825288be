"""No forgetting: the untuned model's replies are kept and trained, and a checkpoint is chosen by tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from rows import turns, write_rows

from finetune.config.forgetting import KeepSection, ReplaySection
from finetune.config.load import load
from finetune.errors import ConfigError, DataError
from finetune.evaluation.scores import forgetting
from finetune.evaluation.scores.forgetting import Criterion, gain, not_worse, qualifies
from finetune.evaluation.scores.statistics import Measure
from finetune.generation import replay


def losses(values: np.ndarray, name: str = "general_loss") -> Measure:
    sums = np.stack([values, np.ones_like(values)], axis=1)
    return Measure((name,), sums, lambda sums: sums[:, :1] / sums[:, 1:])


def test_a_loss_at_its_margin_is_called_not_worse_in_five_percent_of_samples() -> None:
    passed = {0.0: 0, 0.05: 0, 0.1: 0}
    for number in range(200):
        chance = np.random.default_rng(number)
        untuned = chance.normal(1.5, 0.5, 80)
        for worse in passed:
            tuned = untuned + worse + chance.normal(0, 0.1, 80)
            one = not_worse(losses(tuned), losses(untuned), "general_loss", 0.05)
            passed[worse] += one.passes
    assert 0.01 <= passed[0.05] / 200 <= 0.1  # three standard errors of 0.05 are 0.046
    assert passed[0.0] / 200 > 0.95
    assert passed[0.1] == 0


def test_a_score_that_is_better_when_higher_is_judged_in_its_direction() -> None:
    untuned = np.repeat([0.0, 100.0], 50)
    name = "general_tool_call_accuracy"
    up = losses(np.repeat([0.0, 100.0], [45, 55]), name)
    down = losses(np.repeat([0.0, 100.0], [60, 40]), name)
    assert not_worse(up, losses(untuned, name), name, 5.0).passes
    assert not not_worse(down, losses(untuned, name), name, 5.0).passes


def test_a_gain_is_one_that_chance_does_not_make_and_in_the_right_direction() -> None:
    chance = np.random.default_rng(0)
    before = chance.normal(2, 0.3, 60)
    after = before - 0.5 + chance.normal(0, 0.1, 60)
    assert gain(losses(after, "loss"), losses(before, "loss"), "loss").passes
    assert gain(losses(before, "loss"), losses(after, "loss"), "loss").p == 1.0
    assert not gain(losses(before, "loss"), losses(before, "loss"), "loss").passes


def test_a_checkpoint_passes_all_tests_and_the_more_are_tried_the_harder_it_is() -> None:
    good, poor = Criterion("loss", -0.5, 0.002), Criterion("general_loss", 0.02, 0.03, 0.05)
    assert qualifies([good], [])
    assert qualifies([good, poor], [])
    assert not qualifies([good, poor], [0.6, 0.7])  # 0.03 x 3
    assert qualifies([good, poor], [0.0001, 0.0002])  # Holm: those before it are settled
    assert not qualifies([good, Criterion("x/y", -9, 0.4, 5.0)], [])


def test_the_tests_are_said_in_words() -> None:
    assert str(Criterion("loss", -0.5, 0.002)) == "loss is really better (-0.500, p = 0.002)"
    assert str(Criterion("general_loss", 0.2, 0.6, 0.05)) == "general loss may be worse by 0.05 or more (+0.200, p = 0.600)"  # fmt: skip
    assert str(Criterion("calls/all", 1.0, 0.01, 5.0)) == "calls/all is not worse by 5 (+1.0, p = 0.010)"  # fmt: skip


def test_shipped_prompts_are_those_of_their_script() -> None:
    import runpy

    made = runpy.run_path(str(Path(__file__).parents[1] / "scripts/fixtures/make_replay_prompts.py"))["rows"]()  # fmt: skip
    shipped = [json.loads(line) for line in replay.PROMPTS.read_text("utf-8").splitlines()]
    assert shipped == made
    assert len({json.dumps(row["messages"]) for row in shipped}) == len(shipped) > 300
    assert sum("tools" in row for row in shipped) > 100
    chinese = sum(any("\u4e00" <= c <= "\u9fff" for c in row["messages"][0]["content"]) for row in shipped)  # fmt: skip
    assert 0.4 < chinese / len(shipped) < 0.6


class Predicted:
    """Replies to what was asked, in place of a process that generates them; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Path, prompts: Path, output: Path, max_new_tokens: int) -> None:
        self.calls += 1
        rows = [json.loads(line) for line in prompts.read_text("utf-8").splitlines()]
        for number, row in enumerate(rows):
            row["messages"].append({"role": "assistant", "content": f"Reply {number}."})
            row |= {"where": "x:1", "stopped": number % 10 != 0, "tool_calls": []}
        write_rows(output, rows)


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> Predicted:
    double = Predicted()
    monkeypatch.setattr(replay, "_predict", double)
    return double


def prompts(folder: Path, number: int = 40) -> str:
    rows = [{"messages": turns(f"Question {n}?")} for n in range(number)]
    return str(write_rows(folder / "prompts.jsonl", rows))


def test_replies_are_made_once_and_a_fifth_of_them_is_held_out(
    tiny_glm: Path, tmp_path: Path, predicted: Predicted
) -> None:
    section = ReplaySection(prompts=prompts(tmp_path))
    found = replay.replay_of(section, str(tiny_glm), None, str(tmp_path / "cache"))
    again = replay.replay_of(section, str(tiny_glm), None, str(tmp_path / "cache"))
    assert (found, predicted.calls) == (again, 1)
    assert (found.replies, found.cut) == (36, 4)  # one in ten did not end
    parts = [[json.loads(line) for line in file.read_text().splitlines()] for file in found[:2]]
    assert sum(map(len, parts)) == 36
    assert 2 <= len(parts[1]) <= 14
    assert set(parts[0][0]) == {"messages"}
    other = replay.replay_of(section.model_copy(update={"max_new_tokens": 9}), str(tiny_glm), None, str(tmp_path / "cache"))  # fmt: skip
    assert other.train.parent != found.train.parent


def test_a_model_whose_replies_never_end_is_named(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(model: Path, asked: Path, output: Path, max_new_tokens: int) -> None:
        write_rows(output, [{"messages": turns("a", "b"), "stopped": False}])

    monkeypatch.setattr(replay, "_predict", endless)
    with pytest.raises(DataError, match=r"raise data\.replay\.max_new_tokens"):
        replay.replay_of(
            ReplaySection(prompts=prompts(tmp_path)), str(tiny_glm), None, str(tmp_path)
        )


def test_replies_join_the_training_data_by_weight_and_the_rest_is_what_must_be_kept(
    tiny_glm: Path, tmp_path: Path, predicted: Predicted
) -> None:
    from finetune.config.schema import DataSection, ModelSection, TrainingSection
    from finetune.training.loading.prepare_data import load_run_data

    train = write_rows(tmp_path / "train.jsonl", [{"messages": turns(f"q{n}", "a")} for n in range(5)])  # fmt: skip
    section = DataSection(
        train=str(train),
        replay=ReplaySection(prompts=prompts(tmp_path), weight=2.0),
        cache_dir=str(tmp_path / "cache"),
    )
    data = load_run_data(section, TrainingSection(output_dir="x"), ModelSection(path=str(tiny_glm)), KeepSection())  # fmt: skip
    assert data.kept is not None
    assert len(data.train) + 2 * len(data.kept) == 5 + 2 * 36
    without = load_run_data(section, TrainingSection(output_dir="x"), ModelSection(path=str(tiny_glm)))  # fmt: skip
    assert without.kept is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["evaluation.choose=domain_without_forgetting"], "give evaluation.keep"),
        (["evaluation.keep={}"], "has nothing to measure"),
        (["evaluation.keep={tasks: [mmlu]}", "data.validation=null"], "give data.validation"),
    ],
)
def test_options_that_lack_something_are_named(
    tiny_glm: Path, tmp_path: Path, changes: list[str], problem: str
) -> None:
    settings = runs.config(tiny_glm, tmp_path / "d.jsonl", tmp_path / "run")
    settings["data"]["validation"] = str(tmp_path / "d.jsonl")
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ConfigError, match=problem):
        load(file, changes)


def test_the_newest_checkpoint_that_forgot_nothing_is_chosen_over_interruptions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.config.schema import EvaluationSection
    from finetune.training.measuring.choosing import Chooser, conclusion
    from finetune.training.measuring.keeping import KeptData

    kept = KeptData(KeepSection(), Any, None, (), 1, EvaluationSection())  # type: ignore[arg-type]
    chance = np.random.default_rng(0)
    domain, general = chance.normal(2, 0.3, 60), chance.normal(1, 0.2, 60)

    def at(gained: float, lost: float) -> dict[str, Measure]:
        noise = chance.normal(0, 0.02, 60)
        return {
            "loss": losses(domain - gained + noise, "loss"),
            "general_loss": losses(general + lost + noise),
        }

    first = Chooser(tmp_path, kept)
    assert not first.chosen(0, at(0.0, 0.0))
    assert first.chosen(10, at(0.3, 0.01))
    resumed = Chooser(tmp_path, kept)
    assert resumed.chosen(20, at(0.5, 0.02))
    assert not resumed.chosen(30, at(0.9, 0.3))
    said = capsys.readouterr().out
    assert "general loss may be worse by 0.05 or more" in said
    assert conclusion(tmp_path).startswith("checkpoint-20 is the newest that learned without")
    assert not (tmp_path / "other").exists()
    other = Chooser(tmp_path, kept)
    shorter = {name: losses(one.units[:50, 0], name) for name, one in at(0.3, 0.0).items()}
    assert not other.chosen(40, shorter)
    assert "was of other data" in capsys.readouterr().err


def test_when_no_checkpoint_qualifies_it_is_said(tmp_path: Path) -> None:
    from finetune.config.schema import EvaluationSection
    from finetune.training.measuring.choosing import Chooser, conclusion
    from finetune.training.measuring.keeping import KeptData

    kept = KeptData(KeepSection(), Any, None, (), 1, EvaluationSection())  # type: ignore[arg-type]
    values = np.random.default_rng(0).normal(2, 0.3, 60)
    assert conclusion(tmp_path) == ""
    chooser = Chooser(tmp_path, kept)
    chooser.chosen(0, {"loss": losses(values, "loss"), "general_loss": losses(values)})
    chooser.chosen(5, {"loss": losses(values - 0.5, "loss"), "general_loss": losses(values + 1)})
    assert "no checkpoint of 1 learned without forgetting" in conclusion(tmp_path)
    assert "general loss may be worse" in conclusion(tmp_path)


def test_a_mean_of_replies_is_taken_dialogue_by_dialogue() -> None:
    found = forgetting.as_mean("x", [100.0, None, 0.0, 100.0], ["a", "a", "b", "b"])
    assert found is not None
    assert found.units.tolist() == [[100.0, 1.0], [100.0, 2.0]]
    assert forgetting.as_mean("x", [None], ["a"]) is None


def test_a_run_measures_what_is_kept_and_chooses_by_it(
    tiny_glm: Path, tmp_path: Path, predicted: Predicted
) -> None:
    data = runs.write_dialogues(tmp_path / "d.jsonl", 12)
    settings = runs.config(tiny_glm, data, tmp_path / "run")
    settings["data"] |= {
        "validation": str(data),
        "replay": {"prompts": prompts(tmp_path)},
        "cache_dir": str(tmp_path / "cache"),
    }
    settings["training"] |= {"max_steps": 2, "save_every_steps": 1}
    settings["evaluation"] = {
        "every_steps": 1, "generate": False, "keep": {}, "choose": "domain_without_forgetting",
    }  # fmt: skip
    found = runs.run_here(settings)
    assert {"general_loss", "chosen", "loss"} <= set(found["scores"])
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "choices.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 2]
    chosen = [row["step"] for row in rows if row["chosen"]]
    best = f"checkpoint-{chosen[-1]}" if chosen else None
    assert (Path(found["best_checkpoint"]).name if found["best_checkpoint"] else None) == best
    assert (tmp_path / "run" / "untuned.npz").is_file()
