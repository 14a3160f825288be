"""Small parts of the models, each alone: names, loading, loss, documents, spans, sizes, kernels."""

from __future__ import annotations

import logging
import os
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import nn

from finetune.errors import ConfigError, ModelError
from finetune.models import kernels, load, loss, packed_attention, tiled_mlp, wide_residual
from finetune.models.families import FAMILIES
from finetune.models.kernels import check, products
from finetune.models.library_logging import quiet_libraries
from finetune.models.load import load_model
from finetune.models.loss import SupervisedHead, for_model, supervised_loss
from finetune.models.model_size import check_size
from finetune.models.packed_attention import Documents, document_starts, pieces
from finetune.models.sequence_parallel import Split, check_heads

CPU = torch.device("cpu")
VISION = {"chatglm": "vision", "glm4v": "visual", "glm46v": "visual", "glm_ocr": "visual", "glm4v_moe": "visual"}  # fmt: skip


# --- families --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FAMILIES))
def test_head_and_vision_stay_whole_and_images_are_seen_where_both_parts_say_so(name: str) -> None:
    family, vision = FAMILIES[name], VISION.get(name)
    assert family.vision == vision
    assert family.part("vision") == (vision or "vision")
    assert family.part("layers.0") == "layers.0"
    assert family.sees_images({"vision_config": {"x": 1}}) is (vision is not None)
    assert not family.sees_images({"vision_config": None})
    assert not family.sees_images({})
    whole = [re.compile(pattern) for pattern in family.unquantized]

    def stays(module: str) -> bool:
        return any(pattern.match(module) for pattern in whole)

    head = "transformer.output_layer" if name == "chatglm" else "lm_head"
    assert stays(head)
    assert not stays("model.layers.0.self_attn.q_proj")
    if vision:
        assert stays(f"model.{vision}.blocks.0.attn.qkv")


@pytest.mark.parametrize(
    ("name", "hit", "missed"),
    [
        ("glm4_moe", ["self_attn.q_proj", "mlp.shared_experts.up_proj", "mlp.gate_proj"], ["mlp.gate", "mlp.experts", "mlp.experts.up_proj"]),
        ("glm4_moe_lite", ["self_attn.kv_b_proj", "mlp.shared_experts.down_proj", "mlp.down_proj"], ["mlp.gate", "mlp.experts"]),
        ("glm", ["self_attn.o_proj", "mlp.gate_up_proj"], ["input_layernorm"]),
        ("glm4", ["self_attn.k_proj", "mlp.down_proj"], ["post_mlp_layernorm"]),
    ],
)  # fmt: skip
def test_lora_hits_the_projections_of_a_layer_and_no_router_or_norm(
    name: str, hit: list[str], missed: list[str]
) -> None:
    targets = re.compile(FAMILIES[name].lora_targets)
    for layer in ("model.layers.0.", "model.layers.12."):
        assert all(targets.fullmatch(layer + one) for one in hit)
        assert not any(targets.fullmatch(layer + one) for one in missed)
    assert not targets.fullmatch("lm_head")


# --- what libraries say ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_libraries_warn_in_the_leading_process_and_err_in_the_others(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    verbosity = transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        quiet_libraries()
    level = logging.ERROR if rank else logging.WARNING
    for name in ("peft", "torch.distributed", "datasets"):
        assert logging.getLogger(name).level == level
    for name in ("DeepSpeed", "deepspeed", "accelerate"):
        assert logging.getLogger(name).level == logging.ERROR
    assert os.environ["DEEPSPEED_LOG_LEVEL"] == "error"
    transformers.logging.set_verbosity(verbosity)


# --- loading -----------------------------------------------------------------------------------------


def test_after_loading_transformers_says_what_it_said_before(
    tiny_glm: Path, tmp_path: Path
) -> None:
    before = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_info()
        load_model(tiny_glm)
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
        broken = tiny.save_model(tmp_path / "broken", "glm")
        (broken / "model.safetensors").write_bytes(b"x")
        with pytest.raises(ModelError):
            load_model(broken)
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
    finally:
        transformers.logging.set_verbosity(before)


