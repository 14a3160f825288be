"""Configurations: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

from pathlib import Path

import config_text
import pytest
from config_text import (
    CONTRADICTIONS,
    MINIMAL,
    SURPRISES,
    UNKNOWN_KEYS,
    WRONG_KINDS,
    WRONG_SOURCES,
)

from finetune.config.load import dump_config, load, load_config
from finetune.config.schema import LoraMethod
from finetune.config.yaml_text import resolve
from finetune.errors import ConfigError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes x.yaml into a working directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    return config_text.write


@pytest.fixture
def refused(write):
    """The message with which a text and overrides are refused."""
    return config_text.refused


# What is read


def test_a_minimal_file_is_enough_and_gets_the_defaults(write):
    config = load_config(write(MINIMAL))
    assert config.model.path == "some/model"
    assert config.method == LoraMethod()
    assert config.training.learning_rate == 5e-4
    assert config.deepspeed is None


def test_5e_4_is_a_number(write):
    assert load_config(write(MINIMAL + "  learning_rate: 5e-4\n")).training.learning_rate == 0.0005


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-3", -3), ("010", 10),
        ("0x10", 16), ("0o17", 15), ("true", True), ("False", False), ("~", None), ("null", None),
        ("", None), ("yes", "yes"), ("off", "off"), ("2024-01-01", "2024-01-01"), ("1:30", "1:30"),
        ("1_000", "1_000"), ("e5", "e5"), ("你好", "你好"), ("1e", "1e"), ("-.inf", float("-inf")),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema_of_yaml_1_2(text, value):
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


def test_quoted_numbers_are_text(write):
    config = load_config(write(MINIMAL.replace("some/model", "'2024'")))
    assert config.model.path == "2024"


def test_a_section_with_every_line_commented_out_is_an_empty_section(write):
    config = load_config(write(MINIMAL + "evaluation:\n  # every_steps: 5\n"))
    assert config.evaluation.every_steps is None


def test_a_byte_order_mark_is_no_part_of_the_text(write):
    assert load_config(write(b"\xef\xbb\xbf" + MINIMAL.encode())).model.path == "some/model"


def test_environment_variables_and_tildes_stay_as_they_are_written(write, monkeypatch):
    monkeypatch.setenv("SECRET", "expanded")
    config = load_config(write(MINIMAL.replace("some/model", "~/$SECRET/${SECRET}")))
    assert config.model.path == "~/$SECRET/${SECRET}"
    assert "expanded" not in dump_config(config)


def test_relative_paths_stay_relative_to_the_working_directory(write):
    config = load_config(write(MINIMAL))
    assert config.data.train == "train.jsonl"
    assert config.training.output_dir == "runs/x"


# What is refused


def test_every_problem_is_reported_at_once_with_its_line_and_key(refused):
    message = refused(
        "model:\n  path: some/model\n  dtyp: auto\n"
        "data:\n  train: a.jsonl\n  max_length: long\n"
        "method:\n  kind: lora\n  rank: 0\n"
        "training:\n  max_steps: 1\n  num_epochs: 1\n  seed: 1\n  seed: 2\n"
    )
    assert message.splitlines() == [
        "6 problems in the configuration:",
        "  x.yaml:3: model.dtyp: unknown key in model; did you mean dtype?",
        "  x.yaml:6: data.max_length: must be a whole number, got 'long'",
        "  x.yaml:9: method.rank: must be greater than 0, got 0",
        "  x.yaml:10: training.output_dir: is required: The run directory",
        "  x.yaml:12: training.num_epochs: contradicts training.max_steps: give one of the two "
        "(null removes the other)",
        "  x.yaml:14: training.seed: given twice, first in line 13; remove one",
    ]


@pytest.mark.parametrize(("line", "said"), UNKNOWN_KEYS)
def test_an_unknown_key_is_refused_with_the_nearest_name(refused, line, said):
    assert said in refused(MINIMAL + line)


@pytest.mark.parametrize(("line", "said"), WRONG_KINDS)
def test_a_value_of_the_wrong_kind_is_refused_with_the_right_kind(refused, line, said):
    assert said in refused(MINIMAL + line)


@pytest.mark.parametrize(("train", "said"), WRONG_SOURCES)
def test_a_wrong_source_is_one_problem_at_its_own_place(refused, train, said):
    message = refused(MINIMAL.replace("train.jsonl", train))
    assert said in message
    assert len(message.splitlines()) == 1


def test_a_lora_key_under_full_is_an_error_that_says_so(refused):
    message = refused(MINIMAL.replace("kind: lora", "kind: full\n  rank: 8"))
    assert "x.yaml:7: method.rank: belongs to kind: lora" in message
    assert "but method.kind is full" in message


def test_an_unknown_or_missing_method_names_the_methods(refused):
    assert "method.kind: must be one of lora," in refused(MINIMAL.replace("lora", "lorra"))
    assert "did you mean lora?" in refused(MINIMAL.replace("lora", "lorra"))
    assert "x.yaml:5: method.kind: is required: lora or " in refused(
        MINIMAL.replace("kind: lora", "rank: 8")
    )


@pytest.mark.parametrize(("content", "said"), SURPRISES)
def test_what_is_surprising_in_yaml_is_refused_with_its_place(refused, content, said):
    assert said in refused(content)


def test_an_alias_bomb_is_refused_without_expanding_it(refused):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert "x.yaml:2: a1[8]: `*a0` is refused" in refused("\n".join(lines))


def test_a_missing_file_names_the_nearest_one(write):
    write(MINIMAL)
    with pytest.raises(ConfigError, match=r"x\.yml: no such file .*did you mean x\.yaml"):
        load_config(Path("x.yml"))
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(Path())


# What must hold together


@pytest.mark.parametrize(("lines", "key", "said"), CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused(refused, lines, key, said):
    message = refused(MINIMAL + lines)
    assert key in message
    assert said in message


def test_columns_are_for_prompt_response_rows(refused):
    lines = "train.jsonl\n  format: openai\n  columns: {prompt: a, response: b}"
    assert "data.columns: are names for prompt/response rows, but data.format is openai" in refused(
        MINIMAL.replace("train.jsonl", lines)
    )


def test_a_target_pattern_must_be_a_regular_expression(refused):
    message = refused(MINIMAL.replace("kind: lora", "kind: lora\n  target_modules: '('"))
    assert "method.target_modules: is not a regular expression" in message


def test_real_extra_fields_are_passed_on(write):
    config = load_config(write(MINIMAL + "  extra: {optim: adafactor, adam_beta2: 0.95}\n"))
    assert config.training.extra == {"optim": "adafactor", "adam_beta2": 0.95}


def test_options_without_effect_are_noted(write):
    loaded = load(write(MINIMAL + "evaluation:\n  every_steps: 5\n"))
    assert loaded.notes == (
        "x.yaml:10: evaluation.every_steps: has no effect: there is no data.validation",
    )
