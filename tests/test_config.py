"""Configurations: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune.config import FullMethod, LoraMethod, RunConfig
from finetune.config_file import dump_config, json_schema, load, load_config, reference_page
from finetune.config_file.extras import OWNED, REFUSED, training_argument_names
from finetune.config_file.yaml_text import parse, resolve
from finetune.errors import ConfigError

ROOT = Path(__file__).parent.parent

MINIMAL = """\
model:
  path: some/model
data:
  train: train.jsonl
method:
  kind: lora
training:
  output_dir: runs/x
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a text (or bytes) as x.yaml into the working directory, and gives its path."""
    monkeypatch.chdir(tmp_path)

    def writer(content: str | bytes) -> Path:
        path = Path("x.yaml")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return writer


@pytest.fixture
def refused(write):
    """The message with which a text and overrides are refused."""

    def message(content: str | bytes, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(write(content), overrides)
        assert caught.value.exit_code == 2
        return str(caught.value)

    return message


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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("  learning_rat: 1\n", "did you mean learning_rate?"),
        ("  max_length: 1\n", "the option is data.max_length"),
        ("  logging_steps: 1\n", "the option is training.log_every_steps"),
        ("  lora_alpha: 1\n", "the option is method.alpha"),
        ("  qqqq: 1\n", "it has output_dir, max_steps,"),
        ("<<: {max_steps: 1}\n", "x.yaml:9: <<: unknown key in the top level"),
        ("trainin: {}\n", "did you mean training?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(refused, line, said):
    assert said in refused(MINIMAL + line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("  batch_size: '2'\n", "must be a whole number, got '2'; write 2, without quotes"),
        ("  max_steps: 10_000\n", "write 10000"),
        ("  batch_size: true\n", "must be a whole number, got true"),
        ("  batch_size: 1.0\n", "must be a whole number, got 1.0"),
        ("  learning_rate: .nan\n", "must be a finite number"),
        ("  learning_rate: .inf\n", "must be a finite number"),
        ("  learning_rate: 0\n", "must be greater than 0, got 0"),
        ("  packing: yes\n", "unknown key in training; the option is data.packing"),
        ("  activation_checkpointing: yes\n", "must be true or false, got 'yes'"),
        ("  resume: 1\n", "must be text, got 1; put it in quotes if it is meant"),
        ("  report_to: wandb\n", "must be a list, got 'wandb'"),
        ("  report_to: [wandbb]\n", "training.report_to[0]: must be one of tensorboard, wandb"),
        ("  extra: []\n", "must be a mapping, got a list"),
        ("deepspeed:\n  zero_stage: 4\n", "must be one of 0, 1, 2, 3; got 4"),
        ("  max_steps: 99999999999999999999999999999x\n", "must be a whole number"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_the_right_kind(refused, line, said):
    assert said in refused(MINIMAL + line)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("5", "data.train: must be text or a list, got 5"),
        ("{path: a}", "data.train: must be text or a list, got a mapping"),
        ("[5]", "data.train[0]: must be text or a mapping, got 5"),
        (
            "[a, {path: b, wieght: 2}]",
            "data.train[1].wieght: unknown key in data.train[1]; did you",
        ),
        ("[a, {weight: 2}]", "data.train[1].path: is required: A file, a glob or a folder"),
        ("[{path: b, weight: 0}]", "data.train[0].weight: must be greater than 0, got 0"),
        ("[{path: b, format: openia}]", "data.train[0].format: must be one of auto, messages,"),
    ],
)
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (MINIMAL + "x: &a 1\n", "x.yaml:9: x: `&a` is refused"),
        (MINIMAL + "x: *a\n", "x.yaml:9: x: `*a` is refused"),
        (MINIMAL + "x: !!python/object/apply:os.system [ls]\n", "tag `!!python/object/apply:os.sy"),
        (MINIMAL + "x: !!str 5\n", "tag `!!str` is refused"),
        (MINIMAL + "---\nmodel: 1\n", "x.yaml:9: a second document begins here"),
        ("[" * 50_000, "x.yaml:1: [0][0]"),
        ("a: {" * 50_000, "nested deeper than 16 levels"),
        ("", "is empty; a configuration is a mapping"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "holds a list; a configuration is a mapping"),
        ("hello", "holds text"),
        ("{}", "4 problems"),
        (MINIMAL.encode() + b"x: \xff\n", "x.yaml:9: byte 0xff is not UTF-8"),
        (MINIMAL.encode("utf-16"), "is not UTF-8"),
        (MINIMAL + "x: \x07\n", "x.yaml:9: character 0x0007 is not allowed"),
        (MINIMAL + 'x: "\\ud800"\n', "x.yaml:9: x: holds a NUL or half a surrogate pair"),
        (MINIMAL + 'x: "a\\0b"\n', "holds a NUL"),
        (MINIMAL + "\tx: 1\n", "indent with spaces, not tabs"),
        (MINIMAL + "x: a: b\n", "put text that holds `: ` in quotes"),
        (MINIMAL + "x: [1, 2\n", "not valid YAML"),
        (MINIMAL + "? [1, 2]\n: 3\n", "x.yaml:9: a key must be plain text"),
        ("a: " + "x" * (1 << 20), "is larger than"),
    ],
)
def test_what_is_surprising_in_yaml_is_refused_with_its_place(refused, content, said):
    assert said in refused(content)


def test_an_alias_bomb_is_refused_without_expanding_it(refused):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert "x.yaml:30: a29[8]: `*a28` is refused" in refused("\n".join(lines))


def test_a_missing_file_names_the_nearest_one(write):
    write(MINIMAL)
    with pytest.raises(ConfigError, match=r"x\.yml: no such file .*did you mean x\.yaml"):
        load_config(Path("x.yml"))
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(Path())


# What must hold together


@pytest.mark.parametrize(
    ("lines", "key", "said"),
    [
        ("deepspeed:\n  zero_stage: 2\n  offload_parameters: cpu\n",
         "x.yaml:11: deepspeed.offload_parameters", "needs deepspeed.zero_stage 3, got 2"),
        ("deepspeed:\n  offload_parameters: cpu\n", "offload_parameters", "zero_stage 3, got 2"),
        ("deepspeed:\n  zero_stage: 0\n  offload_optimizer: cpu\n", "offload_optimizer", "1 or more"),
        ("deepspeed:\n  config: ds.json\n  zero_stage: 2\n", "deepspeed.zero_stage",
         "contradicts deepspeed.config"),
        ("evaluation:\n  best_metric: bleu-4\n", "x.yaml:10: evaluation.best_metric",
         "needs held-out dialogues: give data.validation"),
        ("evaluation:\n  best_metric: rouge-l\n  generate: false\n", "evaluation.best_metric",
         "needs generated replies, but evaluation.generate is false"),
        ("evaluation:\n  patience: 2\n", "evaluation.patience", "give evaluation.every_steps"),
        ("  warmup_steps: 1.5\n", "training.warmup_steps", "must be whole from 1 on"),
        ("  extra: {optmi: x}\n", "x.yaml:9: training.extra.optmi", "did you mean optim?"),
        ("  extra: {bf16: true}\n", "training.extra.bf16", "is set by model.dtype"),
        ("  extra: {fsdp: full_shard}\n", "training.extra.fsdp", "the section deepspeed"),
        ("  extra: {hub_token: x}\n", "training.extra.hub_token", "a token must not land in"),
    ],
)  # fmt: skip
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


# Overrides


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("training.learning_rate=1e-5", "training", "learning_rate", 1e-5),
        ("training.max_steps=7", "training", "max_steps", 7),
        ("data.validation=null", "data", "validation", None),
        ("data.validation=", "data", "validation", None),
        ("data.packing=true", "data", "packing", True),
        ("data.train=[a, b]", "data", "train", ["a", "b"]),
        ("model.path='7'", "model", "path", "7"),
        ("model.path=a=b", "model", "path", "a=b"),
        ("training.extra.optim=sgd", "training", "extra", {"optim": "sgd"}),
        ("training.extra={optim: sgd}", "training", "extra", {"optim": "sgd"}),
        ("deepspeed.zero_stage=3", "deepspeed", "zero_stage", 3),
    ],
)
def test_overrides_are_typed_like_yaml(write, override, section, name, value):
    config = load_config(write(MINIMAL), [override])
    assert getattr(getattr(config, section), name) == value


def test_the_last_override_of_a_key_wins(write):
    config = load_config(write(MINIMAL), ["training.seed=1", "training.seed=2"])
    assert config.training.seed == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.max_step=5", "command line: training.max_step: unknown key in training; did you "
         "mean max_steps?"),
        ("trainin.max_steps=5", "command line: trainin: unknown key in the top level; did you mean "
         "training?"),
        ("max_steps=5", "the option is training.max_steps"),
        ("max_steps", "`max_steps` is not of the form section.key=value"),
        ("=5", "is not of the form"),
        ("training..seed=5", "is not of the form"),
        ("model.path.x=5", "model.path is text, without keys; replace it as a whole"),
        ("data.validation=*.jsonl", 'goes in quotes: "*.jsonl"'),
        ("model.path=!!python/name:os.system x", "is refused"),
        ("training.seed=[1", "command line: training.seed: not valid YAML"),
        ("training.seed=1\n---\n2", "a second document begins here"),
        ("training.extra={a: 1, a: 2}", "training.extra.a: given twice, first in before"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_refused_by_name(refused, override, said):
    assert said in refused(MINIMAL, override)


def test_an_override_of_the_method_leaves_out_the_files_options_of_the_other_and_says_so(write):
    path = write(MINIMAL.replace("kind: lora", "kind: lora\n  rank: 16\n  alpha: 8"))
    loaded = load(path, ["method.kind=full"])
    assert loaded.config.method == FullMethod()
    assert "method.rank, method.alpha of the file left out" in loaded.notes[0]


def test_a_lora_override_under_full_is_an_error_that_says_so(refused):
    for overrides in (["method.kind=full", "method.rank=8"], ["method.rank=8", "method.kind=full"]):
        message = refused(MINIMAL, *overrides)
        assert message.startswith("command line: method.rank: belongs to kind: lora")


def test_a_section_can_be_replaced_as_a_whole(write):
    path = write(MINIMAL + "deepspeed:\n  zero_stage: 2\n")
    assert load_config(path, ["deepspeed=null"]).deepspeed is None
    assert load_config(path, ["method={kind: lora, rank: 4}"]).method == LoraMethod(rank=4)


# What is written


def test_a_resolved_configuration_is_read_back_equal(write):
    config = load_config(write(MINIMAL), ["training.learning_rate=1e-5", "data.train=['5e-4', no]"])
    assert load_config(write(dump_config(config))) == config
    assert config.data.train == ["5e-4", "no"]


def test_a_resolved_configuration_with_a_deepspeed_file_is_read_back_equal(write):
    config = load_config(write(MINIMAL + "deepspeed:\n  config: ds.json\n"))
    assert load_config(write(dump_config(config))) == config


@settings(deadline=None)
@example("a\x85b")
@example("\u2028")
@example("a\n  b: c\n")
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20))
def test_any_text_survives_the_resolved_configuration(text):
    config = RunConfig.model_validate(
        yaml.safe_load(MINIMAL) | {"model": {"path": text, "revision": text}}
    )
    document = parse(dump_config(config), "x")
    assert document.problems == []
    assert document.value["model"]["path"] == text


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_file_under_configs_loads_and_begins_with_its_command(path):
    loaded = load(path)
    assert loaded.notes == ()
    assert load_config_text(dump_config(loaded.config)) == loaded.config
    command, _, rest = path.read_text(encoding="utf-8").splitlines()[0].partition(" finetune.py ")
    assert command.startswith("# torchrun --nproc_per_node=")
    assert rest == path.relative_to(ROOT).as_posix()


def load_config_text(text: str) -> RunConfig:
    return RunConfig.model_validate(parse(text, "text").value, strict=True)


# The schema and the page


def test_the_reference_page_is_current():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page.rstrip() == reference_page().rstrip(), (
        "run: python -m finetune schema --markdown > docs/config.md"
    )


def test_the_reference_page_names_every_option():
    page = reference_page()
    schema = json_schema()
    for definition in schema["$defs"].values():
        for name in definition["properties"]:
            assert f"`{name}`" in page or name == "kind"


def test_the_schema_describes_every_option():
    schema = json_schema()
    assert schema["properties"].keys() == RunConfig.model_fields.keys()
    assert schema["additionalProperties"] is False
    for name, definition in schema["$defs"].items():
        for key, details in definition["properties"].items():
            assert "description" in details or key == "kind", f"{name}.{key}"
    json.dumps(schema)


# The fields of transformers.TrainingArguments


def test_the_fields_read_from_the_source_are_the_real_fields():
    from transformers import TrainingArguments

    real = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert set(training_argument_names()) == real


def test_options_that_are_ours_exist():
    sections = {
        f"{section}.{name}"
        for section, info in RunConfig.model_fields.items()
        for name in getattr(info.annotation, "model_fields", {})
    }
    for field, option in OWNED.items():
        assert option in sections or option == "the section deepspeed", field


def test_extra_cannot_set_what_the_trainer_sets_itself():
    tree = ast.parse((ROOT / "finetune/training/arguments.py").read_text(encoding="utf-8"))
    ours = {
        key.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant) and key.value in training_argument_names()
    }
    free = {"optim", "log_level", "log_level_replica", "include_num_input_tokens_seen"}
    assert "per_device_train_batch_size" in ours
    assert ours - free <= OWNED.keys() | REFUSED.keys()


def test_checking_a_configuration_imports_nothing_heavy(write):
    path = write(MINIMAL + "  extra: {optmi: x}\n")
    code = (
        "import sys; from pathlib import Path; from finetune.config_file import load_config\n"
        f"try: load_config(Path({str(path)!r}))\n"
        "except Exception as error: assert 'did you mean optim' in str(error), error\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout == "[]\n", done.stderr
