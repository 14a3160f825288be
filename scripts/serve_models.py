"""Small models for scripts/serve_check.py and scripts/gguf_check.py, made once under runs/serve-check."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny_glm4v
import torch

from finetune.data.tokenizer import BUILT_IN_TEMPLATE, load_chat_tokenizer
from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.modeling import ChatGLMForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
TEXT = [ROOT / "data" / "support_desk" / "train.jsonl"]
PICTURES = [ROOT / "data" / "shapes" / "train.jsonl"]
# 8 steps on one process: enough to move every reply away from the base's.
TRAINING = (
    "data.max_length=768", "training.max_steps=8", "training.num_epochs=null",
    "training.save_every_steps=8", "training.learning_rate=2e-3", "evaluation.max_samples=2",
    "evaluation.max_new_tokens=4", "deepspeed=null",
)  # fmt: skip


def published_text(folder: Path) -> Path:
    """A random text model of about a million parameters in the published `chatglm` layout."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for path in TEXT for line in path.read_text(encoding="utf-8").splitlines()]
    ids = tiny_glm4v.save_tokenizer(folder, lines)
    written = tiny_glm4v.make_config(ids, size=28, width=128, layers=4).to_dict()
    for key in ("vision_config", "boi_token_id", "eoi_token_id"):
        written.pop(key)
    return save_random(folder, written | {"rope_ratio": 50})


def save_random(folder: Path, written: dict[str, Any]) -> Path:
    """Write a random model of config `written` and what belongs to it; the tokenizer is there."""
    torch.manual_seed(0)
    config = ChatGLMConfig.from_dict(written)
    model = ChatGLMForConditionalGeneration(config)
    for weight in model.parameters():
        if weight.ndim == 1:  # biases and norms, which start as zeros and ones
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    add_settings(folder, written["eos_token_id"], written["pad_token_id"])
    return folder


def add_settings(folder: Path, stops: list[int], pad: int) -> None:
    """Write the stops and the chat template of glm-4-9b-chat."""
    settings = {"eos_token_id": stops, "pad_token_id": pad}
    (folder / "generation_config.json").write_text(json.dumps(settings) + "\n")
    (folder / "chat_template.jinja").write_text(BUILT_IN_TEMPLATE.read_text(encoding="utf-8"))


def published_images(folder: Path) -> Path:
    """A random GLM-4V for images of 84 pixels, so that those of data/shapes, of 112, are resized."""
    if not (folder / "config.json").is_file():
        tiny_glm4v.make_model(folder, [*PICTURES, *TEXT], size=84, width=128, layers=4)
        tokenizer = load_chat_tokenizer(folder)
        add_settings(folder, list(tokenizer.stop_ids), tokenizer.pad_id)
    return folder


def adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter of `base`, trained by `finetune train` for a few steps."""
    if not list(folder.glob("checkpoint-*")):
        config = "configs/quickstart.yaml"
        finetune("train", config, f"model.path={base}", f"training.output_dir={folder}", *TRAINING)
    return next(folder.glob("checkpoint-*"))


def merged(base_adapter: Path, folder: Path) -> Path:
    """The adapter and its base as one model, by `finetune merge`."""
    if not (folder / "config.json").is_file():
        finetune("merge", str(base_adapter), "--output", str(folder))
    return folder


def exported(model: Path, layout: str, folder: Path) -> Path:
    """A model in its other layout, by `finetune export`."""
    if not (folder / "config.json").is_file():
        finetune("export", str(model), "--layout", layout, "--output", str(folder))
    return folder


def finetune(*arguments: str) -> None:
    """Run a command of ours; raises CalledProcessError when it fails."""
    subprocess.run([sys.executable, "finetune.py", *arguments], cwd=ROOT, check=True)
