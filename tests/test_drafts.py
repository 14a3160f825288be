"""Replies that are drafted from what stood there before: other passes, no other token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from finetune import methods
from finetune.config.schema import LoraMethod, PTuningV2Method
from finetune.generation import batch as tensors
from finetune.generation import drafts
from finetune.generation.batch import SharedPrefix
from finetune.generation.decoder import Decoder, Decoding, DecodingRow, Request
from finetune.generation.drafts import Drafts
from finetune.generation.load import _sharing
from finetune.methods.adapter_rows import AdapterRows
from finetune.models.kernels import products
from finetune.models.load import load_model

FAMILIES = ["chatglm", "glm", "glm4"]


@pytest.fixture(autouse=True)
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are packed, on any processor."""
    if not products._is_right():
        pytest.skip("this torch has no product of oneDNN's")
    monkeypatch.setattr(products, "_gains", lambda: True)
    monkeypatch.setattr(products, "FEWEST_PACKED", 64)
    monkeypatch.setattr(drafts, "FOLLOWED", 2)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every forward pass."""
    seen: list[int] = []
    original = tensors._forward

    def watched(model: Any, cache: Any, ids: Tensor, *rest: Any, **more: Any) -> Tensor:
        seen.append(ids.shape[1])
        return original(model, cache, ids, *rest, **more)

    monkeypatch.setattr(tensors, "_forward", watched)
    return seen


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


def random_ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tiny.NUM_RANKS, (count,), generator=generator).tolist()


@dataclass
class Asked:
    """What is asked of a model, with and without drafts."""

    model: Any
    stop_ids: Sequence[int] = ()
    decoding: Decoding = field(default_factory=lambda: Decoding(40))
    more: Callable[[], dict[str, Any]] = dict
    """Of each request: a constraint, who reads it."""

    def written(self, prompt: Sequence[int], prefix: SharedPrefix | None = None, *, drafts: bool = True) -> Decoder:  # fmt: skip
        """Its decoder, at the end of the reply."""
        with torch.no_grad(), products.packed(self.model):
            decoder = Decoder(self.model, self.stop_ids, drafts=drafts)
            [row] = decoder.add([Request(prompt, self.decoding, **self.more())], prefix)
            while decoder.active:
                decoder.step()
        if row.error is not None:
            raise row.error
        return decoder

    def row(self, prompt: Sequence[int], prefix: SharedPrefix | None = None) -> DecodingRow:
        """The reply."""
        return self.written(prompt, prefix)._rows[0]

    def by_steps(self, prompt: Sequence[int]) -> DecodingRow:
        """The reply without drafts."""
        return self.written(prompt, drafts=False)._rows[0]


def copying(model: Any, copied: Sequence[int]) -> None:
    """Lets a model write these ids round and round, whatever it has learned: token and next one look alike."""
    inner = getattr(model, "transformer", None)
    table = inner.embedding.word_embeddings if inner is not None else model.model.embed_tokens
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and weight is not table.weight:
                weight.mul_(0.1)
        head = model.get_output_embeddings().weight
        for token, following in zip(copied, [*copied[1:], copied[0]], strict=True):
            table.weight[token].mul_(10)
            head[following] = table.weight[token]


def prompts(count: int) -> Iterator[list[int]]:
    for seed in range(count):
        part = random_ids(6 + seed % 5, seed)
        yield [*part, *random_ids(seed % 4, 100 + seed), *part[: 3 + seed % 3]]


def test_replies_of_drawn_models_and_prompts_are_the_same_token_for_token(
    folder: Path, passes: list[int]
) -> None:
    model, steps = load_model(folder, dtype="float32"), list[tuple[int, int]]()
    stops = range(0, tiny.NUM_RANKS, 9)
    for draw in range(3):
        torch.manual_seed(draw)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    torch.nn.init.normal_(weight, std=(0.02, 0.2, 1.0)[draw])
        for prompt in prompts(6):
            asked = Asked(model, stops if draw % 2 else ())
            plain = asked.by_steps(prompt)
            number = len(passes)
            passes.clear()
            drafted = asked.row(prompt)
            assert (drafted.ids, drafted.stopped) == (plain.ids, plain.stopped)
            steps.append((number, len(passes)))
            passes.clear()
    assert all(drafts._exact[model].values())
    assert sum(drafted for _, drafted in steps) < sum(plain for plain, _ in steps)


def test_a_reply_that_copies_takes_a_fraction_of_the_passes(
    folder: Path, passes: list[int]
) -> None:
    model, text = load_model(folder, dtype="float32"), list(range(10, 40))
    copying(model, text)
    asked = Asked(model, decoding=Decoding(80))
    assert asked.by_steps(text[:12]).ids == [text[(12 + at) % 30] for at in range(80)]
    assert len(passes) == 80
    asked.row(text * 2)  # compares passes with steps, once
    passes.clear()
    assert asked.row([*text, *text[:12]]).ids == [text[(12 + at) % 30] for at in range(80)]
    assert passes[1:] == [1 + drafts.SHORT, *[1 + drafts.LONG] * 9, 1, 1, 1]


def test_the_nearest_rivals_stay_in_their_order(folder: Path, passes: list[int]) -> None:
    """Every token has a twin, whose logit is the same or differs in its last bits."""
    model = load_model(folder, dtype="float32")
    head = model.get_output_embeddings().weight
    half, tokens = len(head) // 2, 0
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            noise = (0.0, 1e-7, 3e-7)[seed] * torch.randn_like(head[:half])
            head[half : 2 * half] = head[:half] * (1 + noise)
        for prompt in prompts(4):
            asked = Asked(model)
            plain = asked.by_steps(prompt)
            assert asked.row(prompt).ids == plain.ids
            tokens += len(plain.ids)
    assert any(width > 1 for width in passes[1:])
    assert tokens == 3 * 4 * 40


@pytest.mark.parametrize("longest", [1, 2, 4, 5, 9, 12])
def test_a_reply_ends_where_it_would_have_ended(
    longest: int, tiny_glm: Path, passes: list[int]
) -> None:
    model, text = load_model(tiny_glm, dtype="float32"), list(range(10, 40))
    copying(model, text)
    prompt, expected = [*text, *text[:12]], text[12 : 12 + longest]
    for asked in (
        Asked(model, decoding=Decoding(longest)),
        Asked(model, more=lambda: {"on_token": lambda token: token == expected[-1]}),
    ):
        decoder = asked.written(prompt)
        assert (decoder._rows[0].ids, decoder._rows[0].stopped) == (expected, False)
    stopped = Asked(model, [text[12 + longest]]).row(prompt)
    assert (stopped.ids, stopped.stopped) == (expected, True)
    steps = Asked(model, decoding=Decoding(longest)).written(prompt)
    plain = Asked(model, decoding=Decoding(longest)).written(prompt, drafts=False)
    kept, expected_kept = (one.taken(one._rows[0]) for one in (steps, plain))
    assert kept.ids == expected_kept.ids
    for pair, other in zip(kept.layers, expected_kept.layers, strict=True):
        assert all(map(torch.equal, pair, other))


class EveryThird:
    """Lets no multiple of three come, and counts what it has seen."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def restrict(self, logits: Tensor) -> Tensor:
        """Not these."""
        return logits.index_fill(0, torch.arange(0, len(logits), 3), float("-inf"))

    def accept(self, token: int) -> None:
        """One more."""
        self.seen.append(token)


