"""Does the merged checkpoint answer as base + adapter do? Real forward passes of both."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from peft import PeftModel

from finetune.errors import ModelError
from finetune.models.load import load_model
from finetune.weights import tensors

# Logits of a float32 model; sums in another order differ by about this times their size.
EXACT = 1e-4
# Share of the largest logit that rounding the merged weights to 8 bits may move.
ROUNDED = 0.05

_LENGTHS = (7, 16, 33)


def check_parity(base: Path, adapter: Path, merged: Path) -> float:
    """The largest difference between the logits of both over a few prompts.

    Both run in the same number format, one after the other. Raises ModelError when the difference
    is more than rounding explains.
    """
    with torch.inference_mode():
        model = load_model(base)
        prompts = _prompts(model.config.vocab_size)
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


def _prompts(vocab_size: int) -> list[torch.Tensor]:
    """Token ids, the same every time; [1, T] each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (1, length), generator=generator) for length in _LENGTHS]


def _logits(model: torch.nn.Module, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """[1, T, V] in float32 for each prompt."""
    return [model(input_ids=ids, use_cache=False).logits.float() for ids in prompts]


def _in_float32(model: torch.nn.Module, folder: Path) -> bool:
    """Whether nothing was rounded, in the computation or in the weights of ``folder``."""
    stored = (tensor.dtype for tensor in tensors(folder).values())
    computed = (parameter.dtype for parameter in model.parameters())
    return all(d == "F32" for d in stored) and all(d == torch.float32 for d in computed)
