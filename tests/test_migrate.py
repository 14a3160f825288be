"""Configurations of other programs become ours: every option is taken, or named with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pictures
import pytest
import runs
import yaml
from command_line import exit_code
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.config.load import load_config
from finetune.config.migrate import FILL_IN, PROGRAMS, migrate
from finetune.config.migrate_tables import Nothing, Option
from finetune.config.schema import LoraMethod, RunConfig
from finetune.errors import ConfigError

TRAINING = {
    "output_dir": "./output", "max_steps": 2, "learning_rate": "5e-4", "per_device_train_batch_size": 1,
    "dataloader_num_workers": 0, "remove_unused_columns": False, "save_strategy": "steps", "save_steps": 500,
    "log_level": "info", "logging_strategy": "steps", "logging_steps": 10, "run_name": "glm4-lora",
    "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 500, "adam_epsilon": "1e-6",
    "predict_with_generate": True, "generation_config": {"max_new_tokens": 16},
}  # fmt: skip
DEMO = {
    "data_config": {"train_file": "train.jsonl", "val_file": "dev.jsonl", "test_file": "dev.jsonl", "num_proc": 1},
    "combine": True, "freezeV": True, "max_input_length": 64, "max_output_length": 64, "training_args": TRAINING,
}  # fmt: skip
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1,
        "target_modules": ["query_key_value"]}  # fmt: skip
FACTORY = {
    "model_name_or_path": "MODEL", "trust_remote_code": True, "stage": "sft", "do_train": True,
    "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "dataset": "identity", "template": "glm4",
    "cutoff_len": 256, "max_samples": 1000, "overwrite_cache": True, "preprocessing_num_workers": 16,
    "output_dir": "saves/glm4/lora/sft", "logging_steps": 10, "save_steps": 500, "plot_loss": True,
    "overwrite_output_dir": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
    "learning_rate": "1.0e-4", "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
    "bf16": False, "ddp_timeout": 180000000, "val_size": 0.1, "max_steps": 2,
}  # fmt: skip
FILES: dict[str, dict[str, Any]] = {
    "demo lora": DEMO | {"peft_config": LORA},
    "demo ptuning_v2": DEMO | {"peft_config": {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 8, "num_attention_heads": 2, "token_dim": 256}},
    "demo sft": DEMO | {"training_args": TRAINING | {"deepspeed": "configs/ds_zero_3.json", "bf16": True}},
    "demo vision lora": DEMO | {"freezeV": False, "peft_config": LORA},
    "demo swanlab": DEMO | {"swanlab": "local", "peft_config": LORA},
    "LLaMA-Factory lora": FACTORY,
    "LLaMA-Factory full": FACTORY | {"finetuning_type": "full", "deepspeed": "examples/deepspeed/ds_z3_config.json"},
    "ms-swift": {"model": "ZhipuAI/glm-4-9b-chat", "train_type": "lora", "dataset": ["a.jsonl"], "torch_dtype": "bfloat16", "num_train_epochs": 1, "lora_rank": 8, "lora_alpha": 32, "target_modules": "all-linear", "max_length": 2048, "deepspeed": "zero2", "loss_scale": "last_round", "attn_impl": "flash_attn"},
    "axolotl": {"base_model": "THUDM/glm-4-9b-chat", "datasets": [{"path": "a.jsonl", "type": "chat_template"}], "adapter": "qlora", "load_in_4bit": True, "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True, "sequence_len": 4096, "sample_packing": True, "micro_batch_size": 2, "num_epochs": 1, "optimizer": "adamw_torch_fused", "lr_scheduler": "cosine", "learning_rate": 0.0002, "bf16": True, "gradient_checkpointing": True, "flash_attention": True, "output_dir": "./out"},
    "TRL": {"model_name_or_path": "THUDM/glm-4-9b-chat", "dataset_name": "a.jsonl", "use_peft": True, "lora_r": 32, "lora_alpha": 16, "lora_target_modules": "all-linear", "learning_rate": 2.0e-4, "num_train_epochs": 1, "packing": True, "gradient_checkpointing": True, "output_dir": "out", "eval_strategy": "no"},
}  # fmt: skip


def moved(folder: Path, old: dict[str, Any], **given: str) -> tuple[Any, str]:
    file = folder / "old.yaml"
    file.write_text(yaml.safe_dump(old, sort_keys=False), encoding="utf-8")
    found = migrate(file, **given)
    return found, found.text()


@pytest.mark.parametrize("name", FILES)
def test_every_option_is_taken_or_named_and_the_result_loads(tmp_path: Path, name: str) -> None:
    old = FILES[name]
    found, text = moved(tmp_path, old, model="some/model", data=str(tmp_path / "data"))
    new = tmp_path / "new.yaml"
    new.write_text(text, encoding="utf-8")
    load_config(new)
    said = " ".join([*found.origins.values(), *found.left])
    flat = [k for key, value in old.items() for k in (value if isinstance(value, dict) else [key])]
    unsaid = [key for key in flat if key not in said and old.get(key) is not False]
    # `generation_config` is told by the option in it; a value of false turned nothing on.
    assert [
        key
        for key in unsaid
        if key not in ("generation_config", "max_input_length", "eval_strategy")
    ] == []
    assert FILL_IN not in text


def test_the_demo_means_here_what_it_meant_there(tmp_path: Path) -> None:
    found, text = moved(tmp_path, FILES["demo lora"], model="m", data="data/AdvertiseGen")
    values = found.values
    assert values["data.train"] == "data/AdvertiseGen/train.jsonl"
    assert values["data.validation"] == "data/AdvertiseGen/dev.jsonl"
    assert values["data.max_length"] == 129  # 64 + 64 + the stop
    assert values["data.train_on"] == "last_reply"
    assert (values["method.kind"], values["method.rank"]) == ("lora", 8)
    assert values["evaluation.max_new_tokens"] == 16  # of its generation_config
    assert values["training.extra.adam_epsilon"] == 1e-6
    assert "rank: 8  # peft_config.r" in text
    prefix, _ = moved(tmp_path, FILES["demo ptuning_v2"], model="m", data="d")
    assert (prefix.values["method.kind"], prefix.values["method.num_virtual_tokens"]) == (
        "ptuning_v2",
        8,
    )
    assert (
        moved(tmp_path, FILES["demo sft"], model="m", data="d")[0].values["method.kind"] == "full"
    )


@pytest.mark.parametrize(
    ("swanlab", "trackers"),
    [("local", ["swanlab"]), ("cloud", ["swanlab"]), ("disabled", None), (None, None)],
)
def test_a_tracker_of_the_demo_is_taken_unless_it_is_turned_off(
    tmp_path: Path, swanlab: str | None, trackers: list[str] | None
) -> None:
    found, _ = moved(
        tmp_path, DEMO | {"swanlab": swanlab, "peft_config": LORA}, model="m", data="d"
    )
    assert found.values.get("training.report_to") == trackers


def test_registered_data_sets_become_their_files_and_columns(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    register = {
        "identity": {"file_name": "identity.json"},
        "mine": {"file_name": "m.json", "columns": {"prompt": "question", "response": "reply"}},
        "talks": {"file_name": "t.json", "formatting": "sharegpt", "columns": {"messages": "dialog"}, "tags": {"role_tag": "speaker"}},
        "wanted": {"file_name": "w.json", "ranking": True},
        "far": {"hf_hub_url": "a/b"},
    }  # fmt: skip
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(register))
    old = FACTORY | {
        "dataset": "identity,mine,talks,far,gone",
        "dataset_dir": str(tmp_path / "data"),
    }
    found, _ = moved(tmp_path, old)
    assert found.values["data.train"] == [
        {"path": str(tmp_path / "data/identity.json"), "format": "alpaca"},
        {"path": str(tmp_path / "data/m.json"), "format": "alpaca", "columns": {"instruction": "question", "output": "reply"}},
        {"path": str(tmp_path / "data/t.json"), "format": "sharegpt", "columns": {"conversations": "dialog"}},
        {"path": "hf://a/b", "format": "alpaca"},
        FILL_IN,
    ]  # fmt: skip
    assert "speaker" in found.left["dataset talks: tags"]
    limited = moved(tmp_path, old | {"dataset": "mine", "max_samples": 7})[0].values["data.train"]
    assert [source["max_rows"] for source in limited] == [7]
    assert "preference" in moved(tmp_path, old | {"dataset": "wanted"})[0].left["dataset wanted"]


def test_merging_and_predicting_files_name_the_command(tmp_path: Path) -> None:
    merge = {
        "model_name_or_path": "m",
        "adapter_name_or_path": "a",
        "template": "glm4",
        "export_dir": "out",
    }
    assert moved(tmp_path, merge)[0].commands[0].endswith("finetune merge a --base m --output out")
    predict = FACTORY | {"do_train": False, "do_predict": True, "adapter_name_or_path": "a"}
    assert "finetune evaluate a --data FILE" in moved(tmp_path, predict)[0].commands[0]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_every_entry_of_a_table_names_an_option_that_exists(program: Any) -> None:
    known = {"deepspeed", "training"} | {f"training.extra.{name}" for name in ("optim", "tf32")}
    for section, info in RunConfig.model_fields.items():
        model = info.annotation if hasattr(info.annotation, "model_fields") else None
        known |= {f"{section}.{name}" for name in model.model_fields} if model else set()
    known |= {f"method.{name}" for name in LoraMethod.model_fields} | {"method.num_virtual_tokens"}
    for name, entry in program.whole_table.items():
        if not isinstance(entry, Nothing):
            assert (entry.to if isinstance(entry, Option) else entry) in known, name


def test_a_file_of_ours_and_of_nobody_is_refused(tmp_path: Path) -> None:
    for content, said in (
        ("model: {path: x}\nmethod: {kind: lora}\n", "of this program already"),
        ("a: 1\n", "is not a configuration of the original GLM-4 demo, axolotl"),
        ("a: [", "cannot be read as YAML"),
    ):
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(ConfigError, match=said):
            migrate(tmp_path / "x.yaml")


def test_anothers_configuration_given_to_train_is_told_the_command(
    tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(FILES["demo lora"]))
    with pytest.raises(ConfigError) as error:
        load_config(file)
    said = str(error.value)
    assert f"finetune migrate {file} --output new.yaml" in said
    assert "train_file: the option is data.train; val_file: the option is data.validation" in said
    assert exit_code("data/AdvertiseGen/", "some/model", str(file), "yes") == 2
    assert "finetune migrate" in capsys.readouterr().err


ZERO_3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
}  # fmt: skip


HINTS = {
    "data.val_file=x": "the option is data.validation",
    "data.test_file=x": "finetune evaluate RUN --data FILE",
    "data.num_proc=4": "tokenising takes seconds in one process",
    "data.combine=true": "the option is data.train_on",
    "data.max_input_length=512": "the option is data.max_length",
    "data.max_output_length=512": "the option is evaluation.max_new_tokens",
    "training.remove_unused_columns=false": "columns are read by meaning",
    "training.log_level=info": "write it into training.extra, as {log_level: …}",
    "training.run_name=x": "write it into training.extra, as {run_name: …}",
    "training.adam_epsilon=1e-6": "write it into training.extra, as {adam_epsilon: …}",
    "training.evaluation_strategy=steps": "evaluation.every_steps counts steps",
    "training.debug=x": "finetune --debug shows tracebacks",
    "training.predict_with_generate=true": "the option is evaluation.generate",
    "training.generation_config={max_new_tokens: 5}": "evaluation.max_new_tokens",
    "training.per_device_train_batch_size=1": "the option is training.batch_size",
    "freezeV=true": "the option is model.freeze",
    "swanlab=local": "the option is training.report_to",
    "method.peft_type=LORA": "the option is method.kind",
    "method.task_type=CAUSAL_LM": "it follows from the checkpoint",
    "method.r=8": "the option is method.rank",
    "method.lora_alpha=32": "the option is method.alpha",
    "method.token_dim=256": "it follows from the checkpoint",
    "method.num_attention_heads=2": "it follows from the checkpoint",
    "stage=sft": "dialogues are trained by their replies",
    "template=glm4": "the checkpoint's own chat template is used",
    "finetuning_type=lora": "the option is method.kind",
    "lora_target=all": "the option is method.target_modules",
    "quantization_bit=4": "the option is model.quantization",
    "loraplus_lr_ratio=16": "the option is method.lora_plus_ratio",
    "flash_attn=fa2": "the option is model.attention",
    "neftune_noise_alpha=5": "write it into training.extra, as {neftune_noise_alpha: …}",
    "dataset=identity": "the option is data.train",
    "eval_dataset=identity": "the option is data.validation",
    "val_size=0.1": "the option is data.validation (whole groups are held out",
    "freeze_vision_tower=true": "the option is model.freeze",
    "adapter_name_or_path=x": "the option is model.adapter",
    "export_dir=x": "the --output of `finetune merge`",
    "max_samples=1000": "max_rows of a source in data.train",
    "ddp_timeout=1800": "the option is training.process_timeout_minutes (minutes here)",
    "do_train=true": "the command decides that",
    "do_predict=true": "finetune predict, finetune evaluate",
    "deepspeed=ds_z3.json": "write the file as deepspeed: {config: ds_z3.json}",
    "method.target_modules=all": "every linear layer is all-linear",
}


@pytest.mark.parametrize("said", HINTS)
def test_a_foreign_option_among_ours_is_told_what_it_is_here(said: str) -> None:
    config = Path(__file__).parent.parent / "configs/quickstart.yaml"
    with pytest.raises(ConfigError) as error:
        load_config(config, [said])
    assert HINTS[said] in str(error.value)


@pytest.mark.parametrize("data", ["data/", "data", "data/rows", "rows"])
@pytest.mark.parametrize("behind", [[], ["yes"]])
def test_the_demo_s_command_line_is_answered_with_ours(
    data: str, behind: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(data, "THUDM/glm-4-9b-chat", "lora.yaml", *behind) == 2
    said = capsys.readouterr().err
    assert f"finetune migrate lora.yaml --data {data} --model THUDM/glm-4-9b-chat --output" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["demo lora", "demo ptuning_v2", "demo sft", "demo vision lora", "demo swanlab", "LLaMA-Factory lora", "LLaMA-Factory full"],
)  # fmt: skip
def test_a_migrated_configuration_trains(
    name: str, tiny_chatglm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Each of the demo's files and LLaMA-Factory's, as it comes out, but for ZeRO-3 and trackers."""
    model = tiny_chatglm
    for file in ("train.jsonl", "dev.jsonl"):
        runs.write_dialogues(tmp_path / file, 40)
    if "vision" in name:
        model = pictures.save_model(tmp_path / "glm-4v-tiny")
        rows = pictures.write_dialogues(tmp_path, 8, every=1).read_text()
        for file in ("train.jsonl", "dev.jsonl"):
            (tmp_path / file).write_text(rows)
    found, _ = moved(tmp_path, FILES[name], model=str(model), data=str(tmp_path))
    if found.values["data.train"] == str(tmp_path):
        found.values["data.train"] = str(tmp_path / "train.jsonl")
    (tmp_path / "new.yaml").write_text(found.text(), encoding="utf-8")
    if sharded := found.values.get("deepspeed.config"):  # the JSON is taken as it is
        (tmp_path / sharded).parent.mkdir(parents=True)
        (tmp_path / sharded).write_text(json.dumps(ZERO_3), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_config(tmp_path / "new.yaml").deepspeed is None or sharded
    said = ["training.report_to=[]", "deepspeed=null"]
    runs.run_here(load_config(tmp_path / "new.yaml", said).model_dump())
    run_dir = Path(found.values["training.output_dir"])
    assert (run_dir / "checkpoint-2").is_dir()
    if "val_size" in FILES[name]:
        assert found.values["data.validation"] == "10%"
        assert json.loads((run_dir / "data.json").read_text())["validation"]["rows"] > 1
    if name == "LLaMA-Factory lora":
        _merge_predict_and_train_on(tmp_path, model, run_dir)


def _merge_predict_and_train_on(folder: Path, model: Path, run_dir: Path) -> None:
    """The commands that LLaMA-Factory's other files become, on what was just trained."""
    old = {
        "model_name_or_path": str(model),
        "adapter_name_or_path": str(run_dir),
        "template": "glm4",
    }
    merge = old | {
        "export_dir": "merged",
        "export_size": 5,
        "export_device": "cpu",
        "export_legacy_format": False,
    }
    assert run_command(moved(folder, merge)[0].commands[0]) == 0
    assert (folder / "merged/config.json").is_file()
    predict = FACTORY | old | {"do_train": False, "do_predict": True, "predict_with_generate": True}
    command = moved(folder, predict)[0].commands[0].replace("FILE", "dev.jsonl")
    assert run_command(command, "--output", "scores", "--max-new-tokens", "4") == 0
    assert (folder / "scores/evaluation.json").is_file()
    found, _ = moved(folder, FACTORY | old, model=str(model), data="train.jsonl")
    assert found.values["model.adapter"] == str(run_dir)


def run_command(sentence: str, *more: str) -> int:
    """The exit code of the command behind "that is: finetune"."""
    return exit_code(*sentence.partition(": finetune ")[2].split(), *more)


@pytest.mark.parametrize("content", ["{", "[1]", "\\xff"])
def test_a_damaged_register_of_data_sets_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset_info.json").write_text(content)
    with pytest.raises(ConfigError, match=r"dataset_info\.json .*correct"):
        moved(tmp_path, FACTORY | {"dataset_dir": str(tmp_path)})


ODD = st.sampled_from(
    [None, True, -1, 0.5, "x", "", [], ["a"], [1], {}, {"a": 1}, [{"path": 1}], 10**30]
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_odd_values_are_named_and_give_yaml_all_the_same(
    tmp_path: Path, data: st.DataObject
) -> None:
    program = data.draw(st.sampled_from(PROGRAMS))
    names = data.draw(st.lists(st.sampled_from(sorted(program.whole_table)), max_size=6))
    old: dict[str, Any] = {}
    for name in [*names, min(program.marks)]:
        node = old
        *sections, last = name.split(".")
        for section in sections:
            inner = node.setdefault(section, {})
            node[section] = node = inner if isinstance(inner, dict) else {}
        node[last] = data.draw(ODD)
    found, text = moved(tmp_path, old)
    assert isinstance(yaml.safe_load(text), dict)
    assert {"model.path", "data.train", "method.kind"} <= found.values.keys()
