"""One place knows the device; every kind of it, and a machine whose accelerator cannot be used."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from finetune.distributed import device, hardware
from finetune.errors import ConfigError
from finetune.models import wide_residual
from finetune.models.kernels import torch_forms
from finetune.models.load import load_model
from finetune.models.number_format import automatic, number_format

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"finetune/distributed/device.py", "finetune/distributed/hardware.py"}
KERNELS = "finetune/models/kernels/"
"""What Triton and CUDA are for is told by a tensor's own device there."""


class Card:
    """A device module as torch_npu and torch.xpu bring one."""

    def __init__(self, count: int = 2, native_bf16: bool = True) -> None:
        self.chosen: Any = None
        self.waited = 0
        self.count, self.native = count, native_bf16
        self.stream = torch.zeros(4, dtype=torch.uint8)

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.count

    def set_device(self, device: Any) -> None:
        self.chosen = device

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return including_emulation or self.native

    def get_device_properties(self, number: int) -> Any:
        return SimpleNamespace(name=f"Card {number}", total_memory=32 * 10**9, major=7, minor=0)

    def mem_get_info(self) -> tuple[int, int]:
        return 12 * 10**9, 32 * 10**9

    def memory_allocated(self) -> int:
        return 15 * 10**9

    def memory_reserved(self) -> int:
        return 18 * 10**9

    max_memory_allocated, max_memory_reserved = memory_allocated, memory_reserved

    def synchronize(self) -> None:
        self.waited += 1

    def get_rng_state(self) -> torch.Tensor:
        return self.stream.clone()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.stream = state


def put_in(monkeypatch: pytest.MonkeyPatch, kind: str, card: Card) -> Card:
    if kind == "npu":
        torch.utils.rename_privateuse1_backend("npu")  # as torch_npu does
    monkeypatch.delenv(hardware.FORCED, raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch, kind, card, raising=False)
    return card


@pytest.mark.parametrize(("kind", "backend"), [("cuda", "nccl"), ("npu", "hccl"), ("xpu", "xccl")])
def test_every_kind_of_accelerator_is_found_chosen_and_told_apart(kind: str, backend: str) -> None:
    # In a process of its own: torch remembers for good that there is an NPU.
    apart = multiprocessing.get_context("fork").Process(target=_look_at, args=(kind, backend))
    apart.start()
    apart.join(60)
    assert apart.exitcode == 0


def _look_at(kind: str, backend: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        _check_device(kind, backend, monkeypatch)


def _check_device(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card = put_in(monkeypatch, kind, Card())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.local_device() == torch.device(kind, 1)
    assert device.select() == card.chosen == torch.device(kind, 1)
    assert device.backend() == f"cpu:gloo,{kind}:{backend}"
    assert (device.count(), device.pins_memory(), device.unused()) == (2, True, "")
    held = device.memory()
    assert held is not None
    assert (held.free, held.total, held.allocated) == (12 * 10**9, 32 * 10**9, 15 * 10**9)
    assert device.memory_gb() == 15.0
    device.synchronize()
    assert card.waited == 1
    before = device.random_state()
    card.stream = torch.ones(4, dtype=torch.uint8)
    device.set_random_state(before)
    assert not card.stream.any()


def test_more_processes_than_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, "cuda", Card(count=2))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"has 2 GPUs; use --nproc_per_node=2"):
        device.select()


def test_an_apple_gpu_is_used_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 1,
        recommended_max_memory=lambda: 30 * 10**9, driver_allocated_memory=lambda: 4 * 10**9,
        current_allocated_memory=lambda: 3 * 10**9,
    )  # fmt: skip
    put_in(monkeypatch, "mps", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major <= 14)
    assert (device.select(), device.local_device()) == (None, torch.device("mps"))
    assert (device.backend(), device.pins_memory()) == ("gloo", False)
    assert (device.has_native_bf16(), device.memory_gb()) == (True, 3.0)
    assert [card.bytes for card in device.cards()] == [30 * 10**9]


def test_the_user_can_ask_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, "cuda", Card())
    monkeypatch.setenv(hardware.FORCED, "cpu")
    assert device.local_device() == torch.device("cpu")
    assert (device.backend(), device.count(), device.memory()) == ("gloo", 0, None)


def test_an_accelerator_of_another_kind_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("hpu"))
    assert device.kind() == "cpu"


