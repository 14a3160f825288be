"""What is asked of an accelerator's module and of the machine: each number from where it belongs."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_device import Card, put_in

from finetune.distributed import device, hardware, position
from finetune.errors import ConfigError


class Numbered(Card):
    """Each of its numbers is another, so that none can stand for another."""

    def max_memory_allocated(self) -> int:
        return 16 * 10**9

    def max_memory_reserved(self) -> int:
        return 19 * 10**9

    def empty_cache(self) -> None:
        self.emptied = True


def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing hides a card."""
    for name in {hardware.FORCED, *(name for maker in hardware.MAKERS for name in maker.hidden_by)}:
        monkeypatch.delenv(name, raising=False)


# --- which device -------------------------------------------------------------------------------------


def test_a_device_that_does_not_answer_or_that_we_know_no_backend_of_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card: Any = put_in(monkeypatch, "cuda", Card())
    assert (device.kind(), device.has_accelerator()) == ("cuda", True)
    card.is_available = lambda: False
    assert (device.kind(), device.has_accelerator()) == ("cpu", False)
    put_in(monkeypatch, "xpu", Card())
    assert device.device_backend() == "xccl"
    monkeypatch.setenv("LOCAL_RANK", "1")
    own = device.card()
    assert own is not None
    assert own.name == "Card 1"
    assert [one.name for one in device.cards()] == ["Card 0", "Card 1"]
    monkeypatch.delattr(torch, "xpu")  # the package of the backend is not there
    assert device.kind() == "cpu"
    put_in(monkeypatch, "hpu", Card())  # there, but of a kind that is not supported
    assert (device.kind(), device.device_backend()) == ("cpu", "gloo")


@pytest.mark.parametrize(
    ("kind", "said"), [("cuda", "2 GPUs"), ("xpu", "2 GPUs"), ("mtia", "2 mtias")]
)
def test_too_many_processes_are_told_how_many_were_started_and_how_many_cards_there_are(
    kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(device.BACKENDS, kind, "some")
    card = put_in(monkeypatch, kind, Card(count=2))
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ConfigError, match=f"at least 4 processes on this machine, which has {said}; use --nproc_per_node=2"):  # fmt: skip
        device.select()
    assert card.chosen is None


