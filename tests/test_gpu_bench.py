"""What waits for a GPU is rehearsed on a CPU, so that it runs when there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_stages_for_a_gpu_run_on_a_cpu_and_a_failed_one_costs_no_other(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    stages = ["correct", "nonsense", "step"]
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/bench/gpu.sh"), "--rehearse", "--answers", str(answers), *stages],
        env=os.environ | {"PYTHON": sys.executable}, cwd=tmp_path, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {"stage": "nonsense", "failed": 2} in lines
    correct = [line for line in lines if line["stage"] == "correct"]
    assert len(correct) == 2
    assert all(line["worst_gradient_off"] < 2e-2 for line in correct)
    steps = [line for line in lines if line["stage"] == "step"]
    assert [line["name"].split(",")[0] for line in steps].count("peft_trainer") == 1
    assert all(line["ms"] > 0 and line["predicted_gb"] > 0 for line in steps)
    assert "| step | ours, lora, 32 |" in done.stdout


def test_every_stage_has_a_time_limit_and_a_line_in_the_help() -> None:
    script = (ROOT / "scripts/bench/gpu.sh").read_text()
    source = (ROOT / "scripts/bench/gpu.py").read_text()
    names = script.split("stages:-")[1].split("}")[0].split()
    assert names == [
        "ceilings",
        "kernels",
        "correct",
        "attention",
        "qlora",
        "step",
        "generate",
        "train",
    ]
    assert all(f"{name}) echo" in script and f"\n{name} " in source for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ptuning_v2"])
def test_a_step_waits_for_the_gpu_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench"))
    from count_syncs import count

    found = count(method, packing=True, stage=None)
    assert found["syncs_per_step"] == 1, found["sites"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stage"), [("lora", 2), ("full", 3)])
def test_a_step_under_deepspeed_waits_for_the_gpu_once(method: str, stage: int) -> None:
    """In a process of its own: accelerate holds DeepSpeed's state as long as its process lives."""
    script = ROOT / "scripts/bench/count.py"
    options = ["--syncs", "--method", method, "--zero-stage", str(stage), "--json"]
    done = subprocess.run(
        [sys.executable, str(script), *options],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["syncs_per_step"] == 1, found["sites"]