@pytest.mark.parametrize(
    ("file", "hiding", "said"),
    [
        ("dev/nvidia0", "CUDA_VISIBLE_DEVICES", "an NVIDIA GPU.*with CUDA"),
        ("dev/kfd", "HIP_VISIBLE_DEVICES", "an AMD GPU.*with ROCm"),
        ("dev/davinci0", "ASCEND_RT_VISIBLE_DEVICES", "an Ascend NPU.*torch_npu"),
        ("dev/hl0", "HABANA_VISIBLE_DEVICES", "an Intel Gaudi.*not supported"),
        ("dev/cambricon_dev0", "MLU_VISIBLE_DEVICES", "a Cambricon MLU.*not supported"),
        ("dev/mtgpu.0", "MUSA_VISIBLE_DEVICES", "a Moore Threads GPU.*not supported"),
    ],
)
def test_an_accelerator_that_torch_cannot_use_is_named_with_the_remedy(
    file: str, hiding: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    for name in {hardware.FORCED, *(name for maker in hardware.MAKERS for name in maker.hidden_by)}:
        monkeypatch.delenv(name, raising=False)
    assert (device.unused(tmp_path), hardware.likely_kind(tmp_path)) == ("", "cpu")
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.touch()
    assert hardware.likely_kind(tmp_path) != "cpu"
    with pytest.raises(ConfigError, match=f"{said}.*set FINETUNE_DEVICE=cpu"):
        device.refuse_unused(tmp_path)
    monkeypatch.setenv(hiding, "")  # the user has hidden it
    device.refuse_unused(tmp_path)
    monkeypatch.delenv(hiding)
    monkeypatch.setenv(hardware.FORCED, "cpu")
    device.refuse_unused(tmp_path)


def test_no_other_file_asks_which_accelerator_there_is() -> None:
    asks = re.compile(r"torch\.(cuda|npu|xpu|mps|accelerator)\b|[\"'](cuda|npu|xpu|mps)[\"'/]")
    found = {
        f"{name}: {line.strip()}"
        for path in sorted((ROOT / "finetune").rglob("*.py"))
        if (name := path.relative_to(ROOT).as_posix()) not in PLACES
        and not name.startswith(KERNELS)
        for line in path.read_text(encoding="utf-8").splitlines()
        if asks.search(line) and "torch.backends" not in line
    }
    assert found == set()


# --- cards without bfloat16 in hardware -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("native", "images", "expected"),
    [(True, False, "bfloat16"), (True, True, "bfloat16"), (False, False, "float16"), (False, True, "float32")],
)  # fmt: skip
def test_auto_is_bfloat16_in_hardware_float16_for_text_else_float32(
    native: bool, images: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in(monkeypatch, "cuda", Card(native_bf16=native))
    assert str(number_format("auto", sees_images=images)) == f"torch.{expected}"
    assert str(automatic(native_bf16=native, sees_images=images)) == f"torch.{expected}"


HIDDEN, INNER, HOT = 512, 1712, 3
"""An eighth of the 9B's widths; HOT channels of a token carry the activations that grow."""


def with_activations_like_the_9b(model: nn.Module, seed: int = 0) -> None:
    """Give a layer's MLP what large models have: channels of an inner product in the hundred thousands.

    In models of this size single channels of first tokens and separators reach 1e4 and more in the
    residual and 1e5 in the MLP (Sun et al. 2024, arXiv:2402.17762).
    """
    mlp = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    up, down = (w for w in mlp.parameters() if w.dim() == 2)
    with torch.no_grad():
        size = up.shape[0] // 2
        for first in (0, size):
            up[first : first + HOT] *= 4000.0
        down[:, :HOT] *= 0.5


@pytest.mark.parametrize("family", ["chatglm", "glm", "glm4"])
def test_float16_stays_finite_and_right_where_its_sums_alone_would_overflow(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    ids = torch.randint(10, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    outcome = {}
    for dtype in ("float32", "float16"):
        model = load_model(folder, dtype=dtype)
        with_activations_like_the_9b(model)
        inner = []
        monkeypatch.setattr(
            wide_residual, "row_scale", _noting(inner, wide_residual.row_scale)
        )  # what the MLP's inner product reaches
        model.train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        monkeypatch.undo()
        slopes = [w.grad.float() for w in model.parameters() if w.grad is not None]
        with torch.no_grad():
            outcome[dtype] = loss.detach(), model.eval()(input_ids=ids).logits.float(), slopes
    assert max(inner) > 1e5  # beyond float16
    (loss, logits, slopes), (loss16, logits16, slopes16) = outcome["float32"], outcome["float16"]
    assert torch.isfinite(logits16).all()
    assert all(torch.isfinite(slope).all() for slope in slopes16)
    assert loss16.item() == pytest.approx(loss.item(), rel=2e-3)
    assert torch.linalg.vector_norm(logits16 - logits) <= 1e-2 * torch.linalg.vector_norm(logits)
    for one, other in zip(slopes16, slopes, strict=True):
        assert (
            torch.linalg.vector_norm(one - other) <= 5e-2 * torch.linalg.vector_norm(other) + 1e-6
        )


def _noting(found: list[float], scale: Any) -> Any:
    def noted(rows: torch.Tensor) -> torch.Tensor:
        found.append(float(rows.detach().abs().max()))
        return scale(rows)  # type: ignore[no-any-return]

    return noted


def test_without_it_the_same_layer_gives_nan() -> None:
    both = torch.zeros(1, 2 * INNER)
    both[0, [0, INNER]] = 400.0  # the product is 160,000
    down = nn.Linear(INNER, HIDDEN, bias=False).half()
    wrong = down(torch_forms.swiglu(both.half()))
    right = wide_residual.down_projected(both.half(), down)
    assert not torch.isfinite(wrong).all()
    expected = torch.nn.functional.linear(torch_forms.swiglu(both), down.weight.float())
    assert torch.allclose(right, expected, rtol=2e-3)


def test_rows_in_float16s_range_are_not_scaled_and_others_by_powers_of_two() -> None:
    rows = torch.tensor([[1.0, -2048.0], [2049.0, 1.0], [-160000.0, 3.0]])
    assert wide_residual.row_scale(rows).flatten().tolist() == [1.0, 2.0, 128.0]


def test_a_float16_run_trains_without_nan(tiny_glm4: Path) -> None:
    model = load_model(tiny_glm4, dtype="float16")
    with_activations_like_the_9b(model)
    masters = {n: w.detach().float().clone() for n, w in model.named_parameters()}
    ids = torch.randint(10, 300, (2, 16), generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=ids, labels=ids).loss
        (loss * 128).backward()  # as loss scaling does
        for name, weight in model.named_parameters():
            masters[name] -= 0.02 * weight.grad.float() / 128
            weight.data.copy_(masters[name])
            weight.grad = None
        losses.append(loss.item())
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert losses[-1] < losses[0]


# --- numbers of a device --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("major", "native", "expected"), [(7, True, False), (8, False, True), (9, False, True)]
)
def test_a_card_of_nvidias_has_bfloat16_from_capability_8_on(
    major: int, native: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = put_in(monkeypatch, "cuda", Card(native_bf16=native))
    said = SimpleNamespace(name="x", total_memory=5, major=major, minor=6)
    monkeypatch.setattr(card, "get_device_properties", lambda number: said)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = device.card()
    assert found == device.Card("x", 5, f"{major}.6", expected)
    assert device.cards() == [found, found]
    monkeypatch.setattr(torch.version, "hip", "6.0")  # AMD's says nothing of the kind
    assert device.card() == device.Card("x", 5, "", native)
    assert device.has_native_bf16() is native


def test_what_a_process_can_still_take_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = device.free_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert 0 < device.free_bytes() < alone / 500
    put_in(monkeypatch, "cuda", Card())
    assert device.free_bytes() == 12 * 10**9 + 18 * 10**9 - 15 * 10**9  # unused of what torch holds
    held = device.memory()
    assert held is not None
    assert (held.reserved, held.most_reserved, held.most_allocated) == (
        18 * 10**9, 18 * 10**9, 15 * 10**9,
    )  # fmt: skip


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("has_all", [False, True])
def test_a_checkpoint_holds_the_streams_of_one_accelerator_or_of_all(
    everywhere: bool, has_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device.random_states(everywhere=everywhere) == {}
    card: Any = put_in(monkeypatch, "cuda", Card())
    if has_all:
        card.get_rng_state_all = lambda: ["first", "second"]
    found = device.random_states(everywhere=everywhere)["cuda"]
    assert (found == ["first", "second"]) if everywhere and has_all else not found.any()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("warns", [False, True])
def test_after_deterministic_kernels_the_setting_is_what_it_was(before: bool, warns: bool) -> None:
    try:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        with device.deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled() is before
        assert torch.is_deterministic_algorithms_warn_only_enabled() is warns
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("value", "hidden"), [("", True), ("-1", True), ("0", False), (None, False)]
)
def test_cards_are_hidden_by_an_empty_variable_or_minus_one(
    value: str | None, hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    monkeypatch.delenv(hardware.FORCED, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert (hardware.likely_kind(tmp_path) == "cpu") is hidden


@pytest.mark.parametrize(
    ("value", "cpu"), [("cpu", True), ("CPU", True), ("cuda", False), ("", False)]
)
def test_the_cpu_is_asked_for_in_any_letters(
    value: str, cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(hardware.FORCED, value)
    assert hardware.wants_cpu() is cpu
