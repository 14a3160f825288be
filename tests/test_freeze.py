"""`model.freeze` and full fine-tuning: what learns, what stays, in which number format."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file

from finetune import methods
from finetune.config.schema import FullMethod, LoraMethod
from finetune.errors import ConfigError
from finetune.models.load import load_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_dialogues(tmp_path_factory.mktemp("data") / "train.jsonl", 11)


def test_frozen_weights_keep_their_bits_and_all_others_learn(
    tiny_chatglm: Path, data: Path, tmp_path: Path
) -> None:
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=2, training__learning_rate=1e-3,
        training__warmup_steps=0, model__freeze=["embedding", r"layers\.0\."],
    ) | {"method": {"kind": "full"}}  # fmt: skip
    runs.run_here(settings)
    before = load_file(tiny_chatglm / "model.safetensors")
    after = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        stays = "embedding" in name or "layers.0." in name or "inv_freq" in name
        assert torch.equal(before[name], after[name]) is stays, name


def test_lora_leaves_frozen_layers_without_adapters(tiny_glm: Path) -> None:
    model = methods.attach(
        load_model(tiny_glm), LoraMethod(rank=2), freeze=[r"layers\.1\.", "q_proj"]
    )
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert not [name for name in names if "layers.1." in name or "q_proj" in name]


@pytest.mark.parametrize(
    ("patterns", "said"),
    [(["visoin"], "'visoin' is in no weight's name.*embedding"), (["("], "is not a regex")],
)
def test_a_pattern_that_freezes_nothing_is_refused(
    tiny_chatglm: Path, patterns: list[str], said: str
) -> None:
    for section in (FullMethod(), LoraMethod()):
        with pytest.raises(ConfigError, match=said):
            methods.attach(load_model(tiny_chatglm), section, freeze=patterns)


def test_freezing_everything_is_refused(tiny_chatglm: Path) -> None:
    for section in (FullMethod(), LoraMethod()):
        with pytest.raises(ConfigError, match="nothing is left to train"):
            methods.attach(load_model(tiny_chatglm), section, freeze=["."])


def test_in_bfloat16_what_learns_is_float32_and_what_is_frozen_stays_narrow(
    tiny_chatglm: Path, data: Path, tmp_path: Path
) -> None:
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=1, model__dtype="bfloat16",
        training__learning_rate=1e-6, training__warmup_steps=0, model__freeze=["embedding"],
    ) | {"method": {"kind": "full"}}  # fmt: skip
    runs.run_here(settings)
    before = load_file(tiny_chatglm / "model.safetensors")
    after = load_file(tmp_path / "run/checkpoint-1/model.safetensors")
    for name in before:
        if "embedding" in name:
            assert after[name].dtype == torch.bfloat16
        elif "inv_freq" not in name:
            # A step of 1e-6 is far below what bfloat16 can tell at 0.1 to 1.
            assert after[name].dtype == torch.float32
            moved = (after[name] - before[name]).abs().max()
            assert 1e-8 < moved < 2e-6, name
