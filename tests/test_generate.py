"""Replies do not depend on batches, processes, or what the checkpoint says about sampling."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from finetune.config.schema import PTuningV2Method
from finetune.distributed.map_batches import EvaluationStoppedError
from finetune.errors import DataError
from finetune.generation import batch as tensors
from finetune.generation import decoder, drafts
from finetune.generation import generate as generation
from finetune.generation.decoder import Decoder, DecodingRow
from finetune.generation.generate import Extras, Reply, SeededSampling, generate, plan_batches
from finetune.generation.settings import Sampling
from finetune.methods import ptuning_v2
from finetune.models.kernels import products
from finetune.models.load import load_model


@dataclass
class Stops:
    """The two facts that generation takes from a template."""

    stop_ids: tuple[int, ...] = tuple(tiny.EOS_IDS)
    pad_id: int = tiny.PAD_ID


def prompts(count: int, *, longest: int = 40, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    header = [tiny.CONTROL_IDS["[gMASK]"], tiny.CONTROL_IDS["<sop>"]]
    return [
        [*header, *(chance.randrange(tiny.NUM_RANKS) for _ in range(chance.randrange(2, longest)))]
        for _ in range(count)
    ]


def open_tiny(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def glm(tiny_glm: Path) -> Any:
    return open_tiny(tiny_glm)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shape [rows, tokens] that goes into every forward pass."""
    seen: list[tuple[int, int]] = []
    original = tensors._forward

    def watched(model: Any, cache: Any, ids: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(tuple(ids.shape))
        return original(model, cache, ids, *rest, **more)

    monkeypatch.setattr(tensors, "_forward", watched)
    return seen


def by_hand(model: Any, prompt: list[int], stops: Stops, new: int) -> tuple[tuple[int, ...], bool]:
    """Greedy decoding without a cache, a batch or transformers' generate."""
    ids: list[int] = []
    with torch.no_grad():
        for _ in range(new):
            logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] in stops.stop_ids:
                return tuple(ids[:-1]), True
    return tuple(ids), False


@pytest.mark.parametrize("family", ["chatglm", "glm", "glm4"])
def test_a_batch_gives_what_each_prompt_gives_alone(
    family: str, request: pytest.FixtureRequest
) -> None:
    model = open_tiny(request.getfixturevalue(f"tiny_{family}"))
    asked = prompts(12)
    # A third of the vocabulary stops a reply, so that rows of a batch end at different steps.
    stops = Stops(stop_ids=(*tiny.EOS_IDS, *range(0, tiny.NUM_RANKS, 3)))
    alone = [by_hand(model, prompt, stops, 24) for prompt in asked]
    assert len({len(ids) for ids, _ in alone}) > 2
    for size in (1, 5, 12):
        replies = generate(model, stops, asked, max_new_tokens=24, batch_size=size)
        assert replies == [Reply(i, *one) for i, one in enumerate(alone)]


SPEED_PATHS: dict[str, list[tuple[Any, str, Any]]] = {
    "all on": [],
    "no common beginning": [(tensors, "SHORTEST_PREFIX", 10**9)],
    "every prompt read by itself": [
        (tensors, "beginnings", lambda prompts: [*range(len(prompts))]),
        (generation, "beginnings", lambda prompts: [*range(len(prompts))]),
    ],
    "in pieces": [(tensors, "FIRST_PASS_TOKENS", 16)],
    "rows that ended stay": [(Decoder, "is_sparse", False)],
    "batches not dealt together": [(generation, "FULL_BATCH", 1)],
    "one row at a time": [(generation, "CACHE_BYTES", 1)],
    "torch's own products": [(products, "_gains", lambda: False)],
    "weights not packed": [(products, "PACKED_SHARE", 10**18)],
    "torch's own maximum": [(decoder, "_argmax", lambda logits: logits.argmax(dim=-1))],
    "nothing drafted": [(drafts, "FOLLOWED", 10**9)],
    "more drafted": [(drafts, "FOLLOWED", 1), (drafts, "LONGEST_PAUSE", 0)],
    "masks made by transformers": [(tensors, "takes_documents", lambda model: False)],
}


