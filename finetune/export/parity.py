"""Does the merged checkpoint answer as base + adapter do? Real forward passes of both."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from finetune.errors import ModelError
from finetune.models.load import load_model
from finetune.models.quiet import quiet_libraries
from finetune.weights import tensors

# Logits of a float32 model; sums in another order differ by about this times their size.
EXACT = 1e-4
# Share of the largest logit that rounding the merged weights to 8 bits may move.
ROUNDED = 0.05

_LENGTHS = (7, 16, 33)
Inputs = dict[str, torch.Tensor]


def check_parity(base: Path, adapter: Path, merged: Path) -> float:
    """The largest difference between the logits of both over a few prompts.

    Both run in the same number format, one after the other. Raises ModelError when the difference
    is more than rounding explains.
    """
    quiet_libraries()
    with torch.inference_mode():
        model = load_model(base)
        prompts = _prompts(model.config)
        before = _logits(PeftModel.from_pretrained(model, str(adapter)).eval(), prompts)
        del model
        gc.collect()
        merged_model = load_model(merged)
        after = _logits(merged_model, prompts)
    difference = max(float((b - a).abs().max()) for b, a in zip(before, after, strict=True))
    largest = max(1.0, *(float(logits.abs().max()) for logits in before))
    allowed = (EXACT if _in_float32(merged_model, merged) else ROUNDED) * largest
    if not difference <= allowed:
        raise ModelError(
            f"the merged model's logits differ from the adapter's by {difference:.3g} "
            f"(at most {allowed:.3g} is rounding); nothing was written. Please report this"
        )
    return difference


def _prompts(config: Any) -> list[Inputs]:
    """Inputs of [1, T] token ids, the same every time; one with an image where the model sees."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(config.vocab_size, (1, n), generator=generator) for n in _LENGTHS]
    prompts = [{"input_ids": text} for text in ids]
    if getattr(config, "image_patches", 0):
        size, pad = config.vision_config["image_size"], config.pad_token_id or 0
        span = [config.boi_token_id, *[pad] * config.image_patches, config.eoi_token_id]
        pixels = torch.randn(1, 3, size, size, generator=generator)
        seen = torch.cat([torch.tensor([span]), ids[0]], dim=1)
        prompts.append({"input_ids": seen, "pixel_values": pixels})
    return prompts


def _logits(model: torch.nn.Module, prompts: list[Inputs]) -> list[torch.Tensor]:
    """[1, T, V] in float32 for each prompt."""
    return [model(**inputs, use_cache=False).logits.float() for inputs in prompts]


def _in_float32(model: torch.nn.Module, folder: Path) -> bool:
    """Whether nothing was rounded, in the computation or in the weights of ``folder``."""
    stored = (tensor.dtype for tensor in tensors(folder).values())
    computed = (parameter.dtype for parameter in model.parameters())
    return all(d == "F32" for d in stored) and all(d == torch.float32 for d in computed)
