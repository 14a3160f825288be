"""Replies are the same on two processes, with weights that ZeRO-3 shares out, and with images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pictures
import pytest
import test_generate as here

import finetune.models
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.generation.generate import generate
from finetune.generation.load import open_model


@pytest.fixture(scope="module")
def glm(tiny_glm: Path) -> Any:
    return here.open_tiny(tiny_glm)


def image_prompts(folder: Path) -> tuple[Any, list[Any]]:
    """A model with eyes, and prompts of which every second one shows an image."""
    opened = open_model(folder / "glm4v")
    rows = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(row)["messages"][0] for row in rows]
    shown = [str(folder / one["image"]) if "image" in one else None for one in asked]
    messages = [Message("user", one["content"], images=(ShownImage(path),) if path else ()) for one, path in zip(asked, shown, strict=True)]  # fmt: skip
    requests = [(Conversation((message,)), 1) for message in messages]
    return opened.model, list(opened.template.prompts(requests))


WORKER = """
import json, os, sys
import torch, torch.distributed as dist
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
sys.path[:0] = [TESTS]
import test_generate as here, test_generate_ranks
from finetune.generation.generate import generate
from finetune.distributed.map_batches import EvaluationStoppedError
from finetune.distributed.processes import is_sharded
from pathlib import Path

model = here.open_tiny(Path(FOLDER))
stops = here.Stops(stop_ids=(*here.tiny.EOS_IDS, *range(0, here.tiny.NUM_RANKS, 3)))
rank = dist.get_rank()
calls = []
original = here.generation.write_replies
here.generation.write_replies = lambda *a, **k: (calls.append(1), original(*a, **k))[1]
def run(**more):
    replies = generate(model, stops, here.prompts(15), max_new_tokens=24, batch_size=1, **more)
    return [[reply.index, list(reply.ids), reply.stopped] for reply in replies]
results = {"plain": run(), "plain calls": len(calls)}
try:
    run(should_stop=lambda: rank == 1)
except EvaluationStoppedError:
    results["stopped"] = True
assert not is_sharded(model)
deepspeed.initialize(model=model, config={
    "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
})
assert is_sharded(model)
calls.clear()
results |= {"sharded": run(), "sharded calls": len(calls)}
model, shown = test_generate_ranks.image_prompts(Path(SEEING))
deepspeed.initialize(model=model, config={
    "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
})
replies = generate(model, stops, shown, max_new_tokens=24, batch_size=2)
results["images"] = [[reply.index, list(reply.ids), reply.stopped] for reply in replies]
Path(OUT, f"{rank}.json").write_text(json.dumps(results))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_replies_of_one_also_with_sharded_weights(
    glm: Any, tiny_glm: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    stops = here.Stops(stop_ids=(*here.tiny.EOS_IDS, *range(0, here.tiny.NUM_RANKS, 3)))
    replies = generate(glm, stops, here.prompts(15), max_new_tokens=24, batch_size=1)
    expected = [[reply.index, list(reply.ids), reply.stopped] for reply in replies]
    pictures.save_model(tmp_path / "glm4v")
    pictures.write_dialogues(tmp_path, 40)
    seeing, shown = image_prompts(tmp_path)
    seen = generate(seeing, stops, shown, max_new_tokens=24, batch_size=2)
    images = [[reply.index, list(reply.ids), reply.stopped] for reply in seen]
    assert len({len(reply.ids) for reply in seen}) > 2
    script = tmp_path / "worker.py"
    names = {
        "TESTS": Path(__file__).parent,
        "FOLDER": tiny_glm,
        "SEEING": tmp_path,
        "OUT": tmp_path,
    }
    script.write_text("".join(f"{k} = {str(v)!r}\n" for k, v in names.items()) + WORKER)
    root = Path(finetune.models.__file__).parents[2]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            script,
        ],
        env=os.environ | {"PYTHONPATH": str(root)},
        timeout=180,
        check=True,
    )
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert sum(result["plain calls"] for result in results) == 15  # each batch once
    for result in results:
        assert result["plain"] == result["sharded"] == expected
        assert result["plain calls"] > 0
        assert result["images"] == images
        assert result["sharded calls"] == 8  # the second repeats a batch to keep in step
        assert result["stopped"]
