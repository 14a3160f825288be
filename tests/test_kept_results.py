"""What an evaluation keeps is used again exactly when nothing that decides it has changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rows import write_rows
from test_evaluation_runs import GENERATE, cache, checkpoints, held_out, place

from finetune.errors import ModelError, NonFiniteError
from finetune.evaluation.evaluate import evaluate
from finetune.generation.load import Models

__all__ = ["cache", "place"]  # fixtures


def refuse_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(Models, "open", refuse)


def test_other_options_of_an_adapter_and_another_dtype_are_generated_anew(
    place: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(place / "lora", tmp_path / "lora")
    target = str(run / "checkpoint-2")
    evaluate(target, output=tmp_path / "a", changes=GENERATE)
    refuse_to_open(monkeypatch)
    evaluate(target, output=tmp_path / "b", changes=GENERATE)
    for name, before, after in (
        ("checkpoint-2/adapter_config.json", '"lora_alpha": 32', '"lora_alpha": 16'),
        ("checkpoint-2/config.yaml", "dtype: float32", "dtype: bfloat16"),
    ):
        text = (run / name).read_text("utf-8")
        assert before in text
        (run / name).write_text(text.replace(before, after), "utf-8")
        with pytest.raises(AssertionError, match="opened"):
            evaluate(target, output=tmp_path / "c", changes=GENERATE)
        (run / name).write_text(text, "utf-8")


def test_kept_scores_that_lost_lines_are_made_again(
    place: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = checkpoints(place)[0]
    first = evaluate(target, output=tmp_path / "a", changes=GENERATE)
    refuse_to_open(monkeypatch)
    [kept] = (cache / "evaluations").glob("*/scored-*.jsonl")
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[:-3]))
    again = evaluate(target, output=tmp_path / "b", changes=GENERATE)
    assert again["targets"] == first["targets"]


def test_a_base_with_a_weight_that_is_no_number_is_no_result(
    tiny_glm: Path, cache: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_glm, tmp_path / "spoilt")
    [file] = model.glob("*.safetensors")
    weights = load_file(file)
    weights["lm_head.weight"][3, 0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    data = write_rows(tmp_path / "dev.jsonl", held_out(4))
    with pytest.raises((NonFiniteError, ModelError), match=r"NaN|finite"):
        evaluate(str(model), [str(data)], output=tmp_path / "out", changes={"generate": False})
    assert not (tmp_path / "out").exists()