def test_a_lack_of_memory_is_not_taken_for_a_bad_checkpoint(
    tiny_glm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(load, "check_size", full_memory)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(tiny_glm)
    monkeypatch.setattr(load, "check_size", lambda *_: 1 / 0)
    with pytest.raises(ModelError, match=r"cannot be loaded .ZeroDivisionError"):
        load_model(tiny_glm)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_layers_are_added_up_in_float32_in_float16_only(dtype: str, tiny_glm: Path) -> None:
    model = load_model(tiny_glm, dtype=dtype)
    assert getattr(model, "sums_in_float32", False) is (dtype == "float16")
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("setting", "used"), [("auto", True), ("torch", False)])
def test_other_products_are_used_unless_torch_is_asked_for(
    setting: str, used: bool, tiny_glm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_gains", lambda: True)
    model = load_model(tiny_glm, kernels=setting)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert (products.ReplyingLinear in kinds) is used


def test_a_kernel_that_stays_out_is_named_once(
    tiny_glm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load, "_told", set())
    monkeypatch.setattr(load.check, "choose", lambda *_: check.Verdict((), {"swiglu": "is wrong"}))
    for _ in range(2):
        load_model(tiny_glm)
    assert capsys.readouterr().err.count("swiglu is not used here: is wrong") == 1


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({}, None),
        ({"missing_keys": {"b", "a"}}, "missing: a, b"),
        ({"unexpected_keys": ["x"]}, "unknown: x"),
        ({"mismatched_keys": [("w", (1,), (2,))]}, "of another shape: w"),
        ({"missing_keys": list("edcba")}, "missing: a, b, c and 2 more"),
    ],
)
def test_each_kind_of_weights_that_do_not_fit_is_named(report: Any, said: str | None) -> None:
    if said is None:
        load._check_complete(Path("x"), report)
        return
    with pytest.raises(ModelError, match=re.escape(said)):
        load._check_complete(Path("x"), report)


