"""Scores in parts, each by hand: a judge's verdicts, labels, embeddings, counts of texts, sums of units."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rows import read_rows, write_rows

from finetune.data.dialogue.conversation import Message
from finetune.evaluation.predictions import Prediction
from finetune.evaluation.scores import added, judge, labels, metrics, texts
from finetune.evaluation.scores.added import ByModels
from finetune.evaluation.scores.embeddings import Embedder
from finetune.evaluation.scores.judge import Judge
from finetune.evaluation.scores.labels import LabelReader
from finetune.evaluation.scores.metrics import metric, numbers_of

# --- a judge -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "win", "agree"),
    [  # the reply is A in the first question and B in the second
        ("A", "B", 100, 100), ("B", "A", 0, 100), ("C", "C", 50, 100), ("A", "A", 50, 0), ("B", "B", 50, 0),
        ("A", "C", 75, 0), ("C", "B", 75, 0), ("B", "C", 25, 0), ("C", "A", 25, 0),
        (None, "B", None, None), ("A", None, None, None), (None, None, None, None),
    ],
)  # fmt: skip
def test_two_verdicts_make_a_share_and_an_agreement(
    first: str | None, second: str | None, win: float | None, agree: float | None
) -> None:
    found = judge._rated(("p", "", "one", "other"), first, second)
    assert found == {judge.WIN: win, judge.AGREE: agree}


def test_a_question_shows_both_orders_and_the_good_answer_where_there_is_one() -> None:
    first, second = judge.both_orders(("asked", "good", "reply", "rival"))
    assert first.index("answer A ===\nreply\n") < first.index("answer B ===\nrival\n")
    assert second.index("answer A ===\nrival\n") < second.index("answer B ===\nreply\n")
    for text in (first, second):
        assert "=== conversation ===\nasked\n=== a good answer ===\ngood\n" in text
    assert "a good answer" not in judge.both_orders(("asked", "", "reply", "rival"))[0]
    assert judge.both_orders(("asked", "good", "same", "same")) == ("", "")


def test_a_long_text_is_shown_by_its_beginning_and_its_end() -> None:
    whole = "a" * 12_000 + "b" * 12_000
    assert judge._shortened(whole) == whole
    assert judge._shortened("a" * 20_000 + "b" * 20_000) == "a" * 12_000 + "\n[…]\n" + "b" * 12_000


class Answers:
    """An address that answers in turn."""

    model, url = "m", "http://x/v1"

    def __init__(self, *said: Any) -> None:
        self.said, self.asked = [*said], []

    def post(self, path: str, body: Any) -> Any:
        self.asked.append((path, body))
        return {"choices": [{"message": {"content": self.said.pop(0)}}]}


def test_the_last_verdict_of_an_answer_counts(tmp_path: Path) -> None:
    said = ["[[A]] at first, but [[ B ]]", "none", None, "[[D]] [[c]] [[C]]"]
    address: Any = Answers(*said)
    asked = Judge(address, tmp_path / "kept.jsonl")
    assert [asked._verdict("q") for _ in said] == ["B", None, None, "C"]
    path, body = address.asked[0]
    assert (path, body["temperature"], body["max_tokens"]) == ("chat/completions", 0, 2048)
    assert body["messages"] == [{"role": "user", "content": "q"}]


def test_one_question_of_many_alike_is_asked_and_unclear_ones_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge, "AT_ONCE", 1)
    address: Any = Answers("[[A]]", "[[B]]", "?", "?")
    kept = tmp_path / "judgements" / "kept.jsonl"
    pairs = [("p", "", "a", "b")] * 20 + [("p", "", "c", "d")] * 2 + [("p", "", "e", "e")]
    found = list(Judge(address, kept).win_rates(pairs))
    assert [one[judge.WIN] for one in found] == [100.0] * 20 + [None, None, 50.0]
    assert len(address.asked) == 4
    assert "in its answer on 2 pairs" in capsys.readouterr().err
    assert [row["verdict"] for row in read_rows(kept)] == ["A", "B", None, None]


def judged(tmp_path: Path, *places: list[str], kinds: tuple[str, ...]) -> tuple[list[Any], dict[str, str]]:  # fmt: skip
    """Pairs that a judge is asked of files of replies with these places."""
    files = []
    for number, (kind, wheres) in enumerate(zip(kinds, places, strict=True)):
        rows = [{"where": where, "message": 1, "prompt": "p", "reference": "good", "prediction": f"{kind} {number}", "scores": {"x": 1.0}} for where in wheres]  # fmt: skip
        files.append((f"{kind}{number}", kind, write_rows(tmp_path / f"{number}.jsonl", rows)))
    asked: list[Any] = []

    def win_rates(pairs: Any) -> Any:
        for one in pairs:
            asked.append(one)
            yield {judge.WIN: 1.0, judge.AGREE: None}

    who = SimpleNamespace(win_rates=win_rates, address=SimpleNamespace(model="m", url="u"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "of", lambda *_: who)
        said = added.add_scores(ByModels(judge="openai:m@http://x"), files, tmp_path)
    for _, _, file in files:
        assert all({"x", judge.WIN, judge.AGREE} == row["scores"].keys() for row in read_rows(file))
    return asked, said


def test_replies_are_judged_beside_the_bases_where_it_answered_the_same(tmp_path: Path) -> None:
    asked, said = judged(tmp_path, ["a", "b"], ["a", "b"], kinds=("base", "adapter"))
    assert asked == [("p", "good", "adapter 1", "base 0")] * 2
    assert "those of the base" in said[judge.WIN]
    asked, said = judged(tmp_path, ["a", "b"], ["a", "c"], kinds=("base", "adapter"))
    assert asked == [("p", "", f"{name}", "good") for name in ("base 0", "base 0", "adapter 1", "adapter 1")]  # fmt: skip
    assert "those of the data" in said[judge.WIN]
    asked, said = judged(tmp_path, ["a"], ["a"], kinds=("adapter", "adapter"))
    assert asked == [("p", "", "adapter 0", "good"), ("p", "", "adapter 1", "good")]


# --- labels ------------------------------------------------------------------------------------


def table(pairs: list[tuple[str, str]], dialogues: list[str] | None = None) -> Any:
    reader = LabelReader()
    for number, (reference, reply) in enumerate(pairs):
        reader.add(reference, reply, dialogues[number] if dialogues else f"d:{number}")
    return reader.table()


def test_a_set_of_labels_is_told_by_how_many_there_are_and_how_often() -> None:
    def is_set(numbers: dict[str, int]) -> bool:
        return table([(name, name) for name, many in numbers.items() for _ in range(many)]) is not None  # fmt: skip

    assert is_set({"a": 5, "b": 5})
    assert not is_set({"a": 5, "b": 4}), "fewer than 10"
    assert is_set({"a": 4, "b": 4, "c": 4})
    assert not is_set({"a": 4, "b": 4, "c": 2, "d": 1}), "fewer than 3 for each"
    assert is_set({f"label {n}": 3 for n in range(50)})
    assert not is_set({f"label {n}": 3 for n in range(51)})
    assert is_set({"x" * 64: 5, "y": 5})
    assert not is_set({"x" * 65: 5, "y": 5})


def test_labels_are_compared_without_case_blanks_and_a_full_stop() -> None:
    found = table([("Spam", " SPAM。 "), ("ham", "ham!"), ("spam.", "ham\nbecause"), ("ham", "HAM ！"), *[("ham", "Ham.")] * 8])  # fmt: skip
    assert found.labels == ("ham", "Spam"), "the more frequent first, written as first"
    assert found.confusion.tolist() == [[10, 0, 0], [0, 1, 1]]


def test_the_sums_of_labels_are_taken_dialogue_by_dialogue() -> None:
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("b", "?"), *[("a", "a")] * 8]
    found = table(pairs, ["x", "x", "y", "y", *"abcdefgh"])
    units = found.measure().units
    # Hits, wanted and given of labels a and b.
    assert units[:2].tolist() == [[1, 0, 2, 0, 1, 1], [0, 1, 0, 2, 0, 1]]
    assert len(units) == 10
    [report] = [found.report()]
    assert report.recall == pytest.approx([90.0, 50.0])
    assert report.precision == pytest.approx([100.0, 50.0])
    nobody = table([*[("a", "a")] * 9, *[("b", "?")] * 3]).report()
    assert (nobody.precision, nobody.recall, nobody.f1) == ([100, 0], [100, 0], [100, 0])


def test_a_macro_f1_is_over_the_labels_that_are_there() -> None:
    hits, wanted, given = (np.array([row]) for row in ([3.0, 0, 0], [4.0, 0, 2], [3.0, 0, 0]))
    assert metrics._macro_f1(hits, wanted, given) == pytest.approx([(600 / 7 + 0) / 2])
    assert metrics._accuracy(hits, wanted, given) == pytest.approx([50.0])
    nothing = np.zeros((1, 3))
    assert metrics._macro_f1(nothing, nothing, nothing) == 0.0


@pytest.mark.parametrize("name", ["precision", "recall", "f1", "confusion"])
def test_a_report_of_labels_has_a_value_for_each(name: str) -> None:
    whole = {"labels": ["a", "b"], "precision": [1, 2], "recall": [1, 2], "f1": [1, 2], "confusion": [[1, 2, 0], [1, 2, 3]]}  # fmt: skip
    labels.LabelReport.model_validate(whole)
    with pytest.raises(ValueError, match="every label has"):
        labels.LabelReport.model_validate(whole | {name: whole[name][:1]})
    with pytest.raises(ValueError, match="one more"):
        labels.LabelReport.model_validate(whole | {"confusion": [[1, 2, 0], [1, 2]]})
    for odd in (-1, 10**15):
        with pytest.raises(ValueError, match="than"):
            labels.LabelReport.model_validate(whole | {"confusion": [[1, 2, odd], [1, 2, 3]]})


def test_a_report_has_no_more_labels_than_a_set() -> None:
    def report(size: int) -> labels.LabelReport:
        columns = {name: [0.0] * size for name in ("precision", "recall", "f1")}
        return labels.LabelReport(labels=["x"] * size, confusion=[[0] * (size + 1)] * size, **columns)  # fmt: skip

    assert len(report(50).labels) == 50
    with pytest.raises(ValueError, match="at most 50"):
        report(51)


# --- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "most", "room"),
    [(514, 10**30, 512), (514, 128, 126), (None, 10**30, 510), (0, 10**30, 510), (8192, 10**30, 2046)],
)  # fmt: skip
def test_a_text_is_cut_where_the_model_ends(positions: int | None, most: int, room: int) -> None:
    asked: dict[str, Any] = {}

    def tokenizer(given: list[str], **options: Any) -> Any:
        asked.update(options)
        ids = torch.ones(len(given), 4, dtype=torch.long)
        mask = torch.tensor([[1, 1, 1, 0]] * len(given))
        special = torch.tensor([[1, 0, 0, 1]] * len(given))

        class Given(dict[str, Any]):
            def to(self, _: Any) -> Given:
                return self

        return Given(input_ids=ids, attention_mask=mask, special_tokens_mask=special)

    tokenizer.model_max_length = most  # type: ignore[attr-defined]
    model = lambda **given: SimpleNamespace(last_hidden_state=torch.ones(len(given["input_ids"]), 4, 3))  # noqa: E731  # fmt: skip
    model.config, model.device = SimpleNamespace(max_position_embeddings=positions), "cpu"  # type: ignore[attr-defined]
    [found] = Embedder("m", model, tokenizer)._embedded(["text"])
    assert (asked["max_length"], asked["truncation"]) == (room, True)
    assert found.shape == (2, 3), "neither the special token at the beginning nor the padding"
    assert found.norm(dim=-1).tolist() == pytest.approx([1, 1])


# --- texts -------------------------------------------------------------------------------------


def test_only_a_reply_that_is_shorter_is_penalised() -> None:
    def bleu(reply: str, reference: str) -> float:
        counts = texts.bleu_counts(reply.split(), reference.split())
        return float(texts.bleu_of(np.array([counts], dtype=float))[0])

    assert bleu("a b c d", "a b c d") == pytest.approx(100)
    assert bleu("a b c d", "a b c d e f g h") == pytest.approx(100 * np.exp(-1))
    longer = bleu("a b c d e f g h", "a b c d")
    assert longer == pytest.approx(100 * (4 / 8 * 3 / 7 * 2 / 6 * 1 / 5) ** 0.25)
    assert bleu("x y", "a b") == 0
    assert bleu("a x b y c", "a b c d e") == pytest.approx(100 * (3 / 5 * 0.5 / 4 * 0.25 / 3 * 0.125 / 2) ** 0.25)  # fmt: skip


def test_chrf_weighs_what_is_missing_twice_as_much_as_what_is_too_much() -> None:
    def chrf(reply: str, reference: str) -> float:
        counts = texts.chrf_counts(reply, reference)
        return float(texts.chrf_of(np.array([counts], dtype=float))[0])

    assert chrf("ab", "ab") == pytest.approx(100)
    # Single characters alone: half of the reply is right, all of the reference is there, and back.
    assert chrf("ax", "a") == pytest.approx(100 * 5 * 0.5 * 1 / (4 * 0.5 + 1))
    assert chrf("a", "ax") == pytest.approx(100 * 5 * 1 * 0.5 / (4 * 1 + 0.5))
    assert chrf("", "a") == 0
    assert chrf("b", "a") == 0


@pytest.mark.parametrize(
    ("words", "content"),
    [
        (["今日", "は", "晴れ", "。"], ["今日", "晴れ"]), (["は", "。"], ["は", "。"]), (["…"], ["…"]),
        (["GLM", "-", "4"], ["GLM", "4"]), ([], []), (["3.5", "倍", "it's"], ["3.5", "倍", "it's"]),
    ],
)  # fmt: skip
def test_words_that_say_something_are_compared(words: list[str], content: list[str]) -> None:
    assert texts.content_words(words) == content


def test_words_of_every_script_are_cut_without_blanks() -> None:
    assert texts.language_words("好 的 ok") == ["好", "的", "ok"]
    assert texts.script_words("  ") == []
    assert texts.script_words("a\u3000好\n") == ["a", "好"]


def test_a_home_that_was_missing_is_missing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("HOME", raising=False)
    with texts._any_home():
        assert os.environ["HOME"]
    assert "HOME" not in os.environ
    with pytest.raises(ZeroDivisionError), texts._any_home():
        raise ZeroDivisionError
    assert "HOME" not in os.environ
    monkeypatch.setenv("HOME", "/somewhere")
    with texts._any_home():
        assert os.environ["HOME"] == "/somewhere"
    assert os.environ["HOME"] == "/somewhere"


# --- the table of scores -----------------------------------------------------------------------

LOWER = {"loss", "perplexity", "general_loss", "repetition_rate"}


def test_the_direction_of_every_score_is_known() -> None:
    assert {one.name for one in metrics.METRICS if one.better == "lower"} == LOWER
    assert {one.name for one in metrics.METRICS if one.better == "neither"} == {"length_ratio"}
    assert [one.name for one in metrics.METRICS if one.shown == "headline"] == [
        "rouge-l", "tool_call_accuracy", "exact_match", "chrf", "bleu-4", "loss",
    ]  # fmt: skip
    assert {one.name: one.digits for one in metrics.METRICS if one.digits != 1} == {"loss": 3, "general_loss": 3, "perplexity": 2}  # fmt: skip
    assert {one.name for one in metrics.METRICS if one.shown == "column"} == {
        "general_loss", "label_accuracy", "label_macro_f1", "json_validity", "json_schema_validity", "stop_rate",
    }  # fmt: skip
    assert set(metrics.CHOOSING) == {one.name for one in metrics.METRICS} - {"general_loss", "label_accuracy", "label_macro_f1"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "is_lower"),
    [
        ("wikitext/word_perplexity", True), ("wikitext/bits_per_byte", True), ("x/ter,none", True), ("x/perplexity", True),
        ("wikitext/byte_perplexity", True), ("x/brier_score", True),
        ("x/acc", False), ("word_perplexity", False), ("my_ter", False), ("ter", False), ("brier_score/acc", False),
    ],
)  # fmt: skip
def test_a_tasks_perplexities_are_better_when_lower_and_a_users_own_scores_are_not(
    name: str, is_lower: bool
) -> None:
    assert metric(name).lower_is_better is is_lower


def test_the_headline_is_the_first_there_is() -> None:
    assert metrics.headline_of(["loss", "bleu-4", "chrf"]) == "chrf"
    assert metrics.headline_of(["stop_rate", "mine"]) == "stop_rate"


@pytest.mark.parametrize(
    ("reply", "equal"),
    [("true", True), ("1", False), ("false", False), ("[true]", False), ("true ", True)],
)
def test_flags_are_no_numbers_where_json_is_compared(reply: str, equal: bool) -> None:
    from finetune.evaluation.scores.pairs import json_parts

    assert json_parts(f'{{"a": {reply}}}', '{"a": true}')["json_match"] == 100.0 * equal
    swapped = {"true": "false", "1": "0", "false": "true", "[true]": "[false]", "true ": "false"}
    assert json_parts(f'{{"a": {swapped[reply]}}}', '{"a": false}')["json_match"] == 100.0 * equal
    assert json_parts(f'[[{reply}], {{"b": 2.0}}]', '[[true], {"b": 2}]')["json_match"] == 100.0 * equal  # fmt: skip


def test_a_call_is_not_asked_to_be_the_schemas_json() -> None:
    call = Message("assistant", '{"a": 1}', "book")
    text = Message("assistant", '{"a": 1}')
    for reference, found in ((call, None), (text, 100.0)):
        scores, _ = numbers_of(Prediction(text, reference), schema="{}")
        assert scores["json_schema_validity"] == found


def test_a_reply_that_goes_on_behind_a_long_label_is_another_one() -> None:
    long = "x" * 64
    found = table([(long, f"{long}y"), *[(long, long)] * 5, *[("y", "y")] * 5])
    assert found.confusion.tolist() == [[5, 0, 1], [0, 5, 0]]


def test_bleu_of_labels_is_of_the_orders_that_there_are() -> None:
    bleu, chrf = texts.sacrebleu_signatures()
    assert "eff:yes" in bleu
    assert "tok:none" in bleu
    assert "nrefs:1" in bleu
    assert "nrefs:1" in chrf


def test_a_run_chooses_by_what_it_can_compute_of_its_own_data() -> None:
    assert {"loss", "perplexity", "rouge-l"} <= {*metrics.CHOOSING}
    assert not {"label_accuracy", "label_macro_f1", "general_loss"} & {*metrics.CHOOSING}
    assert metrics.best_metric_problem("rouge-l") is None
    assert "label_accuracy" in str(metrics.best_metric_problem("label_accuracy"))