def test_sampled_punished_and_restricted_replies_are_the_same(
    folder: Path, passes: list[int]
) -> None:
    model = load_model(folder, dtype="float32")
    copying(model, range(10, 40))
    ways = [
        {"decoding": Decoding(30, temperature=0.7, seed=3)},
        {"decoding": Decoding(30, repetition_penalty=1.3, frequency_penalty=0.1)},
        {"more": lambda: {"constraint": EveryThird()}},
    ]
    for way in ways:
        for prompt in ([*range(10, 40), *range(10, 22)], *prompts(3)):
            asked = Asked(model, **way)
            assert asked.row(prompt).ids == asked.by_steps(prompt).ids
    assert any(width in (1 + drafts.SHORT, 1 + drafts.LONG) for width in passes)


@pytest.mark.parametrize("method", [LoraMethod(rank=4), PTuningV2Method(num_virtual_tokens=4)])
def test_adapters_and_prefixes_reply_the_same(method: Any, folder: Path, passes: list[int]) -> None:
    torch.manual_seed(0)
    model: Any = methods.attach(load_model(folder, dtype="float32"), method).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or "prefix" in name:
                torch.nn.init.normal_(weight, std=0.3)
    for prompt in prompts(4):
        asked = Asked(model)
        assert asked.row(prompt).ids == asked.by_steps(prompt).ids
    assert drafts._exact[model]
    assert all(drafts._exact[model].values())


