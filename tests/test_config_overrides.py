"""Overrides on the command line: typed like the file, refused by name."""

from __future__ import annotations

import config_text
import pytest
from config_text import MINIMAL

from finetune.config import problems
from finetune.config.load import load, load_config
from finetune.config.schema import FullMethod, LoraMethod


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes x.yaml into a working directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    return config_text.write


@pytest.fixture
def refused(write):
    """The message with which a text and overrides are refused."""
    return config_text.refused


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


def test_a_method_that_there_is_not_leaves_nothing_out_and_is_refused(refused):
    for kind in ("other", "[lora]", "{}"):
        assert "command line: method.kind: must be one of lora," in refused(
            MINIMAL, f"method.kind={kind}"
        )
    odd = MINIMAL.replace("kind: lora", "kind: [lora]")
    assert "method.rank: belongs to" not in refused(odd, "training.seed=x")
    whole = refused(MINIMAL.replace("method:\n  kind: lora", "method: lora"), "method.kind=full")
    assert "method is text, without keys; replace it as a whole" in whole


def test_what_pydantic_says_of_itself_is_told_with_the_value():
    item = {"type": "odd", "msg": "Input is odd", "input": 5, "loc": ()}
    assert problems._sentence(("a",), item, {}) == (("a",), "Input is odd, got 5")
    assert problems._meaning(("nobody", "x"), {}) == ""
    assert problems.model_at(("training", "extra", "a"), {"training": {"extra": {}}}) is None
    assert problems.model_at(("training",), {"training": {}}) is problems.RunConfig.model_fields["training"].annotation  # fmt: skip


def test_a_section_of_the_command_line_lacks_its_keys_there(refused):
    message = refused(
        "model: {path: m}\ndata: {train: a}\nmethod: {kind: lora}\n", "training.seed=1"
    )
    assert message.startswith("command line: training.output_dir: is required")
    listed = refused("- *a\n")
    assert "x.yaml:1: [0]: `*a` is refused" in listed
    assert "holds a list; a configuration is a mapping" in listed
    assert "is empty" not in refused("a: [\n"), "what cannot be read to its end is not empty"
