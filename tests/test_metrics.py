"""What a score is: to the digit where a reference exists, by hand where it does not."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from finetune.data.dialogue.conversation import Message
from finetune.evaluation.predictions import Prediction, Scores, text
from finetune.evaluation.scores import metrics, texts
from finetune.evaluation.scores.pairs import (
    DEFINITIONS,
    Compared,
    DefinitionName,
)
from finetune.evaluation.scores.statistics import ReplyTable

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def reply(content: str, name: str = "") -> Message:
    return Message("assistant", content, metadata=name)


def pair(prediction: str, reference: str) -> Prediction:
    return Prediction(reply(prediction), reply(reference))


def scores_of(prediction: Prediction) -> Scores:
    return metrics.numbers_of(prediction, "demo")[0]


def means_of(predictions: list[Prediction]) -> Scores:
    table = ReplyTable()
    for number, one in enumerate(predictions):
        table.add(str(number), *metrics.numbers_of(one, "demo"))
    return table.scores()


TEXT_METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "exact_match")


def call_score(name: str, arguments: str, *, tools: tuple = (WEATHER,)) -> float | None:
    expected = reply('{"city": "北京"}', "get_weather")
    return validity(Prediction(reply(arguments, name), expected, tools=tools))


def validity(prediction: Prediction) -> float | None:
    return scores_of(prediction)["tool_call_validity"]


def test_every_golden_pair_scores_the_reference_to_the_last_digit(glm4_assets: Path) -> None:
    golden = json.loads((glm4_assets / "golden" / "metrics.json").read_text(encoding="utf-8"))
    keys = {name: name for name in ("rouge-1", "rouge-2", "rouge-l")} | {"bleu-4": "bleu-4 words"}
    pairs = [pair(one["prediction"], one["reference"]) for one in golden["pairs"]]
    for one, got in zip(golden["pairs"], map(scores_of, pairs), strict=True):
        assert {name: got[name] for name in keys} == {name: one[keys[name]] for name in keys}
    means = means_of(pairs)
    assert {name: means[name] for name in keys} == {
        name: golden["mean"][keys[name]] for name in keys
    }


def test_bleu_on_characters_is_the_reference_to_the_last_digit(glm4_assets: Path) -> None:
    golden = json.loads((glm4_assets / "golden" / "metrics.json").read_text(encoding="utf-8"))
    for one in golden["pairs"]:
        both = Compared(pair(one["prediction"], one["reference"]), DEFINITIONS["demo"])
        found = texts.bleu(list(both.reply), list(both.reference)) if both.reply else 0.0
        assert found == one["bleu-4 characters"]


def test_a_score_worked_out_by_hand() -> None:
    # Words: a b c d | a b x d, white space between them, which BLEU counts and ROUGE does not.
    # ROUGE-1: 3 of 4 words; ROUGE-2: "a b" of 3 pairs; ROUGE-L: a b d, 3 of 4.
    got = scores_of(pair("a b c d", "a b x d"))
    assert got["rouge-1"] == pytest.approx(75.0)
    assert got["rouge-2"] == pytest.approx(100 / 3)
    assert got["rouge-l"] == pytest.approx(75.0)
    # BLEU, 7 tokens each ("_" a blank): all but c; a_ _b b_ _d of 6; a_b _b_ of 5; a_b_ of 4.
    assert got["bleu-4"] == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)


def test_the_scale_runs_from_0_to_100() -> None:
    same = scores_of(Prediction(reply("今天天气很好。"), reply("今天天气很好。"), stopped=True))
    assert [round(same[name] or 0, 4) for name in TEXT_METRICS] == [100.0] * 5
    assert same["stop_rate"] == 100.0
    none = scores_of(Prediction(reply("xyz"), reply("今天天气很好。"), stopped=False))
    assert [none[name] for name in TEXT_METRICS] == [0.0] * 5
    assert none["stop_rate"] == 0.0


@pytest.mark.parametrize("empty", ["", " ", "\n", " \n\n "])
def test_an_empty_reply_scores_0_and_stays_in_the_mean(empty: str) -> None:
    means = means_of([pair(empty, "你好"), pair("你好", "你好")])
    assert means["exact_match"] == 50.0
    assert means["rouge-1"] == pytest.approx(50.0, abs=1e-5)


def test_white_space_around_a_reply_does_not_count_and_inside_it_does() -> None:
    assert scores_of(pair(" 你好\n", "你好"))["exact_match"] == 100.0
    assert scores_of(pair("你 好", "你好"))["exact_match"] == 0.0


def test_control_strings_that_were_typed_are_compared_as_text() -> None:
    assert scores_of(pair("say <|user|>", "say"))["exact_match"] == 0.0


def test_a_call_is_compared_as_name_line_break_arguments() -> None:
    assert text(reply('{"city": "北京"}', "get_weather")) == 'get_weather\n{"city": "北京"}'
    wrong_name = Prediction(reply("{}", "get_time"), reply("{}", "get_weather"), tools=(WEATHER,))
    assert scores_of(wrong_name)["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("get_weather", '{"city": "上海"}', 100.0),
        ("get_weather", '{"city": "上海", "unit": "C"}', 100.0),
        ("get_weather", '{"unit": "C"}', 0.0),
        ("get_weather", '["上海"]', 0.0),
        ("get_weather", "{'city': '上海'}", 0.0),
        ("get_weather", "[" * 100_000, 0.0),
        ("get_time", '{"city": "上海"}', 0.0),
        ("", "上海是晴天。", 0.0),
    ],
)
def test_a_call_is_valid_with_a_known_name_json_arguments_and_the_required_ones(
    name: str, arguments: str, expected: float
) -> None:
    assert call_score(name, arguments) == expected


def test_a_tool_without_required_arguments_or_parameters_takes_any_object() -> None:
    for more in ({}, {"parameters": None}, {"parameters": {"required": "all"}}, {"parameters": {"required": [1]}}):  # fmt: skip
        tools = ({"type": "function", "function": {"name": "now"} | more},)
        assert call_score("now", "{}", tools=tools) == 100.0


def test_a_built_in_tool_takes_text() -> None:
    assert call_score("python", "print(1)", tools=({"type": "python"},)) == 100.0


def test_validity_is_asked_of_calls_only() -> None:
    answer = reply("晴。")
    assert validity(Prediction(answer, answer, tools=(WEATHER,))) is None
    invented = Prediction(reply("{}", "get_time"), answer, tools=(WEATHER,))
    assert validity(invented) == 0.0
    # A first line that merely looks like a name, where no tools are offered.
    assert validity(Prediction(reply("b", "a"), answer)) is None
    assert means_of([Prediction(answer, answer)])["tool_call_validity"] is None


def test_the_mean_of_validity_is_over_calls_and_of_the_rest_over_all() -> None:
    good = Prediction(
        reply('{"city": "上海"}', "get_weather"), reply("{}", "get_weather"), True, (WEATHER,)
    )
    text = Prediction(reply("好"), reply("好"), False, (WEATHER,))
    means = means_of([good, text, text, text])
    assert means["tool_call_validity"] == 100.0
    assert means["stop_rate"] == 25.0


def test_no_pairs_have_no_scores() -> None:
    assert set(means_of([]).values()) == {None}


def test_the_subsequence_is_as_long_as_rouge_chinese_finds_it() -> None:
    from rouge_chinese import rouge_score

    chance = random.Random(0)
    for _ in range(300):
        one, other = (
            [chance.choice("abcd ") for _ in range(chance.randrange(1, 90))] for _ in range(2)
        )
        assert texts.lcs_length(one, other) == rouge_score._len_lcs(one, other)


def test_odd_text_scores_as_the_borrowed_functions_say() -> None:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    chance = random.Random(1)
    pieces = [
        "好",
        "今天",
        "。",
        "！",
        "……",
        "”",
        "\n",
        "\n\n",
        " ",
        "\t",
        "a",
        "3.5",
        "？",
        "😀",
        "\u3000",
    ]
    for _ in range(200):
        one, other = (
            "x" + "".join(chance.choices(pieces, k=chance.randrange(0, 30))) + "y" for _ in range(2)
        )
        got = scores_of(pair(one, other))
        hypothesis, target = texts.jieba_words(one), texts.jieba_words(other)
        rouge = Rouge().get_scores(" ".join(hypothesis), " ".join(target))[0]
        smoothing = SmoothingFunction().method3
        assert got["bleu-4"] == 100.0 * sentence_bleu(
            [target], hypothesis, smoothing_function=smoothing
        )
        for name in ("rouge-1", "rouge-2", "rouge-l"):
            assert got[name] == 100.0 * rouge[name]["f"]


def test_replies_of_thousands_of_words_are_scored_in_seconds() -> None:
    chance = random.Random(2)
    text = ["".join(chance.choices("天气很好我们去公园散步吃饭。，", k=12_000)) for _ in range(2)]
    start = time.process_time()
    got = scores_of(pair(*text))
    assert len(texts.jieba_words(text[0])) > 4_000
    assert time.process_time() - start < 10  # the dict of rouge_chinese takes minutes and gigabytes
    assert got["rouge-l"]


def test_scoring_says_nothing_leaves_nothing_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from finetune.evaluation.scores import metrics, texts\n"
        "assert texts.jieba_words('今天天气很好') == ['今天天气', '很', '好']\n"
        "assert texts.bleu(['好'], ['好']) > 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_words_do_not_depend_on_what_others_taught_jieba(caplog: pytest.LogCaptureFixture) -> None:
    before = texts.jieba_words("石墨烯台灯")
    import jieba  # after ours, which silences what its import warns of

    with caplog.at_level(logging.DEBUG):
        jieba.dt.tmp_dir = tempfile.mkdtemp(dir=os.environ.get("FINETUNE_CACHE"))
        jieba.add_word("石墨烯台灯")
    assert texts.jieba_words("石墨烯台灯") == before


def test_the_signature_names_what_the_numbers_depend_on() -> None:
    said = metrics.signatures("demo")
    for part in ("jieba words", "method3", "empty replies score 0", "jieba 0.", "nltk 3."):
        assert part in said["bleu-4"]
    assert "f1, jieba words" in said["rouge-l"]
    assert "\n" not in "".join(said.values())
    assert "sentence, characters" in metrics.signatures("llamafactory")["bleu-4"]


# --- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("one", metrics.METRICS, ids=lambda one: one.name)
def test_every_score_can_choose_the_best_in_its_own_direction(one: metrics.Metric) -> None:
    lower = one.name in ("loss", "perplexity", "general_loss", "repetition_rate")
    assert metrics.is_better(one.name, 3.0, 5.0) is lower
    assert metrics.is_better(one.name, 5.0, 3.0) is not lower
    assert not metrics.is_better(one.name, 3.0, 3.0)
    assert metrics.is_better(one.name, 3.0, None)


@pytest.mark.parametrize("name", ["loss", "bleu-4"])
def test_what_is_no_number_is_never_the_best_and_is_beaten_by_any(name: str) -> None:
    nan, infinity = float("nan"), float("inf")
    for value in (nan, infinity, -infinity):
        assert not metrics.is_better(name, value, None)
        assert not metrics.is_better(name, value, 3.0)
        assert metrics.is_better(name, 3.0, value)


def test_a_score_is_counted_in_exactly_one_way() -> None:
    for one in metrics.METRICS:
        ways = [one.per_reply, one.counts, one.of_loss, one.of_labels]
        assert sum(way is not None for way in ways) == 1, one.name
        assert (one.of_loss is not None) == one.source.endswith("loss")
        assert (one.of_labels is not None) == (one.source == "labels")
    names = [one.name for one in metrics.METRICS]
    assert len(set(names)) == len(names)


def test_a_score_that_is_misspelt_is_answered_with_the_one_that_was_meant() -> None:
    assert metrics.best_metric_problem("tool_call_accuracy") is None
    assert "did you mean rouge-l?" in str(metrics.best_metric_problem("rouge_l"))
    assert "choose rouge-l, tool_call_accuracy" in str(metrics.best_metric_problem("nothing"))


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_an_empty_reply_equals_an_empty_reference_and_shares_no_word_with_it(
    definition: DefinitionName,
) -> None:
    found = metrics.numbers_of(pair("", ""), definition)[0]
    assert [found[name] for name in TEXT_METRICS] == [0.0, 0.0, 0.0, 0.0, 100.0]
