"""`finetune doctor`: everything is looked at, each finding has its figure, and what is amiss its remedy."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from finetune.cli import doctor
from finetune.distributed import device
from finetune.distributed.device import Card


def test_everything_is_looked_at_and_the_hub_only_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_hub", lambda: iter([doctor.Finding("hub", "asked")]))
    found = [finding.what for finding in doctor.examine()]
    wanted = ["Python", "torch", "GPU", "CPU", "disk, working directory", "disk, cache", "file locks here", "host name"]  # fmt: skip
    assert [what for what in found if what in wanted] == wanted
    assert f"port {doctor.PORT}" in found
    assert "hub" not in found
    assert [f.what for f in doctor.examine(hub=True)][-1] == "hub"


@pytest.mark.parametrize(
    ("cards", "exchange", "version", "told"),
    [
        (1, "nccl", "2.21", {"NCCL": ("2.21", "")}),
        (1, "nccl", "", {"NCCL": ("none", "")}),
        (2, "nccl", "", {"NCCL": ("none", "several GPUs need a torch with NCCL")}),
        (2, "nccl", "2.21", {"NCCL": ("2.21", "")}),
        (2, "xccl", "", {"exchange between the cards": ("xccl", "")}),
        (1, "xccl", "", {}),
    ],
)
def test_cards_are_numbered_and_several_need_a_way_to_exchange(
    cards: int, exchange: str, version: str, told: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    made = [Card(f"Card {n}", (n + 1) * 2**30, "" if n else "9.0", native_bf16=True) for n in range(cards)]  # fmt: skip
    for name, value in (("has_accelerator", True), ("cards", made), ("device_backend", exchange), ("collective_version", version)):  # fmt: skip
        monkeypatch.setattr(device, name, lambda value=value: value)
    found = {f.what: (f.found, f.remedy) for f in doctor._devices()}
    listed = {"GPU 0": ("Card 0, 1 GiB, capability 9.0", ""), "GPU 1": ("Card 1, 2 GiB", "")}
    assert found == {f"GPU {n}": listed[f"GPU {n}"] for n in range(cards)} | told


def test_a_machine_without_a_card_tells_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_accelerator", lambda: False)
    monkeypatch.setattr(device, "unused", lambda: "")
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = int(next(line.split()[1] for line in lines if line.startswith("MemTotal"))) * 1024
    card, cpu = doctor._devices()
    assert (card.what, card.found, card.is_well) == ("GPU", "none", True)
    assert (cpu.what, cpu.found) == ("CPU", f"{os.cpu_count()} cores, {total / 1e9:.0f} GB")


def test_disks_are_told_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    room = SimpleNamespace(free=123_400_000_000, total=64_500_000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: room)
    found = {f.what: f.found for f in doctor._room()}
    assert found["disk, working directory"] == found["disk, cache"] == "123 GB free"
    if Path("/dev/shm").is_dir():
        assert found["shared memory"] == "0.1 GB"


def test_locks_are_tried_where_the_run_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (finding,) = doctor._locks()
    assert (finding.what, finding.found, finding.remedy) == ("file locks here", "yes", "")
    tried: list[int] = []

    def refused(file: Any, how: int) -> None:
        tried.append(how)
        assert Path(file.name).parent.resolve() == tmp_path
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(doctor.fcntl, "flock", refused)
    (finding,) = doctor._locks()
    assert finding.found == "No locks available"
    assert ".owner" in finding.remedy
    assert tried == [doctor.fcntl.LOCK_EX | doctor.fcntl.LOCK_NB]
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_was_just_left_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()  # the side that ends first waits on the port for a minute
            client.recv(1)
    monkeypatch.setattr(doctor, "PORT", port)
    (finding,) = doctor._port()
    assert (finding.what, finding.found) == (f"port {port}", "free")
    with pytest.raises(OSError, match="in use"), socket.socket() as plain:
        plain.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, ""), (OSError("no way\nthere"), "no way"), (ValueError(""), "ValueError"), (OSError("x" * 150), "x" * 100),
        (HfHubHTTPError("401 Unauthorized", response=httpx.Response(401, request=httpx.Request("GET", "https://m"))), "401 Unauthorized"),
    ],
    ids=["answers", "no network", "no words", "many words", "refuses"],
)  # fmt: skip
@pytest.mark.parametrize("mirror", [None, "https://mirror"])
def test_a_hub_that_does_not_answer_is_named_with_its_reason(
    error: Exception | None, reason: str, mirror: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Api:
        def __init__(self, endpoint: str) -> None:
            asked.append(endpoint)

        def model_info(self, name: str, timeout: float) -> None:
            asked.append(0 < timeout < 60)
            if error:
                raise error

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    if mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror)
    address = mirror or "https://huggingface.co"
    (finding,) = doctor._hub()
    assert asked == [address, True]
    assert finding.found == (f"{address}: {reason}" if error else address)
    assert ("set HF_ENDPOINT to a mirror" in finding.remedy) is (error is not None)


def test_a_fault_of_ours_in_asking_the_hub_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda endpoint: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        list(doctor._hub())


def test_each_library_is_held_against_what_this_package_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = {"old": "0.5", "fits": "1.5", "before": "2.0rc1", "any": "9"}
    asked = ["old<2,>=1.0", "fits<2,>=1.0", "before>=1.0", "any", "gone>=3", 'extra>=1; extra == "x"']  # fmt: skip

    def version(name: str) -> str:
        if name not in there:
            raise doctor.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(doctor, "requires", lambda _: asked)
    monkeypatch.setattr(doctor, "version", version)
    _, *libraries = doctor._libraries()
    assert [(f.what, f.found, f.remedy) for f in libraries] == [
        ("old", "0.5", "pip install 'old<2,>=1.0'"), ("fits", "1.5", ""), ("before", "2.0rc1", ""),
        ("any", "9", ""), ("gone", "missing", "pip install 'gone>=3'"),
    ]  # fmt: skip
