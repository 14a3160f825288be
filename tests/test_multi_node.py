"""Two machines: two launchers that meet on the loopback address, each with a cache of its own.

The forms are those of docs/multi_node.md; what cannot be had here, a SLURM cluster and the training
operator of Kubeflow, is stood in for by what they do: start the script twice, set variables.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml
from closeness import SMOOTH_STEPS, assert_trained_alike

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/multi_node.md").read_text(encoding="utf-8")
FORMS = {
    "rendezvous": ["--rdzv_backend=c10d", "--rdzv_id=17", "--rdzv_endpoint=127.0.0.1:{port}"],
    "fixed ranks": ["--master_addr=127.0.0.1", "--master_port={port}", "--node_rank={node}"],
}
# `srun COMMAND` runs the command on every node and fails when one of them does.
SRUN = """#!/bin/bash
pids=()
for node in $(seq 0 $((SLURM_NNODES - 1))); do
    SLURM_NODEID=$node FINETUNE_CACHE="$CACHES-$node" "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames cpu[1-2]" ] || exit 2
printf '127.0.0.1\\ncpu2\\n'
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def replaced(text: str, changes: dict[str, str]) -> str:
    """`text` with every key, which it must hold, as its value."""
    for old, new in changes.items():
        assert old in text, f"{old} is not in the page's {text}"
        text = text.replace(old, new)
    return text


class Subject:
    """A run of two processes, and the same run alone."""

    def __init__(self, model: Path, folder: Path, stage: int | None = None) -> None:
        data = runs.write_dialogues(folder / "train.jsonl", 11)
        common = {"method__dropout": 0.0, "training__max_steps": 3, **SMOOTH_STEPS}
        self.folder = folder
        self.alone = runs.config(
            model, data, folder / "alone", training__batch_size=4, **common
        )  # fmt: skip
        settings = runs.config(model, data, folder / "both", **common)
        if stage is not None:
            settings["deepspeed"] = {"zero_stage": stage}
        self.file = folder / "both.yaml"
        self.file.write_text(json.dumps(settings), encoding="utf-8")

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        # torchrun of the Python that runs the tests, whatever else is on the path
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PATH": path, **environment},
        )  # fmt: skip

    def check(self, started: list[subprocess.Popen[str]]) -> None:
        """What was started ends well and has trained the run of one process."""
        runs.run_here(self.alone)
        said = [one.communicate(timeout=300) for one in started]
        assert [one.returncode for one in started] == [0] * len(started), said[0][1][-3000:]
        assert sum(out.count("writes to") for out, _ in said) == 1  # one process talks
        assert_trained_alike(self.folder / "both", self.folder / "alone")


@pytest.mark.parametrize(("form", "stage"), [("rendezvous", 2), ("fixed ranks", None)])
def test_two_launchers_train_the_run_of_one_process(
    tiny_chatglm: Path, tmp_path: Path, form: str, stage: int | None
) -> None:
    subject, port = Subject(tiny_chatglm, tmp_path, stage), runs.free_port()
    options = [[text.format(port=port, node=node) for text in FORMS[form]] for node in range(2)]
    said = blocks("bash")[0] + blocks("bash")[1]
    assert all(option.split("=")[0] in said for option in options[0])  # the page's own
    subject.check([
        subject.start(
            ["torchrun", "--nnodes=2", "--nproc_per_node=1", *options[node], "finetune.py",
             str(subject.file)],
            FINETUNE_CACHE=str(tmp_path / f"cache-{node}"),
        )
        for node in range(2)
    ])  # fmt: skip


@pytest.mark.parametrize("number", range(len(blocks("bash"))))
def test_every_script_of_the_page_is_bash(number: int) -> None:
    done = subprocess.run(["bash", "-n"], input=blocks("bash")[number], text=True, check=False)
    assert done.returncode == 0


def test_the_slurm_script_of_the_page_trains_the_run_of_one_process(
    tiny_chatglm: Path, tmp_path: Path
) -> None:
    subject, port = Subject(tiny_chatglm, tmp_path, stage=2), runs.free_port()
    (script,) = (block for block in blocks("bash") if "#SBATCH" in block)
    changes = {
        "--nproc_per_node=8": "--nproc_per_node=1",
        "29400": str(port),
        "configs/sft.yaml": str(subject.file),
    }
    (tmp_path / "job.sh").write_text(replaced(script, changes), encoding="utf-8")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "cpu[1-2]"}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = ["bash", str(tmp_path / "job.sh")]
    subject.check([subject.start(job, **given, PATH=path, CACHES=str(tmp_path / "cache"))])


def operator_environment(job: dict[str, Any], endpoint: str) -> dict[str, str]:
    """What Kubeflow's training operator sets in every worker of a job of workers only.

    By its pkg/controller.v1/pytorch/envvar.go and elastic.go: PET_NPROC_PER_NODE comes from
    elasticPolicy.nProcPerNode, which is deprecated, or goes with a Master; the rendezvous id is left
    out when the policy has none.
    """
    policy, replicas = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Worker"}
    assert set(policy) == {"rdzvBackend", "minReplicas", "maxReplicas", "maxRestarts"}
    return {
        "PYTHONUNBUFFERED": "0",
        "PET_RDZV_ENDPOINT": endpoint,
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
        "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
    }


def test_the_pytorch_job_of_the_page_trains_the_run_of_one_process(
    tiny_chatglm: Path, tmp_path: Path
) -> None:
    subject = Subject(tiny_chatglm, tmp_path, stage=2)
    (text,) = blocks("yaml")
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["maxReplicas"] == 2
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    changes = {
        f"--nproc_per_node={gpus}": "--nproc_per_node=1",
        "configs/sft.yaml": str(subject.file),
        "/shared/runs/sft": str(tmp_path / "both"),
    }
    command = json.loads(replaced(json.dumps(container["command"]), changes))
    given = operator_environment(job, f"127.0.0.1:{runs.free_port()}")
    subject.check([
        subject.start(command, **given, FINETUNE_CACHE=str(tmp_path / f"cache-{node}"))
        for node in range(2)
    ])  # fmt: skip
