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

from finetune.data.dialogue.conversation import Message, ShownImage

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


def write_albums(folder: Path, count: int) -> Path:
    """`count` dialogues by turns of text, of one picture, and of three of different sizes in two questions."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    sizes = [(60, 60), (90, 60), (60, 120)]
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", sizes[number % 3], colour).save(images / f"{colour}.png")
    lines = []
    for number in range(count):
        shown = [COLOURS[(number + step) % len(COLOURS)] for step in range(3)]
        parts = [{"type": "image", "image": f"images/{colour}.png"} for colour in shown]
        ask = {"type": "text", "text": "what is this " * (1 + number % 3)}
        turns = [[[ask]], [[parts[0], ask]], [[parts[0], ask, parts[1]], [ask, parts[2]]]]
        messages: list[dict[str, Any]] = []
        for turn in turns[number % 3]:
            reply = {"role": "assistant", "content": f"{shown[0]} {number % 3}"}
            messages += [{"role": "user", "content": turn}, reply]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path = folder / "rows.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


GRID_TEMPLATE = (
    Path(__file__).resolve().parent.parent / "scripts/fixtures/grid_chat.jinja"
).read_text(encoding="utf-8")
"""In the manner of GLM-4.1V's."""


GRID_FAMILIES = {
    "glm4v": {"head_dim": 8, "partial": 0.5, "sections": [1, 1, 0]},
    "glm46v": {"head_dim": 8, "partial": 0.5, "sections": [1, 1, 0]},
    "glm_ocr": {"head_dim": 16, "partial": 1.0, "sections": [2, 3, 3]},
    "glm4v_moe": {"head_dim": 8, "partial": 0.5, "sections": [1, 1, 0]},
}  # fmt: skip
"""As published: GLM-OCR's heads are together wider than the model, and turn as a whole."""


def save_grid_model(folder: Path, family: str = "glm4v", *, width: int = 32) -> Path:
    """A tiny random one whose images keep their shape: a token for 28 x 28 pixels, four to sixteen each."""
    from tokenizers import AddedToken, Tokenizer

    from finetune.models.families import FAMILIES

    tiny.save_tokenizer(folder, chat_template=GRID_TEMPLATE)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|image|>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    image = tokenizer.token_to_id("<|image|>")
    shape: dict[str, Any] = GRID_FAMILIES[family]
    text = {
        "vocab_size": tiny.VOCAB_SIZE, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "pad_token_id": tiny.PAD_ID, "initializer_range": 0.2,
        "head_dim": shape["head_dim"],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": shape["partial"],
            "mrope_section": shape["sections"],
        },
    }  # fmt: skip
    if family == "glm4v_moe":
        text |= {
            "num_hidden_layers": 3, "moe_intermediate_size": 16, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "image_size": 56, "patch_size": 14,
        "out_hidden_size": width, "intermediate_size": 32, "initializer_range": 0.2,
    }  # fmt: skip
    known = FAMILIES[family]
    config = known.config_class(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=image + 1,
        image_start_token_id=BOI, image_end_token_id=EOI, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    known.model_class(config).save_pretrained(folder)
    pixels = {"shortest_edge": 2 * 4 * 28**2, "longest_edge": 2 * 16 * 28**2}
    settings = {"size": pixels, "image_processor_type": "Glm4vImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    generation = {"eos_token_id": tiny.EOS_IDS, "pad_token_id": tiny.PAD_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


NAMES = ("a.png", "b.png", "c.png")


def draw(folder: Path) -> Path:
    """`NAMES`, of one colour each and of sizes that take four to sixteen tokens."""
    sizes, colours = ((60, 60), (40, 120), (150, 70)), ("red", "green", "blue")
    for name, size, colour in zip(NAMES, sizes, colours, strict=True):
        Image.new("RGB", size, colour).save(folder / name)
    return folder


def user(*parts: str, folder: Path | None = None) -> Message:
    """A question of texts and, where a part is the name of one, pictures."""
    text, shown = "", []
    for part in parts:
        if part in NAMES:
            shown.append(ShownImage(str(folder / part) if folder else part, len(text)))
        else:
            text += part
    return Message("user", text, images=tuple(shown))
