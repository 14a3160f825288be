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


def test_auto_in_a_json_file_is_the_number_for_the_stage_that_it_names(tmp_path: Path) -> None:
    text = """{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": "auto",
    "reduce_bucket_size": "auto", "stage3_max_live_parameters": 7}, "scheduler": null}"""
    found = given(tmp_path, text, {})
    assert found["zero_optimization"] == {
        "stage": 3, "stage3_param_persistence_threshold": 40960, "reduce_bucket_size": 4096 * 4096,
        "stage3_max_live_parameters": 7,
    }  # fmt: skip
    assert not {"optimizer", "scheduler"} & found.keys()


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


def test_what_deepspeed_would_compile_print_or_refuse_by_itself_is_turned_off() -> None:
    found = deepspeed_config(DeepSpeedSection(zero_stage=2), setting())
    assert found["zero_allow_untested_optimizer"] is True  # torch's AdamW is not on its list
    assert found["zero_force_ds_cpu_optimizer"] is False
    assert found["steps_per_print"] > 10**6
    assert found["wall_clock_breakdown"] is False


@pytest.mark.parametrize(("stage", "live"), [(1, None), (2, None), (3, 1_000_000_000)])
def test_each_stage_holds_what_a_plan_counts(stage: Any, live: int | None) -> None:
    from finetune.planning import sharding

    section = DeepSpeedSection(zero_stage=stage, offload_optimizer="cpu")
    found = deepspeed_config(section, setting())["zero_optimization"]
    assert found["sub_group_size"] == sharding.SUB_GROUP
    assert found["allgather_bucket_size"] == found["reduce_bucket_size"] == 4096 * 4096
    assert found["contiguous_gradients"] is True
    assert found["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    names = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    assert [found.get(name) for name in names] == ([sharding.LIVE_WEIGHTS] * 2 if live else [None] * 2)  # fmt: skip
    if live:
        assert live > sharding.LIVE_WEIGHTS  # DeepSpeed's own
        assert found["stage3_prefetch_bucket_size"] == int(0.9 * 4096 * 4096)
        # A ZeRO-3 run's own save gathers; without this DeepSpeed writes empty weights.
        assert found["stage3_gather_16bit_weights_on_model_save"] is True


def test_weights_on_the_host_are_pinned_and_lie_there_in_stage_3_alone() -> None:
    for stage in (2, 3):
        section = DeepSpeedSection.model_construct(
            zero_stage=stage, offload_parameters="cpu", offload_optimizer="none", config=None
        )
        found = deepspeed_config(section, setting())["zero_optimization"]
        expected = {"device": "cpu", "pin_memory": True} if stage == 3 else None
        assert found.get("offload_param") == expected


@pytest.mark.parametrize(
    ("own", "local", "cpus", "asked"),
    [("1", "8", 64, [8]), (None, None, 6, [6]), ("4", "2", 64, []), ("1", "64", 6, [1]), ("1", "2", None, [1])],
)  # fmt: skip
def test_an_optimizer_on_the_cpu_takes_its_share_of_cores_where_the_user_has_said_nothing(
    own: str | None, local: str | None, cpus: int | None, asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    threads: list[int] = []
    monkeypatch.setattr(zero.device, "has_accelerator", lambda: True)
    monkeypatch.setattr(zero.os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(zero.torch, "set_num_threads", threads.append)
    for name, value in (("OMP_NUM_THREADS", own), ("LOCAL_WORLD_SIZE", local)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    zero.prepare_libraries(DeepSpeedSection(zero_stage=2, offload_optimizer="cpu"))
    assert threads == asked
    assert "DS_ACCELERATOR" not in zero.os.environ


def test_on_a_machine_without_a_gpu_deepspeed_is_told_so_and_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import deepspeed.ops

    monkeypatch.setattr(zero.device, "has_accelerator", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    zero.prepare_libraries(DeepSpeedSection(zero_stage=2))
    assert zero.os.environ["DS_ACCELERATOR"] == "cpu"
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    monkeypatch.setenv("DS_ACCELERATOR", "of the user")
    zero.prepare_libraries(DeepSpeedSection(zero_stage=2))
    assert zero.os.environ["DS_ACCELERATOR"] == "of the user"


def test_deepspeed_joins_on_the_devices_backend_and_looks_for_no_mpi(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import deepspeed

    asked: list[Any] = []
    monkeypatch.setattr(zero.device, "device_backend", lambda: "some")
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **given: asked.append(given))
    zero.join()
    assert asked == [{"dist_backend": "some", "auto_mpi_discovery": False, "verbose": False}]