@pytest.mark.parametrize(("taken", "fits"), [(0, False), (1, True), (3, True), (4, False)])
def test_a_token_takes_as_many_experts_as_there_are_at_most(
    taken: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SimpleNamespace(
        head_dim=2, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, hidden_size=4,
        intermediate_size=8, vocab_size=10, n_routed_experts=3, num_experts_per_tok=taken,
        moe_intermediate_size=2, first_k_dense_replace=1,
    )  # fmt: skip
    config = SimpleNamespace(get_text_config=lambda: text)
    held = SimpleNamespace(shape=(100,))
    monkeypatch.setattr("finetune.models.model_size.tensors", lambda folder: {"x": held})
    if fits:
        check_size(Path("x"), config)
    else:
        with pytest.raises(ModelError, match=f"a token takes {taken} of 3 experts"):
            check_size(Path("x"), config)
    text.num_experts_per_tok, text.vocab_size = 1, 249_984  # a small one may be off by a million
    check_size(Path("x"), config)
    text.vocab_size = 249_985
    with pytest.raises(
        ModelError, match="asks for about 1,000,204 numbers and its weights hold 100"
    ):
        check_size(Path("x"), config)


# --- the loss ----------------------------------------------------------------------------------------


def test_the_first_token_of_a_packed_document_is_not_learned_from_the_one_before() -> None:
    batch = {
        "input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None],
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }  # fmt: skip
    given = for_model(batch, CPU)
    assert given["supervised"].tolist() == [0, 1, 3, 4]
    assert given["documents"].borders.tolist() == [0, 3, 6]
    assert "documents" not in for_model(batch | {"position_ids": torch.arange(6)[None]}, CPU)
    parts = [
        for_model(batch, CPU, Split(2, part, lambda sent: sent))["supervised"].tolist()
        for part in (0, 1)
    ]
    assert parts == [[0, 1], [0, 1]]
    documents = Documents.of(document_starts(batch["position_ids"], None, None))  # type: ignore[arg-type]
    assert loss._within(documents, batch["labels"]).tolist() == [[-100, 1, 2, -100, 4, 5]]
    longer = torch.arange(7)[None]
    assert loss._within(documents, longer).tolist() == [[-100, 1, 2, -100, 4, 5, 6]]


@pytest.mark.parametrize("wrapped", [False, True])
def test_without_a_number_of_items_the_loss_is_the_mean_by_weight(wrapped: bool) -> None:
    torch.manual_seed(0)
    head = SupervisedHead(4, 7, bias=False)
    labels = torch.tensor([[0, 1, 2, -100]])
    weights = torch.tensor([[9.0, 0.5, 3.0, 9.0]])
    hidden = torch.randn(1, 4, 4, requires_grad=True)
    plain = nn.Linear(4, 7, bias=False)
    plain.weight = head.weight
    used: nn.Module = plain if wrapped else head
    ce = torch.nn.functional.cross_entropy(hidden[0, :2] @ head.weight.T, labels[0, 1:3], reduction="none")  # fmt: skip
    for given, share, by in ((None, torch.ones(2), 2.0), (weights, torch.tensor([0.5, 3.0]), 3.5)):
        expected = (ce * share).sum() / by
        found = supervised_loss(used, hidden, labels, loss_weights=given)
        torch.testing.assert_close(found, expected)
        grads = torch.autograd.grad(found, [hidden, head.weight])
        exact = torch.autograd.grad(expected, [hidden, head.weight], retain_graph=True)
        torch.testing.assert_close(grads, exact)
        twice = supervised_loss(used, hidden, labels, loss_weights=given, num_items=torch.tensor(4))
        torch.testing.assert_close(twice, (ce * share).sum() / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_others_is_used_in_chunks_and_also_for_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 14)
    head, hidden = nn.Linear(4, 7).to(dtype), torch.randn(1, 6, 4, dtype=dtype, requires_grad=True)
    seen: list[int] = []
    head.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    labels = torch.tensor([[0, 1, 2, 3, 4, 5]])
    found = supervised_loss(head, hidden, labels)
    assert seen == [2, 2, 1]
    assert found.dtype is torch.float32
    none = supervised_loss(head, hidden, torch.full_like(labels, -100))
    assert none.item() == 0.0
    grads = torch.autograd.grad(none, [hidden, head.weight, head.bias])
    assert not any(grad.any() for grad in grads)


def test_shifted_labels_have_weights_of_their_own() -> None:
    labels, weights = loss._unshifted(torch.tensor([[5, 6]]), torch.tensor([[0.5, 2.0]]))
    assert labels.tolist() == [[-100, 5, 6]]
    assert weights is not None
    assert weights.tolist() == [[0.0, 0.5, 2.0]]
    assert loss._unshifted(torch.tensor([[5]]), None)[1] is None


# --- documents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "mask", "cache", "starts"),
    [
        ([[0, 1, 0, 1]], None, None, [[1, 0, 1, 0]]),
        ([[5, 6, 0, 1]], None, None, [[1, 0, 1, 0]]),  # the first row begins anywhere
        ([[0, 1, 2, 3]], None, None, None),
        ([[0, 1, 1, 1]], None, None, None),  # patches of an image
        ([[0, 1, 0, 1]], [[1, 1, 1, 1]], None, None),
        ([[0, 1, 0, 1]], None, "a cache", None),
        ([[[0, 1, 0, 1]], [[0, 1, 2, 3]]], None, None, [[1, 0, 1, 0]]),  # time decides
        ([[[0, 1, 2, 3]], [[0, 1, 0, 1]]], None, None, None),
        (None, None, None, None),
    ],
)
def test_documents_begin_where_the_time_starts_again_at_zero(
    given: Any, mask: Any, cache: Any, starts: Any
) -> None:
    ids = None if given is None else torch.tensor(given)
    found = document_starts(ids, None if mask is None else torch.tensor(mask), cache)
    assert (None if found is None else found.int().tolist()) == starts


