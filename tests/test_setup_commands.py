"""`finetune doctor` and `finetune launch`: what is missing has its remedy, one error is one message."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import command_line
import pytest

from finetune.cli import doctor
from finetune.cli.launch import launch
from finetune.distributed import hardware
from finetune.distributed.device import Card


def remedies(found: list[doctor.Finding]) -> dict[str, str]:
    return {finding.what: finding.remedy for finding in found}


@pytest.mark.parametrize(
    ("major", "minor", "native"), [(7, 0, False), (7, 5, False), (8, 0, True), (9, 0, True)]
)
def test_a_card_without_bfloat16_in_hardware_is_told_its_number_format(
    major: int, minor: int, native: bool
) -> None:
    card = Card("Card", 24 * 2**30, f"{major}.{minor}", native_bf16=native)
    finding = doctor._card(card, 0)
    assert finding.found.startswith(f"Card, 24 GiB, capability {major}.{minor}")
    assert ("float16 with sums in float32" in finding.found) is not native


def test_a_library_that_is_missing_or_old_is_named_with_the_command() -> None:
    assert doctor._library("no-such-library", ">=1").remedy == "pip install 'no-such-library>=1'"
    assert doctor._library("torch", ">=99").remedy == "pip install 'torch>=99'"
    assert doctor._library("torch", ">=2.6").is_well


def test_little_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    little = SimpleNamespace(free=10**9, total=64 * 10**6)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: little)
    found = remedies(list(doctor._room()))
    assert "19 GB" in found["disk, working directory"]
    assert "--shm-size" in found["shared memory"]


def test_a_port_in_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        monkeypatch.setattr(doctor, "PORT", held.getsockname()[1])
        (finding,) = doctor._port()
    assert "--standalone" in finding.remedy
    assert next(doctor._port()).is_well


def test_a_card_that_torch_cannot_use_is_not_taken_for_no_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "shown", lambda root: [hardware.MAKERS[0]])
    first = next(doctor._devices())
    assert (first.what, first.found) == ("GPU", "none that torch can use")
    assert "install a torch with CUDA" in first.remedy


def test_the_command_prints_every_finding_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    code = command_line.exit_code("doctor", "--json")
    rows = json.loads(capfd.readouterr().out)
    assert {"Python", "torch", "file locks here"} <= {row["what"] for row in rows}
    assert code == int(any(row["remedy"] for row in rows))


def test_a_machine_whose_name_has_no_address_is_told_how_processes_meet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    assert remedies(list(doctor._host_name())) == {"host name": ""}
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    (finding,) = doctor._host_name()
    assert "--local-addr=127.0.0.1" in finding.remedy


def test_processes_of_one_machine_do_not_look_for_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("torch.distributed.run.main", given.append)
    assert launch("2", ["configs/lora.yaml"]) == 0
    assert launch("2", ["--nnodes=2", "--rdzv-endpoint=a:1", "configs/lora.yaml"]) == 0
    assert "--local-addr=127.0.0.1" in given[0]
    assert not any("--local-addr" in word or word == "--standalone" for word in given[1])


@pytest.mark.slow
def test_one_error_of_two_processes_is_one_message_with_its_exit_code(tmp_path: Path) -> None:
    done = command_line.run(
        "-m", "finetune", "launch", "-n", "2", "configs/none.yaml", cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr
        == f"error: configs/none.yaml: no such file (working directory {tmp_path}); correct the path\n"
    )


def test_a_launch_without_a_configuration_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert command_line.exit_code("launch", "-n", "2") == 2
    assert "name the YAML file" in capfd.readouterr().err
