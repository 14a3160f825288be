"""How texts of every script are cut into words, which of them count, and the language that a text is in."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.dialogue.conversation import Message
from finetune.evaluation.predictions import Prediction, language
from finetune.evaluation.scores import metrics, texts

PARTICLES = "は が を に で の と も へ や か し ね よ から まで より には では とは でも ので のに"


@pytest.mark.parametrize("particle", PARTICLES.split())
def test_a_japanese_particle_makes_no_texts_alike(particle: str) -> None:
    assert texts.content_words(["学校", particle, "行く"]) == ["学校", "行く"]


@pytest.mark.parametrize("word", ["です", "ます", "我", "的", "a", "을"])
def test_other_short_words_count(word: str) -> None:
    assert texts.content_words(["学校", word]) == ["学校", word]


@pytest.mark.parametrize("sign", ["㐀", "䶿", "一", "鿿", "豈", "\U00020000", "\U0003134f"])
def test_characters_of_every_block_are_chinese_and_cut_by_jieba(
    sign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert texts.is_chinese(f"a{sign}b")
    cut: list[str] = []
    monkeypatch.setattr(texts, "jieba_words", lambda text: cut.append(text) or [text])
    assert texts.script_words(f"a {sign}{sign} b") == ["a", sign * 2, "b"]
    assert cut == [sign * 2]


@pytest.mark.parametrize("sign", ["ぁ", "ん", "ァ", "ー", "ㇰ", "ㇿ", "ｦ", "ﾟ"])
def test_a_text_with_kana_is_japanese_and_not_cut_by_jieba(
    sign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "jieba_words", lambda text: pytest.fail(text))
    assert "東京" in texts.script_words(f"東京、{sign}")
    assert not texts.is_chinese(sign)


def test_signs_beyond_16_bits_shift_no_border() -> None:
    assert texts.script_words("😀😀 ok, 好的 it's 3.5") == ["😀", "😀", "ok", ",", "好", "的", "it's", "3.5"]  # fmt: skip


GREETINGS = {
    "여러분 안녕": "korean", "สวัสดีทุกคน": "thai", "ສະບາຍດີ": "lao", "សួស្តី": "khmer", "မင်္ဂလာပါ": "burmese",
    "γειά σου": "greek", "שלום לכולם": "hebrew", "নমস্কার": "bengali", "வணக்கம்": "tamil", "გამარჯობა": "georgian",
    "բարեւ": "armenian", "hello, ça va": "latin script", "здравствуй": "cyrillic script", "مرحبا بكم": "arabic script",
    "नमस्ते": "devanagari script", "你好，世界": "chinese", "こんにちは": "japanese", "ሰላም": "other", "17 % …": "other",
    "好好 abcdefg": "latin script", "好好 abcde": "chinese",
}  # fmt: skip


@pytest.mark.parametrize("text", GREETINGS)
def test_a_greeting_is_known_by_its_script(text: str) -> None:
    assert language(text) == GREETINGS[text]


# --- scores of one reply -----------------------------------------------------------------------


def numbers(reply: str, reference: str, definition: Any = "default", name: str = "") -> Any:
    said, wanted = Message("assistant", reply, name), Message("assistant", reference, name)
    return metrics.numbers_of(Prediction(said, wanted), definition)[0]


def test_the_repetition_is_that_of_the_reply() -> None:
    assert numbers("a b c d a b c d", "a b c d e f g h")["repetition_rate"] == pytest.approx(20)
    assert numbers("a b c d e f g h", "a b c d a b c d")["repetition_rate"] == 0


def test_a_call_counts_with_its_name_in_llama_factorys_definition() -> None:
    bare, named = (numbers("sum x", "sum y", "llamafactory", name) for name in ("", "addition"))
    whole = numbers("addition\nsum x", "addition\nsum y", "llamafactory")
    for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l"):
        assert named[name] == whole[name] != bare[name], name


@pytest.mark.parametrize("name", ["rouge-1", "rouge-2", "rouge-l"])
def test_each_rouge_is_its_own(name: str) -> None:
    found = numbers("a b c d", "b a c d")
    assert found[name] == pytest.approx({"rouge-1": 100, "rouge-2": 100 / 3, "rouge-l": 75}[name])
