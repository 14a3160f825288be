"""Bases in shards and random PEFT adapters for the merging tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from finetune.artifacts.base_record import BaseRecord
from finetune.artifacts.weights import model_fingerprint
from finetune.models.families import family_of
from finetune.models.load import load_model


def make_base(
    folder: Path, dtype: torch.dtype = torch.float32, shards: int = 3, **config: Any
) -> Path:
    """A tiny GLM in several shards with an index, as real checkpoints come."""
    tiny.save_model(folder, config.pop("family", "glm"), **config)
    weights = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for part in range(shards):
        file = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        chosen = {name: weights[name].contiguous() for name in names[part::shards]}
        save_file(chosen, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    total = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    (folder / "modeling_chatglm.py").write_text("# published code\n")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def make_adapter(folder: Path, base: Path, *, seed: int = 1, **options: Any) -> Path:
    """A PEFT adapter whose every weight is random, B and magnitude too."""
    model = load_model(base)
    options.setdefault("target_modules", family_of(model.config).lora_targets)
    options.setdefault("r", 4)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(lora_alpha=6, task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in ("lora_B", "lora_embedding_A", "modules_to_save")) or (parameter.requires_grad and name.endswith(".bias")):  # fmt: skip
            torch.nn.init.normal_(parameter, std=0.05)
        if "magnitude" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
    adapted.save_pretrained(str(folder))
    record = BaseRecord(str(base), None, model_fingerprint(base))
    record.write(folder, method="lora")
    return folder


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What PEFT makes of the two in the base's number format."""
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    model = PeftModel.from_pretrained(load_model(base, dtype=names[dtype]), str(adapter))
    return dict(model.merge_and_unload().state_dict())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(60, 90)[None]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits
