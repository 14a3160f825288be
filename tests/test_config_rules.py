"""Limits, defaults, contradictions and messages of configurations, rule by rule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_text import MINIMAL
from hints import said
from pydantic import ValidationError

from finetune.config import extras, problems
from finetune.config.data_section import held_out_share
from finetune.config.extras import OPTIMIZERS, OWNED, check_optimizer, extra_problems
from finetune.config.load import config_tree, dump_config, load, load_config, load_mapping, settled
from finetune.config.migrate import FILL_IN, Migration, migrate, program_of, told_of
from finetune.config.migrate_sources import Register, read_register, source_of
from finetune.config.reference import _type, texts
from finetune.config.rules import broken_rules, without_effect
from finetune.config.schema import RunConfig, TrainingSection
from finetune.config.yaml_text import MAX_BYTES, MAX_DEPTH, parse, parse_file, resolve

TREE: dict[str, Any] = yaml.safe_load(MINIMAL)


def with_lines(lines: str) -> dict[str, Any]:
    found = json.loads(json.dumps(TREE))
    for name, more in (yaml.safe_load(lines) or {}).items():
        found[name] = {**found.get(name, {}), **more}
    return found


# --- limits --------------------------------------------------------------------------------------

LIMITS: list[tuple[str, list[Any], list[Any]]] = [
    *((name, [1, 7], [0, -1]) for name in (
        "method.rank", "data.max_length", "data.shuffle_buffer", "training.max_steps", "training.batch_size",
        "training.gradient_accumulation_steps", "training.sequence_parallel", "training.log_every_steps",
        "training.save_every_steps", "training.save_weights_every_steps", "training.keep_checkpoints",
        "training.profile", "evaluation.every_steps", "evaluation.max_new_tokens",
        "evaluation.max_samples", "evaluation.batch_size", "evaluation.patience")),
    *((name, [0.1, 2.0], [0.0, -0.1, math.inf, math.nan]) for name in (
        "method.alpha", "training.num_epochs", "training.learning_rate", "training.process_timeout_minutes")),
    *((name, [0.0, 0.5], [-0.1, math.inf, math.nan]) for name in (
        "training.warmup_steps", "training.weight_decay", "training.max_grad_norm")),
    *((name, [0.0, 0.99], [-0.1, 1.0]) for name in ("method.dropout", "data.max_bad_rows")),
    ("data.max_overlap", [0.0, 1.0], [-0.1, 1.1]), ("data.temperature", [1.0, 2.0], [0.9]),
    ("method.lora_plus_ratio", [1.0, 16.0], [0.9]), ("training.seed", [0, 2**32 - 1], [-1, 2**32]),
    ("data.loader_workers", [0, 2], [-1]), ("model.path", ["m"], [""]), ("model.adapter", ["a"], [""]),
    ("training.output_dir", ["o"], [""]), ("training.on_end", ["x"], [""]), ("evaluation.best_metric", ["loss"], [""]),
    ("deepspeed.zero_stage", [0, 1, 2, 3], [4, -1]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "taken", "refused"), LIMITS, ids=lambda v: str(v)[:40])
def test_each_option_takes_what_is_within_its_limits(
    key: str, taken: list[Any], refused: list[Any]
) -> None:
    section, name = key.split(".")

    def checked(value: Any) -> Any:
        tree = {**TREE, section: {**TREE.get(section, {}), name: value}}
        return getattr(getattr(RunConfig.model_validate(tree, strict=True), section), name)

    for value in taken:
        assert checked(value) == value
    for value in refused:
        with pytest.raises(ValidationError):
            checked(value)


@pytest.mark.parametrize(
    ("said_so", "share"),
    [("5%", 0.05), ("99.9%", 0.999), ("0%", None), ("100%", None), ("-1%", None), ("x%", None), ("5", None), (["5%"], None), (None, None)],
)  # fmt: skip
def test_a_share_is_over_0_and_under_100_percent(said_so: Any, share: Any) -> None:
    assert held_out_share(said_so) == (share if share is None else pytest.approx(share))


def test_without_steps_or_epochs_there_are_three_passes() -> None:
    assert TrainingSection(output_dir="o").epochs == 3.0
    assert TrainingSection(output_dir="o", num_epochs=0.5).epochs == 0.5


# --- contradictions in both directions -----------------------------------------------------------

FINE = [
    "data: {columns: {prompt: a, response: b}}", "data: {format: pairs, columns: {prompt: a, response: b}}",
    "training: {warmup_steps: 0.5}", "training: {warmup_steps: 20}", "training: {warmup_steps: many}", "training: {warmup_steps: 1}", "training: {warmup_steps: 2.0}", "training: {max_steps: 1}",
    "training: {tokens_per_step: 9}\ndata: {packing: true}",
    "training: {offload_activations: true, activation_checkpointing: true}",
    "training: {save: weights}", "training: {save_weights_every_steps: 2}",
    "training: {optimizer: muon}", "training: {optimizer: muon}\nmethod: {kind: ptuning_v2, prefix_projection: true}",
    "training: {optimizer: adamw_8bit}\nmethod: {kind: ptuning_v2}",
    "training: {extra: {optim: sgd}}", "training: {sequence_parallel: 2}\nmodel: {attention: sdpa}",
    "training: {sequence_parallel: 2}", "model: {attention: eager}", "model: {quantization: nf4}",
    "model: {quantization: nf4}\ndeepspeed: {zero_stage: 2}", "method: {target_modules: all-linear}",
    "method: {target_modules: [q]}", "deepspeed: {config: z.json}",
    "deepspeed: {zero_stage: 3, offload_parameters: cpu}", "deepspeed: {zero_stage: 1, offload_optimizer: cpu}",
    "evaluation: {best_metric: perplexity}", "evaluation: {best_metric: bleu-4}\ndata: {validation: a}",
    "evaluation: {patience: 1, every_steps: 2}\ndata: {validation: a}", "evaluation: {choose: best_metric}",
    "evaluation: {keep: {data: a}}\ndata: {validation: a}", "evaluation: {keep: {tasks: [a]}}\ndata: {validation: a}",
    "evaluation: {keep: {}}\ndata: {validation: a, replay: {}}", "data: {validation: 5%, group_by: a}",
    "data: {stop: all, temperature: 2}", "data: {streaming: true}\ntraining: {max_steps: 1}",
    "data: {streaming: true, train: [{path: a, weight: 2}]}\ntraining: {max_steps: 1}",
    "training: {on_end: 'a b'}", "training: {extra: {adam_beta2: 0.9}}",
]  # fmt: skip


@pytest.mark.parametrize("lines", FINE)
def test_what_goes_together_is_not_refused(lines: str) -> None:
    assert list(broken_rules(with_lines(lines))) == []


QUIET = [
    "data: {max_bad_rows: 0.1, on_bad_row: skip}", "data: {streaming: true, shuffle_buffer: 5}", "data: {group_by_length: true}",
    "data: {streaming: true, group_by_length: false}", "data: {packing: true}", "data: {packing: true, group_by_length: false}",
    "data: {validation: a}\nevaluation: {every_steps: 5, at_start: true}", "evaluation: {at_start: false}", "data: {max_overlap: 0.5, cache_image_features: true}",
]  # fmt: skip


@pytest.mark.parametrize("lines", QUIET)
def test_what_has_an_effect_is_not_noted(lines: str) -> None:
    assert list(without_effect(with_lines(lines))) == []


# --- messages and places -------------------------------------------------------------------------


def refused(folder: Path, text: str, *overrides: str) -> str:
    (folder / "x.yaml").write_text(text, encoding="utf-8")
    return said(load_config, folder / "x.yaml", overrides).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  resume: true\n", "must be text, got true; put it in quotes if it is meant"),
        ("  report_to: yes\n", "must be a list, got 'yes'"),
        ("  seed: yes\n", "must be a whole number, got 'yes'"),
        ("  seed: 4294967296\n", "must be less than 4294967296"),
        ("  warmup_steps: -1\n", "must be at least 0, got -1"),
        ("  save: all\n", "must be one of resumable, weights; got 'all'"),
        ("  save: waights\n", "got 'waights'; did you mean weights?"),
        ("  learning_rates: {a: [1]}\n", "training.learning_rates.a: must be a number, got a list"),
        ("data_:\n  x: 1\n", "data_: unknown key in the top level; did you mean data?"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_told_with_what_can(
    tmp_path: Path, line: str, message: str
) -> None:
    text = refused(tmp_path, MINIMAL + line)
    assert message in text
    assert text.startswith("x.yaml:")
    assert text.count("\n") == 0


def test_what_is_wrong_with_a_method_is_told_at_its_kind(tmp_path: Path) -> None:
    text = refused(tmp_path, MINIMAL.replace("lora", "lorra"))
    assert text.startswith("x.yaml:6: method.kind: must be one of lora,")
    other = refused(tmp_path, MINIMAL.replace("kind: lora", "kind: lora\n  num_virtual_tokens: 4"))
    assert "method.num_virtual_tokens: belongs to kind: ptuning_v2, but" in other


def test_problems_stand_in_the_order_of_the_file_and_those_of_the_command_line_last(
    tmp_path: Path,
) -> None:
    lines = refused(tmp_path, MINIMAL + "  sed: 1\n  max_steps: 0\n", "data.max_length=0").split(
        "\n"
    )
    assert [line.split(": ")[0].strip() for line in lines[1:]] == ["x.yaml:9", "x.yaml:10", "command line"]  # fmt: skip
    nested = refused(tmp_path, MINIMAL, "deepspeed={zero_stage: 9, config: 3}")
    assert "  command line: deepspeed.zero_stage: must be one of 0" in nested
    twice = refused(tmp_path, MINIMAL + "  seed: 1\n  seed: x\n")
    assert twice.count("training.seed") == 1
    both = refused(tmp_path, MINIMAL + "  max_steps: 0\n  num_epochs: 1\n")
    assert "2 problems" in both


def test_lines_in_messages_are_those_of_an_editor(tmp_path: Path) -> None:
    for content, line in ((b"a: 1\n\nb: \x07\n", 3), (b"a: 1\nb: \xff\n", 2), (b"\xff", 1)):
        (tmp_path / "x.yaml").write_bytes(content)
        assert str(parse_file(tmp_path / "x.yaml").problems[0]).startswith(f"{tmp_path}/x.yaml:{line}:")  # fmt: skip
    assert "given twice, first in line 1" in str(parse("a: 1\na: 2\n", "x").problems[0])
    assert "given twice, first in before" in str(parse("{a: 1, a: 2}", "x", numbered=False).problems[0])  # fmt: skip


def test_a_file_is_read_up_to_its_limits(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(MINIMAL.encode().ljust(MAX_BYTES))
    assert parse_file(file).whole
    file.write_bytes(MINIMAL.encode().ljust(MAX_BYTES + 1))
    assert "is larger than" in str(parse_file(file).problems[0])
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x").problems == []
    assert "nested deeper" in str(parse("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "x").problems[0])  # fmt: skip
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert parse_file(file).value == TREE


@pytest.mark.parametrize(
    ("text", "value"),
    [("0o17", 15), ("0x1F", 31), ("1" * 100, int("1" * 100)), ("1" * 101, "1" * 101), ("12345678901", 12345678901), ("1.2345678901e-3", 1.2345678901e-3), (".inf", math.inf)],
)  # fmt: skip
def test_numbers_of_any_length_are_numbers(text: str, value: Any) -> None:
    assert resolve(text) == value


def test_quotes_make_text_of_anything() -> None:
    found = parse("a: '5'\nb: \"true\"\nc: |\n  7\nd: 7\n", "x").value
    assert found == {"a": "5", "b": "true", "c": "7\n", "d": 7}
    assert "`&b` is refused" in str(parse("a: &b {c: 1}\n", "x").problems[0])


def test_a_configuration_that_is_written_is_read_back_with_the_text_that_looks_like_numbers() -> (
    None
):
    for text in ("5e-4", "null", "true", "0x10", "~", "2024", "a\u0085b", "- a", "yes"):
        config = RunConfig.model_validate({**TREE, "model": {"path": text}})
        assert parse(dump_config(config), "x").value["model"]["path"] == text
    by_file = RunConfig.model_validate({**TREE, "deepspeed": {"config": "z.json"}})
    assert config_tree(by_file)["deepspeed"] == {"config": "z.json"}
    assert load_mapping(config_tree(by_file)).config == by_file


@pytest.mark.parametrize(
    ("tokens", "batch", "length", "world", "sharing", "passes"),
    [(65_536, 1, 4096, 4, 1, 4), (65_536, 1, 4096, 4, 2, 8), (100, 1, 4096, 4, 1, 1), (7_000, 2, 1000, 1, 1, 4), (6_900, 2, 1000, 1, 1, 3)],
)  # fmt: skip
def test_tokens_of_a_step_are_said_as_passes(
    tokens: int, batch: int, length: int, world: int, sharing: int, passes: int
) -> None:
    training = {"output_dir": "o", "tokens_per_step": tokens, "batch_size": batch, "sequence_parallel": sharing}  # fmt: skip
    tree = {
        **TREE,
        "training": training,
        "data": {"train": "a", "max_length": length, "packing": True},
    }
    found = settled(RunConfig.model_validate(tree), world).training
    assert (found.gradient_accumulation_steps, found.tokens_per_step) == (passes, None)


def test_another_method_on_the_command_line_leaves_what_the_command_line_said(
    tmp_path: Path,
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(MINIMAL + "", encoding="utf-8")
    assert load(file, ["method.kind=full"]).notes == ()
    assert "method.rank: belongs to kind: lora" in said(load, file, ["method.rank=3", "method.kind=full"])  # fmt: skip


# --- training.extra ------------------------------------------------------------------------------


def test_names_of_the_hub_and_slips_are_told_what_is_free() -> None:
    assert "a token must not land" in extra_problems({"hub_model_id": "x"})["hub_model_id"]
    assert "a token must not land" in extra_problems({"hub_": "x"})["hub_"]
    assert extra_problems({"adam_beta": 1})["adam_beta"].startswith("is not a field")
    meant = extra_problems({"adam_beta_2": 1})["adam_beta_2"]
    assert meant.endswith("did you mean adam_beta2?")


def test_each_optimizer_is_transformers_own_and_its_library_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert set(OPTIMIZERS.values()) <= set(extras.optimizer_names())
    assert OPTIMIZERS == {
        "adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw": "paged_adamw_32bit",
        "paged_adamw_8bit": "paged_adamw_8bit", "muon": "adamw_torch_fused",
    }  # fmt: skip
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for name in OPTIMIZERS:
        if name in ("adamw", "muon"):
            check_optimizer(name)
        else:
            assert f"training.optimizer: {name} needs bitsandbytes" in said(check_optimizer, name)


WORDS = {  # a word of a field of transformers -> a word of our option
    "batch": "batch_size", "epoch": "num_epochs", "accumulation": "gradient_accumulation_steps", "warmup": "warmup_steps",
    "checkpointing": "activation_checkpointing", "seed": "seed", "logging": "log_every_steps", "save_st": "save_every_steps",
    "fp16": "dtype", "bf16": "dtype", "norm": "max_grad_norm", "decay": "weight_decay", "scheduler": "lr_schedule",
    "max_steps": "max_steps", "learning_rate": "learning_rate", "output": "output_dir", "limit": "keep_checkpoints",
    "resume": "resume", "report": "report_to", "timeout": "process_timeout_minutes", "workers": "loader_workers",
    "length": "group_by_length", "sampling_strategy": "group_by_length", "eval_st": "every_steps", "eval_on_start": "at_start",
    "best": "best_metric", "greater": "best_metric", "deepspeed": "deepspeed",
}  # fmt: skip


@pytest.mark.parametrize("field", OWNED)
def test_a_field_that_an_option_sets_names_the_one_that_means_it(field: str) -> None:
    fitting = {option for word, option in WORDS.items() if word in field}
    assert any(OWNED[field].endswith(option) for option in fitting), (field, fitting)


# --- other programs ------------------------------------------------------------------------------


def test_a_program_is_told_by_most_of_its_marks_and_its_own_options_come_first() -> None:
    names = {"stage": "LLaMA-Factory", "micro_batch_size": "axolotl", "use_peft": "TRL", "train_type": "ms-swift", "data_config": "the original GLM-4 demo"}  # fmt: skip
    for mark, name in names.items():
        found = program_of({mark: 1, "x": 2})
        assert found is not None
        assert found.name == name
    both = program_of({"template": 1, "train_type": 2, "tuner_type": 3})
    assert both is not None
    assert both.name == "ms-swift"
    assert program_of({"model": 1, "method": 2, "stage": 3}) is None
    assert program_of({"x": 1}) is None
    assert told_of("dataset") == "the option is data.train"
    assert "data.validation" in str(told_of("val_size"))
    assert told_of("nobody") is None


def moved(folder: Path, old: dict[str, Any], **given: Any) -> Migration:
    (folder / "old.yaml").write_text(yaml.safe_dump(old), encoding="utf-8")
    return migrate(folder / "old.yaml", **given)


def test_what_several_old_options_mean_together(tmp_path: Path) -> None:
    old = {"cutoff_len": 8, "stage": "sft"}
    assert moved(tmp_path, {**old, "packing": True, "group_by_length": True}).values.get("data.group_by_length") is None  # fmt: skip
    stepped = moved(tmp_path, {**old, "max_steps": 5, "num_train_epochs": 2}).values
    assert (stepped["training.max_steps"], "training.num_epochs" in stepped) == (5, False)
    assert moved(tmp_path, {**old, "num_train_epochs": 2}).values["training.num_epochs"] == 2
    full = moved(
        tmp_path, {**old, "finetuning_type": "full", "lora_rank": 4, "quantization_bit": 4}
    )
    assert full.left["lora_rank"] == "belongs to another method than full"
    assert {"method.rank", "model.quantization"}.isdisjoint(full.values)
    assert moved(tmp_path, {**old, "lora_rank": 4}).values["method.kind"] == "lora"
    assert moved(tmp_path, old).values["method.kind"] == "full"
    assert (
        moved(tmp_path, {**old, "model_name_or_path": "a"}, model="b").values["model.path"] == "b"
    )
    assert moved(tmp_path, old).values["data.train"] == FILL_IN
    assert moved(tmp_path, old, data="d").values["data.train"] == "d"
    passed = moved(tmp_path, {**old, "adam_beta2": "0.9", "ddp_backend": "gloo", "nobody": 1, "do_predict_": 1, "auto_find_batch_size": True})  # fmt: skip
    assert passed.values["training.extra.adam_beta2"] == 0.9
    assert passed.left["nobody"] == passed.left["auto_find_batch_size"] == "no such option here"
    assert (
        moved(tmp_path, {**old, "use_cpu": True}).left["use_cpu"]
        == "it is derived from the machine"
    )
    demo = {"data_config": {"train_file": "a.jsonl", "val_file": "b.jsonl"}}
    for data, train in (("folder", "folder/a.jsonl"), ("c.jsonl", "c.jsonl")):
        found = moved(tmp_path, demo, data=data).values
        assert found["data.train"] == train
    shares = moved(tmp_path, {**old, "val_size": 0.1}, data="folder").values
    assert shares["data.validation"] == "10%"


REGISTER = {
    "plain": {"file_name": "a.json"}, "said": {"file_name": "a.json", "formatting": "alpaca"},
    "openai": {"file_name": "a.json", "formatting": "openai"}, "odd": {"file_name": "a.json", "formatting": "other"},
    "named": {"file_name": "a.json", "columns": {"prompt": "q", "query": "i", "response": "r", "system": "s", "history": "history"}},
    "ranked": {"file_name": "a.json", "ranking": True}, "far": {"ms_hub_url": "a/b"}, "both": {"ms_hub_url": "c/d", "hf_hub_url": "a/b"}, "made": {"script_url": "x"},
    "tagged": {"file_name": "a.json", "tags": {"role_tag": "from", "user_tag": "USER"}},
}  # fmt: skip


def test_a_registered_data_set_is_a_source_of_ours(tmp_path: Path) -> None:
    left: dict[str, str] = {}
    register = Register(Path("d"), REGISTER)
    found = {name: source_of(name, register, left) for name in (*REGISTER, "gone", 3)}
    assert found["plain"] == found["said"] == {"path": "d/a.json", "format": "alpaca"}
    assert found["openai"]["format"] == "messages"
    assert found["both"]["path"] == "hf://a/b"
    assert found["odd"]["format"] == "auto"
    assert found["named"]["columns"] == {
        "instruction": "q",
        "input": "i",
        "output": "r",
        "system": "s",
    }
    assert found["far"] == {"path": "ms://a/b", "format": "alpaca"}
    assert found["made"] == found["gone"] == found[3] == FILL_IN
    assert set(left) == {"dataset ranked", "dataset made", "dataset gone", "dataset 3", "dataset tagged: tags"}  # fmt: skip
    assert "'user_tag': 'USER'" in left["dataset tagged: tags"]
    assert "role_tag" not in left["dataset tagged: tags"]
    beside = tmp_path / "sub/d"
    beside.mkdir(parents=True)
    (beside / "dataset_info.json").write_text(json.dumps(REGISTER))
    assert read_register("d", tmp_path / "sub") == Register(beside, REGISTER)
    assert read_register("d", tmp_path) == Register(Path("d"), {})


# --- the page of options -------------------------------------------------------------------------


def test_the_page_says_limits_as_they_are() -> None:
    fields = TrainingSection.model_fields
    assert _type(fields["batch_size"]) == "integer > 0"
    assert _type(fields["warmup_steps"]) == "number ≥ 0"
    assert _type(fields["seed"]) == "integer ≥ 0, < 4294967296"
    kinds = {problems.METHODS[name].model_fields["kind"].description for name in problems.METHODS}
    assert not kinds & set(texts()) - {None}
