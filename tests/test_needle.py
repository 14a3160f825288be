"""Needle in a haystack: texts of the asked length with the sentence at its depth, and what counts as found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError
from finetune.evaluation.evaluate import Options, evaluate
from finetune.evaluation.schema import read_evaluation
from finetune.evaluation.tasks import needle, plan
from finetune.evaluation.tasks.plan import Task


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("4k..32k", [4096, 8192, 16384, 32768]), ("512", [512]), ("300..700", [300, 600]), ("1m", [1 << 20])],
)  # fmt: skip
def test_a_range_doubles_from_its_first_length(text: str, lengths: list[int]) -> None:
    assert plan.lengths_of(Task(text, "needle")) == lengths


@pytest.mark.parametrize("text", ["", "4k..", "8k..4k", "100", "x"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="needle"):
        plan.lengths_of(Task(text, "needle"))


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> Any:
    from finetune.generation.load import open_template

    return open_template(str(tiny_glm))


def test_a_text_fills_its_length_and_holds_its_sentence_at_its_depth(template: Any) -> None:
    found = list(needle.texts(template, 1024))
    assert len(found) == len(needle.DEPTHS) * 2
    for one in found:
        assert 1024 - 120 < len(one.prompt) + needle.NEW_TOKENS <= 1024
        text = template.decode(one.prompt)
        assert text.count(one.number) == 1
        depth = int(one.id.split(":")[2])
        assert abs(100 * text.index(one.number) / len(text) - depth) < 15
    assert len({one.number for one in found}) > 8
    assert [one.prompt for one in needle.texts(template, 1024)] == [one.prompt for one in found]


def test_depths_share_what_stands_before_the_sentence_and_get_the_replies_of_whole_texts(
    tiny_glm: Path, template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.generation import batch
    from finetune.generation.generate import generate
    from finetune.generation.load import open_model

    model = open_model(str(tiny_glm)).model
    asked = list(needle.texts(template, 1024))
    prompts = [one.prompt for one in asked]
    whole = generate(model, template, prompts, max_new_tokens=needle.NEW_TOKENS, batch_size=1)
    read: list[int] = []
    forward = batch._forward

    def counted(model: Any, cache: Any, ids: Any, *rest: Any, **named: Any) -> Any:
        read.append(ids.shape[1])
        return forward(model, cache, ids, *rest, **named)

    monkeypatch.setattr(batch, "_forward", counted)
    monkeypatch.setattr(batch, "FIRST_PASS_TOKENS", 300)
    replies = needle.replies_to(model, template, asked)
    assert replies == [list(one.ids) for one in whole]
    assert max(read) <= 300
    # Per language: all of the deepest text, then a quarter, a half, three quarters, all of it.
    assert 3.3 < sum(one for one in read if one > 1) / 1024 / 2 < 3.7


def test_lengths_without_room_in_memory_are_left_out_before_anything_is_asked(
    tiny_glm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.generation.generate import cache_tokens
    from finetune.generation.load import open_model

    opened = open_model(str(tiny_glm))
    bytes_a_token = (1 << 30) / cache_tokens(opened.model, 1 << 30)
    free = int(3 * 600 * bytes_a_token)
    monkeypatch.setattr("finetune.distributed.device.free_bytes", lambda: free)
    monkeypatch.setattr(needle, "replies_to", lambda model, template, asked: [[]] * len(asked))
    assert list(needle.ask(opened.model, opened.template, [512, 1024])) == ["needle/512"]
    assert "needle: keys and values of 1024 tokens" in capsys.readouterr().err


def test_a_number_in_the_reply_is_found_and_lengths_beyond_the_context_are_left_out(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(model: Any, template: Any, asked: Any) -> list[list[int]]:
        replies = []
        for one in asked:
            text = template.decode(one.prompt)
            place = text.find("blue locker is ") + len("blue locker is ")
            said = f"\nIt is {text[place : place + 5]}." if "blue locker is " in text else "\nNo."
            replies.append(template.tokenizer.plain.encode(said, add_special_tokens=False).ids)
        return replies

    monkeypatch.setattr(needle, "replies_to", answers)
    monkeypatch.setattr("finetune.generation.generate.context_length", lambda _: 600)
    evaluate([str(tiny_glm)], output=tmp_path / "out", options=Options(tasks=("needle:512..1k",)))
    found = read_evaluation(tmp_path / "out")
    [target] = found.targets
    assert list(target.scores) == ["needle/512"]
    assert target.scores["needle/512"].value == 50.0  # every English one
    needles = found.needles[target.name]
    assert needles["en:512:25"] == 100.0
    assert needles["zh:512:25"] == 0.0
    from finetune.report.page import write_page

    page = write_page(tmp_path / "out").read_text(encoding="utf-8")
    assert '<th scope="row">25</th><td class="heat3">50</td>' in page
