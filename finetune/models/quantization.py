"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): frozen linear layers in 4 bits, by bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from finetune.distributed.device import local_device
from finetune.errors import ModelError

BLOCK = 64
"""Weights that share a scale; bitsandbytes on a CPU takes whole blocks in a row only."""


def four_bits(dtype: torch.dtype, kept: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load NF4 weights of all but `kept`, computed with in `dtype`.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.quantization: nf4 needs bitsandbytes, which is not installed; "
            "pip install 'glm4-finetune[qlora]', or leave model.quantization out"
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(kept),
    )
    return {"quantization_config": config, "device_map": {"": local_device()}}


def check_widths(model: nn.Module) -> None:
    """Refuse on a CPU what its kernels cannot multiply.

    Raises:
        ModelError: A quantised layer's width is no multiple of 64.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        on_cpu = isinstance(module, Linear4bit) and module.weight.device.type == "cpu"
        if on_cpu and module.in_features % BLOCK:
            raise ModelError(
                f"model.quantization: nf4 on a CPU needs widths that {BLOCK} divides, but {name} "
                f"takes {module.in_features} numbers; leave model.quantization out, or use a GPU"
            )
