"""Which kernels and products are used where; groups of processes; a layer's cache."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mixtures
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from finetune.models import cache_columns, kernels, loss, sequence_parallel, tiled_mlp
from finetune.models.cache_columns import CacheColumns
from finetune.models.kernels import check, operations, products, stock_layers, torch_forms
from finetune.models.kernels.check import Verdict
from finetune.models.kernels.products import ReplyingLinear
from finetune.models.load import load_model

GPU = torch.device("cuda")


# --- the choice of kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "device", "dtype", "used"),
    [
        ("auto", "cuda", torch.bfloat16, True), ("auto", "cuda", torch.float32, True),
        ("torch", "cuda", torch.bfloat16, False), ("auto", "cpu", torch.bfloat16, False),
        ("auto", "cuda", torch.float64, False), ("auto", "npu", torch.bfloat16, False),
    ],
)  # fmt: skip
def test_kernels_are_chosen_on_a_gpu_in_a_format_that_has_a_band(
    setting: str, device: str, dtype: torch.dtype, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = Verdict(("swiglu",), {"rotate": "is wrong"})
    monkeypatch.setattr(check, "compare", lambda *given: verdict)
    place: Any = SimpleNamespace(type=device)
    tensor: Any = SimpleNamespace(device=place)
    with kernels.running(("rms_norm",), device):
        assert check.choose(setting, place, dtype) == (verdict if used else Verdict())
        assert kernels.runs("swiglu", tensor) is used
        assert not kernels.runs("rms_norm", tensor)
        assert not kernels.runs("swiglu", SimpleNamespace(device=SimpleNamespace(type="other")))  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "attention"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)])  # fmt: skip
def test_attention_is_compared_in_16_bits_and_within_their_band(
    dtype: torch.dtype, attention: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    deviates = check.BANDS[attention] * 0.9
    monkeypatch.setattr(check, "_cases", lambda *_: {"varlen_attention": lambda: [deviates], "swiglu": lambda: [deviates]})  # fmt: skip
    assert ("varlen_attention" in check.compare.__wrapped__(GPU, dtype).used) is True
    assert ("swiglu" in check.compare.__wrapped__(GPU, dtype).used) is (dtype is attention)
    seen: list[torch.dtype] = []

    def noted(random: Any, attend: Any) -> list[float]:
        seen.append(random(1).dtype)
        return [0.0]

    monkeypatch.setattr(check, "_varlen", noted)
    check.flash_problem.__wrapped__("flash_attention_2", torch.device("cpu"), dtype)
    assert seen == [attention]


def test_what_an_error_of_a_compiler_says_is_one_short_line() -> None:
    def broken(text: str) -> Any:
        raise RuntimeError(text)

    assert check._problem(lambda: broken("a" * 300 + "\nb"), 1.0) == "RuntimeError: " + "a" * 200
    assert check._problem(lambda: broken(""), 1.0) == "RuntimeError: "


@pytest.mark.parametrize("trained", [True, False])
def test_shapes_of_kernels_are_those_of_what_they_make(trained: bool) -> None:
    x, weight = torch.randn(2, 3, 8).transpose(0, 1), torch.randn(8)
    with torch.device("meta"):
        meta = torch.empty(3, 2, 8), torch.empty(8)
    out, scale = torch.ops.glm4_finetune.rms_norm(*meta, 1e-5, False)
    assert (out.shape, scale.shape, scale.dtype) == ((3, 2, 8), (3, 2), torch.float32)
    back, shares = torch.ops.glm4_finetune.rms_norm_backward(out, *meta, scale, trained)
    assert (back.shape, shares.shape) == ((3, 2, 8), (operations.PROGRAMS if trained else 0, 8))
    wide = torch.empty(3, 2, 8, device="meta", dtype=torch.bfloat16)
    assert torch.ops.glm4_finetune.swiglu(wide).shape == (3, 2, 4)
    assert torch.ops.glm4_finetune.swiglu_backward(wide[..., :4], wide).shape == (3, 2, 8)
    turned = torch.ops.glm4_finetune.rotate(torch.empty(2, 4, 3, 8, device="meta"), meta[1], meta[1], False)  # fmt: skip
    assert (turned.shape, turned.transpose(1, 2).is_contiguous()) == ((2, 4, 3, 8), True)
    each = torch.ops.glm4_finetune.cross_entropy_(wide.flatten(0, 1), meta[1])
    assert (each.shape, each.dtype) == ((6,), torch.float32)
    assert operations._contiguous_like(x).is_contiguous()
    assert weight.shape == (8,)


def test_blocks_are_powers_of_two() -> None:
    assert [operations._power(n) for n in (1, 2, 3, 4, 5, 4096, 4097)] == [
        1,
        2,
        4,
        4,
        8,
        4096,
        8192,
    ]


def test_a_float16_norm_of_a_wide_row_is_float16_whatever_runs() -> None:
    rows, weight = torch.randn(3, 8) * 1000, torch.rand(8).half()
    for names in ((), ("rms_norm",)):
        with kernels.running(names, "cpu"):
            found = kernels.rms_norm(rows, weight, 1e-5)
        assert found.dtype is torch.float16
        exact = torch_forms.rms_norm(rows.double(), weight.double(), 1e-5, False)
        torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["glm", "glm4", "glm4_moe", "glm4_moe_lite"])
def test_norms_and_mlps_of_transformers_layers_ask_for_kernels(family: str, tmp_path: Path) -> None:
    import tiny

    save = mixtures.save_model if family in mixtures.FAMILIES else tiny.save_model
    model = load_model(save(tmp_path / "model", family))
    kinds = {name: type(m).__module__ for name, m in model.named_modules() if "norm" in name}
    assert set(kinds.values()) == {stock_layers.__name__}
    mlps = {type(m).__module__ for n, m in model.named_modules() if n.endswith(".mlp")}
    if family in ("glm", "glm4"):
        assert mlps == {stock_layers.__name__}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("runs", [True, False])
def test_transformers_rotation_is_ours_for_replies_and_where_the_kernel_runs(
    grad: bool, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []

    def theirs(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        used.append(unsqueeze_dim)
        return q, k

    monkeypatch.setattr(kernels, "rotate", lambda states, cos, sin: (states, cos.shape))
    rotate = stock_layers._rotating(theirs)
    states, angles = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 4)
    with torch.set_grad_enabled(grad), kernels.running(("rotate",) if runs else (), "cpu"):
        rotate(states, states, angles, angles)
        assert used == ([1] if grad and not runs else [])
        used.clear()
        rotate(states, states, angles, angles, unsqueeze_dim=2)
        assert used == [2]
        used.clear()
        narrow = states.bfloat16()
        rotate(narrow, narrow, angles, angles)
        assert used == ([] if runs else [1])


# --- products of replies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "file", "said", "slow"),
    [
        ("x86_64", "vendor_id : AuthenticAMD", "", True), ("AMD64", None, "AMD64 Family 25 AuthenticAMD", True),
        ("x86_64", "vendor_id : GenuineIntel", "", False), ("AMD64", None, "Intel64 Family 6 GenuineIntel", False),
        ("aarch64", "vendor_id : ARM", "", False), ("arm64", None, "arm", False),
    ],
)  # fmt: skip
def test_processors_that_are_not_intels_are_told_by_their_own_word(
    machine: str, file: str | None, said: str, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    cpus = tmp_path / "cpuinfo"
    if file is not None:
        cpus.write_text(file)
    monkeypatch.setattr(products, "Path", lambda name: cpus if name == "/proc/cpuinfo" else Path(name))  # fmt: skip
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "processor", lambda: said)
    assert products._is_slow_for_mkl() is slow


@pytest.mark.parametrize(("slow", "mkl", "right"), [(True, True, True), (False, True, True), (True, False, True), (True, True, False)])  # fmt: skip
def test_other_products_gain_where_mkl_is_slow_and_there_and_they_are_right(
    slow: bool, mkl: bool, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_is_slow_for_mkl", lambda: slow)
    monkeypatch.setattr(products, "_is_right", lambda: right)
    monkeypatch.setattr(torch._C, "has_mkl", mkl)
    gains = slow and mkl and right
    assert products._gains.__wrapped__() is gains
    monkeypatch.setattr(products, "_gains", lambda: gains)
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2), nn.Bilinear(2, 2, 2))
    products.use_in(model)
    assert (type(model[0]) is ReplyingLinear) is gains
    assert products._packable(nn.Sequential(_large())) == [] or gains


def _large() -> ReplyingLinear:
    return ReplyingLinear(256, 256, bias=False)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_an_operator_that_is_not_as_it_was_is_not_used(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(products, "_by_onednn", gone)
    assert not products._is_right()


def test_weights_that_lie_packed_are_no_part_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(products, "_gains", lambda: True)
    monkeypatch.setattr(products, "_pack", lambda weight: products._Pack(weight, weight, False))
    first, second = _large(), _large()
    size = first.weight.nbytes
    monkeypatch.setattr(products, "free_bytes", lambda: 4 * size)  # room for one at a time
    with products.packed(first):
        assert products.is_packed(first.weight)
        with products.packed(nn.Sequential(first, second)):
            assert products.is_packed(second.weight)
        assert not products.is_packed(second.weight)
        assert products.is_packed(first.weight)
        with products.packed(nn.Sequential(second, _large())):
            assert not products.is_packed(second.weight)
    assert not products.is_packed(first.weight)


def test_which_weights_are_worth_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    def worth(weight: Any) -> bool:
        return products._is_worth_packing(weight)

    assert worth(_large().weight)  # 2 ** 16 numbers
    assert not worth(nn.Parameter(torch.zeros(256, 255)))
    assert not worth(torch.zeros(256, 256))
    assert not worth(nn.Parameter(torch.zeros(256, 256, dtype=torch.bfloat16)))
    assert not worth(nn.Parameter(torch.zeros(256, 256, device="meta")))
    shard = nn.Parameter(torch.zeros(256, 256))
    shard.ds_id = 0  # type: ignore[attr-defined]
    assert not worth(shard)


def test_how_a_row_is_added_up_is_known_by_shape_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(products, "_in_pairs", {})
    monkeypatch.setattr(products, "_adds_otherwise", lambda *_: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, rows: weight)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        products._pack(nn.Parameter(torch.zeros(2, 3)))
    assert products._in_pairs == {(2, 3, 1): True, (2, 3, 2): True}


def test_rows_are_apart_within_and_as_before_behind() -> None:
    with products.one_by_one():
        with products.one_by_one():
            assert products.rows_are_apart()
        assert products.rows_are_apart()
    assert not products.rows_are_apart()


# --- chunks and tiles ----------------------------------------------------------------------------------------


def test_a_chunk_has_so_many_logits_as_its_device_reads_well() -> None:
    assert [at.stop - at.start for at in loss._chunks(300, 151_552, "cpu")] == [131, 131, 38]
    assert [at.stop - at.start for at in loss._chunks(600, 151_552, "cuda")] == [527, 73]
    assert [at.stop - at.start for at in loss._chunks(3000, 151_552, "cuda", trained=True)] == [2111, 889]  # fmt: skip
    assert loss._chunks(300, 151_552, "cpu", trained=True) == loss._chunks(300, 151_552, "cpu")
    assert loss._chunks(2, 10**9, "cpu") == [slice(0, 1), slice(1, 2)]
    assert loss._chunks(0, 10, "cpu") == []


def test_the_gradient_of_a_narrow_head_is_added_up_rows_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(loss, "PRODUCT_ROWS", 3)
    slope, rows = torch.randn(4, 8).bfloat16(), torch.randn(4, 5).bfloat16()
    total = torch.ones(8, 5)
    loss._add_product(total, slope, rows)
    torch.testing.assert_close(total, 1 + (slope.float().T @ rows.float()), atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize(("tokens", "tiled"), [(4, False), (5, True)])
def test_a_batch_is_tiled_from_one_token_more_on(
    tokens: int, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_mlp, "ABOVE", 4)
    monkeypatch.setattr(tiled_mlp, "TILE", 3)
    seen: list[int] = []

    def gate_up(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows.flatten(0, -2)))
        return torch.cat([rows, rows], -1)

    rows = torch.randn(1, tokens, 2)
    with torch.no_grad():
        found = tiled_mlp.swiglu_mlp(rows, gate_up, lambda inner: inner)
    torch.testing.assert_close(found, F.silu(rows) * rows)
    assert seen == ([3, 2] if tiled else [4])


# --- processes that share rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", range(4))
def test_neighbours_in_rank_share_their_rows(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "new_group", lambda ranks: made.append(list(ranks)) or made[-1])
    sent: list[Any] = []
    monkeypatch.setattr(dist, "all_to_all_single", lambda got, given, group: sent.append((group, given.is_contiguous())))  # fmt: skip
    assert sequence_parallel.split_of_this_process(1) is None
    split = sequence_parallel.split_of_this_process(2)
    assert split is not None
    assert made == [[0, 1], [2, 3]]  # every process makes all groups
    assert (split.parts, split.part) == (2, rank % 2)
    crossed = torch.randn(3, 2).T.requires_grad_()
    out = sequence_parallel._exchanged(crossed, split)
    torch.autograd.grad(out, crossed, torch.zeros(3, 2).T)
    assert sent == [(made[rank // 2], True)] * 2
    whole = sequence_parallel.split_of_this_process(4)
    assert whole is not None
    assert whole.part == rank


# --- a layer's cache -------------------------------------------------------------------------------------------


def test_columns_are_added_where_there_is_room_and_room_is_made_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_columns, "_HEADROOM", 2)
    layer = CacheColumns()
    columns = torch.arange(8.0).view(1, 1, 8, 1)
    made: list[int] = []
    real = CacheColumns._make_room
    monkeypatch.setattr(CacheColumns, "_make_room", lambda self, end: made.append(end) or real(self, end))  # fmt: skip
    for first, end in ((0, 2), (2, 3), (3, 5), (5, 6), (6, 8)):
        keys, values = layer.update(columns[:, :, first:end], -columns[:, :, first:end])
        assert torch.equal(keys, columns[:, :, :end])
        assert torch.equal(values, -columns[:, :, :end])
    assert made == [3, 6]  # of room for 5 and for 8


@pytest.mark.parametrize("rounds_first", [True, False])
def test_without_a_kernel_rows_are_rounded_where_the_checkpoint_does(rounds_first: bool) -> None:
    hidden, weight = torch.randn(64, 64).bfloat16(), torch.randn(64).bfloat16()
    found = kernels.rms_norm(hidden, weight, 1e-5, rounds_first=rounds_first)
    forms = [torch_forms.rms_norm(hidden, weight, 1e-5, first) for first in (True, False)]
    assert not torch.equal(*forms)
    assert torch.equal(found, forms[not rounds_first])
