"""ZeRO: what becomes of the section, which JSON files are refused, and that sharding changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from closeness import SMOOTH_STEPS, additions, assert_trained_alike, rounding
from safetensors.torch import load_file
from transformers import AutoConfig

from finetune.config.schema import DeepSpeedSection, TrainingSection
from finetune.errors import ConfigError
from finetune.training.deepspeed import zero
from finetune.training.deepspeed.zero import MIN_BUCKET, Setting, deepspeed_config


def setting(precision: str = "fp32", hidden_size: int = 4096, **training: Any) -> Setting:
    options = {"output_dir": "x", "batch_size": 4, "gradient_accumulation_steps": 8} | training
    return Setting(TrainingSection(**options), 2, hidden_size, precision)


def from_json(
    tmp_path: Path, given: Any, section: dict[str, Any], **training: Any
) -> dict[str, Any]:
    file = tmp_path / "ds.json"
    file.write_text(given if isinstance(given, str) else json.dumps(given), encoding="utf-8")
    return deepspeed_config(
        DeepSpeedSection(config=str(file), **section), setting(precision="bf16", **training)
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_batch_sizes_clipping_and_formats_come_from_the_training_section(stage: int) -> None:
    config = deepspeed_config(
        DeepSpeedSection(zero_stage=stage), setting("bf16", max_grad_norm=0.5)
    )
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 8
    assert config["train_batch_size"] == 64  # 4 x 8 x 2 processes
    assert config["gradient_clipping"] == 0.5
    assert (config["bf16"], config["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert "auto" not in json.dumps(config)


def test_buckets_grow_with_the_hidden_size() -> None:
    large = deepspeed_config(DeepSpeedSection(zero_stage=3), setting())["zero_optimization"]
    assert large["reduce_bucket_size"] == 4096 * 4096
    assert large["stage3_param_persistence_threshold"] == 40960
    small = deepspeed_config(DeepSpeedSection(zero_stage=2), setting(hidden_size=32))
    assert small["zero_optimization"]["reduce_bucket_size"] == MIN_BUCKET


def test_offloading_never_asks_for_a_kernel_to_be_compiled() -> None:
    section = DeepSpeedSection(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    config = deepspeed_config(section, setting())
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert config["zero_force_ds_cpu_optimizer"] is False


def test_an_optimizer_on_the_cpu_gets_the_cores_that_torchrun_leaves_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(zero.device, "has_accelerator", lambda: True)
    monkeypatch.setattr(zero.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    zero.prepare_libraries(DeepSpeedSection(zero_stage=2))
    assert asked == []
    zero.prepare_libraries(DeepSpeedSection(zero_stage=2, offload_optimizer="cpu"))
    assert asked == [8]


def test_a_json_file_keeps_what_it_says_and_gets_numbers_for_auto(tmp_path: Path) -> None:
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.0}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False},
        "communication_data_type": "fp32",
    }
    config = from_json(tmp_path, given, {})
    assert config["train_batch_size"] == 64
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"] == {
        "stage": 2, "reduce_bucket_size": 4096 * 4096, "overlap_comm": False,
    }  # fmt: skip
    assert config["communication_data_type"] == "fp32"
    assert "optimizer" not in config  # torch's AdamW says the same


def test_every_contradiction_of_a_json_file_is_named(tmp_path: Path) -> None:
    given = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 4,
        "gradient_clipping": 5,
        "fp16": {"enabled": True},
        "amp": {"enabled": True},
        "optimizer": {"type": "Lamb", "params": {"lr": 1e-5}},
        "scheduler": {"type": "WarmupLR"},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    }
    section = {"zero_stage": 2, "offload_optimizer": "none"}
    with pytest.raises(ConfigError) as caught:
        from_json(tmp_path, given, section)
    said = str(caught.value)
    for name in (
        "train_micro_batch_size_per_gpu is 2, but training.batch_size is 4",
        "gradient_accumulation_steps is 1, but training.gradient_accumulation_steps is 8",
        "train_batch_size is 4, but batch_size x gradient_accumulation_steps x processes is 64",
        "gradient_clipping is 5, but training.max_grad_norm is 1.0",
        "fp16.enabled is True",
        "amp.enabled: remove it",
        "optimizer.type is Lamb",
        "optimizer.params.lr is 1e-05, but the training section says 0.0005",
        "scheduler: remove it",
        "zero_optimization.stage is 3, but deepspeed.zero_stage is 2",
        "zero_optimization.offload_optimizer.device is cpu, but deepspeed.offload_optimizer is none",
    ):
        assert name in said
    assert said.count("deepspeed.config (") == 11


@pytest.mark.parametrize("text", ["[]", "{", '"zero"'])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed\.config: .*ds\.json"):
        from_json(tmp_path, text, {})


def test_a_value_where_an_object_belongs_is_named_with_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(tmp_path, {"bf16": True, "zero_optimization": 2}, {})
    assert "bf16 is True and not an object like {" in str(caught.value)
    assert 'zero_optimization is 2 and not an object like {"stage": 2}' in str(caught.value)


@pytest.mark.slow
def test_two_processes_under_stage_0_and_2_equal_plain_data_parallel_and_resume_in_the_same_bits(
    tiny_chatglm: Path, tmp_path: Path
) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 11, weights=True)

    def settings(name: str, **changes: Any) -> dict[str, Any]:
        return runs.config(
            tiny_chatglm, data, tmp_path / name, training__gradient_accumulation_steps=2,
            training__max_steps=4, training__save_every_steps=2, **SMOOTH_STEPS, **changes,
        )  # fmt: skip

    plain, stage_0, stage_2, again = (
        settings("plain"),
        settings("stage-0", deepspeed__zero_stage=0),
        settings("stage-2", deepspeed__zero_stage=2),
        settings("again", deepspeed__zero_stage=2),
    )
    # The last run goes on from step 2 of the one before.
    script = f"""