SHOWN = [
    ("dev/nvidia7", "an NVIDIA GPU", "cuda", ["CUDA_VISIBLE_DEVICES"]),
    ("proc/driver/nvidia/version", "an NVIDIA GPU", "cuda", ["CUDA_VISIBLE_DEVICES"]),
    ("usr/lib/wsl/lib/libcuda.so.1", "an NVIDIA GPU", "cuda", ["CUDA_VISIBLE_DEVICES"]),
    ("dev/kfd", "an AMD GPU", "cuda", ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"]),
    ("dev/davinci12", "an Ascend NPU", "npu", ["ASCEND_RT_VISIBLE_DEVICES"]),
    ("dev/hl3", "an Intel Gaudi", "hpu", ["HABANA_VISIBLE_DEVICES"]),
    ("sys/class/accel/accel0/device/driver/module/drivers/pci:habanalabs", "an Intel Gaudi", "hpu", ["HABANA_VISIBLE_DEVICES"]),
    ("dev/cambricon_dev0", "a Cambricon MLU", "mlu", ["MLU_VISIBLE_DEVICES"]),
    ("dev/mtgpu.1", "a Moore Threads GPU", "musa", ["MUSA_VISIBLE_DEVICES"]),
]  # fmt: skip


@pytest.mark.parametrize(("file", "name", "kind", "hiding"), SHOWN, ids=[row[0] for row in SHOWN])
def test_each_sign_of_a_card_names_its_maker_and_each_variable_hides_it(
    file: str, name: str, kind: str, hiding: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    visible(monkeypatch)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.touch()
    assert [maker.name for maker in hardware.shown(tmp_path)] == [name]
    assert hardware.likely_kind(tmp_path) == kind
    for variable in hiding:
        for value in ("", "-1"):
            monkeypatch.setenv(variable, value)
            assert hardware.shown(tmp_path) == []
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("name", ["dev/nvidiactl", "dev/nvidia-uvm", "dev/hlx", "dev/mtgpuctl"])
def test_a_driver_without_a_card_is_no_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible(monkeypatch)
    (tmp_path / "dev").mkdir()
    (tmp_path / name).touch()
    assert hardware.shown(tmp_path) == []


def test_of_two_makers_the_first_of_the_list_is_told_and_none_where_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "davinci0"):
        (tmp_path / "dev" / name).touch()
    assert hardware.likely_kind(tmp_path) == "cuda"
    said = device.unused(tmp_path)
    assert "this machine has an NVIDIA GPU" in said
    assert f"the installed torch ({torch.__version__})" in said
    put_in(monkeypatch, "cuda", Card())
    assert device.unused(tmp_path) == ""


# --- number formats -------------------------------------------------------------------------------------


def test_bfloat16_is_native_where_the_device_says_so_or_nobody_asks_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not device.has_native_bf16()  # a CPU
    card: Any = put_in(monkeypatch, "xpu", Card())
    for native in (True, False):
        card.is_bf16_supported = lambda native=native: native
        assert device.has_native_bf16() is native
    monkeypatch.setattr(torch, "xpu", SimpleNamespace(is_available=lambda: True))
    assert device.has_native_bf16()


@pytest.mark.parametrize("version", [13, 14])
def test_an_apple_gpu_has_bfloat16_from_macos_14_on(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 1,
        recommended_max_memory=lambda: 30 * 10**9, driver_allocated_memory=lambda: 4 * 10**9,
        current_allocated_memory=lambda: 3 * 10**9,
    )  # fmt: skip
    put_in(monkeypatch, "mps", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda *asked: asked <= (version, 9)
    )
    assert device.has_native_bf16() is (version >= 14)
    assert device.card() == device.Card("Apple GPU", 30 * 10**9, "", version >= 14)
    gigabytes = (26, 30, 3, 4, 3, 4)
    assert device.memory() == device.Memory(*(10**9 * size for size in gigabytes))
    assert device.free_bytes() == (26 + 4 - 3) * 10**9


# --- memory -----------------------------------------------------------------------------------------------


def test_the_numbers_of_a_devices_memory_are_each_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    card = put_in(monkeypatch, "cuda", Numbered())
    gigabytes = (12, 32, 15, 18, 16, 19)
    assert device.memory() == device.Memory(*(10**9 * size for size in gigabytes))
    assert device.memory_gb() == 16.0  # the peak
    device.give_back_unused()
    assert getattr(card, "emptied", False)


def test_without_an_accelerator_memory_is_the_machines_and_the_peak_this_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    files = {"/proc/meminfo": "MemTotal:  900 kB\nMemFree:  7 kB\nMemAvailable:  500 kB\nCached: 1 kB\n"}  # fmt: skip
    monkeypatch.setattr(Path, "read_text", lambda path, **_: files[str(path)])
    assert device.free_bytes() == 500 * 1024 // 2

    def missing(path: Path, **_: Any) -> str:
        raise FileNotFoundError(path)

    for read in (missing, lambda path, **_: "MemTotal: 9 kB\n"):
        monkeypatch.setattr(Path, "read_text", read)
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert device.free_bytes() == whole // 2
    used = SimpleNamespace(ru_maxrss=3 * 10**6)
    monkeypatch.setattr(
        device.resource, "getrusage", lambda who: used if who == resource.RUSAGE_SELF else None
    )
    monkeypatch.setattr(device.sys, "platform", "linux")  # in kilobytes
    assert device.memory_gb() == 3 * 1.024
    monkeypatch.setattr(device.sys, "platform", "darwin")  # in bytes
    assert device.memory_gb() == 0.003


# --- work ---------------------------------------------------------------------------------------------------


def test_reading_a_tensors_numbers_counts_as_waiting_for_the_device() -> None:
    waited: list[float] = []

    class Slow:
        def tolist(self) -> list[float]:
            waited.append(position.waited())
            return [1.5]

    assert device.numbers(Slow()) == [1.5]  # type: ignore[arg-type]
    assert waited[0] > 0
    assert position.waited() == 0


@pytest.mark.parametrize("own", [None, ":16:8"])
def test_cublas_is_told_before_its_first_use_unless_the_user_has_said(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", own or "")
    if own is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    device.prepare_determinism()
    # The two values with which cuBLAS promises one order of sums (its manual, "Results reproducibility").
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (own or ":4096:8")


def test_all_four_random_streams_are_put_back_also_after_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = put_in(monkeypatch, "cuda", Card())

    def states() -> list[Any]:
        numpy = np.random.get_state()[1]
        return [
            random.getstate(), numpy.tolist(), torch.get_rng_state().tolist(), card.stream.tolist(),
        ]  # fmt: skip

    before = states()

    def failing() -> None:
        with device.preserve_rng():
            random.random(), np.random.random(), torch.rand(3)
            card.stream = torch.ones(4, dtype=torch.uint8)
            assert all(now != then for now, then in zip(states(), before, strict=True))
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        failing()
    assert states() == before


def test_the_version_of_nccl_is_told_of_nvidias_cards_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nccl = SimpleNamespace(version=lambda: (2, 27, 5))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "nccl", nccl)
    assert device.collective_version() is None  # a CPU
    card: Any = put_in(monkeypatch, "cuda", Card())
    card.nccl = nccl
    assert device.collective_version() == "2.27.5"
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert device.collective_version() is None
