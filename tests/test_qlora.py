"""QLoRA: four-bit layers under LoRA, from training over evaluation to a merged model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file

from finetune.config.load import load_config
from finetune.errors import ConfigError, ModelError
from finetune.models.load import load_model

bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'glm4-finetune[qlora]'",
)
WIDE = {
    "glm": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32},
    "chatglm": {"hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 32},
}


def config_file(folder: Path, **changes: object) -> Path:
    data = runs.write_dialogues(folder / "train.jsonl", 16)
    path = folder / "config.json"
    settings = runs.config(folder / "model", data, folder / "run", **changes)
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method__kind": "full", "method__rank": None}, "method.kind full cannot train"),
        ({"deepspeed__zero_stage": 3}, "cannot be sharded by ZeRO-3"),
    ],
)
def test_what_four_bits_cannot_be_combined_with_is_refused_by_key(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = config_file(tmp_path, model__quantization="nf4", **changes)
    with pytest.raises(ConfigError, match=said):
        load_config(path, [])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is installed")
def test_without_bitsandbytes_the_error_says_what_to_install(tiny_glm: Path) -> None:
    with pytest.raises(ModelError, match=r"pip install 'glm4-finetune\[qlora\]'"):
        load_model(tiny_glm, quantization="nf4")


@bitsandbytes
def test_a_width_that_the_kernels_cannot_take_is_refused_on_a_cpu(tiny_glm: Path) -> None:
    with pytest.raises(ModelError, match=r"widths that 64 divides, but .*q_proj takes 32"):
        load_model(tiny_glm, dtype="float32", quantization="nf4")


@bitsandbytes
@pytest.mark.parametrize("stage", [None, 2])
@pytest.mark.parametrize("family", ["glm", "chatglm"])
def test_a_quantised_base_trains_is_evaluated_alike_and_merges(
    family: str, stage: int | None, tmp_path: Path
) -> None:
    from finetune.export.merge import merge
    from finetune.generation.load import open_model

    base = tiny.save_model(tmp_path / "model", family, **WIDE[family])
    changes = {"deepspeed__zero_stage": stage} if stage is not None else {}
    held_out = runs.write_dialogues(tmp_path / "dev.jsonl", 4, seed=1)
    path = config_file(
        tmp_path, model__quantization="nf4", model__dtype="float32", data__validation=str(held_out),
        evaluation__every_steps=6, **changes,
    )  # fmt: skip
    done = runs.run_command(json.loads(path.read_text(encoding="utf-8")), tmp_path, launcher=False)
    assert done.returncode == 0, done.stderr
    losses = runs.history(tmp_path / "run")
    assert losses[-1] < losses[0] - 0.1

    checkpoint = tmp_path / "run" / "checkpoint-6"
    opened = open_model(checkpoint).model
    quantised = [n for n, m in opened.named_modules() if type(m).__name__ == "Linear4bit"]
    assert quantised, "the checkpoint is opened on the base in four bits, as it was trained"
    assert not any("lm_head" in name or "output_layer" in name for name in quantised)
    ids = torch.arange(40, 72).unsqueeze(0)
    in_four_bits = opened(ids).logits

    merged = tmp_path / "merged"
    merge(checkpoint, merged)
    names = load_file(base / "model.safetensors").keys()
    assert load_file(merged / "model.safetensors").keys() == names
    plain = load_model(merged, dtype="float32")(ids).logits
    together = torch.corrcoef(torch.stack([plain.flatten(), in_four_bits.flatten()]))[0, 1]
    assert 0.9 < together < 1 - 1e-4, "four bits are near, and not what was merged"