@pytest.mark.parametrize("family", ["chatglm", "glm4"])
def test_every_speed_path_on_and_off_gives_the_same_tokens(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "FEWEST", 1)
    monkeypatch.setattr(products, "FEWEST_PACKED", 1)
    monkeypatch.setattr(products, "_gains", products._is_right)
    model = load_model(request.getfixturevalue(f"tiny_{family}"), dtype="float32")
    stops = Stops(stop_ids=(*tiny.EOS_IDS, *range(0, tiny.NUM_RANKS, 3)))
    system = prompts(1, longest=30, seed=7)[0] * 2
    wholes = [[*system, *rest] for rest in prompts(12, longest=16)]
    asked = [whole[:end] for whole in wholes for end in (len(system) + 2, len(whole) - 1, len(whole))]  # fmt: skip
    expected = [Reply(i, *by_hand(model, prompt, stops, 10)) for i, prompt in enumerate(asked)]
    assert len({len(reply.ids) for reply in expected}) > 2
    for name, changes in SPEED_PATHS.items():
        with monkeypatch.context() as off:
            for place, attribute, value in changes:
                off.setattr(place, attribute, value)
            for size in (3, 36):
                found = generate(model, stops, asked, max_new_tokens=10, batch_size=size)
                assert found == expected, (name, size)


def test_a_reply_that_is_cut_has_not_stopped_and_one_at_the_limit_has(glm: Any) -> None:
    prompt = prompts(1)[0]
    [free] = generate(glm, Stops(), [prompt], max_new_tokens=8, batch_size=1)
    assert (len(free.ids), free.stopped) == (8, False)
    place = next(i for i in range(1, 8) if free.ids[i] not in free.ids[:i])
    stops = Stops(stop_ids=(free.ids[place],))
    [just] = generate(glm, stops, [prompt], max_new_tokens=place + 1, batch_size=1)
    assert (just.ids, just.stopped) == (free.ids[:place], True)
    [cut] = generate(glm, stops, [prompt], max_new_tokens=place, batch_size=1)
    assert (cut.ids, cut.stopped) == (free.ids[:place], False)


def test_generation_is_greedy_whatever_the_checkpoint_says(glm: Any) -> None:
    from transformers import GenerationConfig

    asked = prompts(4)
    expected = generate(glm, Stops(), asked, max_new_tokens=12, batch_size=4)
    before = glm.generation_config
    glm.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.8, repetition_penalty=3.0, max_length=20,
        no_repeat_ngram_size=1, eos_token_id=5, pad_token_id=7, use_cache=False,
    )  # fmt: skip
    theirs = glm.generation_config
    try:
        assert generate(glm, Stops(), asked, max_new_tokens=12, batch_size=4) == expected
        assert glm.generation_config is theirs
    finally:
        glm.generation_config = before


def test_a_model_in_training_is_given_back_as_it_was(tiny_glm: Path) -> None:
    model = open_tiny(tiny_glm)
    expected = generate(model, Stops(), prompts(3), max_new_tokens=6, batch_size=3)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    model.train()
    model.lm_head.eval()
    widths: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda layer, args: widths.append(args[0].shape[1])
    )
    assert generate(model, Stops(), prompts(3), max_new_tokens=6, batch_size=3) == expected
    hook.remove()
    assert widths[1:] == [1] * 5  # the cache was used
    assert model.training
    assert model.model.layers[1].training
    assert not model.lm_head.training
    assert model.is_activation_checkpointing
    assert model.config.use_cache is False


def test_an_adapter_generates_through_its_own_weights(tiny_glm: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        open_tiny(tiny_glm), LoraConfig(r=4, lora_dropout=0.5, target_modules=["o_proj"])
    )
    asked = prompts(6)
    untouched = generate(model, Stops(), asked, max_new_tokens=10, batch_size=3)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2.0)
    model.train()
    tuned = generate(model, Stops(), asked, max_new_tokens=10, batch_size=3)
    assert tuned != untouched
    merged = model.merge_and_unload()
    assert generate(merged, Stops(), asked, max_new_tokens=10, batch_size=2) == tuned


def test_batches_are_sorted_longest_first() -> None:
    asked = [[number] * length for number, length in enumerate([5, 30, 10, 29, 1, 10])]
    assert plan_batches(asked, 4) == [[1, 3, 2, 5], [0, 4]]
    assert plan_batches([], 4) == []


def test_prompts_that_begin_a_longer_one_stand_behind_it() -> None:
    asked = [[1, 2], [9] * 5, [1, 2, 3, 4, 5, 6], [8] * 4, [1, 2, 3, 4], [1, 2]]
    assert tensors.beginnings(asked) == [2, 1, 2, 3, 2, 2]
    assert plan_batches(asked, 3) == [[2, 4, 0], [5, 1, 3]]


