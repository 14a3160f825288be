"""Does the merged checkpoint answer as base + adapter do? Real forward passes of both."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from finetune.artifacts.adapter import check_config, understood
from finetune.artifacts.weights import tensors
from finetune.errors import ModelError, is_out_of_memory
from finetune.models.library_logging import quiet_libraries
from finetune.models.load import load_model

# Logits of a float32 model; sums in another order differ by about this times their size.
EXACT = 1e-4
# Share of the largest logit that rounding the merged weights to 8 bits may move.
ROUNDED = 0.05

_LENGTHS = (7, 16, 33)
Inputs = dict[str, torch.Tensor]


def check_parity(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    written: Path,
    *,
    device_map: str | None = None,
) -> float:
    """The largest difference between the logits before and in what was written, over a few prompts.

    Both run in the same dtype, one after the other. Raises ModelError when the difference
    is more than rounding explains.

    Args:
        base: A whole model.
        adapters: What was merged into it, each with its weight.
        written: The checkpoint that should answer as these do together.
        device_map: `auto` for both over all accelerators of this machine, else on the CPU.
    """
    quiet_libraries()
    with torch.inference_mode():
        model = load_model(base, device_map=device_map)
        prompts = _prompts(model.config)
        try:
            before = _logits(_adapted(model, adapters), prompts)
        except Exception as error:  # whatever settings of others make PEFT raise
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"PEFT does not open what was merged ({type(error).__name__}: {error}); copy the "
                "adapter again"
            ) from error
        del model
        gc.collect()
        after_model = load_model(written, device_map=device_map)
        after = _logits(after_model, prompts)
    differences = [(b - a).abs().max() for b, a in zip(before, after, strict=True)]
    difference = float(torch.stack(differences).max())  # no number, where one of them is none
    largest = max(1.0, *(float(logits.abs().max()) for logits in before))
    allowed = (EXACT if _in_float32(after_model, written) else ROUNDED) * largest
    if not difference <= allowed:
        raise ModelError(
            f"the logits of what was written differ from those before by {difference:.3g} "
            f"(at most {allowed:.3g} is rounding); nothing was written. Please report this"
        )
    return difference


def _adapted(model: Any, adapters: Sequence[tuple[Path, float]]) -> Any:
    """The model with all adapters at once, each as strong as its weight says."""
    for number, (folder, weight) in enumerate(adapters):
        name = f"adapter_{number}"
        if number == 0:
            config = LoraConfig(**understood(check_config(folder)), inference_mode=True)
            model = PeftModel.from_pretrained(model, str(folder), name, config=config)
        else:
            model.load_adapter(str(folder), adapter_name=name)
        for module in model.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
    if len(adapters) > 1:
        model.base_model.set_adapter([f"adapter_{number}" for number in range(len(adapters))])
    return model.eval()


def _prompts(config: Any) -> list[Inputs]:
    """Inputs of [1, T] token ids, the same every time; one with an image where the model sees."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = config.get_text_config().vocab_size
    ids = [torch.randint(vocabulary, (1, n), generator=generator) for n in _LENGTHS]
    for text in ids:  # GLM-4.1V's placeholder, which wants an image
        text[text == getattr(config, "image_token_id", -1)] = 0
    prompts = [{"input_ids": text} for text in ids]
    if getattr(config, "image_patches", 0):
        size, pad = config.vision_config.image_size, config.pad_token_id or 0
        span = [config.boi_token_id, *[pad] * config.image_patches, config.eoi_token_id]
        pixels = torch.randn(1, 3, size, size, generator=generator)
        seen = torch.cat([torch.tensor([span]), ids[0]], dim=1)
        prompts.append({"input_ids": seen, "pixel_values": pixels})
    elif getattr(config, "image_token_id", None) is not None:
        prompts.append(_two_images(config, ids[0], generator))
    return prompts


def _two_images(config: Any, text: torch.Tensor, generator: torch.Generator) -> Inputs:
    """A prompt with two images of four tokens each, of a family whose images keep their shape."""
    vision = config.vision_config
    side = 2 * vision.spatial_merge_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    span = [config.image_start_token_id, *[config.image_token_id] * 4, config.image_end_token_id]
    return {
        "input_ids": torch.cat([torch.tensor([span]), text, torch.tensor([span])], dim=1),
        "pixel_values": torch.randn(2 * side * side, width, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]] * 2),
    }


def _logits(model: torch.nn.Module, prompts: list[Inputs]) -> list[torch.Tensor]:
    """[1, T, V] in float32 for each prompt."""
    return [model(**inputs, use_cache=False).logits.float() for inputs in prompts]


def _in_float32(model: torch.nn.Module, folder: Path) -> bool:
    """Whether nothing was rounded, in the computation or in the weights of ``folder``."""
    stored = (tensor.dtype for tensor in tensors(folder).values())
    computed = (parameter.dtype for parameter in model.parameters())
    return all(d == "F32" for d in stored) and all(d == torch.float32 for d in computed)
