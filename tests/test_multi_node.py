"""Two machines: two launchers that meet on the loopback address, each with a cache of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs

ROOT = Path(__file__).resolve().parent.parent
FORMS = {
    "rendezvous": ["--rdzv_backend=c10d", "--rdzv_id=17", "--rdzv_endpoint=127.0.0.1:{port}"],
    "fixed ranks": ["--master_addr=127.0.0.1", "--master_port={port}", "--node_rank={node}"],
}


@pytest.mark.parametrize(("form", "stage"), [("rendezvous", 2), ("fixed ranks", None)])
def test_two_launchers_train_the_run_of_one_process(
    tiny_chatglm: Path, tmp_path: Path, form: str, stage: int | None
) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 11)
    common = {"method__dropout": 0.0, "training__max_steps": 3}
    alone = runs.config(
        tiny_chatglm, data, tmp_path / "alone", training__batch_size=4, **common
    )  # fmt: skip
    settings = runs.config(tiny_chatglm, data, tmp_path / "both", **common)
    if stage is not None:
        settings["deepspeed"] = {"zero_stage": stage}
    file = tmp_path / "both.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")
    port = runs.free_port()
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                *(option.format(port=port, node=node) for option in FORMS[form]),
                "-m", "finetune", "train", str(file),
            ],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "FINETUNE_CACHE": str(tmp_path / f"cache-{node}")},
        )
        for node in range(2)
    ]  # fmt: skip
    runs.run_here(alone)
    said = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    assert sum("writes to" in out for out, _ in said) == 1  # one process talks
    assert runs.history(tmp_path / "both") == pytest.approx(
        runs.history(tmp_path / "alone"), abs=2e-6
    )
    left, right = (runs.weights(tmp_path / name / "checkpoint-3") for name in ("both", "alone"))
    assert all(abs(left[key] - right[key]).max() < 1e-5 for key in right)
