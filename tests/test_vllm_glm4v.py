"""GLM-4V in vLLM stands and sees as in training. vLLM is a stand-in here; scripts/evidence/serve_check.sh has the real one."""

from __future__ import annotations

import importlib
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_line import ROOT
from PIL import Image

from finetune.data.chat.image import ImageSpec, pixels
from finetune.serving.vllm_plugin import ARCHITECTURE

BOI, PATCH, EOI = 7, 8, 9


class TheirModel:
    """vLLM's forward, which is given positions [T]."""

    def forward(self, *words: Any, **more: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return words, more


class TheirProcessor:
    def __init__(self, size: dict[str, int]) -> None:
        self.size = size


class TheirInfo:
    def get_hf_config(self) -> Any:
        return SimpleNamespace(vision_config={"image_size": 28})


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, imported beside the parts of vLLM that it uses."""
    parts = {
        "vllm.model_executor.models.glm4v": {
            "GLM4VForCausalLM": TheirModel, "GLM4VProcessingInfo": TheirInfo,
            "GLM4VDummyInputsBuilder": object, "GLM4VMultiModalProcessor": object,
        },
        "vllm.multimodal": {
            "MULTIMODAL_REGISTRY": SimpleNamespace(
                register_processor=lambda *_, info, dummy_inputs: lambda model: model
            )
        },
        "vllm.transformers_utils.processors.glm4v": {"GLM4VImageProcessorFast": TheirProcessor},
    }  # fmt: skip
    for name, members in parts.items():
        for length in range(1, name.count(".") + 2):
            parent = ".".join(name.split(".")[:length])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        for member, value in members.items():
            monkeypatch.setattr(sys.modules[name], member, value, raising=False)
    monkeypatch.delitem(sys.modules, "finetune.serving.vllm_glm4v", raising=False)
    yield importlib.import_module("finetune.serving.vllm_glm4v")
    sys.modules.pop("finetune.serving.vllm_glm4v", None)


@pytest.mark.parametrize("patches", [1, 4, 9])
@pytest.mark.parametrize("before", [0, 5])
def test_the_patches_of_an_image_have_the_position_of_training(
    ours: Any, patches: int, before: int
) -> None:
    ids = [*range(10, 10 + before), BOI, *[PATCH] * patches, EOI, 20, 21]
    place = SimpleNamespace(offset=before, length=patches + 2)
    rows, delta = ours.GLM4VAsTrained().get_mrope_input_positions(
        ids, [SimpleNamespace(mm_position=place)]
    )
    trained = ImageSpec(28, patches, BOI).positions(np.array(ids, np.int32)).tolist()
    assert rows.tolist() == [trained] * 3
    assert delta + len(ids) == trained[-1] + 1  # the first token of the reply
    (_, row), more = ours.GLM4VAsTrained().forward(None, rows, inputs_embeds="image and text")
    assert (row.tolist(), more) == (trained, {"inputs_embeds": "image and text"})


def test_a_prompt_without_an_image_is_counted_through(ours: Any) -> None:
    rows, delta = ours.GLM4VAsTrained().get_mrope_input_positions([1, 2, 3], [])
    assert (rows.tolist(), delta) == ([[0, 1, 2]] * 3, 0)


@pytest.mark.parametrize("size", [(28, 28), (61, 40), (9, 100)])
def test_vllm_sees_the_pixels_of_training_bit_for_bit(
    ours: Any, tmp_path: Path, size: tuple[int, int]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    image.save(tmp_path / "noise.png")
    processor = ours.ProcessingInfo().get_image_processor()
    seen = processor.preprocess([image, noise], return_tensors="pt")["pixel_values"].numpy()
    assert seen.shape == (2, 3, 28, 28)
    for row in seen:
        assert row.tobytes() == pixels(tmp_path / "noise.png", 28).tobytes()
    [alone] = processor.preprocess(image, size={"width": 14, "height": 14})["pixel_values"].numpy()
    assert alone.tobytes() == pixels(tmp_path / "noise.png", 14).tobytes()


def test_vllm_finds_the_architecture_where_this_package_is_installed(
    ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, str] = {}
    registry = SimpleNamespace(register_model=known.__setitem__)
    monkeypatch.setattr(sys.modules["vllm"], "ModelRegistry", registry, raising=False)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [point] = project["entry-points"]["vllm.general_plugins"].values()
    EntryPoint("", point, "").load()()
    module, _, name = known[ARCHITECTURE].partition(":")
    assert getattr(importlib.import_module(module), name) is ours.GLM4VAsTrained