import os, shutil
from finetune.training import run
original = run.train
def train(config, **options):
    if config.training.output_dir.endswith("again"):
        source, target = {str(tmp_path / "stage-2")!r}, {str(tmp_path / "again")!r}
        if os.environ["RANK"] == "0":
            shutil.copytree(source + "/checkpoint-2", target + "/checkpoint-2")
    return original(config, **options)
run.train = train
"""
    done = runs.run_command([plain, stage_0, stage_2, again], tmp_path, processes=2, script=script)
    assert done.returncode == 0, done.stderr
    assert "DeepSpeed" not in done.stderr
    norms = runs.history(tmp_path / "plain", "grad_norm")
    off = rounding(2 * additions(AutoConfig.from_pretrained(tiny_chatglm), 256))
    for name in ("stage-0", "stage-2"):
        assert_trained_alike(tmp_path / name, tmp_path / "plain")
        assert runs.history(tmp_path / name, "grad_norm") == pytest.approx(norms, rel=off)
    for key in ("loss", "grad_norm"):
        assert runs.history(tmp_path / "again", key) == runs.history(tmp_path / "stage-2", key)
    adapters = [
        tmp_path / n / "checkpoint-4/adapter_model.safetensors" for n in ("stage-2", "again")
    ]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    # Its states lie beside the Trainer's, and no converters that open pickles.
    names = {path.name for path in (tmp_path / "stage-2/checkpoint-4").iterdir()}
    assert {"global_step4", "latest"} < names
    assert not [name for name in names if name.endswith(".py")]


@pytest.mark.slow
def test_stage_0_and_2_and_a_json_file_run_in_one_process_without_a_launcher(
    tiny_glm: Path, tmp_path: Path
) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 6)
    changes = {"training__max_steps": 3, **SMOOTH_STEPS}
    runs.run_here(runs.config(tiny_glm, data, tmp_path / "plain", **changes))
    stages = [
        runs.config(
            tiny_glm, data, tmp_path / f"stage-{stage}", deepspeed__zero_stage=stage, **changes,
        )
        for stage in (0, 2)
    ]  # fmt: skip
    given = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "zero_optimization": {
            "stage": 3, "overlap_comm": False, "stage3_max_live_parameters": 1000,
            "stage3_param_persistence_threshold": "auto",
        },
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(given), encoding="utf-8")
    stages.append(
        runs.config(
            tiny_glm, data, tmp_path / "json", deepspeed__config=str(tmp_path / "ds.json"),
            **changes,
        )
    )  # fmt: skip
    done = runs.run_command(stages, tmp_path, launcher=False)
    assert done.returncode == 0, done.stderr
    for name in ("stage-0", "stage-2", "json"):
        assert_trained_alike(tmp_path / name, tmp_path / "plain")


FUSED = """
import torch
step = torch.optim.AdamW.step
def told(self, *args, **kwargs):
    fused = all(group["fused"] for group in self.param_groups)
    print("a fused update" if fused else "a slow update", flush=True)
    return step(self, *args, **kwargs)
torch.optim.AdamW.step = told
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method")  # DeepSpeed's, of torch
def test_offloaded_state_and_weights_train_the_same_run_and_deepspeeds_converter_reads_them(
    tiny_glm: Path, tmp_path: Path
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    data = runs.write_dialogues(tmp_path / "train.jsonl", 8)
    common = {
        "training__max_steps": 3, "training__learning_rate": 1e-3, "training__batch_size": 4,
        **SMOOTH_STEPS,
    }  # fmt: skip
    full = {"method": {"kind": "full"}}
    runs.run_here(runs.config(tiny_glm, data, tmp_path / "plain", **common) | full)
    common["training__batch_size"] = 2
    places = {
        "stage-2": {"zero_stage": 2, "offload_optimizer": "cpu"},
        "stage-3": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    }
    settings = [
        runs.config(tiny_glm, data, tmp_path / name, **common) | full | {"deepspeed": place}
        for name, place in places.items()
    ]
    done = runs.run_command(settings, tmp_path, processes=2, script=FUSED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("a fused update") >= 2 * 2 * 3  # stages, processes, steps
    assert "a slow update" not in done.stdout
    for name in places:
        assert_trained_alike(tmp_path / name, tmp_path / "plain")
        folder = tmp_path / name / "checkpoint-3"
        converted = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        trained = load_file(folder / "model.safetensors")
        assert converted.keys() == trained.keys()
        for key, weight in trained.items():
            assert converted[key].equal(weight.float()), key


def test_states_that_are_saved_open_without_a_type_of_deepspeed(tmp_path: Path) -> None:
    """Python 3.11.0 to 3.11.3 pickles an enum member by `getattr`, which weights_only never allows."""
    import torch
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from finetune.training.deepspeed.sharded_engine import TakenStates

    file = tmp_path / "states.pt"
    state = {
        "zero_stage": ZeroStageEnum.gradients,
        "groups": [{"stage": ZeroStageEnum.weights, "rate": 0.5}],
    }
    taken = TakenStates()
    taken.save(state, str(file))
    torch.save(taken.taken()[str(file)], file)
    assert torch.load(file, weights_only=True) == {
        "zero_stage": 2,
        "groups": [{"stage": 3, "rate": 0.5}],
    }
