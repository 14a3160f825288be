"""Files for containers and clusters: what they name exists, and their commands are ours."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from finetune.cli.commands import app
from finetune.config.load import load_config

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text(encoding="utf-8"))
SKY = yaml.safe_load((ROOT / "deploy/skypilot.yaml").read_text(encoding="utf-8"))


def check(words: list[str]) -> None:
    """A command of ours with options that it has; its configuration loads."""
    command: Any = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
    for word in words[1:]:
        if word.startswith("configs/"):
            load_config(ROOT / word, [w for w in words if re.match(r"[a-z]+\\.[a-z_]+=", w)])


def test_what_the_image_copies_is_there() -> None:
    copied = [
        words.split()[:-1] for words in re.findall(r"^COPY (.*)$", DOCKERFILE, flags=re.MULTILINE)
    ]
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists(), name
    assert 'ENTRYPOINT ["finetune"]' in DOCKERFILE
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not {name for names in copied for name in names} & set(ignored)


@pytest.mark.parametrize("name", ["train", "serve"])
def test_the_commands_of_compose_are_ours(name: str) -> None:
    service = COMPOSE["services"][name]
    assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    check(service["command"])


def test_nothing_is_open_to_other_machines() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert "--api-key-file" in COMPOSE["services"]["serve"]["command"]


def test_the_cloud_job_runs_ours() -> None:
    program, *words = shlex.split(SKY["run"])
    assert program == "finetune"
    check(words)


def test_the_slurm_script_starts_ours_and_saves_before_the_time_is_up(tmp_path: Path) -> None:
    """In a shell where srun and scontrol are what they do: the words of torchrun are looked at."""
    script = ROOT / "deploy/slurm.sh"
    for name, text in {
        "scontrol": "echo node0; echo node1",
        "srun": 'exec "$@"',
        "torchrun": 'printf "%s\\n" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(script), "configs/sft.yaml", "training.seed=1"],
        capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]"},
    )  # fmt: skip
    words = done.stdout.splitlines()
    assert words == [
        "--nnodes=2", "--nproc_per_node=8", "--rdzv_backend=c10d", "--rdzv_id=7", "--rdzv_endpoint=node0:29400",
        "finetune.py", "configs/sft.yaml", "training.seed=1",
    ]  # fmt: skip
    assert "#SBATCH --signal=TERM@" in script.read_text(encoding="utf-8")


def test_the_job_of_kubernetes_is_that_of_the_page_and_complete() -> None:
    job = yaml.safe_load((ROOT / "deploy/pytorchjob.yaml").read_text(encoding="utf-8"))
    spec = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = spec["containers"]
    program, processes, script, config, *overrides = container["command"]
    assert (program, processes, script) == ("torchrun", "--nproc_per_node=8", "finetune.py")
    load_config(ROOT / config, overrides)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
    assert job["spec"]["elasticPolicy"]["minReplicas"] == job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"]  # fmt: skip


def test_compose_has_train_tensorboard_and_serve_of_one_image() -> None:
    assert COMPOSE["services"].keys() == {"train", "tensorboard", "serve"}
    assert {service["image"] for service in COMPOSE["services"].values()} == {"glm4-finetune"}
    volumes = {v.split(":")[0] for s in COMPOSE["services"].values() for v in s["volumes"]}
    assert {v for v in volumes if not v.startswith(".")} == COMPOSE["volumes"].keys()
    used = {name for s in COMPOSE["services"].values() for name in s.get("secrets", [])}
    assert used == COMPOSE["secrets"].keys()
