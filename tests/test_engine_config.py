"""What DeepSpeed is told: while a model is loaded, by a section, and by a JSON file of the user's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.config.schema import DeepSpeedSection, TrainingSection
from finetune.errors import ConfigError
from finetune.training.deepspeed import zero
from finetune.training.deepspeed.zero import Setting, deepspeed_config


def test_while_a_model_is_loaded_shards_have_its_format_and_afterwards_the_config_is_as_it_was() -> (
    None
):
    config = {"bf16": {"enabled": False}, "fp16": {"enabled": False}, "x": 1}
    arguments = SimpleNamespace(hf_deepspeed_config=SimpleNamespace(config=dict(config)))
    for dtype, formats in (("bfloat16", (True, False)), ("float16", (False, True)), ("float32", (False, False))):  # fmt: skip
        with zero.loading(arguments, dtype):
            now = arguments.hf_deepspeed_config.config
            assert (now["bf16"]["enabled"], now["fp16"]["enabled"]) == formats
        assert arguments.hf_deepspeed_config.config == config
    with zero.loading(SimpleNamespace(), "bfloat16"):
        pass


def setting(**training: Any) -> Setting:
    return Setting(TrainingSection(output_dir="x", **training), 2, 4096, "bf16")


def given(tmp_path: Path, text: str, section: dict[str, Any], **training: Any) -> dict[str, Any]:
    (tmp_path / "ds.json").write_text(text)
    asked = DeepSpeedSection(config=str(tmp_path / "ds.json"), **section)
    return deepspeed_config(asked, setting(**training))


@pytest.mark.parametrize(
    ("text", "section", "training"),
    [
        ('{"zero_optimization": {"stage": 3}}', {}, {}),  # nobody has asked for 2
        ('{"zero_optimization": {"stage": 3}}', {"zero_stage": 3}, {}),
        ('{"zero_optimization": {"stage": "auto"}}', {"zero_stage": 1}, {}),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}', {}, {}),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}', {"offload_optimizer": "cpu"}, {}),
        ('{"amp": {"enabled": false}, "bf16": {"enabled": true}}', {}, {}),
        ('{"optimizer": {"type": "Adam", "params": {"eps": 1e-8, "betas": [0.9, 0.999]}}}', {}, {}),
        ('{"optimizer": {"params": {"eps": 1e-6, "betas": [0.8, 0.9]}}}', {}, {"extra": {"adam_epsilon": 1e-6, "adam_beta1": 0.8, "adam_beta2": 0.9}}),
        ('{"optimizer": {"params": {"lr": 0.25, "weight_decay": 0.5}}}', {}, {"learning_rate": 0.25, "weight_decay": 0.5}),
    ],
)  # fmt: skip
def test_a_json_file_that_says_what_the_config_says_is_taken(
    text: str, section: dict[str, Any], training: dict[str, Any], tmp_path: Path
) -> None:
    found = given(tmp_path, text, section, **training)
    assert not {"optimizer", "scheduler"} & found.keys()
    if "auto" in text:
        assert found["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("text", "section", "said"),
    [
        ('{"zero_optimization": {"stage": 3}}', {"zero_stage": 2}, "stage is 3, but deepspeed.zero_stage is 2"),
        ('{"zero_optimization": {"offload_param": {"device": "cpu"}}}', {"zero_stage": 0, "offload_parameters": "none"}, "offload_param.device is cpu, but deepspeed.offload_parameters is none"),
        ('{"optimizer": {"params": {"eps": 1e-6}}}', {}, "params.eps is 1e-06, but the training section says 1e-08"),
        ('{"optimizer": {"params": {"betas": [0.9, 0.95]}}}', {}, r"params.betas is .*0.95.*, but"),
        ('{"optimizer": {"params": {"bias_correction": false}}}', {}, "says None; remove it"),
        ('{"bf16": {"enabled": false}}', {}, "bf16.enabled is False, but model.dtype"),
        ('{"amp": {"enabled": "auto"}}', {}, "amp.enabled: remove it"),
    ],
)  # fmt: skip
def test_a_json_file_that_says_otherwise_is_refused_by_name(
    text: str, section: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        given(tmp_path, text, section)


@pytest.mark.parametrize(("stage", "overlaps"), [(1, False), (2, True), (3, True)])
def test_communication_overlaps_from_stage_2_on(stage: Any, overlaps: bool) -> None:
    found = deepspeed_config(DeepSpeedSection(zero_stage=stage), setting())["zero_optimization"]
    assert found["overlap_comm"] is overlaps
    assert ("stage3_prefetch_bucket_size" in found) is (stage == 3)
    assert not {"offload_optimizer", "offload_param"} & found.keys()
