"""A full fine-tuning that DeepSpeed sharded comes out as one plain checkpoint, at every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from adapters import logits, weights_of
from closeness import SMOOTH_STEPS, additions, assert_close, assert_trained_alike
from transformers import AutoModelForCausalLM

from finetune.export.convert import export
from finetune.export.merge import merge
from finetune.models.load import load_model
from finetune.storage import folders


@pytest.mark.slow
def test_what_two_processes_tuned_under_zero_1_2_and_3_merges_to_the_same_plain_model(
    tiny_chatglm: Path, tmp_path: Path
) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 8)
    settings = []
    for stage in (None, 1, 2, 3):
        one = runs.config(
            tiny_chatglm, data, tmp_path / f"run-{stage}", training__max_steps=2,
            training__learning_rate=1e-3, **SMOOTH_STEPS,
        )  # fmt: skip
        one["method"] = {"kind": "full"}
        if stage is not None:
            one["deepspeed"] = {"zero_stage": stage}
        settings.append(one)
    done = runs.run_command(settings, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    merged: dict[Any, dict[str, torch.Tensor]] = {}
    for stage in (None, 1, 2, 3):
        if stage is not None:  # DeepSpeed's own states are there and are not needed
            assert list((tmp_path / f"run-{stage}/checkpoint-2").glob("global_step2/*"))
        out = merge(tmp_path / f"run-{stage}", tmp_path / f"merged-{stage}").output
        assert folders.verify(out) == []
        merged[stage] = weights_of(out)
        assert {"global_step2", "optimizer.pt", "latest"}.isdisjoint(f.name for f in out.iterdir())
        load_model(out)  # refuses what is missing, left over or of another shape
    before = weights_of(tiny_chatglm)
    for stage in (1, 2, 3):
        assert_trained_alike(tmp_path / f"run-{stage}", tmp_path / "run-None")
        saved = weights_of(tmp_path / f"run-{stage}/checkpoint-2")
        for name, tensor in merged[stage].items():
            assert torch.equal(tensor, saved[name]), name
            assert torch.equal(tensor, before[name]) == ("inv_freq" in name), name
    export(str(tmp_path / "run-3"), tmp_path / "hf", layout="hf")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    merged_3 = load_model(tmp_path / "merged-3")
    assert_close(logits(opened), logits(merged_3), additions(merged_3.config, 30))
