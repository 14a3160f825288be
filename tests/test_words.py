"""Words by script: what two texts share is what they say, in 26 languages."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from test_metrics import pair

from finetune.evaluation.scores.metrics import numbers_of, signatures
from finetune.evaluation.scores.texts import content_words, script_words

SENTENCES = Path(__file__).parents[1] / "scripts" / "evidence" / "languages.jsonl"
ROWS = [json.loads(line) for line in SENTENCES.read_text("utf-8").splitlines()]
NAMES = ("bleu-4", "rouge-1", "rouge-l")


def scores(reply: str, reference: str) -> list[float]:
    found, _ = numbers_of(pair(reply, reference), "default")
    return [found[name] or 0.0 for name in NAMES]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["language"])
def test_a_sentence_shares_nothing_with_an_unrelated_one_and_all_with_itself(
    row: dict[str, str],
) -> None:
    unrelated = scores(row["other"], row["text"])
    alike = scores(row["paraphrase"], row["text"])
    assert max(unrelated) < 15
    assert scores(row["text"], row["text"]) == pytest.approx([100.0] * 3, abs=1e-4)
    assert all(low < middle < 100 for low, middle in zip(unrelated, alike, strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("今天天气很好 OK", ["今天天气", "很", "好", "OK"]),
        ("今日は天気がいい", ["今日", "は", "天気", "が", "いい"]),
        ("It's 3.5 m,  naïve foo_bar!", ["It's", "3.5", "m", ",", "naïve", "foo_bar", "!"]),
        ("오늘 날씨가", ["오늘", "날씨가"]),
        ("วันนี้อากาศดีมาก", ["วัน", "นี้", "อากาศ", "ดี", "มาก"]),
        ("😀👍🏽 x", ["😀", "👍🏽", "x"]),
        (" \n\u3000", []),
        ("", []),
    ],
)
def test_words_are_those_of_the_script_and_white_space_is_none(text: str, words: list[str]) -> None:
    assert script_words(text) == words


def test_signs_and_particles_count_only_where_there_is_nothing_else() -> None:
    assert content_words(["a", ",", "b", "."]) == ["a", "b"]
    assert content_words(["+", "-"]) == ["+", "-"]
    assert content_words(["彼", "は", "は"]) == ["彼"]
    assert content_words(["は", "、"]) == ["は", "、"]
    assert scores("+", "+")[1:] == pytest.approx([100.0, 100.0], abs=1e-4)
    assert scores("+", "-") == [0.0, 0.0, 0.0]


JAPANESE = (
    "今日は天気がいいので、公園を散歩しましょう。", "私には彼の言うことが分からない。", "東京では雨が降っていますが、大阪は晴れです。",
    "これは去年の夏に京都で撮った写真です。", "電車が遅れたので、会議に間に合わなかった。", "新しい法律は来年の四月から施行される。",
    "子供たちは庭でサッカーをして遊んでいる。", "彼女とは高校からの友達でもあるし、同僚でもある。",
)  # fmt: skip


def test_japanese_sentences_do_not_resemble_each_other_by_their_particles() -> None:
    found = [scores(*both)[1] for both in itertools.combinations(JAPANESE, 2)]
    assert sum(found) / len(found) < 5  # 15 where particles are counted


def test_random_texts_over_the_same_words_have_no_high_bleu() -> None:
    chance = random.Random(0)
    vocabulary = [f"word{number}" for number in range(50)]
    texts = [" ".join(chance.choices(vocabulary, k=100)) for _ in range(2)]
    assert scores(*texts)[0] < 5  # 21.7 where blanks are words


def test_one_word_labels_have_a_corpus_bleu() -> None:
    from finetune.evaluation.scores.statistics import ReplyTable

    table = ReplyTable()
    for number, (reply, label) in enumerate([("yes", "yes"), ("no", "no"), ("no", "yes")]):
        table.add(str(number), *numbers_of(pair(reply, label), "default"))
    assert table.scores()["corpus_bleu"] == pytest.approx(200 / 3)


def test_signatures_tell_the_definitions_apart() -> None:
    said = [signatures(name) for name in ("default", "demo", "llamafactory")]
    assert len({one["bleu-4"] for one in said}) == 3
    assert "ICU 7" in said[0]["rouge-l"]
    assert "words by script" in said[0]["corpus_bleu"]
    assert "ICU" not in said[1]["rouge-l"] + said[2]["rouge-l"]
