"""What keeping a frozen tower's features, or resized pixels, on disk saves.

    python scripts/bench/features.py

A random model with GLM-4V-9B's proportions (1/32 of every width, 1/5 of the layers, images of 448
pixels) is tuned with LoRA as configs/glm4v_lora.yaml does, one image an example: seconds of a
forward and backward pass with the tower and with its features from a file, in alternation; then the
same over epochs, the first of which makes the features. Then an image of 1920 x 1080 pixels: seconds
to decode it, to decode and resize it to 1120 x 1120, and to read the resized pixels from a file of
3.8 MB instead.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from safetensors.torch import load_file, save_file

from finetune.config.schema import LoraMethod
from finetune.data.chat.image import pixels, read_image
from finetune.methods import attach
from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.modeling import ChatGLMForConditionalGeneration

ROUNDS = 7
SIZE, PATCH = 448, 14


def make_model() -> Any:
    """GLM-4V-9B made smaller, with LoRA on the text layers and the tower frozen."""
    vision = {
        "dropout_prob": 0.0, "hidden_act": "gelu", "in_channels": 3, "num_hidden_layers": 13,
        "hidden_size": 56, "patch_size": PATCH, "num_heads": 4, "intermediate_size": 480,
        "layer_norm_eps": 1e-6, "num_positions": (SIZE // PATCH) ** 2 + 1, "image_size": SIZE,
        "scaling_factor": 8,
    }  # fmt: skip
    config = ChatGLMConfig.from_dict({
        "model_type": "chatglm", "num_layers": 8, "hidden_size": 128, "ffn_hidden_size": 428,
        "kv_channels": 32, "num_attention_heads": 4, "multi_query_group_num": 2,
        "multi_query_attention": True, "original_rope": True, "rmsnorm": True,
        "post_layer_norm": True, "add_bias_linear": False, "padded_vocab_size": 4736,
        "apply_residual_connection_post_layernorm": False, "vision_config": vision,
        "boi_token_id": 4001, "eoi_token_id": 4002,
    })  # fmt: skip
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(config)
    model = attach(model, LoraMethod(kind="lora"), freeze=["vision"])
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def medians(**work: Callable[[], object]) -> dict[str, float]:
    """Seconds of each piece of work, taken in alternation."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS + 1):
        for name, piece in work.items():
            begun = time.perf_counter()
            piece()
            taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def steps(folder: Path) -> dict[str, float]:
    """Seconds of a training pass with the tower, and with features from a file."""
    model = make_model()
    patches = (SIZE // PATCH // 2) ** 2
    ids = torch.tensor([[*range(5), 4001, *[0] * patches, 4002, *range(30)]])
    labels = torch.full_like(ids, -100)
    labels[0, -20:] = ids[0, -20:]
    shown = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        rows = model.get_base_model().transformer.vision.features(shown)
    save_file({"rows": rows}, folder / "rows.safetensors")

    def run(**images: torch.Tensor) -> None:
        model(input_ids=ids, labels=labels, use_cache=False, **images).loss.backward()

    return medians(
        tower=lambda: run(pixel_values=shown),
        features=lambda: run(image_features=load_file(folder / "rows.safetensors")["rows"]),
    )


def decoding(folder: Path) -> dict[str, float]:
    """Seconds to make an image's pixel values from the image, and from its resized pixels."""
    drawn = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    large = Image.fromarray(drawn).resize((1920, 1080), Image.Resampling.BICUBIC)
    large.save(folder / "large.png")
    large.save(folder / "large.jpg", quality=90)
    small = read_image(folder / "large.png").resize((1120, 1120), Image.Resampling.BICUBIC)
    small.save(folder / "small.bmp")
    return medians(
        png_alone=lambda: read_image(folder / "large.png"),
        png=lambda: pixels(folder / "large.png", 1120),
        jpeg_alone=lambda: read_image(folder / "large.jpg"),
        jpeg=lambda: pixels(folder / "large.jpg", 1120),
        kept=lambda: pixels(folder / "small.bmp", 1120),
    )


def main() -> None:
    """Print both."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        found = steps(Path(temporary))
        print(
            f"a LoRA pass: {found['tower']:.3f} s with the tower, {found['features']:.3f} s with "
            f"features from disk, {found['tower'] / found['features']:.2f} times as fast"
        )
        for epochs in (2, 3, 10):
            kept = (found["tower"] + (epochs - 1) * found["features"]) / epochs
            print(f"  over {epochs} epochs: {found['tower'] / kept:.2f} times as fast")
        times = decoding(Path(temporary))
        for name in ("png", "jpeg"):
            print(
                f"1920 x 1080 {name}: {1000 * times[name]:.0f} ms decoded and resized (decoding "
                f"alone {1000 * times[name + '_alone']:.0f} ms), {1000 * times['kept']:.0f} ms from "
                f"resized pixels on disk, {times[name] / times['kept']:.2f} times as fast"
            )


if __name__ == "__main__":
    main()
