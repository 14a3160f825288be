"""Tool calls in the Berkeley leaderboard's form: read, asked in our layout, and judged by its rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rows import write_rows

from finetune.errors import ConfigError, DataError
from finetune.evaluation.evaluate import Options, evaluate
from finetune.evaluation.schema import read_evaluation
from finetune.evaluation.tasks import calls
from finetune.evaluation.tasks.calls import CallQuestion, MadeCall, read_questions

AREA = {
    "name": "math.area",
    "description": "The area of a triangle.",
    "parameters": {
        "type": "dict",
        "required": ["base"],
        "properties": {
            "base": {"type": "float"},
            "unit": {"type": "String"},
            "points": {"type": "tuple", "items": {"type": "any"}},
        },
    },
}


def question(number: int, category: str) -> dict[str, Any]:
    return {"id": f"{category}_{number}", "question": [[{"role": "user", "content": f"Number {number}?"}]], "function": [AREA]}  # fmt: skip


def leaderboard(folder: Path) -> Path:
    """A folder with three questions of three categories."""
    for category in ("simple", "parallel", "irrelevance"):
        write_rows(folder / f"BFCL_v3_{category}.json", [question(n, category) for n in range(3)])
    (folder / "possible_answer").mkdir()
    one = {"math.area": {"base": [10, 10.5], "unit": ["cm", ""]}}
    for category, truth in (("simple", [one]), ("parallel", [one, one])):
        rows = [{"id": f"{category}_{n}", "ground_truth": truth} for n in range(3)]
        write_rows(folder / "possible_answer" / f"BFCL_v3_{category}.json", rows)
    write_rows(folder / "BFCL_v3_multi_turn_base.json", [{"id": "x"}])  # is not asked
    return folder


def wanted(*answer: dict[str, Any], category: str = "simple") -> CallQuestion:
    from finetune.data.dialogue.conversation import Conversation

    return CallQuestion("q", category, Conversation(()), answer)


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"base": 10}, True),
        ({"base": 10.0, "unit": "CM"}, True),
        ({"base": 10, "unit": "mm"}, False),
        ({"base": 10, "unit": "square-cm"}, True),
        ({"base": "10"}, False),
        ({"base": True}, False),
        ({"unit": "cm"}, False),
        ({"base": 10, "extra": 1}, False),
        (None, False),
    ],
)
def test_a_call_is_right_when_every_value_is_allowed_and_none_is_made_up(
    arguments: dict[str, Any] | None, right: bool
) -> None:
    one = wanted({"area": {"base": [10], "unit": ["cm", "Square cm", ""]}})
    assert one.is_right([MadeCall("area", arguments)]) is right
    assert not one.is_right([MadeCall("volume", arguments)])
    assert not one.is_right([])


def test_lists_and_objects_are_compared_inside() -> None:
    answer = {"find": {"box": [[1, 2.5]], "where": [{"city": ["Rome", "rome, italy"], "zip": [1, ""]}]}}  # fmt: skip
    one = wanted(answer)
    assert one.is_right([MadeCall("find", {"box": [1.0, 2.5], "where": {"city": "ROME"}})])
    assert one.is_right([MadeCall("find", {"box": [1, 2.5], "where": {"city": "Rome Italy", "zip": 1}})])  # fmt: skip
    assert not one.is_right([MadeCall("find", {"box": [1], "where": {"city": "Rome"}})])
    assert not one.is_right([MadeCall("find", {"box": [1, 2.5], "where": {"city": "Paris"}})])
    assert not one.is_right(
        [MadeCall("find", {"box": [1, 2.5], "where": {"city": "Rome", "x": 1}})]
    )


def test_parallel_calls_may_come_in_any_order_and_each_answers_for_one() -> None:
    first, second = {"f": {"x": [1, 2]}}, {"f": {"x": [1]}}
    one = wanted(first, second, category="parallel")
    assert one.is_right([MadeCall("f", {"x": 1}), MadeCall("f", {"x": 2})])
    assert one.is_right([MadeCall("f", {"x": 2}), MadeCall("f", {"x": 1})])
    assert not one.is_right([MadeCall("f", {"x": 2}), MadeCall("f", {"x": 2})])
    assert not one.is_right([MadeCall("f", {"x": 1})])


def test_where_no_function_fits_no_call_is_right() -> None:
    assert wanted(category="irrelevance").is_right([])
    assert not wanted(category="live_irrelevance").is_right([MadeCall("f", {})])
    assert wanted(category="live_relevance").is_right([MadeCall("f", {})])


def test_the_files_of_the_leaderboard_are_read_with_their_types_as_json_schema(
    tmp_path: Path,
) -> None:
    found = read_questions(leaderboard(tmp_path))
    assert [one.category for one in found] == ["irrelevance"] * 3 + ["parallel"] * 3 + [
        "simple"
    ] * 3
    [tool] = found[0].conversation.tools
    assert tool["function"]["parameters"] == {
        "type": "object",
        "required": ["base"],
        "properties": {
            "base": {"type": "number"},
            "unit": {"type": "string"},
            "points": {"type": "array", "items": {}},
        },
    }
    assert found[0].answer == ()


def test_a_folder_without_such_files_and_a_row_without_answer_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no files of the leaderboard"):
        read_questions(tmp_path)
    leaderboard(tmp_path)
    write_rows(tmp_path / "possible_answer" / "BFCL_v3_simple.json", [])
    with pytest.raises(
        DataError, match=r"simple\.json:1: possible_answer has no answer to simple_0"
    ):
        read_questions(tmp_path)
    write_rows(tmp_path / "BFCL_v3_irrelevance.json", [question(0, "irrelevance") | {"question": [[], []]}])  # fmt: skip
    with pytest.raises(DataError, match=r"irrelevance\.json:1: not a question of one turn"):
        read_questions(tmp_path)


def test_every_category_has_a_score_with_an_interval(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = leaderboard(tmp_path)
    arguments = json.dumps({"base": 10})
    said = {"simple": [f"math.area\n{arguments}"], "parallel": [f"math.area\n{arguments}"] * 2, "irrelevance": ["\nNo."]}  # fmt: skip
    asked: list[str] = []

    def answers(model: Any, template: Any, prompts: Any, **_: Any) -> list[Any]:
        from finetune.generation.generate import Reply

        asked.extend(template.decode(prompt) for prompt in prompts)
        header = template.tokenizer.control_ids["<|assistant|>"]
        replies = []
        for number, category in enumerate(("irrelevance", "parallel", "simple")):
            for copy in range(3):
                ids: list[int] = []
                texts = said[category] if copy else ["nothing"]
                for text in texts:
                    ids += [*([header] if ids else []), *template.tokenizer.plain.encode(text, add_special_tokens=False).ids]  # fmt: skip
                replies.append(Reply(3 * number + copy, tuple(ids), True))
        return replies

    monkeypatch.setattr("finetune.generation.generate.generate", answers)
    evaluate([str(tiny_glm)], output=tmp_path / "out", options=Options(tasks=(f"calls:{folder}",)))
    found = read_evaluation(tmp_path / "out")
    scores = {name: score.value for name, score in found.targets[0].scores.items()}
    assert scores == {
        "calls/irrelevance": 100.0,
        "calls/parallel": pytest.approx(200 / 3),
        "calls/simple": pytest.approx(200 / 3),
        "calls/all": pytest.approx(700 / 9),
    }
    simple = found.targets[0].scores["calls/simple"]
    assert (simple.n, simple.low, simple.high) == (3, 0.0, 100.0)
    assert "math.area" in asked[0]
    assert asked[0].endswith("<|assistant|>")


def test_a_model_is_asked_with_its_own_replies(tiny_glm: Path, tmp_path: Path) -> None:
    folder = leaderboard(tmp_path)
    options = Options(tasks=(f"calls:{folder}",))
    report = evaluate([str(tiny_glm)], output=tmp_path / "o", options=options, changes={"max_samples": 1})  # fmt: skip
    assert report["targets"][0]["scores"]["calls/all"]["n"] == 3
    assert calls.PREFIX == "calls"


def test_true_is_no_number_and_a_number_is_no_text() -> None:
    for value, wanted in ((True, 1), (1, True), (False, 0), (0, False), ("1", 1)):
        assert not calls._equal(value, wanted), (value, wanted)
    assert calls._equal(True, True)
    assert calls._equal(1, 1.0)
