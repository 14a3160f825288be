"""A full fine-tuning that DeepSpeed sharded comes out as one plain checkpoint, at every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from adapters import logits, weights_of
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
            training__learning_rate=1e-3,
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
    before, plain = weights_of(tiny_chatglm), logits(load_model(tmp_path / "merged-None"))
    assert (plain - logits(load_model(tiny_chatglm))).abs().max() > 0.01
    for stage in (1, 2, 3):
        answers = logits(load_model(tmp_path / f"merged-{stage}"))
        assert (answers - plain).abs().max() < 1e-4, stage
        for name, tensor in merged[stage].items():
            # The loss hardly depends on the bias of k, so that AdamW follows float noise there.
            if not name.endswith("query_key_value.bias"):
                assert torch.allclose(tensor, merged[None][name], rtol=0, atol=1e-5), name
            assert torch.equal(tensor, before[name]) == ("inv_freq" in name), name
    export(str(tmp_path / "run-3"), tmp_path / "hf", layout="hf")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert (logits(opened) - logits(load_model(tmp_path / "merged-3"))).abs().max() < 1e-5
