"""Values of `training.extra` are checked with the config, before data is prepared."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from config_text import MINIMAL

from finetune.config import extras
from finetune.config.load import load_config
from finetune.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{optim: muon}", "is set by training.optimizer: muon; use that"),
        ("{optim: adamw_torc}", "did you mean adamw_torch?"),
        ("{optim: 3}", "must be text, got 3"),
        ("{adam_beta2: high}", "must be a number, got 'high'"),
        ("{adam_beta2: true}", "must be a number, got true"),
        ("{tf32: 1}", "must be true or false or null, got 1"),
        ("{torch_empty_cache_steps: 1.5}", "must be a whole number or null, got 1.5"),
        ("{neftune_noise_alpha: [5]}", "must be a number or null, got a list"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_key(
    given: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(MINIMAL + f"  extra: {given}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    key = given.strip("{").partition(":")[0]
    assert f"x.yaml:9: training.extra.{key}: " in str(caught.value)
    assert said in str(caught.value)


def test_an_optimizer_whose_library_is_missing_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        extras, "find_spec", lambda name: real(name) if name == "transformers" else None
    )
    found = extras.extra_problems({"optim": "galore_adamw"})
    assert found == {"optim": "galore_adamw needs a library that is not installed: galore_torch"}
    assert extras.extra_problems({"optim": "adafactor"}) == {}


@pytest.mark.parametrize(
    ("library", "mark"),
    [(library, mark) for library, marks in extras.BY_LIBRARY.items() for mark in marks],
)
def test_every_name_with_the_mark_of_a_library_asks_for_it(
    library: str, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == library else real(name))
    every = {*extras.optimizer_names(), *extras.NAMED_OPTIMIZERS}
    names = [name for name in every if name.startswith(mark)]
    asked = [name for name in names if name not in extras.NAMED_OPTIMIZERS]
    for name in asked:
        assert library in extras.extra_problems({"optim": name}).get("optim", ""), name
    assert asked or set(names) & extras.NAMED_OPTIMIZERS.keys()


@pytest.mark.parametrize(
    "good",
    [
        {"optim": "sgd", "adam_beta2": 0.95, "adam_epsilon": 1},
        {"tf32": None, "optim_target_modules": ["attn"], "accelerator_config": {"x": 1}},
        {"neftune_noise_alpha": 5.0, "run_name": "a", "torch_compile": False},
    ],
)
def test_values_of_the_declared_kinds_pass(good: dict[str, object]) -> None:
    assert extras.extra_problems(good) == {}


@pytest.mark.parametrize(
    "taken", sorted({*extras.OWNED, *extras.REFUSED} & {*extras.training_argument_names()})
)
def test_nobody_is_sent_from_a_misspelt_name_to_one_that_cannot_be_set(taken: str) -> None:
    said = extras.extra_problems({f"{taken}_": 1})[f"{taken}_"]
    assert not said.endswith(f"did you mean {taken}?")


def test_without_transformers_its_fields_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (extras._declared, extras._fields):
        cached.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(extras, "find_spec", lambda _: None)
            with pytest.raises(ModuleNotFoundError, match="pip install transformers"):
                extras.training_argument_names()
        with monkeypatch.context() as patch:
            patch.setattr(extras.ast, "parse", lambda _: type("Tree", (), {"body": []}))
            with pytest.raises(ModuleNotFoundError, match="has no TrainingArguments"):
                extras.training_argument_names()
    finally:
        for cached in (extras._declared, extras._fields):
            cached.cache_clear()
    assert extras.training_argument_names()[0] == "output_dir"
