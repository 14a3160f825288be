"""What is made of the configuration: its resolved text, the schema, the page, the extra fields."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import config_text
import pytest
import yaml
from config_text import MINIMAL
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune.config.extras import OWNED, REFUSED, training_argument_names
from finetune.config.load import dump_config, json_schema, load, load_config, reference_page
from finetune.config.schema import RunConfig
from finetune.config.yaml_text import parse

ROOT = Path(__file__).parent.parent


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes x.yaml into a working directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    return config_text.write


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
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20))
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
        "import sys; from pathlib import Path; from finetune.config.load import load_config\n"
        f"try: load_config(Path({str(path)!r}))\n"
        "except Exception as error: assert 'did you mean optim' in str(error), error\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout == "[]\n", done.stderr


def test_what_is_written_is_read_by_people_in_the_order_of_the_page(write):
    text = dump_config(load_config(write(MINIMAL.replace("some/model", "模型/甲"))))
    assert "path: 模型/甲" in text
    sections = [line.rstrip(":") for line in text.splitlines() if line[0].isalpha()]
    assert [name.split(":")[0] for name in sections] == list(RunConfig.model_fields)
    assert text.index("max_steps:") < text.index("batch_size:")
