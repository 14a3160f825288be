"""`finetune train --dry-run`: everything but the steps, and nothing in the run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
import yaml
from command_line import exit_code

from finetune.artifacts.run_dir import RunDirectory


def config_file(model: Path, folder: Path, **changes: object) -> Path:
    data = runs.write_dialogues(folder / "train.jsonl", 24)
    settings = runs.config(model, data, folder / "run", **changes)
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def test_a_dry_run_says_what_would_happen_and_writes_no_run(
    tiny_chatglm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = config_file(tiny_chatglm, tmp_path, training__on_end="touch ended")
    assert exit_code("train", str(path), "--dry-run", "--json", "data.validation=50%") == 0
    out, said = capfd.readouterr()
    found = json.loads(out)
    assert (found["steps"], found["resumes_from"]) == (6, None)
    assert found["examples"] + found["validation_examples"] == 24
    assert found["model_tensors"] > 10
    assert found["memory_bytes_per_gpu"] > 1e5
    assert "start from  the beginning" in said
    assert not (tmp_path / "run").exists()
    assert not Path("ended").exists()


def test_a_dry_run_ends_as_the_run_would(
    tiny_chatglm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = config_file(tiny_chatglm, tmp_path)
    with RunDirectory.open(tmp_path / "run"):
        assert exit_code("train", str(path), "--dry-run") == 7
    assert "is in use by process" in capfd.readouterr().err
    weights = tmp_path / "model"
    weights.mkdir()
    for file in tiny_chatglm.iterdir():
        if not file.name.endswith(".safetensors"):
            (weights / file.name).write_bytes(file.read_bytes())
    assert exit_code("train", str(path), "--dry-run", f"model.path={weights}") == 2
    assert "has neither model.safetensors nor" in capfd.readouterr().err