def test_pieces_hold_one_long_document_or_short_ones_with_a_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_attention, "PIECE", 4)
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, [0, 2, 4, 5, 11]] = True
    found = [(row, begin, end, mask is None) for row, begin, end, mask in pieces(starts)]
    assert found == [(0, 0, 4, False), (0, 4, 5, True), (0, 5, 11, True), (0, 11, 12, True)]
    mask = pieces(starts)[0][3]
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("dtype", "runs", "dropout", "fits"),
    [
        (torch.bfloat16, True, 0.0, True), (torch.float16, True, 0.0, True),
        (torch.float32, True, 0.0, False), (torch.bfloat16, False, 0.0, False),
        (torch.bfloat16, True, 0.1, False),
    ],
)  # fmt: skip
def test_the_kernel_for_documents_takes_narrow_numbers_without_dropout(
    dtype: torch.dtype, runs: bool, dropout: float, fits: bool
) -> None:
    with kernels.running(("varlen_attention",) if runs else (), "cpu"):
        query = torch.zeros(1, 1, 1, 1, dtype=dtype)
        assert packed_attention._fits_one_kernel(query, {"dropout": dropout}) is fits


def test_values_narrower_than_keys_come_back_as_narrow() -> None:
    attend = packed_attention.in_documents(packed_attention.grouped_sdpa)
    query, key = torch.randn(2, 1, 2, 3, 6).unbind(0)
    value = torch.randn(1, 2, 3, 4)
    out, _ = attend(nn.Module(), query, key, value, None, scaling=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)  # fmt: skip
    torch.testing.assert_close(out, expected.transpose(1, 2))


# --- shared rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "groups", "owns"),
    [(2, 2, [[0], [1]]), (2, 4, [[0, 1], [2, 3]]), (4, 2, [[0], [0], [1], [1]]), (8, 2, [[0]] * 4 + [[1]] * 4)],
)  # fmt: skip
def test_each_part_has_the_keys_of_its_own_heads(
    parts: int, groups: int, owns: list[list[int]]
) -> None:
    states = torch.arange(groups).view(1, groups, 1, 1).expand(2, groups, 3, 1)
    for part, own in enumerate(owns):
        found = Split(parts, part, lambda sent: sent).own_groups(states)
        assert found[0, :, 0, 0].tolist() == own


def test_heads_are_shared_out_where_both_kinds_can_be() -> None:
    for parts in (2, 4, 8, 16, 32):
        check_heads(parts, 32, 2)
    for parts, heads, groups in ((3, 32, 2), (64, 32, 2), (6, 12, 4), (3, 6, 2)):
        with pytest.raises(ConfigError, match=f"sequence_parallel is {parts}"):
            check_heads(parts, heads, groups)
    with pytest.raises(ConfigError, match="over 2, 4, 8, 16, 32 processes only"):
        check_heads(3, 32, 2)


@pytest.mark.parametrize("grad", [False, True])
def test_tiles_are_computed_again_only_where_something_learns(
    grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_mlp, "ABOVE", 3)
    monkeypatch.setattr(tiled_mlp, "TILE", 2)
    again: list[int] = []
    real = tiled_mlp.checkpoint
    monkeypatch.setattr(tiled_mlp, "checkpoint", lambda *given, **options: again.append(1) or real(*given, **options))  # fmt: skip
    up, down = nn.Linear(3, 4), nn.Linear(2, 3)
    hidden = torch.randn(1, 5, 3)
    with torch.set_grad_enabled(grad):
        tiled = tiled_mlp.swiglu_mlp(hidden, up, down)
        few = tiled_mlp.swiglu_mlp(hidden[:, :3], up, down)
    assert len(again) == (3 if grad else 0)
    torch.testing.assert_close(tiled[:, :3], few)
    assert tiled.shape == hidden.shape


def test_rows_are_brought_into_range_by_the_power_of_two_above() -> None:
    rows = torch.tensor([[2048.0], [2048.5], [4096.0], [4097.0], [1.0], [0.0]])
    assert wide_residual.row_scale(rows).flatten().tolist() == [1.0, 2.0, 2.0, 4.0, 1.0, 1.0]
