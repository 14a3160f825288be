"""Scores of given replies: LLaMA-Factory's to every digit, tool calls by parts, the user's own."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import exit_code
from rows import read_rows, write_rows

from finetune.data.dialogue.conversation import Message
from finetune.errors import ConfigError, DataError
from finetune.evaluation import scoring
from finetune.evaluation.evaluate import Options, evaluate
from finetune.evaluation.predictions import Prediction
from finetune.evaluation.scores import metrics, pairs, texts
from finetune.evaluation.scoring import Scoring, score_file
from finetune.storage.files import json_line

# What LLaMA-Factory's generated_predictions.jsonl may hold: the line break after <|assistant|>,
# blanks, empty replies, signs alone, other scripts, texts of fewer than four characters.
PAIRS = [
    ("\n这款衬衫的版型很好，面料舒适。", "\n这款衬衫采用宽松的版型，面料柔软舒适。"),
    ("\n今天天气很好，我们去公园散步。", "\n今天天气很好，我们去公园散步。"),
    ("", "\n你好"),
    ("\n", "\n你好"),
    ("\n好", "\n"),
    ("。。。", "！"),
    ("the quick brown fox ", "the quick fox jumps"),
    ("好", "好"),
    ("好的", "好"),
    ("\u3000全角　空格", "全角 空格"),
    ('{"city": "北京"}', '{"city": "上海"}'),
    ("3.5 元", "3.5元"),
]
EXTRAS = [
    (f"第{n}件上衣简约大方，适合{7 * n}岁的女生", f"第{n}件外套大方，适合{n}岁的男生")
    for n in range(40)
]


def as_llama_factory(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """predict_results.json of these pairs, with the borrowed functions alone.

    From the published metric: jieba words joined by blanks into rouge_chinese, 0 where either side
    has none; nltk's BLEU on the characters with smoothing method 3; x 100, rounded to 4 digits a
    pair; numpy's mean.
    """
    assert texts.jieba_words("好")  # imports the three without what they warn of
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    jieba.dt.tmp_dir = tempfile.mkdtemp(dir=os.environ.get("FINETUNE_CACHE"))
    found: dict[str, list[float]] = {n: [] for n in ("rouge-1", "rouge-2", "rouge-l", "bleu-4")}
    for predict, label in pairs:
        one, other = (" ".join(jieba.cut(text)) for text in (predict, label))
        rouge: dict[str, Any] = {name: {"f": 0.0} for name in found if name != "bleu-4"}
        if one.split() and other.split():
            rouge = Rouge().get_scores(one, other)[0]
        for name, value in rouge.items():
            found[name].append(round(value["f"] * 100, 4))
        smoothing = SmoothingFunction().method3
        bleu = sentence_bleu([list(label)], list(predict), smoothing_function=smoothing)
        found["bleu-4"].append(round(bleu * 100, 4))
    return {name: float(np.mean(values)) for name, values in found.items()}


def prediction_file(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = [{"prompt": "[gMASK]<sop>", "predict": one, "label": other} for one, other in pairs]
    return write_rows(folder / "generated_predictions.jsonl", rows)


@pytest.mark.parametrize("number", [1, 5, len(PAIRS), len(PAIRS) + len(EXTRAS)])
def test_a_prediction_file_scores_what_llama_factory_prints(
    number: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = (PAIRS + EXTRAS)[:number]
    file = prediction_file(tmp_path, pairs)
    monkeypatch.chdir(tmp_path)
    command = ("evaluate", "--predictions", file.name, "--definition", "llamafactory", "--json")
    assert exit_code(*command) == 0
    report = json.loads(capfd.readouterr().out)
    expected = as_llama_factory(pairs)
    assert {name: report["scores"][name] for name in expected} == expected
    assert report["targets"][0]["scores"]["bleu-4"]["value"] == expected["bleu-4"]
    assert report["replies"] == number
    assert "rounded to 4 digits" in report["signatures"]["bleu-4"]


def test_our_own_definition_differs_and_says_so(tmp_path: Path) -> None:
    file = prediction_file(tmp_path, PAIRS)
    report = evaluate([], options=Options(predictions=(str(file),)))
    assert report["scores"]["bleu-4"] != as_llama_factory(PAIRS)["bleu-4"]
    assert report["scores"]["exact_match"] == pytest.approx(100 * 2 / len(PAIRS))
    assert "words by script" in report["signatures"]["bleu-4"]
    assert report["output"] == str(tmp_path / "evaluation-generated_predictions")
    [source] = report["data"]
    assert (source["path"], source["samples"]) == (str(file), len(PAIRS))
    assert len(source["fingerprint"]) == 64


def test_a_file_that_holds_no_predictions_is_refused_by_row(tmp_path: Path) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [{"predict": "a", "label": "b"}, {"predict": "a"}])
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not a prediction; write"):
        evaluate([], options=Options(predictions=(str(bad),)))
    odd = write_rows(tmp_path / "odd.jsonl", [{"predict": 3, "label": "b"}])
    with pytest.raises(DataError, match=r"odd\.jsonl:1: predict and label must be text"):
        evaluate([], options=Options(predictions=(str(odd),)))
    with pytest.raises(DataError, match="no file of predictions"):
        evaluate([], options=Options(predictions=("nowhere.jsonl",)))
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate([])


def test_two_files_are_compared_reply_by_reply_when_their_references_agree(tmp_path: Path) -> None:
    good = write_rows(tmp_path / "good.jsonl", [{"predict": o, "label": o} for _, o in EXTRAS])
    poor = write_rows(tmp_path / "poor.jsonl", [{"predict": p, "label": o} for p, o in EXTRAS])
    report = evaluate([], options=Options(predictions=(str(poor), str(good))))
    [one] = [c for c in report["comparisons"] if c["metric"] == "rouge-l"]
    assert (one["a"], one["b"], one["verdict"]) == ("good", "poor", "better")
    other = write_rows(tmp_path / "other.jsonl", [{"predict": p, "label": p} for p, _ in EXTRAS])
    with pytest.raises(DataError, match=r"other\.jsonl: row 1 answers another reference"):
        evaluate([], options=Options(predictions=(str(poor), str(other))))
    few = write_rows(tmp_path / "few.jsonl", [{"predict": p, "label": o} for p, o in EXTRAS[:9]])
    with pytest.raises(DataError, match="fewer rows"):
        evaluate([], options=Options(predictions=(str(poor), str(few))))


# --- tool calls by parts -------------------------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {
            "type": "object",
            "properties": {
                "seats": {"type": "integer", "minimum": 1},
                "class": {"enum": ["first", "second"]},
            },
            "required": ["seats"],
            "additionalProperties": False,
        },
    },
}
CALL = Message("assistant", '{"seats": 2, "class": "first"}', "book")
TEXT = Message("assistant", "两张票已订好。")


def parts(reply: Message, reference: Message, tools: tuple = (TOOL,)) -> dict[str, float | None]:
    found = metrics.numbers_of(Prediction(reply, reference, tools=tools))[0]
    del found["tool_call_validity"]
    return {name[10:]: value for name, value in found.items() if name.startswith("tool_call_")}


def call(arguments: str, name: str = "book") -> Message:
    return Message("assistant", arguments, name)


@pytest.mark.parametrize(
    ("reply", "reference", "expected"),
    [  # accuracy, decision, name, arguments, schema
        (CALL, CALL, (100, 100, 100, 100, 100)),
        (call('{"class":"first","seats":2}'), CALL, (100, 100, 100, 100, 100)),
        (call('{"seats": 2.0, "class": "first"}'), CALL, (100, 100, 100, 100, 100)),
        (call('{"seats": true, "class": "first"}'), CALL, (0, 100, 100, 0, 0)),
        (call('{"seats": 3}'), CALL, (0, 100, 100, 0, 100)),
        (call('{"seats": 0, "class": "first"}'), CALL, (0, 100, 100, 0, 0)),
        (call('{"class": "third", "seats": 2}'), CALL, (0, 100, 100, 0, 0)),
        (call("{'seats': 2}"), CALL, (0, 100, 100, 0, 0)),
        (call(CALL.content, "cancel"), CALL, (0, 100, 0, 100, 0)),
        (call(CALL.content, " book "), CALL, (100, 100, 100, 100, 100)),
        (CALL, call(CALL.content, "book\n"), (100, 100, 100, 100, 100)),
        (Message("assistant", CALL.content), CALL, (0, 0, 0, 0, None)),
        (TEXT, CALL, (0, 0, 0, 0, None)),
        (CALL, TEXT, (0, 0, None, None, 100)),
        (TEXT, Message("assistant", "别的"), (100, 100, None, None, None)),
    ],
)
def test_a_call_is_right_by_parts(reply: Message, reference: Message, expected: tuple) -> None:
    names = ("accuracy", "decision", "name", "arguments", "schema")
    assert parts(reply, reference) == dict(zip(names, expected, strict=True))


def test_without_tools_nothing_is_asked_and_a_wrong_schema_blames_nobody() -> None:
    assert set(parts(TEXT, TEXT, ()).values()) == {None}
    broken = {"type": "function", "function": {"name": "book", "parameters": {"type": "nonsense"}}}
    away = {"type": "function", "function": {"name": "book", "parameters": {"$ref": "http://x.test/s"}}}  # fmt: skip
    for tool in (broken, away):
        assert parts(CALL, CALL, (tool,))["schema"] == 100
    builtin = parts(call("print(1)", "python"), call("print(1)", "python"), ({"type": "python"},))
    assert set(builtin.values()) == {100}
    unasked = parts(CALL, CALL, ())
    assert unasked.pop("schema") is None, "no tools, no schema"
    assert set(unasked.values()) == {100}, "a call that is wanted is compared without tools too"
    for deep in ("[" * 100_000, "[" * 600 + "]" * 600):
        assert parts(call(deep), CALL)["arguments"] == 0
        assert parts(call(deep), call(deep))["arguments"] == 100


# --- the rest ------------------------------------------------------------------------------------


def test_repetition_is_the_share_of_runs_of_four_words_that_were_there_before() -> None:
    # a b c d a b c d: runs abcd bcda cdab dabc abcd, one of five again.
    assert pairs.repetition_rate(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(20.0)
    assert pairs.repetition_rate(["a", "b", "c", "d", "e", "f"]) == 0.0
    assert pairs.repetition_rate(["a", "b", "c"]) is None


def test_words_are_those_of_the_language() -> None:
    assert texts.language_words("今天天气很好 OK") == ["今天天气", "很", "好", "OK"]
    assert texts.language_words("It's 3.5 m, naïve!") == ["It", "'", "s", "3", ".", "5", "m", ",", "naïve", "!"]  # fmt: skip


def test_scores_of_a_whole_corpus_are_no_means(tmp_path: Path) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    pairs = [(one, other) for one, other in PAIRS if one.strip() and other.strip()]
    report = evaluate([], options=Options(predictions=(str(prediction_file(tmp_path, pairs)),)))
    replies, references = ([pair[i].strip() for pair in pairs] for i in (0, 1))
    cut = [[" ".join(texts.script_words(one)) for one in side] for side in (replies, references)]  # fmt: skip
    bleu = BLEU(tokenize="none", force=True, effective_order=True).corpus_score(cut[0], [cut[1]])
    assert report["scores"]["corpus_bleu"] == pytest.approx(bleu.score)
    assert report["scores"]["chrf"] == pytest.approx(CHRF().corpus_score(replies, [references]).score)  # fmt: skip
    lengths = sum(map(len, replies)) / sum(map(len, references))
    assert report["scores"]["length_ratio"] == pytest.approx(100 * lengths)
    for name in ("corpus_bleu", "chrf"):
        assert "version:2." in report["signatures"][name]


def test_every_score_has_a_signature(tmp_path: Path) -> None:
    report = evaluate([], options=Options(predictions=(str(prediction_file(tmp_path, PAIRS)),)))
    names = {*report["scores"], *report["targets"][0]["scores"], "loss", "perplexity"}
    assert names <= set(report["signatures"])
    defined = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in names | {one.name for one in metrics.METRICS}:
        assert f"`{name}`" in defined, f"docs/metrics.md does not define {name}"


def test_a_metric_of_the_users_own_stands_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = f"own_{tmp_path.name.replace('-', '_')}"
    Path(f"{module}.py").write_text(
        "def shout(reply, reference):\n    return None if '好' not in reply else 10.0 * len(reply)\n"
        "def fails(reply, reference):\n    return {}[reply]\n",
        encoding="utf-8",
    )
    rows = [{"predict": one, "label": "x"} for one in ("好", "好好好", "y")]
    file = str(write_rows(tmp_path / "own.jsonl", rows))
    own = Options(predictions=(file,), scoring=Scoring(own=(f"{module}:shout",)))
    report = evaluate([], options=own)
    assert report["targets"][0]["scores"]["shout"]["value"] == 20.0
    assert report["targets"][0]["scores"]["shout"]["n"] == 2
    assert f"{module}:shout" in report["signatures"]["shout"]
    for name, said in (
        (f"{module}:fails", "failed at .*KeyError"),
        (f"{module}:gone", "has no gone"),
        ("no_such_module:f", "No module named"),
        ("plain", "module:function"),
        ("os:chrf", "rename"),
    ):
        with pytest.raises(ConfigError, match=said):
            evaluate([], options=Options(predictions=(file,), scoring=Scoring(own=(name,))))


def test_several_processes_score_what_one_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = prediction_file(tmp_path, PAIRS)
    alone = evaluate([], output=tmp_path / "a", options=Options(predictions=(str(file),)))
    monkeypatch.setattr(scoring, "LINES_PER_PROCESS", 5)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    started: list[Any] = []
    original = scoring._in_parallel
    monkeypatch.setattr(scoring, "_in_parallel", lambda *a: started.append(a[2]) or original(*a))
    several = evaluate([], output=tmp_path / "b", options=Options(predictions=(str(file),)))
    assert started == [2]
    assert several["targets"] == alone["targets"]
    name = "predictions/generated_predictions.jsonl"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.chdir(tmp_path)
    module = f"late_{tmp_path.name.replace('-', '_')}"
    Path(f"{module}.py").write_text("def late(reply, reference):\n    return 1 / (reply != '3')\n")
    replies = [Prediction(call(str(n), ""), TEXT, True, location=f"a:{n}") for n in range(4)]
    lines = "".join(json_line(one.unscored_row) for one in replies)
    (tmp_path / "unscored").write_text(lines, "utf-8")
    monkeypatch.setattr(scoring, "LINES_PER_PROCESS", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"late' failed at a:3 with ZeroDivisionError"):
        score_file(tmp_path / "unscored", tmp_path / "out", Scoring(own=(f"{module}:late",)))
    assert not (tmp_path / "out").exists()
    score_file(tmp_path / "unscored", tmp_path / "out", Scoring())
    assert [row["prediction"] for row in read_rows(tmp_path / "out")] == ["0", "1", "2", "3"]
