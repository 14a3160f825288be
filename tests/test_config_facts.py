"""Entries of the tables of the configuration, one by one, and what is said where a table has none."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_text import MINIMAL
from hints import said

from finetune.config import extras
from finetune.config.extras import extra_problems
from finetune.config.load import dump_config, load, load_config, load_mapping, settled
from finetune.config.migrate import FILL_IN, PROGRAMS, Migration, hint, migrate, program_of, told_of
from finetune.config.problems import nearest
from finetune.config.yaml_text import MAX_PROBLEMS, kind_of, parse, parse_file, resolve, shown


def refused(folder: Path, text: str, *overrides: str) -> str:
    (folder / "x.yaml").write_text(text, encoding="utf-8")
    return said(load_config, folder / "x.yaml", overrides).replace(f"{folder}/", "")


# --- what is missing, what is empty, what is nothing ---------------------------------------------


def test_a_section_that_says_nothing_lacks_what_it_must_say(tmp_path: Path) -> None:
    bare = refused(tmp_path, "model:\ndata:\nmethod:\ntraining:\nevaluation:\ndeepspeed:\n")
    assert [line.strip() for line in bare.splitlines()[1:]] == [
        "x.yaml:1: model.path: is required: A folder, or a hub id such as `THUDM/glm-4-9b-chat`",
        "x.yaml:2: data.train: is required: Training files: a path, a glob, a folder, a data set of a hub (`hf://owner/name`, `ms://owner/name`, with `@revision` and `/files` behind it), or a list of these or of `{path, weight, format}`",
        "x.yaml:3: method.kind: is required: lora or ptuning_v2 or full",
        "x.yaml:4: training.output_dir: is required: The run directory",
    ]
    none = refused(tmp_path, "{}")
    assert [line.strip() for line in none.splitlines()[1:]] == [
        "x.yaml: model: is required: Which checkpoint is tuned, and in which number format",
        "x.yaml: data: is required: Where dialogues come from and how they become examples",
        "x.yaml: method: is required: how the model is tuned, kind: lora, ptuning_v2, full",
        "x.yaml: training: is required: The optimisation and what a run leaves on disk",
    ]
    empty = refused(tmp_path, MINIMAL.replace("some/model", '""'))
    assert empty.startswith("x.yaml:2: model.path: must not be empty: A folder, or a hub id")
    whole = load_config_text(tmp_path, MINIMAL + "evaluation:\ndeepspeed:\n")
    assert whole.deepspeed is None
    assert whole.evaluation.best_metric == "loss"


def load_config_text(folder: Path, text: str) -> Any:
    (folder / "x.yaml").write_text(text, encoding="utf-8")
    return load_config(folder / "x.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  lr: 1\n", "the option is training.learning_rate"), ("  epochs: 1\n", "the option is training.num_epochs"),
        ("  validation_file: a\n", "the option is data.validation"), ("lora: {}\n", "the option is method (kind: lora)"),
        ("lora_config: {}\n", "the option is method (kind: lora)"), ("  training_args: {}\n", "the option is training"),
        ("  metric_for_best_model: loss\n", "the option is evaluation.best_metric"), ("  use_cpu: true\n", "it is derived from the machine"),
        ("  learning_rates: [1]\n", "must be a mapping, got a list"), ("deepspeed: [1]\n", "must be a mapping, got a list"),
        ("  max_grad_norm: x\n", "must be a number, got 'x'"), ("  keep_checkpoints: 1.5\n", "must be a whole number, got 1.5"),
        ("deepspeed: {config: 5}\n", "must be text, got 5; put it in quotes if it is meant"),
        ("  seed: -1\n", "must be at least 0, got -1"), ("  output_dir: b\n", "given twice, first in line 8; remove one"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_what_does(tmp_path: Path, line: str, message: str) -> None:
    text = refused(tmp_path, MINIMAL + line)
    assert message in text
    assert text.count("\n") == 0


def test_a_train_file_beside_ours_is_told_its_option(tmp_path: Path) -> None:
    text = refused(tmp_path, MINIMAL.replace("train: train.jsonl", "train: a\n  train_file: b"))
    assert "x.yaml:5: data.train_file: unknown key in data; " in text
    assert "data.train" in text.partition(";")[2]
    assert nearest("LEARNING_RATE", ["learning_rate", "seed"]) == "learning_rate"
    assert nearest("qqq", ["learning_rate"]) is None


def test_rows_are_shared_out_over_the_processes_that_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = yaml.safe_load(MINIMAL)
    tree["data"] |= {"packing": True, "max_length": 1000}
    tree["training"] |= {"tokens_per_step": 12_000}
    config = load_mapping(tree).config
    for world, passes in ((1, 12), (3, 4)):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", "0")
        assert settled(config).training.gradient_accumulation_steps == passes
    assert dump_config(config).splitlines()[0] == "# Every option of the run; paths are relative to the directory it was started in."  # fmt: skip


def test_the_nearest_configuration_of_the_folder_is_meant(tmp_path: Path) -> None:
    for name in ("lora.yaml", "lora2.txt", "other.yml"):
        (tmp_path / name).touch()
    text = said(load, tmp_path / "lora2.yaml")
    assert text == f"{tmp_path}/lora2.yaml: no such file (working directory {Path.cwd()}); did you mean {tmp_path}/lora.yaml?"  # fmt: skip
    assert said(load, tmp_path / "othr.yml").endswith(f"did you mean {tmp_path}/other.yml?")
    for path in (tmp_path / "qqqq.yaml", tmp_path / "none/x.yaml", Path("x" * 5000)):
        assert said(load, path).endswith("; correct the path")


# --- YAML ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("TRUE", True), ("True", True), ("FALSE", False), ("NULL", None), ("Null", None), ("tRUE", "tRUE"), ("+5", 5), ("-0.5E+2", -50.0),
     ("+.5", 0.5), (".Inf", float("inf")), (".INF", float("inf")), ("0x", "0x"), ("0o8", "0o8"), ("--1", "--1"), ("1.2.3", "1.2.3"), ("1e5x", "1e5x")],
)  # fmt: skip
def test_words_and_numbers_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


def test_two_halves_of_a_character_are_one_and_problems_are_not_endless(tmp_path: Path) -> None:
    assert resolve(".NaN") != resolve(".NaN"), "which is no number, and not the text"
    assert parse('a: "\\ud83d\\ude00"', "x").value == {"a": "😀"}
    many = parse("".join(f"k{n}: *a\n" for n in range(MAX_PROBLEMS + 50)), "x")
    assert (len(many.problems), many.whole) == (MAX_PROBLEMS, False)
    os.mkfifo(tmp_path / "pipe")
    [problem] = parse_file(tmp_path / "pipe").problems
    assert str(problem) == f"{tmp_path}/pipe: is not a regular file"
    for value, words in ((None, "nothing"), (True, "true/false"), (1, "a whole number"), (1.5, "a number"), ("x", "text"), ([], "a list"), ({}, "a mapping")):  # fmt: skip
        assert kind_of(value) == words
    assert [shown(value) for value in (None, [1], True, "x", 1.5)] == ["nothing", "a list", "true", "'x'", "1.5"]  # fmt: skip
    assert shown("x" * 78) == repr("x" * 78)
    assert shown("x" * 79) == "'" + "x" * 76 + "…"


# --- training.extra ------------------------------------------------------------------------------

BROKEN = [
    "do_train",
    "do_eval",
    "do_predict",
    "use_cpu",
    "local_rank",
    "label_smoothing_factor",
    "use_liger_kernel",
    "average_tokens_across_devices",
    "remove_unused_columns",
    "label_names",
    "prediction_loss_only",
    "eval_delay",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "eval_accumulation_steps",
    "include_for_metrics",
    "batch_eval_metrics",
    "save_only_model",
    "save_on_each_node",
    "enable_jit_checkpoint",
    "logging_nan_inf_filter",
    "dataloader_drop_last",
    "ddp_find_unused_parameters",
    "ignore_data_skip",
    "restore_callback_states_from_checkpoint",
    "fsdp",
    "fsdp_config",
    "parallelism_config",
    "disable_tqdm",
    "push_to_hub",
    "hub_token",
]
SET_BY = [
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "auto_find_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "activation_checkpointing",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "seed",
    "data_seed",
    "logging_steps",
    "logging_strategy",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "ddp_timeout",
    "deepspeed",
    "bf16",
    "fp16",
    "bf16_full_eval",
    "fp16_full_eval",
    "dataloader_num_workers",
    "group_by_length",
    "train_sampling_strategy",
    "length_column_name",
    "eval_strategy",
    "eval_steps",
    "eval_on_start",
    "per_device_eval_batch_size",
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
    "activation_checkpointing_kwargs",
]


@pytest.mark.parametrize("field", [*BROKEN, *SET_BY])
def test_a_field_that_would_break_a_promise_or_has_an_option_is_not_passed_on(field: str) -> None:
    told = extra_problems({field: None})[field]
    assert told.startswith("cannot be set: " if field in BROKEN else "is set by ")


@pytest.mark.parametrize(
    ("optimizer", "library"),
    [
        ("rmsprop_bnb", "bitsandbytes"), ("lion_32bit", "bitsandbytes"), ("ademamix", "bitsandbytes"), ("paged_lion_8bit", "bitsandbytes"),
        ("galore_adafactor", "galore_torch"), ("apollo_adamw", "apollo_torch"), ("lomo", "lomo_optim"), ("adalomo", "lomo_optim"),
        ("schedule_free_adamw", "schedulefree"), ("grokadamw", "grokadamw"), ("stable_adamw", "optimi"), ("adamw_torch_4bit", "torchao"),
        ("adamw_torch_8bit", "torchao"), ("adamw_anyprecision", "torchdistx"), ("adamw_torch_xla", "torch_xla"), ("adamw_torch_npu_fused", "torch_npu"),
        ("sgd", ""), ("adagrad", ""), ("rmsprop", ""), ("adamw_torch", ""), ("adafactor", ""),
    ],
)  # fmt: skip
def test_an_optimizer_names_the_library_that_brings_it(
    optimizer: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert optimizer in extras.optimizer_names()
    real = importlib.util.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: real(name) if name == "transformers" else None)  # fmt: skip
    wanted = {"optim": f"{optimizer} needs a library that is not installed: {library}"}
    assert extra_problems({"optim": optimizer}) == (wanted if library else {})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"adam_beta1": 0, "adam_beta2": 0.0, "adam_epsilon": 1e-15}, {}),
        ({"adam_beta1": 1}, {"adam_beta1": "must be 0 or more and below 1, got 1"}),
        ({"adam_epsilon": 1e-16}, {"adam_epsilon": "must be 1e-15 or more, got 1e-16"}),
        ({"lr_scheduler_kwargs": [1]}, {"lr_scheduler_kwargs": "must be a mapping or text or null, got a list"}),
        ({"optim": "nobody"}, {"optim": "is no optimizer"}),
    ],
)  # fmt: skip
def test_a_value_has_the_kind_and_the_range_of_its_field(
    given: dict[str, Any], told: dict[str, str]
) -> None:
    found = extra_problems(given)
    assert found.keys() == told.keys()
    for name, text in told.items():
        assert text.split(" or ")[0] in found[name]
        assert text.endswith("optimizer") or found[name].endswith(text.partition(", ")[2])


# --- other programs ------------------------------------------------------------------------------

MARKS = {
    "the original GLM-4 demo": "data_config training_args peft_config",
    "axolotl": "base_model micro_batch_size sequence_len sample_packing",
    "LLaMA-Factory": "finetuning_type stage cutoff_len dataset_dir adapter_name_or_path template",
    "ms-swift": "train_type tuner_type model_type val_dataset agent_template attn_impl",
    "TRL": "dataset_name use_peft lora_target_modules",
}
WITHOUT = {  # options that have no counterpart here and are answered all the same
    "the original GLM-4 demo": "data_config.test_file data_config.num_proc peft_config.task_type peft_config.num_attention_heads peft_config.token_dim peft_config.num_layers peft_config.inference_mode",
    "LLaMA-Factory": "trust_remote_code stage dataset_dir template max_samples train_on_prompt preprocessing_num_workers overwrite_cache tokenized_path quantization_method double_quantization freeze_multi_modal_projector plot_loss export_dir export_size export_device export_legacy_format export_quantization_bit infer_backend ray_run_name do_predict export_hub_model_id use_galore rope_scaling enable_liger_kernel additional_target",
    "ms-swift": "model_type template truncation_strategy system agent_template quant_method freeze_aligner dataset_num_proc load_from_cache_file adapters model_author model_name use_hf",
    "axolotl": "model_type tokenizer_type trust_remote_code chat_template load_in_8bit eval_sample_packing pad_to_sequence_len train_on_inputs evals_per_epoch saves_per_epoch special_tokens strict",
    "TRL": "trust_remote_code dataset_train_split assistant_only_loss completion_only_loss dataset_num_proc chat_template_path eos_token",
}
OF_ALL = "overwrite_output_dir gradient_checkpointing_kwargs data_seed logging_strategy save_strategy resume_from_checkpoint dataloader_pin_memory evaluation_strategy eval_strategy greater_is_better load_best_model_at_end remove_unused_columns do_train debug push_to_hub"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_program_is_known_by_each_of_its_marks_and_answers_for_each_of_its_options(
    program: Any, tmp_path: Path
) -> None:
    marks = MARKS[program.name].split()
    assert program.marks == set(marks)
    for mark in marks:
        assert program_of({mark: 1}) is program
    names = [*WITHOUT[program.name].split(), *OF_ALL.split()]
    is_demo = program.name.startswith("the original")  # told by its sections
    tree: dict[str, Any] = {} if is_demo else {marks[0]: "x"}
    for name in names:
        node = tree
        *sections, last = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = "x"
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(tree))
    found = migrate(tmp_path / "old.yaml")
    assert found.program == program.name
    silent = [name for name in names if found.left.get(name, "no such option here") == "no such option here"]  # fmt: skip
    assert silent == []


def test_the_new_file_says_where_every_line_comes_from(tmp_path: Path) -> None:
    found = Migration("X", {"training.output_dir": "r", "model.path": FILL_IN, "training.extra.tf32": True, "training.extra.optim": "sgd", "data.train": ["a", FILL_IN]})  # fmt: skip
    found.origins = {"training.extra.optim": "optim; why"}
    found.left, found.commands = {"gone": "no such option here"}, ["do  this\nnow"]
    assert found.text() == (
        "# From a configuration of X, by `finetune migrate`.\n# do this now\nmodel:\n  path: FILL-IN\ndata:\n  train: [a, FILL-IN]\n"
        "training:\n  output_dir: r\n  extra:\n    tf32: true\n    optim: sgd  # optim; why\n\n# Not here:\n#   gone: no such option here\n"
    )  # fmt: skip
    assert found.to_fill_in == ["model.path", "data.train"]
    old = {"stage": "sft", "finetuning_type": "lora", "lora_rank": 4, "seed": 1, "model_name_or_path": "m", "tf32": True}  # fmt: skip
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    assert list(migrate(tmp_path / "old.yaml").values) == [
        "model.path", "data.train", "method.kind", "method.rank", "training.seed", "training.output_dir", "training.extra.tf32",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "command"),
    [
        ({"export_dir": "out"}, "merges; that is: finetune merge m --output out"),
        ({"export_dir": "out", "adapter_name_or_path": "a"}, "merges; that is: finetune merge a --base m --output out"),
        ({"do_predict": True, "dataset": "x"}, "predicts; that is: finetune evaluate m --data FILE"),
        ({"infer_backend": "vllm", "adapter_name_or_path": "a"}, "chats; that is: finetune chat a --base m (or finetune serve)"),
        ({"infer_backend": "vllm", "dataset": "x"}, None), ({"do_predict": False}, None),
    ],
)  # fmt: skip
def test_what_another_file_asks_for_besides_training_is_a_command(
    tmp_path: Path, old: dict[str, Any], command: str | None
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({"template": "glm4", "model_name_or_path": "m"} | old))
    found = migrate(file)
    assert found.commands == ([f"The old file {command}"] if command else [])
    assert "model.adapter" not in found.values
    assert ("adapter_name_or_path" in found.left) == ("adapter_name_or_path" in old)


def test_data_lies_in_the_folder_that_is_named_where_no_whole_path_is(tmp_path: Path) -> None:
    def placed(data: str, **files: str) -> dict[str, Any]:
        (tmp_path / "old.yaml").write_text(yaml.safe_dump({"data_config": files, "freezeV": True}))
        return migrate(tmp_path / "old.yaml", model="glm-4V-9b", data=data).values

    found = placed("d", train_file="a.jsonl", val_file="/b.jsonl")
    assert (found["data.train"], found["data.validation"]) == ("d/a.jsonl", "/b.jsonl")
    assert found["model.freeze"] == ["vision"], "of a model that sees"
    one = placed("c.jsonl", train_file="a.jsonl", val_file="/b.jsonl")
    assert (one["data.train"], one["data.validation"]) == ("c.jsonl", "/b.jsonl")
    assert placed("d", val_file="b.jsonl")["data.train"] == "d"
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"data_config": {}, "freezeV": True}))
    text = migrate(tmp_path / "old.yaml", model="glm-4-9b")
    assert "text models have no vision encoder" in text.left["freezeV"]
    assert "model.freeze" not in text.values


def test_an_option_of_another_program_says_what_became_of_it() -> None:
    assert hint({"stage": 1}, ["lora_rank"]) == "the option is method.rank"
    assert hint({"stage": 1}, ["nobody"]) is None
    assert hint({"a": 1}, ["lora_rank"]) is None
    assert hint({"stage": 1}, ["val_size"]) == "the option is data.validation (whole groups are held out; a number of rows is a file of its own)"  # fmt: skip
    assert hint({"stage": 1}, ["plot_loss"]) == "finetune report draws it"
    demo = {"data_config": {"train_file": 1, "nobody": 2}}
    assert hint(demo, ["data_config"]) == "train_file: the option is data.train"
    assert hint(demo, ["data_config", "train_file"]) == "the option is data.train"
    assert told_of("quant_bits") == "the option is model.quantization (4 bits, nf4)"
    assert told_of("model_type") == "not needed: it follows from the checkpoint"
    assert told_of("val_file") == "the option is data.validation"
    assert told_of("adapters") is not None


def test_a_configuration_is_frozen_and_equal_values_are_written_out() -> None:
    shared = {"path": "a", "weight": 2.0}
    tree = yaml.safe_load(MINIMAL)
    tree["data"]["train"] = [shared, shared]
    config = load_mapping(tree).config
    assert [source.path for source in config.data.train] == ["a", "a"]
    with pytest.raises(ValueError, match="frozen"):
        config.training.seed = 1


def test_a_value_without_a_counterpart_says_where_to_look_and_none_turns_nothing_on(
    tmp_path: Path,
) -> None:
    old = {"stage": "sft", "save_steps": 0.2, "val_size": 100, "report_to": None, "bf16": False, "logging_dir": None, "flash_attn": None, "lora_rank": [1], "learning_rate": {}}  # fmt: skip
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    left = migrate(tmp_path / "old.yaml").left
    assert left["save_steps"] == "0.2 has no counterpart; see training.save_every_steps"
    assert left["val_size"].startswith("whole groups are held out")
    assert {"report_to", "bf16", "flash_attn"}.isdisjoint(left)
    register = tmp_path / "data"
    register.mkdir()
    (register / "dataset_info.json").write_text('{"mine": {"file_name": "m.json"}}')
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"stage": "sft", "dataset": "mine", "dataset_dir": str(register)}))  # fmt: skip
    [source] = migrate(tmp_path / "old.yaml", data="elsewhere").values["data.train"]
    assert source["path"] == str(register / "m.json"), "it says where its data lies"