def test_adapters_of_one_base_reply_the_same(tiny_glm: Path, passes: list[int]) -> None:
    base = load_model(tiny_glm, dtype="float32")
    torch.manual_seed(0)
    adapters = [methods.attach(_sharing(base), LoraMethod(rank=4)).eval() for _ in range(2)]
    rows = AdapterRows(base)
    for name, adapted in zip(("one", "other"), adapters, strict=True):
        with torch.no_grad():
            for place, weight in adapted.named_parameters():
                if "lora_" in place:
                    torch.nn.init.normal_(weight, std=0.3)
        rows.put(name, adapted)
    replies = set()
    for name in ("one", "other", ""):
        for prompt in prompts(4):
            asked = Asked(rows, more=lambda name=name: {"adapter": name})
            drafted = asked.row(prompt).ids
            assert drafted == asked.by_steps(prompt).ids
            replies.add(tuple(drafted))
    assert len(replies) == 12
    assert {adapter for adapter, *_ in drafts._exact[rows]} == {"one", "other", ""}
    assert all(drafts._exact[rows].values())


def test_what_prompts_begin_with_may_be_known(tiny_glm: Path, passes: list[int]) -> None:
    model = load_model(tiny_glm, dtype="float32")
    for prompt in prompts(4):
        with torch.no_grad():
            known = SharedPrefix(model, []).more(model, prompt[:5])
        asked = Asked(model)
        expected = asked.by_steps(prompt).ids
        assert asked.row(prompt, known).ids == expected
    assert all(drafts._exact[model].values())


def test_a_pass_that_rounds_otherwise_is_found_out_and_not_used(
    tiny_glm: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "FEWEST_PACKED", 2000)  # the output layer alone
    monkeypatch.setattr(tensors, "one_by_one", nullcontext)
    model, text = load_model(tiny_glm, dtype="float32"), list(range(10, 40))
    copying(model, text)
    asked = Asked(model)
    plain = asked.by_steps(text * 2).ids
    assert asked.row(text * 2).ids == plain
    assert drafts._exact[model] == {("", torch.get_num_threads(), 1 + drafts.SHORT): False}
    passes.clear()
    assert asked.row(text * 2).ids == plain
    assert set(passes[1:]) == {1}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nothing_is_drafted_where_nothing_is_packed_or_rows_are_several(
    dtype: str, tiny_glm: Path, passes: list[int]
) -> None:
    model = load_model(tiny_glm, dtype=dtype)
    text = [*range(10, 30), *range(10, 20)]
    number = 1 if dtype == "bfloat16" else 2
    with torch.no_grad(), products.packed(model):
        decoder = Decoder(model, ())
        decoder.add([Request(text, Decoding(8)) for _ in range(number)])
        while decoder.active:
            decoder.step()
    assert set(passes[1:]) == {1}


def test_drafts_that_are_wrong_become_rare_and_those_that_are_right_long() -> None:
    ids = [1, 2, 3]
    found = Drafts([7, 7, *ids], ids, 1000)
    lengths = []
    for _ in range(40):
        lengths.append(len(found._found()))
        if lengths[-1]:
            found.judge(0)
    assert [at for at, length in enumerate(lengths) if length] == [0, 2, 6, 14, 30]
    assert set(lengths) == {0, drafts.SHORT}
    found.judge(1)
    assert found._found() == [1, 2, 3]  # what has begun to repeat itself goes on
    found.judge(drafts.SHORT)
    assert found._found() == [1, 2, 3, 1, 2, 3, 1]
    assert Drafts([1, 2, 3, 1, 2], [], drafts.SHORT)._found() == []


def test_rotations_that_depend_on_the_reach_of_a_pass_are_not_drafted(tiny_glm: Path) -> None:
    model = load_model(tiny_glm, dtype="float32")
    with products.packed(model):
        assert drafts._can_be_checked(model)
        model.config.rope_parameters["rope_type"] = "dynamic"
        assert not drafts._can_be_checked(model)
    model.config.rope_parameters["rope_type"] = "default"
    assert not drafts._can_be_checked(model)  # not packed
