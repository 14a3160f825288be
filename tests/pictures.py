"""A tiny random GLM-4V that looks like the published one, and dialogues about small pictures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

BOI, EOI = tiny.CONTROL_IDS["<|begin_of_image|>"], tiny.CONTROL_IDS["<|end_of_image|>"]
SIZE, NUM_PATCHES = 56, 4
VISION = {
    "dropout_prob": 0.0, "hidden_act": "gelu", "in_channels": 3, "num_hidden_layers": 2,
    "hidden_size": 16, "patch_size": 14, "num_heads": 2, "intermediate_size": 32,
    "layer_norm_eps": 1e-6, "num_positions": 17, "image_size": SIZE, "scaling_factor": 8,
}  # fmt: skip
COLOURS = ["red", "green", "blue", "white", "black", "yellow"]


def save_model(folder: Path, **overrides: Any) -> Path:
    """`tiny.save_model` with a tower: images of 56 pixels, 4 patches for the text."""
    from finetune.models.chatglm.configuration import ChatGLMConfig
    from finetune.models.chatglm.vision import VisionModel

    vision = {"vision_config": VISION, "boi_token_id": BOI, "eoi_token_id": EOI, "rope_ratio": 1}
    tiny.save_model(folder, "chatglm", **vision, **overrides)
    tensors = load_file(folder / "model.safetensors")
    with torch.device("meta"):
        tower = VisionModel(ChatGLMConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(1)
    for name, weight in sorted(tower.named_parameters()):
        noise = torch.randn(tuple(weight.shape), generator=generator)
        wide = weight[0].numel() ** 0.5 if weight.dim() > 1 else 10.0
        value = 1.0 + 0.1 * noise if "norm" in name and name.endswith("weight") else noise / wide
        tensors[f"transformer.vision.{name}"] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_dialogues(folder: Path, count: int, *, every: int = 2, seed: int = 0) -> Path:
    """`count` dialogues; each `every`-th shows a picture of one colour, the others are text."""
    draw = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        colour = COLOURS[number % len(COLOURS)]
        question: dict[str, Any] = {"role": "user", "content": "what is this " * draw.randint(1, 4)}
        if number % every == 0:
            question["image"] = f"images/{colour}.png"
            Image.new("RGB", (20, 10), colour).save(folder / question["image"])
        reply = {"role": "assistant", "content": f"{colour} {number % 3}"}
        lines.append(json.dumps({"messages": [question, reply]}) + "\n")
    path = folder / "rows.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path
