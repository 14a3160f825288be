"""Replies made elsewhere, a user's metrics, processes that score, and which kept scores are used again."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from rows import read_rows, write_rows

from finetune.data.dialogue.conversation import Message
from finetune.errors import ConfigError, DataError
from finetune.evaluation import folder, scoring
from finetune.evaluation.options import Options
from finetune.evaluation.predictions import Prediction, read_unscored
from finetune.evaluation.scoring import Scoring, score, score_external, score_file
from finetune.evaluation.store import Results
from finetune.evaluation.targets import Target
from finetune.storage.files import json_line

TOOL = {"type": "function", "function": {"name": "book", "parameters": {"type": "object"}}}
SAID = Prediction(
    Message("assistant", '{"a": 1}', "book"), Message("assistant", '{"a": 2}', "book"), stopped=True,
    tools=(TOOL,), location="d.jsonl:3", message=5, prompt="asked", slices={"kind": "tool"}, images=("a.png",),
)  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, {"stopped": False}, {"stopped": None}, {"tools": ()}, {"images": (), "slices": {}}]
)  # fmt: skip
def test_a_reply_that_waits_for_its_scores_comes_back_whole(changes: dict[str, Any]) -> None:
    one = replace(SAID, **changes)
    assert read_unscored(json.loads(json_line(one.unscored_row))) == one


def test_a_scored_row_has_what_is_compared_and_images_only_where_there_are_any() -> None:
    row = score(SAID, Scoring()).row
    assert (row["prediction"], row["reference"]) == ('book\n{"a": 1}', 'book\n{"a": 2}')
    assert (row["where"], row["message"], row["prompt"]) == ("d.jsonl:3", 5, "asked")
    assert (row["stopped"], row["slices"], row["images"]) == (True, {"kind": "tool"}, ("a.png",))
    assert "images" not in replace(SAID, images=()).row


# --- replies made elsewhere --------------------------------------------------------------------


def scored(tmp_path: Path, rows: list[dict[str, Any]], like: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:  # fmt: skip
    other = None if like is None else write_rows(tmp_path / "like.jsonl", like)
    source = write_rows(tmp_path / "source.jsonl", rows)
    score_external(source, tmp_path / "out" / "scored.jsonl", Scoring(), like=other)
    return read_rows(tmp_path / "out" / "scored.jsonl")


def test_a_row_from_elsewhere_keeps_what_it_says_where_it_says_it_well(tmp_path: Path) -> None:
    plain = {"predict": " yes ", "label": "yes"}
    rows = [
        plain,
        {"prediction": "y", "reference": "好", "where": "x:9", "message": 3, "prompt": "p", "stopped": False, "slices": {"kind": "k"}},
        plain | {"message": "3", "stopped": "yes", "slices": ["kind"]},
    ]  # fmt: skip
    first, second, third = scored(tmp_path, rows)
    source = tmp_path / "source.jsonl"
    assert (first["where"], first["message"], first["prompt"]) == (f"{source}:1", 0, "")
    assert (first["stopped"], first["scores"]["stop_rate"]) == (None, None)
    assert (first["prediction"], first["scores"]["exact_match"]) == ("yes", 100.0)
    assert first["slices"] == {"language": "latin script"}
    assert (second["where"], second["message"], second["prompt"]) == ("x:9", 3, "p")
    assert (second["stopped"], second["scores"]["stop_rate"]) == (False, 0.0)
    assert second["slices"] == {"kind": "k"}
    assert (third["message"], third["stopped"], third["slices"]) == (0, None, first["slices"])
    [other] = scored(tmp_path, [{"predict": "yes", "label": "好的，明天见"}])
    assert other["slices"] == {"language": "chinese"}


def test_lines_of_predict_are_read_up_to_their_reply(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "book"}]  # fmt: skip
    calls = [{"role": "assistant", "metadata": "book", "content": "{}"}] * 2
    row = {"where": "in.jsonl:2", "messages": asked + calls, "stopped": True, "tools": [TOOL]}
    [found] = scored(tmp_path, [row | {"reference": calls[0]}])
    assert (found["where"], found["message"], found["prompt"]) == ("in.jsonl:2", 3, "hi\nyes\nbook")
    assert found["prediction"] == found["reference"] == "book\n{}"
    assert found["scores"]["tool_call_accuracy"] == found["scores"]["tool_call_schema"] == 100.0
    assert found["slices"] == {"language": "latin script"}
    with pytest.raises(DataError, match="had no reply to compare with"):
        scored(tmp_path, [row])


LIKE = {
    "where": "d:1", "message": 3, "prompt": "p", "reference": "yes", "prediction": "no",
    "slices": {"kind": "plain"}, "images": ["a.png"],
}  # fmt: skip


def test_replies_beside_another_targets_take_its_places(tmp_path: Path) -> None:
    [found] = scored(tmp_path, [{"predict": "yes", "label": " yes\n"}], [LIKE])
    for name in ("where", "message", "prompt", "slices", "images"):
        assert found[name] == LIKE[name], name
    assert found["scores"]["exact_match"] == 100.0


def test_calls_of_predict_stand_beside_another_targets_calls(tmp_path: Path) -> None:
    call = {"role": "assistant", "metadata": "book", "content": "{}"}
    row = {"where": "in:2", "messages": [{"role": "user", "content": "book"}, call], "stopped": True, "reference": call}  # fmt: skip
    [found] = scored(tmp_path, [row], [LIKE | {"reference": "book\n{}"}])
    assert (found["where"], found["scores"]["exact_match"]) == ("d:1", 100.0)
    (tmp_path / "torn.jsonl").write_text('{"predict": "a", "label": "b"}\n{\n')
    with pytest.raises(DataError, match=r"torn\.jsonl:2: "):
        score_external(tmp_path / "torn.jsonl", tmp_path / "out.jsonl", Scoring(), like=None)
    with pytest.raises(DataError, match="row 1 answers another reference than d:1"):
        scored(tmp_path, [row], [LIKE | {"reference": "cancel\n{}"}])


@pytest.mark.parametrize(
    ("here", "there", "said"),
    [
        (2, 1, "source.jsonl has more rows than there are replies"), (1, 2, "source.jsonl has fewer rows than"),
        (1, 0, "has more rows"),
    ],
)  # fmt: skip
def test_more_or_fewer_rows_than_replies_are_named_so(
    tmp_path: Path, here: int, there: int, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        scored(tmp_path, [{"predict": "yes", "label": "yes"}] * here, [LIKE] * there)


# --- a user's metrics --------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the user's with one metric, which returns `value`."""
    module = ModuleType("meters")
    module.__file__ = None
    module.meter = lambda reply, reference: module.value  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "meters", module)
    scoring.user_metric.cache_clear()
    return module


@pytest.mark.parametrize(("value", "found"), [(None, None), (True, 1.0), (7, 7.0), ("2.5", 2.5)])
def test_a_metric_gives_a_number_or_none(own: ModuleType, value: Any, found: float | None) -> None:
    own.value = value  # type: ignore[attr-defined]
    assert score(SAID, Scoring(own=("meters:meter",))).scores["meter"] == found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_that_gives_no_finite_number_is_named_with_its_place(
    own: ModuleType, value: float
) -> None:
    own.value = value  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"'meters:meter' returned -?(nan|inf) at d\.jsonl:3"):
        score(SAID, Scoring(own=("meters:meter",)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("meters:gone", "meters has no gone"), ("meters:number", "number is not a function"), ("meters:", "write module:function"),
        (":meter", "write module:function"), ("meters:rouge-l", "is a built-in metric; rename"),
    ],
)  # fmt: skip
def test_what_is_no_metric_is_named(own: ModuleType, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        scoring.user_metric(name)


@pytest.mark.parametrize("error", [ZeroDivisionError("zero"), SystemExit(3), ValueError("no")])
def test_a_metric_that_fails_is_named_whatever_it_raises(own: ModuleType, error: BaseException) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise error

    own.meter = fail  # type: ignore[attr-defined]
    said = rf"'meters:meter' failed at d\.jsonl:3 with {type(error).__name__}: "
    with pytest.raises(ConfigError, match=said):
        score(SAID, Scoring(own=("meters:meter",)))


# --- processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "processors", "processes"),
    [(500, 8, 0), (501, 8, 2), (1000, 8, 2), (1001, 8, 3), (100_000, 8, 8), (1001, 1, 0), (1001, None, 0)],
)  # fmt: skip
def test_as_many_processes_score_as_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int, processors: int, processes: int
) -> None:
    (tmp_path / "unscored").write_text("{}\n" * lines)
    asked = []

    def parallel(unscored: Path, total: int, number: int, *_: Any) -> list[Path]:
        asked.append((total, number))
        return []

    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.setattr(scoring, "_in_parallel", parallel)
    monkeypatch.setattr(scoring, "_scored_lines", lambda _, first, last, __: [f"{first} {last}\n"])
    assert score_file(tmp_path / "unscored", tmp_path / "out", Scoring()) == lines
    assert asked == ([(lines, processes)] if processes else [])
    assert (tmp_path / "out").read_text() == ("" if processes else f"0 {lines}\n")


