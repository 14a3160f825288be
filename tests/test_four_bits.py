"""Four bits without bitsandbytes: what is asked of it, and which widths a CPU takes."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from finetune.errors import ModelError
from finetune.models import quantization
from finetune.models.families import FAMILIES


class Linear4bit(nn.Linear):
    """As bitsandbytes' layer is called."""


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bitsandbytes that has nothing but that name."""
    library, layers = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.nn")
    layers.Linear4bit = Linear4bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", layers)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("width", "place", "fits"), [(64, "cpu", True), (128, "cpu", True), (63, "cpu", False), (96, "cpu", False), (63, "meta", True)])  # fmt: skip
def test_a_cpu_takes_whole_blocks_and_a_gpu_any_width(width: int, place: str, fits: bool) -> None:
    model = nn.Sequential(nn.Linear(7, 7), Linear4bit(width, 4, device=place))
    if fits:
        quantization.check_widths(model)
        return
    with pytest.raises(ModelError, match=f"64 divides, but 1 takes {width} numbers"):
        quantization.check_widths(model)


@pytest.mark.parametrize("family", ["glm", "chatglm", "glm4v"])
def test_what_stays_whole_is_said_and_the_rest_is_computed_in_the_runs_format(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "BitsAndBytesConfig", lambda **told: SimpleNamespace(**told))
    monkeypatch.setattr(quantization, "find_spec", lambda name: "there")
    kept = FAMILIES[family].unquantized
    asked: dict[str, Any] = quantization.four_bits(torch.bfloat16, kept)
    config = asked["quantization_config"]
    assert config.llm_int8_skip_modules == list(kept) != []
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    assert asked["device_map"] == {"": torch.device("cpu")}
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'glm4-finetune\[qlora\]'"):
        quantization.four_bits(torch.bfloat16, kept)
