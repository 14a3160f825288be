"""Tasks in parts: schemas of calls, what texts share, scales of scores, speeds, lengths that fit."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_votes import write
from torch import nn

from finetune.data.chat.layouts.glm45 import Glm45Layout
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.errors import ConfigError
from finetune.evaluation.scores.votes import score_votes
from finetune.evaluation.tasks import calls, harness, needle, plan, speed, writing
from finetune.evaluation.tasks.calls import CallQuestion, MadeCall
from finetune.evaluation.tasks.plan import Task
from finetune.generation import messages, predict
from finetune.generation.settings import Placement

# --- calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "found"),
    [("dict", {"type": "object"}), ("float", {"type": "number"}), ("tuple", {"type": "array"}), ("String", {"type": "string"}), ("any", {}), ("integer", {"type": "integer"})],
)  # fmt: skip
def test_types_of_python_become_those_of_json_schema(kind: str, found: dict[str, str]) -> None:
    assert calls._schema({"type": kind}) == found
    assert calls._schema({"x": [{"type": kind, "more": 1}]}) == {"x": [found | {"more": 1}]}


def question(category: str, number: int = 0, answer: Any = ()) -> CallQuestion:
    return CallQuestion(f"{category}{number}", category, Conversation(()), answer)


def test_the_first_of_every_category_are_asked() -> None:
    asked = [question(name, n) for n in range(3) for name in ("simple", "live_simple")]
    found = [one.id for _, one in calls._first(asked, 2)]
    assert found == ["simple0", "live_simple0", "simple1", "live_simple1"]


def test_every_wanted_call_has_a_made_one_of_its_own() -> None:
    answer = [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}]
    one = question("parallel", answer=answer)
    first, second, third = (MadeCall("f", {"a": value}) for value in (1, 2, 3))
    assert one.is_right([first, second])
    assert one.is_right([second, first])
    assert not one.is_right([second, second]), "one call answers for one"
    assert not one.is_right([first])
    assert not one.is_right([first, second, third])
    optional = question("simple", answer=[{"f": {"a": [1], "b": ["", 5]}}])
    assert optional.is_right([MadeCall("f", {"a": 1})])
    for made in ({"b": 5}, {"a": 1, "c": 1}, {"a": 1, "b": 6}, None):
        assert not optional.is_right([MadeCall("f", made)])
    assert not optional.is_right([MadeCall("g", {"a": 1})])


# --- other tasks -------------------------------------------------------------------------------


def test_what_two_texts_share_is_short_of_the_whole_of_the_second() -> None:
    assert needle._same([1, 2, 3], [1, 2, 4, 5]) == 2
    assert needle._same([1, 2, 3], [1, 2, 3]) == 2
    assert needle._same([1, 2, 3], [1, 2]) == 1
    assert needle._same([1], [1, 2, 3]) == 1
    assert needle._same([], [1]) == 0
    depths = [needle.Hidden(f"en:10:{depth}", 10, "", [], "").is_deepest for depth in needle.DEPTHS]
    assert depths == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("values", "found", "said"), [([0, 1, 0.5], (0, 100, 50), True), ([0.5, 7], (0.5, 7), False), ([-0.1, 1], (-0.1, 1), False)]
)  # fmt: skip
def test_only_shares_become_per_cents(values: list[float], found: tuple[float, ...], said: bool) -> None:  # fmt: skip
    rows = [{"doc_id": n, "filter": "none", "m": value} for n, value in enumerate(values)]
    [(name, score)] = harness._scores({"results": {"t": {"m,none": 1.0, "m_stderr,none": 0.1, "alias": "t"}}, "samples": {"t": rows}}, "t", "how")  # fmt: skip
    assert (name, score.values) == ("t/m", found)
    assert ("in per cent" in score.signature) is said


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("4k..32k", [4096, 8192, 16384, 32768]), ("4k..31k", [4096, 8192, 16384]), ("500..4000", [500, 1000, 2000, 4000]), ("256", [256]), ("1m", [1 << 20]), ("4K", [4096])],
)  # fmt: skip
def test_lengths_double_up_to_the_last(text: str, lengths: list[int]) -> None:
    assert plan.lengths_of(Task(text, "needle")) == lengths
    for wrong in ("255", "8k..4k", "4k..", "k"):
        with pytest.raises(ConfigError, match=f"--tasks needle:{wrong}"):
            plan.lengths_of(Task(wrong, "needle"))


def test_a_text_is_asked_for_where_the_context_has_room_for_three_tokens_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import finetune.generation.generate as generate

    template: Any = SimpleNamespace(prompts=lambda asked: [[0] * 10 for _ in asked], parse=lambda ids: SimpleNamespace(content=ids))  # fmt: skip
    monkeypatch.setattr(generate, "context_length", lambda _: 910)
    monkeypatch.setattr(generate, "generate", lambda _, __, prompts, **how: [SimpleNamespace(ids="word " * 300) for _ in prompts])  # fmt: skip
    found = writing.ask(None, template, [300, 301], 4)
    assert sorted(found) == ["writing/300", "writing/300:new"]
    assert "301 words do not fit" in capsys.readouterr().err
    assert found["writing/300"].values == (100.0,) * 8
    assert all(value < 2 for value in found["writing/300:new"].values), "the same word again"
    monkeypatch.setattr(generate, "generate", lambda _, __, prompts, **how: [SimpleNamespace(ids="ab") for _ in prompts])  # fmt: skip
    assert writing.ask(None, template, [300], 4)["writing/300:new"].values == (100.0,) * 8


# --- speeds ------------------------------------------------------------------------------------


def test_a_speed_is_of_the_tokens_that_were_read_and_of_those_behind_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import finetune.generation.decoder as decoder
    from finetune.distributed import device

    class Decoder:
        def __init__(self, model: Any, stop_ids: Any, *, drafts: bool) -> None:
            assert stop_ids == ()
            assert not drafts
            self.row = SimpleNamespace(ids=[1], error=None)

        @property
        def active(self) -> bool:
            return len(self.row.ids) < 5

        def add(self, requests: Any) -> list[Any]:
            assert (len(requests[0].prompt), requests[0].decoding.max_new_tokens) == (100, 5)
            return [self.row]

        def step(self) -> None:
            self.row.ids.append(1)

    times = iter([10.0, 12.0, 20.0])
    monkeypatch.setattr(decoder, "Decoder", Decoder)
    monkeypatch.setattr(speed, "_now", lambda: next(times))
    monkeypatch.setattr(device, "memory_gb", lambda: 3.5)
    template: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=50))
    found = speed._measure(None, template, 100, 5)
    assert found == speed.Speed(100, 2.0, 50.0, 4 / 8, 3.5)
    assert speed._said(found).endswith("first token after 2.00 s, written at 0.5 tokens/s, 3.5 GB")


def test_lengths_that_fit_are_measured_in_order_up_to_the_first_that_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import finetune.distributed.map_batches as batches
    import finetune.generation.generate as generate
    import finetune.generation.load as load

    asked: list[int] = []

    def measure(_: Any, __: Any, length: int, new: int) -> speed.Speed:
        asked.append(length)
        if length == 300:
            raise torch.OutOfMemoryError
        return speed.Speed(length, 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(speed, "_measure", measure)
    opened: list[Any] = []
    monkeypatch.setattr(load, "open_model", lambda *words, **how: opened.append((words, how)) or SimpleNamespace(model=nn.Module(), template=None))  # fmt: skip
    monkeypatch.setattr(batches, "evaluating", lambda _: nullcontext())
    monkeypatch.setattr(generate, "context_length", lambda _: 210)
    found = speed.bench("m", [400, 200, 100, 200, 201], new_tokens=10)
    assert asked == [64, 100, 200], "once without counting, then each in order"
    assert [one["length"] for one in found["lengths"]] == [100, 200]
    assert "201 tokens and 10 new ones are over the context of 210" in capsys.readouterr().out
    monkeypatch.setattr(generate, "context_length", lambda _: None)
    assert len(speed.bench("m", [100, 300, 400], new_tokens=10)["lengths"]) == 1
    assert "300 tokens do not fit into memory" in capsys.readouterr().out
    placement = Placement(quantization="nf4")
    all_fit = speed.bench("m", [7, 5], base="b", placement=placement)
    assert opened[-1] == (("m",), {"base": "b", "placement": placement})
    assert [one["length"] for one in all_fit["lengths"]] == [5, 7]
    assert (all_fit["model"], all_fit["new_tokens"]) == ("m", 64)


@pytest.mark.parametrize(
    ("text", "lengths"), [("1k..4k", [1024, 2048, 4096]), ("1k..3k", [1024, 2048]), ("2k..1k", [2048]), ("1000,2K", [1000, 2048]), (" 5 ", [5])]
)  # fmt: skip
def test_lengths_of_a_bench_are_a_range_or_a_list(text: str, lengths: list[int]) -> None:
    assert speed.lengths_of(text) == lengths


# --- votes, thoughts, inputs -------------------------------------------------------------------


def test_the_pairs_of_most_dialogues_come_first(tmp_path: Path) -> None:
    rows = [(["a", "b"], "a", "1"), *((["b", "c"], "c", str(n)) for n in range(3)), (["a", "c"], None, "1")]  # fmt: skip
    found = [(one.a, one.b, one.dialogues) for one in score_votes([write(tmp_path, *rows)])]
    assert found == [("b", "c", 3), ("a", "b", 1), ("a", "c", 1)]


def test_a_thought_is_no_part_of_a_reply_whose_tags_are_text(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    pieces = [SimpleNamespace(text=text, is_thought=text == "hm") for text in ("hm", "<tool_call>", "f")]  # fmt: skip
    stream = SimpleNamespace(take=lambda _: pieces[:2], finish=lambda: pieces[2:])
    monkeypatch.setattr(messages, "reply_stream", lambda *_: stream)
    call = Message("assistant", "{}", "f")
    template: Any = SimpleNamespace(layout=object.__new__(Glm45Layout), messages=lambda *_: [call])
    assert messages.reply_messages([7], template, ()) == [Message("assistant", "<tool_call>f")]
    assert messages.reply_messages([7], template, ({},)) == [call]


@pytest.mark.parametrize("place", ["model", "base", "data"])
def test_no_reply_is_written_over_what_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:  # fmt: skip
    for name in ("model", "base", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.jsonl").write_text("{}\n")
    monkeypatch.setattr(predict.RowOptions, "section", lambda *_: None)
    words = (str(tmp_path / "model"), [str(tmp_path / "data")], tmp_path / place / "file.jsonl")
    with pytest.raises(ConfigError, match="choose another --output"):
        predict.predict(*words, base=str(tmp_path / "base"), overwrite=True)
