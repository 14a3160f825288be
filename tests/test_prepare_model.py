"""The model section and the method section become a model that is ready to train."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pictures
import pytest
import torch

from finetune.config.schema import FullMethod, LoraMethod, ModelSection, TrainingSection
from finetune.training.prepare_model import PreparedModel, is_apart, prepare_model


def ready(folder: Path, method: Any, model: dict[str, Any], **training: Any) -> PreparedModel:
    data: Any = SimpleNamespace(first_tokens=lambda count: [])
    section = TrainingSection(**{"output_dir": "x", "report_to": [], "seed": 5} | training)
    return prepare_model(
        ModelSection(path=str(folder), **model), method, section, None, data, loader_workers=0
    )


def test_an_adapter_starts_from_the_numbers_of_the_seed_whatever_was_drawn_before(
    tiny_glm: Path,
) -> None:
    def first(seed: int) -> torch.Tensor:
        one = ready(tiny_glm, LoraMethod(rank=2), {}, seed=seed)
        return next(w for n, w in one.model.named_parameters() if "lora_A" in n).detach()

    started = first(5)
    torch.rand(7)
    assert torch.equal(first(5), started)
    assert not torch.equal(first(6), started)


@pytest.mark.parametrize(
    ("method", "dtype", "learns", "still"),
    [
        (FullMethod(), "bfloat16", torch.float32, torch.bfloat16),
        (FullMethod(), "float32", torch.float32, torch.float32),
        (LoraMethod(rank=2), "bfloat16", torch.float32, torch.bfloat16),
    ],
    ids=["full", "full in float32", "lora"],
)
def test_what_learns_is_float32_and_the_rest_is_as_narrow_as_was_asked(
    tiny_glm: Path, method: Any, dtype: str, learns: torch.dtype, still: torch.dtype
) -> None:
    frozen = {"freeze": ["embed_tokens"]} if method.kind == "full" else {}
    one = ready(tiny_glm, method, {"dtype": dtype, **frozen})
    formats: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for weight in one.model.parameters():
        formats[weight.requires_grad].add(weight.dtype)
    assert formats == {True: {learns}, False: {still}}
    assert one.dtype == getattr(torch, dtype)
    assert one.casts is (method.kind == "full" and dtype == "bfloat16")
    assert (one.split, one.deepspeed, is_apart(one.model)) == (None, None, False)
    assert one.base.path == str(tiny_glm.resolve())


@pytest.mark.parametrize("family", ["chatglm", "glm4v"])
def test_a_rate_for_vision_is_that_of_the_encoder_in_every_family(
    family: str, tmp_path: Path
) -> None:
    save = pictures.save_model if family == "chatglm" else pictures.save_grid_model
    folder = save(tmp_path / "model")
    one = ready(folder, FullMethod(), {}, learning_rate=1.0, learning_rates={"vision": 0.25})
    rates = {name: one.rates.of(name) for name, _ in one.model.named_parameters()}
    part = "vision" if family == "chatglm" else "visual"
    assert rates == {name: 0.25 if part in name else 1.0 for name in rates}
    assert set(rates.values()) == {0.25, 1.0}
