"""Small runs for the tests: data, a config, one process here or several under torchrun."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["the", "quick", "fox", "jumps", "over", "a", "lazy", "dog", "order", "customer", "answer"]


def write_dialogues(path: Path, count: int, *, seed: int = 0, weights: bool = False) -> Path:
    """`count` dialogues of one to three turns and very different lengths."""
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        messages: list[dict[str, Any]] = []
        for turn in range(draw.randint(1, 3)):
            question = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12)))
            reply: dict[str, Any] = {
                "role": "assistant",
                "content": f"{question.split()[0]} answer {number % 7}",
            }
            if weights:
                reply["weight"] = 0.25 + (number + turn) % 3
            messages += [{"role": "user", "content": question}, reply]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def config(model: Path, data: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A complete config; `changes` are `section__key=value`."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(model)},
        "data": {"train": str(data), "max_length": 256},
        "method": {"kind": "lora", "rank": 4},
        "training": {
            "output_dir": str(run_dir), "max_steps": 6, "batch_size": 2, "learning_rate": 1e-2,
            "gradient_accumulation_steps": 1, "log_every_steps": 1, "save_every_steps": 100,
            "keep_checkpoints": 20, "report_to": [],
        },
        "evaluation": {"max_new_tokens": 8},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return sections


def outcome_of(script: Path, folder: Path, *, timeout: float) -> dict[str, Any]:
    """What a script of several runs prints as its last line, JSON; it gets `folder` to work in."""
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "FINETUNE_CACHE": str(folder / "cache")}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def run_here(settings: dict[str, Any]) -> dict[str, Any]:
    """Train in this process."""
    from finetune.config.schema import RunConfig
    from finetune.training.run import train

    return train(RunConfig.model_validate(settings))


def run_command(
    settings: dict[str, Any] | list[dict[str, Any]],
    folder: Path,
    *,
    processes: int = 1,
    launcher: bool = True,
    environment: dict[str, str] | None = None,
    script: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Train through the command line, under torchrun or without; several runs one after another.

    `script` is Python to run before, to break something.
    """
    popen = start_command(
        settings, folder, processes=processes, launcher=launcher,
        environment=environment, script=script,
    )  # fmt: skip
    out, err = popen.communicate(timeout=240)
    return subprocess.CompletedProcess(popen.args, popen.returncode, out, err)


SEVERAL = """
import sys
from finetune.cli import main
from finetune.distributed.processes import joined_processes
from finetune.training import trainer
with joined_processes():  # one process group for all of them
    for file in sys.argv[1:]:
        try:
            main(["train", file])
        except SystemExit as end:
            if end.code:
                raise
"""


def start_command(
    settings: dict[str, Any] | list[dict[str, Any]],
    folder: Path,
    *,
    processes: int = 1,
    launcher: bool = True,
    environment: dict[str, str] | None = None,
    script: str | None = None,
) -> subprocess.Popen[str]:
    files = []
    for one in [settings] if isinstance(settings, dict) else settings:
        files.append(folder / f"{Path(one['training']['output_dir']).name}.yaml")
        files[-1].write_text(json.dumps(one), encoding="utf-8")  # JSON is YAML
    if script is None and len(files) == 1:
        what = ["-m", "finetune", "train", str(files[0])]
    else:
        program = folder / "program.py"
        program.write_text((script or "") + SEVERAL, encoding="utf-8")
        what = [str(program), *map(str, files)]
    command = [sys.executable]
    if launcher:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command += ["--master-port", str(free_port())]
    return subprocess.Popen(
        [*command, *what],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(run_dir: Path, process: subprocess.Popen[str], count: int = 2) -> None:
    """Until `count` steps are logged."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= count:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("no step was logged within four minutes")


_ports = itertools.count(random.Random(os.urandom(8)).randrange(1000))


def free_port() -> int:
    """One that nobody else takes before it is used.

    Each worker of the tests has a thousand of its own, below those that outgoing connections are given.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw9").removeprefix("gw")) % 10
    for number in _ports:
        port = 20_000 + 1000 * worker + number % 1000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable: numbers do not end")


def history(run_dir: Path, key: str = "loss") -> list[float]:
    """The values of `key` step by step, from metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record[key] for record in map(json.loads, lines) if key in record]


def weights(checkpoint: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "adapter_model.safetensors")


def adapter_hash(run_dir: Path, step: int) -> str:
    """What tells the same bits from nearly the same."""
    file = run_dir / f"checkpoint-{step}" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()