class Child:
    """A process that scores, as it ends."""

    made: ClassVar[list[Child]] = []

    def __init__(self, command: list[Any], **options: Any) -> None:
        self.command, self.options, self.killed = command, options, False
        self.returncode, self.said = self.ends.pop(0)
        Child.made.append(self)

    def communicate(self) -> tuple[None, str]:
        if isinstance(self.said, BaseException):
            raise self.said
        return None, self.said

    def kill(self) -> None:
        self.killed = True

    ends: ClassVar[list[tuple[int, Any]]] = []


@pytest.mark.parametrize(
    ("ends", "error", "said"),
    [
        ([(0, ""), (0, "")], None, ""),
        ([(0, ""), (2, " metric 'x' failed\n")], ConfigError, "^metric 'x' failed$"),
        ([(1, "Traceback"), (0, "")], RuntimeError, "ended with 1:\nTraceback"),
        ([(-9, ""), (0, "")], RuntimeError, "ended with -9"),
        ([(0, ""), (0, KeyboardInterrupt("stop"))], KeyboardInterrupt, "stop"),
    ],
)  # fmt: skip
def test_a_scoring_process_that_fails_ends_all_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: Any, error: Any, said: str
) -> None:
    monkeypatch.setattr(scoring.subprocess, "Popen", Child)
    Child.made, Child.ends = [], [*ends]
    how = Scoring(schema="{}")
    if error is None:
        parts = list(scoring._in_parallel(tmp_path / "u", 5, 2, tmp_path, how))
        assert parts == [tmp_path / "0", tmp_path / "1"]
        assert [child.command[4:6] for child in Child.made] == [["0", "2"], ["2", "5"]]
        for child in Child.made:
            assert child.options["start_new_session"], "signals are for the one that ends them"
            assert child.options["env"]["PYTHONIOENCODING"] == child.options["encoding"] == "utf-8"
        options = json.loads(Child.made[0].command[-1])
        assert Scoring(options["definition"], tuple(options["own"]), options["schema"]) == how
    elif error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            scoring._in_parallel(tmp_path / "u", 5, 2, tmp_path, how)
    else:
        with pytest.raises(error, match=said):
            scoring._in_parallel(tmp_path / "u", 5, 2, tmp_path, how)
    assert all(child.killed for child in Child.made)


