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
from finetune.evaluation import metrics
from finetune.evaluation.metrics import Pair

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


def pair(prediction: str, reference: str) -> Pair:
    return Pair(reply(prediction), reply(reference))


def call_score(name: str, arguments: str, *, tools: tuple = (WEATHER,)) -> float | None:
    expected = reply('{"city": "北京"}', "get_weather")
    return metrics.tool_call_validity(Pair(reply(arguments, name), expected, tools=tools))


@pytest.mark.parametrize("unit", ["word", "character"])
def test_every_golden_pair_scores_the_reference_to_the_last_digit(
    glm4_assets: Path, unit: metrics.BleuUnit
) -> None:
    golden = json.loads((glm4_assets / "golden" / "metrics.json").read_text(encoding="utf-8"))
    keys = {name: name for name in ("rouge-1", "rouge-2", "rouge-l")} | {
        "bleu-4": f"bleu-4 {unit}s"
    }
    scores = [
        metrics.score_pair(pair(one["prediction"], one["reference"]), bleu_unit=unit)
        for one in golden["pairs"]
    ]
    for one, got in zip(golden["pairs"], scores, strict=True):
        assert {name: got[name] for name in keys} == {name: one[keys[name]] for name in keys}
    means = metrics.mean(scores)
    assert {name: means[name] for name in keys} == {
        name: golden["mean"][keys[name]] for name in keys
    }


def test_a_score_worked_out_by_hand() -> None:
    # Words: a b c d | a b x d, white space between them, which BLEU counts and ROUGE does not.
    # ROUGE-1: 3 of 4 words; ROUGE-2: "a b" of 3 pairs; ROUGE-L: a b d, 3 of 4.
    got = metrics.score_pair(pair("a b c d", "a b x d"))
    assert got["rouge-1"] == pytest.approx(75.0)
    assert got["rouge-2"] == pytest.approx(100 / 3)
    assert got["rouge-l"] == pytest.approx(75.0)
    # BLEU, 7 tokens each ("_" a blank): all but c; a_ _b b_ _d of 6; a_b _b_ of 5; a_b_ of 4.
    assert got["bleu-4"] == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)


def test_the_scale_runs_from_0_to_100() -> None:
    same = metrics.score_pair(Pair(reply("今天天气很好。"), reply("今天天气很好。"), stopped=True))
    assert [round(same[name] or 0, 4) for name in metrics.TEXT_METRICS] == [100.0] * 5
    assert same["stop_rate"] == 100.0
    none = metrics.score_pair(Pair(reply("xyz"), reply("今天天气很好。"), stopped=False))
    assert [none[name] for name in metrics.TEXT_METRICS] == [0.0] * 5
    assert none["stop_rate"] == 0.0


@pytest.mark.parametrize("empty", ["", " ", "\n", " \n\n "])
def test_an_empty_reply_scores_0_and_stays_in_the_mean(empty: str) -> None:
    means = metrics.score([pair(empty, "你好"), pair("你好", "你好")])
    assert means["exact_match"] == 50.0
    assert means["rouge-1"] == pytest.approx(50.0, abs=1e-5)


def test_white_space_around_a_reply_does_not_count_and_inside_it_does() -> None:
    assert metrics.score_pair(pair(" 你好\n", "你好"))["exact_match"] == 100.0
    assert metrics.score_pair(pair("你 好", "你好"))["exact_match"] == 0.0


def test_control_strings_that_were_typed_are_compared_as_text() -> None:
    assert metrics.score_pair(pair("say <|user|>", "say"))["exact_match"] == 0.0


def test_a_call_is_compared_as_name_line_break_arguments() -> None:
    assert metrics.text(reply('{"city": "北京"}', "get_weather")) == 'get_weather\n{"city": "北京"}'
    wrong_name = Pair(reply("{}", "get_time"), reply("{}", "get_weather"), tools=(WEATHER,))
    assert metrics.score_pair(wrong_name)["exact_match"] == 0.0


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
    tools = ({"type": "function", "function": {"name": "now"}},)
    assert call_score("now", "{}", tools=tools) == 100.0


def test_a_built_in_tool_takes_text() -> None:
    assert call_score("python", "print(1)", tools=({"type": "python"},)) == 100.0


def test_validity_is_asked_of_calls_only() -> None:
    answer = reply("晴。")
    assert metrics.tool_call_validity(Pair(answer, answer, tools=(WEATHER,))) is None
    invented = Pair(reply("{}", "get_time"), answer, tools=(WEATHER,))
    assert metrics.tool_call_validity(invented) == 0.0
    # A first line that merely looks like a name, where no tools are offered.
    assert metrics.tool_call_validity(Pair(reply("b", "a"), answer)) is None
    assert metrics.score([Pair(answer, answer)])["tool_call_validity"] is None


def test_the_mean_of_validity_is_over_calls_and_of_the_rest_over_all() -> None:
    good = Pair(
        reply('{"city": "上海"}', "get_weather"), reply("{}", "get_weather"), True, (WEATHER,)
    )
    text = Pair(reply("好"), reply("好"), False, (WEATHER,))
    means = metrics.score([good, text, text, text])
    assert means["tool_call_validity"] == 100.0
    assert means["stop_rate"] == 25.0


def test_no_pairs_have_no_scores() -> None:
    assert set(metrics.score([]).values()) == {None}


def test_the_subsequence_is_as_long_as_rouge_chinese_finds_it() -> None:
    from rouge_chinese import rouge_score

    chance = random.Random(0)
    for _ in range(300):
        one, other = (
            [chance.choice("abcd ") for _ in range(chance.randrange(1, 90))] for _ in range(2)
        )
        assert metrics.lcs_length(one, other) == rouge_score._len_lcs(one, other)


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
        got = metrics.score_pair(pair(one, other))
        hypothesis, target = metrics.words(one), metrics.words(other)
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
    got = metrics.score_pair(pair(*text))
    assert len(metrics.words(text[0])) > 4_000
    assert time.process_time() - start < 10  # the dict of rouge_chinese takes minutes and gigabytes
    assert got["rouge-l"]


def test_scoring_says_nothing_leaves_nothing_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from finetune.evaluation import metrics\n"
        "assert metrics.words('今天天气很好') == ['今天天气', '很', '好'], metrics.words('今天天气很好')\n"
        "assert metrics.bleu(['好'], ['好']) > 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_words_do_not_depend_on_what_others_taught_jieba(caplog: pytest.LogCaptureFixture) -> None:
    before = metrics.words("石墨烯台灯")
    import jieba  # after ours, which silences what its import warns of

    with caplog.at_level(logging.DEBUG):
        jieba.dt.tmp_dir = tempfile.mkdtemp(dir=os.environ.get("FINETUNE_CACHE"))
        jieba.add_word("石墨烯台灯")
    assert metrics.words("石墨烯台灯") == before


def test_the_signature_names_what_the_numbers_depend_on() -> None:
    line = metrics.signature()
    for part in ("0..100", "jieba words", "method3", "f1", "empty replies score 0", "jieba 0."):
        assert part in line
    assert "\n" not in line
    assert "characters" in metrics.signature(bleu_unit="character")
