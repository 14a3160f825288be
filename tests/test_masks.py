"""No attention mask where causal attention is enough: padding, prefixes, rows of any length."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import masking_utils

from finetune import methods
from finetune.config.schema import FullMethod, LoraMethod, PTuningV2Method
from finetune.generation.batch import Batch, SharedPrefix
from finetune.methods import ptuning_v2
from finetune.models import kernels
from finetune.models.load import load_model, shape_of
from finetune.models.loss import for_model
from finetune.planning.counting import counting, shapes_only
from finetune.planning.roofline import Ceilings
from finetune.planning.subjects import nothing_moves, ready

FAMILIES = ("chatglm", "glm", "glm4")
LONG = 131_072


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"tiny_{request.param}")
    return folder


def padded() -> dict[str, torch.Tensor]:
    """Three rows; the second and third end in padding, which carries no loss."""
    ids = torch.randint(0, 370, (3, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 11:], mask[2, 6:] = 0, 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def trained(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[Any]]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    loss = model(**inputs, use_cache=False).loss
    return loss, list(torch.autograd.grad(loss, weights))


def test_padding_on_the_right_learns_the_same_without_a_mask(base: Path) -> None:
    model, inputs = load_model(base).train(), padded()
    with_mask, expected = trained(model, inputs)
    del inputs["attention_mask"]
    without, found = trained(model, inputs)
    torch.testing.assert_close(without, with_mask, atol=1e-6, rtol=0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_what_was_found_on_the_cpu_gives_the_same_loss(base: Path) -> None:
    model, inputs = load_model(base).train(), padded()
    del inputs["attention_mask"]
    row = {name: tensor.flatten()[None] for name, tensor in inputs.items()}
    row["position_ids"] = torch.arange(17).repeat(3)[None]
    for batch in (inputs, row):
        expected = model(**batch, use_cache=False).loss
        found = model(**for_model(batch, torch.device("cpu")), use_cache=False).loss
        assert torch.equal(found, expected)


def test_a_prefix_without_a_mask_learns_what_it_learns_with_one(base: Path) -> None:
    found = []
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = load_model(base, attention=attention)
        model = ptuning_v2.attach(model, PTuningV2Method(num_virtual_tokens=5)).train()
        inputs = padded()
        del inputs["attention_mask"]
        found.append(trained(model, inputs))
    (ours, gradients), (eager, expected) = found
    torch.testing.assert_close(ours, eager, atol=2e-6, rtol=0)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=1e-4)


def small(folder: Path, kind: str) -> Path:
    """A config.json of two thin layers that take long rows."""
    sizes: dict[str, Any]
    if kind == "chatglm":
        sizes = {
            "model_type": "chatglm", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48,
            "num_attention_heads": 2, "kv_channels": 16, "multi_query_attention": True,
            "multi_query_group_num": 1, "padded_vocab_size": 64, "add_qkv_bias": True,
            "add_bias_linear": False, "rmsnorm": True, "layernorm_epsilon": 1e-6,
            "seq_length": LONG, "rope_ratio": 500, "original_rope": True, "post_layer_norm": True,
            "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": False,
        }  # fmt: skip
    else:
        config = {"glm": transformers.GlmConfig, "glm4": transformers.Glm4Config}[kind]
        sizes = config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, vocab_size=64, max_position_embeddings=LONG,
            pad_token_id=0,
        ).to_dict()  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


@pytest.mark.parametrize("rows", ["one", "two", "packed"])
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", [LoraMethod(), PTuningV2Method(), FullMethod()], ids=lambda m: m.kind)  # fmt: skip
def test_nothing_as_large_as_the_square_of_a_long_row_is_ever_made(
    method: Any, kind: str, rows: str, tmp_path: Path
) -> None:
    folder = small(tmp_path, kind)
    ids = torch.ones(2 if rows == "two" else 1, LONG, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    if rows == "packed":
        batch["position_ids"] = torch.arange(LONG)[None] % 3000
    given = for_model(batch, torch.device("cpu"))
    with shapes_only():
        model = shape_of(folder)
        with nothing_moves():
            model = methods.attach(model, method)
        model = ready(model, checkpointing=True)
        with counting(Ceilings()) as counter:
            model(**given, use_cache=False).loss.backward()
    largest = max(size for _, size, _ in counter.ledger.events)
    assert largest < LONG * LONG / 50


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", [LoraMethod(), PTuningV2Method(), FullMethod()], ids=lambda m: m.kind)  # fmt: skip
def test_prompts_of_any_length_are_read_without_such_a_square(
    method: Any, kind: str, tmp_path: Path
) -> None:
    folder = small(tmp_path, kind)
    common = [1] * 20  # a prefix that all share is read first
    prompts = [common + [2] * (LONG - 20), common + [3] * (LONG - 3000)]
    with shapes_only(), torch.no_grad():
        model = shape_of(folder)
        with nothing_moves():
            model = methods.attach(model, method).eval()
        with counting(Ceilings()) as counter:
            batch = Batch(model, SharedPrefix(model, prompts))
            assert batch.prefill(prompts).shape == (2, 64)
            assert batch.step([1, 1]).shape == (2, 64)
    largest = max(size for _, size, _ in counter.ledger.events)
    assert largest < LONG * LONG / 50


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", [LoraMethod(), PTuningV2Method(), FullMethod()], ids=lambda m: m.kind)  # fmt: skip
def test_the_loss_of_held_out_rows_makes_no_such_square(
    method: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small(tmp_path, kind)
    ids = torch.ones(2, LONG, dtype=torch.long)
    # It looks at numbers, to find that positions from 0 on are no packed documents.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None)
    with shapes_only(), torch.no_grad():
        model = shape_of(folder)
        with nothing_moves():
            model = methods.attach(model, method).eval()
        with counting(Ceilings()) as counter:
            inner = model.get_base_model() if isinstance(model, PeftModel) else model
            inner.base_model(input_ids=ids, use_cache=False)
    assert max(size for _, size, _ in counter.ledger.events) < LONG * LONG / 50


def test_prompts_of_mixed_lengths_are_read_as_if_each_were_alone(base: Path) -> None:
    model = load_model(base).eval()
    drawn = torch.Generator().manual_seed(0)
    for common in (0, 20):
        head = torch.randint(0, 370, (common,), generator=drawn).tolist()
        prompts = [head + torch.randint(0, 370, (n,), generator=drawn).tolist() for n in (3, 9, 6)]
        with torch.inference_mode():
            batch = Batch(model, SharedPrefix(model, prompts))
            found = [batch.prefill(prompts[:2]), batch.prefill(prompts[2:]), batch.step([7, 8, 9])]
            for number, prompt in enumerate(prompts):
                alone = model(input_ids=torch.tensor([[*prompt, 7 + number]])).logits[0, -2:]
                read = torch.cat(found[:2])[number]
                torch.testing.assert_close(read, alone[0], atol=2e-5, rtol=1e-4)
                torch.testing.assert_close(found[2][number], alone[1], atol=2e-5, rtol=1e-4)


def by_documents(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
):  # type: ignore[no-untyped-def]
    """What `varlen_attn` computes on a GPU: the last query of a document sees its last key."""
    assert window_size == (-1, 0)
    lengths = [end - start for start, end in pairwise(cu_seq_q.tolist())]
    assert max_q == max(lengths)
    assert max_k == max(end - start for start, end in pairwise(cu_seq_k.tolist()))
    parts = []
    for (start, end), (first, last) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):  # fmt: skip
        q, k, v = (t[a:b].transpose(0, 1) for t, a, b in ((query, start, end), (key, first, last), (value, first, last)))  # fmt: skip
        seen = torch.ones(end - start, last - first, dtype=torch.bool).tril(last - first - (end - start))  # fmt: skip
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)  # fmt: skip
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("with_prefix", [False, True], ids=["plain", "prefix"])
def test_one_kernel_for_all_documents_gives_what_pieces_give(
    base: Path, with_prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_documents)
    torch.manual_seed(0)
    monkeypatch.setattr("finetune.models.packed_attention.NARROW", (torch.float32,))
    model = load_model(base).train()
    if with_prefix:
        model = ptuning_v2.attach(model, PTuningV2Method(num_virtual_tokens=5))
    ids = torch.randint(0, 370, (2, 17), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(4), *range(7), *range(6)], [*range(9), *range(8)]])
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
    expected, gradients = trained(model, inputs)
    with kernels.running(("varlen_attention",), "cpu"):
        found, ours = trained(model, inputs)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=1e-4)
