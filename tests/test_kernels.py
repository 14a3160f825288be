"""Kernels in Triton's interpreter, which runs them on a CPU: the numbers of their torch forms."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels run in Triton's interpreter: pip install triton")

from finetune.models import kernels, load
from finetune.models.kernels import check, torch_forms
from finetune.models.kernels.operations import RmsNorm, Rotate, Swiglu
from finetune.models.load import load_model

CPU = torch.device("cpu")
ALL = ("rms_norm", "swiglu", "rotate", "cross_entropy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_kernel_gives_the_numbers_and_gradients_of_torch(name: str, dtype: torch.dtype) -> None:
    assert max(check._cases(CPU, dtype)[name]()) < check.BANDS[dtype]


@pytest.mark.parametrize("width", [2, 3, 63, 64, 65])
def test_rows_of_any_width_are_done_to_their_end(width: int) -> None:
    found = [
        *check._deviations(
            lambda x, w: RmsNorm.apply(x, w, 1e-5, False),
            lambda x, w: torch_forms.rms_norm(x, w, 1e-5, False),
            random(3, width), random(width),
        ),
        *check._deviations(Swiglu.apply, torch_forms.swiglu, random(3, 2 * width)),
        *check._cross_entropy(random(1, 8 * width)),
        # Rows that do not lie one behind the other.
        *check._deviations(Swiglu.apply, torch_forms.swiglu, random(2 * width, 3).T),
        *check._deviations(
            lambda x, w: RmsNorm.apply(x, w, 1e-5, False),
            lambda x, w: torch_forms.rms_norm(x, w, 1e-5, False),
            random(width, 3).T, random(width),
        ),
    ]  # fmt: skip
    assert max(found) < 2e-5


@pytest.mark.parametrize(("heads", "channels", "pairs"), [(1, 8, 2), (3, 10, 2), (5, 16, 8)])
def test_any_share_of_the_channels_is_turned_and_angles_may_differ_by_row(
    heads: int, channels: int, pairs: int
) -> None:
    cos, sin = random(2, 1, 7, pairs), random(2, 1, 7, pairs + 1)[..., 1:]
    found = check._deviations(
        lambda x: Rotate.apply(x, cos, sin),
        lambda x: torch_forms.rotate(x, cos, sin),
        random(2, 7, heads, channels).transpose(1, 2),
    )
    assert max(found) < 1e-6


def test_more_rows_than_programs_share_a_norms_weight_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("finetune.models.kernels.operations.PROGRAMS", 4)
    found = check._deviations(
        lambda x, w: RmsNorm.apply(x, w, 1e-5, False),
        lambda x, w: torch_forms.rms_norm(x, w, 1e-5, False),
        random(11, 16), random(16),
    )  # fmt: skip
    assert max(found) < 1e-6


@pytest.mark.parametrize("first", [False, True])
def test_a_norm_whose_weight_is_frozen_has_the_gradient_of_its_rows_alone(first: bool) -> None:
    rows, weight = random(20, 16).requires_grad_(), random(16)
    found = torch.autograd.grad(RmsNorm.apply(rows, weight, 1e-5, first).square().sum(), rows)
    exact = torch.autograd.grad(torch_forms.rms_norm(rows, weight, 1e-5, first).square().sum(), rows)  # fmt: skip
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


def test_what_does_not_lie_in_one_piece_is_read_as_it_is_meant() -> None:
    turned = random(2, 3, 8, 7).transpose(2, 3)  # channels do not lie side by side
    cos, sin = random(1, 1, 7, 2), random(1, 1, 7, 2)
    wide = random(6, 5).T
    found = [
        *check._deviations(lambda x: Rotate.apply(x, cos, sin), lambda x: torch_forms.rotate(x, cos, sin), turned),
        *check._deviations(Swiglu.apply, torch_forms.swiglu, wide),
        *check._deviations(
            lambda x, w: RmsNorm.apply(x, w, 1e-5, True), lambda x, w: torch_forms.rms_norm(x, w, 1e-5, True),
            wide, random(6),
        ),
    ]  # fmt: skip
    assert max(found) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("family", ["chatglm", "glm", "glm4"])
def test_a_model_learns_the_same_with_kernels(family: str, request: pytest.FixtureRequest) -> None:
    ids = torch.randint(0, 370, (1, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for names in ((), ALL):
        model = load_model(request.getfixturevalue(f"tiny_{family}")).train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        with kernels.running(names, "cpu"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            found.append((loss.detach(), torch.autograd.grad(loss, weights)))
    (plain, expected), (fused, gradients) = found
    torch.testing.assert_close(fused, plain, atol=1e-6, rtol=0)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)


def test_a_kernel_that_is_wrong_or_does_not_compile_stays_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong() -> list[float]:
        return [0.5]

    def broken() -> list[float]:
        raise RuntimeError("no ptxas on this machine\nand more")

    cases = {"rms_norm": wrong, "swiglu": broken, "rotate": lambda: [0.0]}
    monkeypatch.setattr(check, "_cases", lambda *_: cases)
    verdict = check.compare.__wrapped__(CPU, torch.float32)
    assert verdict.used == ("rotate",)
    assert verdict.refused == {
        "rms_norm": "differs from torch by 5.0e-01, more than 1.0e-05",
        "swiglu": "RuntimeError: no ptxas on this machine",
    }


def test_without_a_gpu_none_is_used() -> None:
    assert check.choose("auto", CPU, torch.bfloat16).used == ()
    assert not any(kernels.runs(name, torch.empty(1)) for name in ALL)


def test_outside_of_running_nothing_has_changed() -> None:
    with kernels.running(("rotate",), "cpu"):
        assert kernels.runs("rotate", torch.empty(1))
    assert not kernels.runs("rotate", torch.empty(1))


@pytest.mark.parametrize(("shift", "said"), [(0.0, None), (0.1, "differs from torch by"), (None, "RuntimeError: no kernel image")])  # fmt: skip
def test_flash_attention_is_compared_document_by_document_before_it_is_used(
    shift: float | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(module, query, key, value, mask, *, scaling, cu_seq_lens_q, max_length_q, **_):  # type: ignore[no-untyped-def]
        """What flash-attn computes from the lengths that it is told; one of these is wrong."""
        if shift is None:
            raise RuntimeError("no kernel image\nfor this device")
        assert (mask, max_length_q) == (None, 40)
        flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
        parts = []
        for first, end in pairwise(cu_seq_lens_q.tolist()):
            q, k, v = (t[first:end].transpose(0, 1) for t in flat)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)  # fmt: skip
            parts.append(out.transpose(0, 1) * (1 + shift))
        return torch.cat(parts).view(*query.transpose(1, 2).shape), None

    monkeypatch.setitem(check.ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", attend)
    found = check.flash_problem.__wrapped__("flash_attention_2", CPU, torch.bfloat16)
    assert found is None if said is None else said in str(found)


def test_a_model_goes_on_with_torch_where_flash_attention_is_wrong(
    tiny_glm: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_model(tiny_glm)
    model.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr(check, "flash_problem", lambda *_: "differs from torch by 1.0e-01")
    load._check_flash(model.config, torch.bfloat16)
    assert model.config._attn_implementation == "document_sdpa"
    assert "flash_attention_2 is not used here, but sdpa: differs" in capfd.readouterr().err