def test_small_batches_are_dealt_together_while_enough_are_left() -> None:
    assert [len(one) for one in plan_batches(prompts(128), 4)] == [16] * 8
    assert [len(one) for one in plan_batches(prompts(1024), 4)] == [32] * 32
    assert [len(one) for one in plan_batches(prompts(63), 4)] == [4] * 15 + [3]
    assert [len(one) for one in plan_batches(prompts(1024), 64)] == [64] * 16


@pytest.mark.parametrize("family", ["chatglm", "glm", "prefixed"])
def test_every_reply_of_a_dialogue_is_asked_in_one_pass_over_it(
    family: str, request: pytest.FixtureRequest, batches: list[tuple[int, int]]
) -> None:
    model = open_tiny(request.getfixturevalue(f"tiny_{family.replace('prefixed', 'glm')}"))
    if family == "prefixed":
        torch.manual_seed(0)
        model = ptuning_v2.attach(model, PTuningV2Method(num_virtual_tokens=4)).eval()
    wholes = [one * 2 for one in prompts(4)]
    asked = [whole[:part] for whole in wholes for part in (len(whole) // 3, len(whole) // 2, len(whole))]  # fmt: skip
    alone = [shapes_of(model, batches, [one], batch_size=1)[0].ids for one in asked]
    together = shapes_of(model, batches, asked, batch_size=12)
    assert [reply.ids for reply in together] == alone
    assert batches[0] == (4, max(map(len, wholes)))
    assert all(tokens == 1 for _, tokens in batches[1:])


def shapes_of(model: Any, batches: list[Any], asked: list[list[int]], **more: Any) -> list[Reply]:
    batches.clear()
    stops = Stops(stop_ids=(*tiny.EOS_IDS, *range(0, tiny.NUM_RANKS, 3)))
    return generate(model, stops, asked, max_new_tokens=40, **more)


def test_finished_rows_make_room_for_waiting_prompts(
    glm: Any, batches: list[tuple[int, int]]
) -> None:
    asked = prompts(32)
    replies = shapes_of(glm, batches, asked, batch_size=4)
    computed = sum(rows for rows, tokens in batches if tokens == 1)
    lengths = [len(reply.ids) + reply.stopped for reply in replies]
    needed = sum(lengths) - len(lengths)  # each first token comes with its prompt
    order = sorted(range(32), key=lambda i: -len(asked[i]))
    fixed = sum(4 * (max(lengths[i] for i in order[at : at + 4]) - 1) for at in range(0, 32, 4))
    assert max(rows for rows, _ in batches) == 4
    assert computed < 0.7 * fixed  # what batches that wait for their slowest row compute
    assert needed <= computed


def test_what_all_prompts_begin_with_is_computed_once_and_changes_nothing(
    glm: Any, batches: list[tuple[int, int]]
) -> None:
    system = prompts(1, longest=40, seed=9)[0] * 3
    asked = [[*system, *rest] for rest in prompts(10, longest=8)]
    alone = [shapes_of(glm, batches, [one], batch_size=1)[0].ids for one in asked]
    together = shapes_of(glm, batches, asked, batch_size=4)
    assert [reply.ids for reply in together] == alone
    shared = len(tensors.shared_prefix(asked))
    assert shared >= len(system)
    assert batches[0] == (1, shared)
    assert max(tokens for _, tokens in batches[1:]) <= 8 + 2


@pytest.mark.parametrize("prefixed", [False, True])
def test_positions_behind_a_shared_prefix_count_no_padding(
    tiny_glm: Path, prefixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_tiny(tiny_glm)
    if prefixed:
        torch.manual_seed(0)
        model = ptuning_v2.attach(model, PTuningV2Method(num_virtual_tokens=4)).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data *= 10  # so that a position that is off by one shows
    system = prompts(1, longest=40, seed=9)[0] * 3
    asked = [[*system, *rest] for rest in prompts(4, longest=12)]
    assert len({len(one) for one in asked}) > 1
    seen: dict[int, torch.Tensor] = {}
    append = DecodingRow.append

    def noting(row: DecodingRow, logits: torch.Tensor, *rest: Any) -> None:
        if not row.ids:
            seen[len(row.request.prompt)] = logits
        append(row, logits, *rest)

    monkeypatch.setattr(DecodingRow, "append", noting)
    generate(model, Stops(), asked, max_new_tokens=2, batch_size=4)
    for prompt in asked:
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(seen[len(prompt)], alone, atol=1e-4, rtol=1e-4)


def test_a_temperature_too_small_to_divide_by_is_greedy(glm: Any) -> None:
    asked = prompts(3)
    greedy = generate(glm, Stops(), asked, max_new_tokens=8, batch_size=3)
    for temperature in (1e-320, 1e-30, 9e-6):
        extras = Extras(SeededSampling(Sampling(temperature)))
        assert generate(glm, Stops(), asked, max_new_tokens=8, batch_size=3, extras=extras) == greedy  # fmt: skip


def test_sampled_replies_depend_on_the_seed_and_not_on_the_batch(glm: Any) -> None:
    asked = prompts(9)

    def sampled(seed: int, size: int, first: int = 0) -> list[tuple[int, ...]]:
        extras = Extras(SeededSampling(Sampling(0.8), seed=seed, first=first))
        found = generate(
            glm, Stops(), asked[first:], max_new_tokens=12, batch_size=size, extras=extras
        )
        return [reply.ids for reply in found]

    assert sampled(1, 1) == sampled(1, 4) == sampled(1, 9)
    assert sampled(1, 4)[5:] == sampled(1, 2, first=5)
    assert sampled(1, 4) != sampled(2, 4)
    assert sampled(1, 4) != [reply.ids for reply in generate(glm, Stops(), asked, max_new_tokens=12, batch_size=4)]  # fmt: skip


def test_prompts_are_read_in_first_passes_of_bounded_size(
    glm: Any, batches: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = shapes_of(glm, batches, prompts(12), batch_size=6)
    monkeypatch.setattr(tensors, "FIRST_PASS_TOKENS", 100)
    assert shapes_of(glm, batches, prompts(12), batch_size=6) == expected
    assert max(rows * tokens for rows, tokens in batches if tokens > 1) <= 100
    assert any(rows > 1 for rows, tokens in batches if tokens > 1)


def test_the_cache_of_a_batch_stays_within_its_bytes(
    glm: Any, batches: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 2 (keys, values) x 2 layers x 2 heads x 8 x 4 bytes = 256 bytes a token.
    assert generation.cache_tokens(glm) == (4 << 30) // 256
    expected = shapes_of(glm, batches, prompts(12), batch_size=6)
    monkeypatch.setattr(generation, "CACHE_BYTES", 256 * 2 * (42 + 40))
    assert shapes_of(glm, batches, prompts(12), batch_size=6) == expected
    assert max(rows for rows, _ in batches) == 2


def test_an_automatic_batch_fills_half_of_the_free_memory(
    glm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = 256 * (40 + 24)  # bytes of a prompt and its reply
    cases = ((40 * row, 16), (62 * row, 16), (64 * row, 32), (0, 1), (10**15, 128))
    for free, rows in cases:
        monkeypatch.setattr(generation, "free_bytes", lambda free=free: free)
        assert generation.rows_at_once(glm, "auto", 64) == rows
    assert generation.rows_at_once(glm, 7, 64) == 7


def test_no_prompts_have_no_replies(glm: Any) -> None:
    assert generate(glm, Stops(), [], max_new_tokens=4, batch_size=4) == []


def test_a_prompt_without_room_for_a_reply_is_named_before_anything_is_generated(
    glm: Any, batches: list[tuple[int, int]]
) -> None:
    limit = glm.config.max_position_embeddings
    asked = [*prompts(2), [5] * (limit - 3)]
    with pytest.raises(
        DataError, match=rf"1 of 3 prompts .* {limit} positions(.|\n)*prompt 2: 2045"
    ):
        generate(glm, Stops(), asked, max_new_tokens=4, batch_size=4)
    assert batches == []
    generate(glm, Stops(), [[5] * (limit - 3)], max_new_tokens=3, batch_size=4)


def test_a_stop_request_ends_generation_within_a_token(
    glm: Any, batches: list[tuple[int, int]]
) -> None:
    polls = 0

    def after_three() -> bool:
        nonlocal polls
        polls += 1
        return polls > 3

    with pytest.raises(EvaluationStoppedError, match="stopped before its end"):
        generate(
            glm, Stops(), prompts(10), max_new_tokens=500, batch_size=1, should_stop=after_three
        )
    assert len(batches) == 3
    assert polls < 10