def test_a_process_scores_its_own_lines_alone(
    tmp_path: Path, own: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [replace(SAID, location=f"d:{n}").unscored_row for n in range(5)]
    unscored = write_rows(tmp_path / "unscored", rows)
    for first, last in ((0, 2), (2, 5), (5, 5)):
        words = [str(unscored), str(first), str(last), str(tmp_path / "part")]
        scoring._main([*words, json.dumps({"definition": "demo", "own": [], "schema": ""})])
        found = read_rows(tmp_path / "part")
        assert [row["where"] for row in found] == [f"d:{n}" for n in range(first, last)]
        assert all(row["scores"]["json_schema_validity"] is None for row in found)
    said = Scoring("demo", (), '{"type": "string"}')
    text = replace(SAID, reply=Message("assistant", "{}"), reference=Message("assistant", "{}"))
    texts = write_rows(tmp_path / "texts", [text.unscored_row])
    scoring._main([str(texts), "0", "1", str(tmp_path / "part"), json.dumps(asdict(said))])
    [one] = read_rows(tmp_path / "part")
    assert one["scores"]["json_schema_validity"] == 0.0
    own.value = float("nan")  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as end:
        scoring._main([str(unscored), "0", "1", str(tmp_path / "part"), json.dumps({"definition": "demo", "own": ["meters:meter"], "schema": ""})])  # fmt: skip
    assert end.value.code == ConfigError.exit_code
    assert "returned nan at d:0" in capsys.readouterr().err


# --- kept scores -------------------------------------------------------------------------------


def kept_under(tmp_path: Path, how: Scoring) -> str:
    """The file that scores are kept in."""
    results = Results(tmp_path, "key")
    results.folder.mkdir(parents=True, exist_ok=True)
    job: Any = SimpleNamespace(results=results)
    asked: list[Path] = []
    results.scored = lambda name, _: asked.append(results.folder / name) or results.folder / "none"  # type: ignore[method-assign, func-returns-value]
    (results.folder / "none").write_text("")
    folder._write_predictions(job, tmp_path / "out" / "file", how)
    return asked[0].name


def test_scores_are_kept_for_one_way_of_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "measured.py"
    file.write_text("def one(reply, reference): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = Scoring(own=("measured:one",))
    names = {
        "default": kept_under(tmp_path, Scoring()),
        "definition": kept_under(tmp_path, Scoring("demo")),
        "schema": kept_under(tmp_path, Scoring(schema="{}")),
        "own": kept_under(tmp_path, own),
    }
    assert kept_under(tmp_path, Scoring()) == names["default"]
    assert kept_under(tmp_path, own) == names["own"]
    file.write_text("def one(reply, reference): return 2\n")
    names["another text of the metric"] = kept_under(tmp_path, own)
    monkeypatch.setattr(folder, "versions", lambda packages: dict.fromkeys(packages, "0"))
    names["packages"] = kept_under(tmp_path, Scoring())
    monkeypatch.undo()
    monkeypatch.setattr(scoring, "FORMAT", 0)
    names["format"] = kept_under(tmp_path, Scoring())
    assert len(set(names.values())) == len(names), names


@pytest.mark.parametrize("name", ["evaluation.json", "scores.json", "predictions.jsonl", "predictions/a.jsonl"])  # fmt: skip
def test_no_file_that_is_read_or_that_another_wrote_is_written_over(
    tmp_path: Path, name: str
) -> None:
    place = tmp_path / "out"
    (place / name).parent.mkdir(parents=True)
    (place / name).write_text("mine")
    elsewhere = Target("a", str(tmp_path / "replies.jsonl"), "predictions")
    with pytest.raises(ConfigError, match="--overwrite"):
        folder.check_place(place, [elsewhere], Options())
    folder.check_place(place, [elsewhere], Options(overwrite=True))
    read = replace(elsewhere, path=str(place / name))
    for options in (Options(), Options(overwrite=True)):
        with pytest.raises(
            ConfigError, match=r"is read, and .* is written; choose another --output"
        ):
            folder.check_place(place, [read], options)
    with pytest.raises(ConfigError, match="is not a folder"):
        folder.check_place(place / name, [elsewhere], Options())
