"""`finetune init`: a configuration for these rows, this model and this card, and the next command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
from command_line import exit_code

from finetune.cli import init
from finetune.config.load import load
from finetune.config.schema import RunConfig
from finetune.errors import ConfigError
from finetune.planning.plan import Gpu

Fits = Callable[[RunConfig], bool]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return runs.write_dialogues(tmp_path / "rows.jsonl", 60)


def test_a_configuration_that_fits_is_written_with_its_next_command(
    rows: Path, tiny_chatglm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "my.yaml"
    words = ("init", "--data", str(rows), "--model", str(tiny_chatglm), "--gpus", "2", "--gpu", "24GB", "--output", str(output))  # fmt: skip
    assert exit_code(*words) == 0
    loaded = load(output)
    config = loaded.config
    assert loaded.notes == ()
    assert (config.data.train, config.data.validation, config.data.packing) == (str(rows), "20%", True)  # fmt: skip
    assert (config.method.kind, config.training.activation_checkpointing) == ("lora", False)
    text = output.read_text(encoding="utf-8")
    assert text.startswith(f"# finetune launch -n 2 {output}\n")
    assert "60 dialogues, 0 of them twice" in text
    assert "all activations are kept" in text
    assert f"next: finetune launch -n 2 {output}\n" in capfd.readouterr().out
    assert exit_code(*words) == 2
    assert "exists already" in capfd.readouterr().err


def drafted(
    rows: Path, model: Path, fits: Fits, monkeypatch: pytest.MonkeyPatch, gpus: int = 1
) -> init.Draft:
    """What is written when of all ways only one fits, as `fits` says of its config."""

    def planned(config: RunConfig, gpu: Gpu) -> tuple[None, SimpleNamespace]:
        return None, SimpleNamespace(fits=fits(config), memory_bytes=9e9, gpu=gpu)

    monkeypatch.setattr(init, "planned", planned)
    return init.draft(str(rows), str(model), Gpu(bytes=10**10, number=gpus), Path("my.yaml"))


@pytest.mark.parametrize(
    ("fits", "gpus", "key", "value"),
    [
        (
            lambda c: c.training.activation_checkpointing,
            1,
            "training.activation_checkpointing",
            True,
        ),
        (lambda c: c.deepspeed is not None, 2, "deepspeed.zero_stage", 3),
        (lambda c: c.model.quantization is not None, 1, "model.quantization", "nf4"),
        (lambda c: c.data.max_length < 2000, 1, "data.max_length", 1024),
    ],
)
def test_what_does_not_fit_gives_way_to_what_holds_less(
    fits: Fits, gpus: int, key: str, value: object, rows: Path, tiny_chatglm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    found = drafted(rows, tiny_chatglm, fits, monkeypatch, gpus)
    section, _, name = key.partition(".")
    assert found.tree[section][name] == value
    assert found.tree["training"]["activation_checkpointing"] is True
    assert found.command == (
        "finetune launch -n 2 my.yaml" if gpus == 2 else "finetune train my.yaml"
    )


def test_nothing_that_fits_is_an_error_with_the_least_that_is_needed(
    rows: Path, tiny_chatglm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"at the least 9\.0 GB .* and --gpu is 10 GB"):
        drafted(rows, tiny_chatglm, lambda c: False, monkeypatch)


def test_bad_rows_are_named_before_anything_is_planned(
    rows: Path, tiny_chatglm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows.write_text(rows.read_text() + '{"messages": []}\n', encoding="utf-8")
    words = ("--data", str(rows), "--model", str(tiny_chatglm), "--gpus", "1", "--gpu", "24GB")
    assert exit_code("init", *words, "--output", str(rows.parent / "my.yaml")) == 2
    said = capfd.readouterr().err
    assert "1 bad rows, first " in said
    assert f"`finetune data check {rows}` lists them" in said


def test_what_is_not_given_is_asked_for_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "my.yaml")
    assert exit_code("init", "--output", output) == 2
    assert "--data is not given, and there is no terminal" in capfd.readouterr().err
    assert exit_code("init", "--output", str(tmp_path / ("x" * 300))) == 2
    assert "cannot be written (File name too long)" in capfd.readouterr().err
    asked: list[tuple[str, object]] = []

    def prompt(what: str, default: object, *, err: bool) -> object:
        assert err, "standard output is for the answer"
        asked.append((what, default))
        return default or str(tmp_path / "none.jsonl")

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("typer.prompt", prompt)
    assert exit_code("init", "--output", output, "--model", str(tmp_path)) == 2
    rest: list[tuple[str, object]] = [("GPUs", 1), ("Memory of each GPU", "24GB")]
    assert asked == [("Data (a file, a glob or a folder)", None), *rest]
    asked.clear()
    assert exit_code("init", "--output", output, "--data", str(tmp_path / "none.jsonl")) == 2
    assert asked == [("Model", "THUDM/glm-4-9b-chat"), *rest]


@pytest.mark.parametrize("config", [{"vision_config": {"x": 1}}, {"n_routed_experts": 4}])
def test_encoders_and_experts_are_not_held_in_4_bits(
    config: dict[str, object], rows: Path, tiny_chatglm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "read_json", lambda file: config)
    with pytest.raises(ConfigError, match="does not fit"):
        drafted(rows, tiny_chatglm, lambda c: c.model.quantization is not None, monkeypatch)
