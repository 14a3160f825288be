"""Public tasks reach a model through lm-evaluation-harness, or say what is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from rows import turns, write_rows

from finetune.errors import ConfigError
from finetune.evaluation import harness
from finetune.evaluation.evaluate import Options, evaluate


def test_without_the_harness_the_extra_is_named_before_a_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, tiny_glm: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "no_such_package")
    data = write_rows(tmp_path / "dev.jsonl", [{"messages": turns("a", "b")}])
    with pytest.raises(ConfigError, match=r"pip install 'glm4-finetune\[tasks\]'"):
        evaluate(str(tiny_glm), [str(data)], options=Options(tasks=("ceval",)))


def test_tasks_are_asked_in_one_process_and_their_files_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "json")
    harness.check_harness(())
    with pytest.raises(ConfigError, match=r"gone\.yaml is no file"):
        harness.check_harness(("ceval", "gone.yaml"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        harness.check_harness(("ceval",))


def test_scores_of_tasks_are_read_with_their_errors() -> None:
    found = {
        "results": {"own": {"alias": "own", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,x": 0.2,
                            "f1_stderr,x": "N/A"}},
        "n-samples": {"own": {"original": 9, "effective": 4}},
    }  # fmt: skip
    assert harness._scores(found) == {
        "own/acc": {"value": 0.5, "low": 0.5 - 0.196, "high": 0.5 + 0.196, "n": 4},
        "own/f1": {"value": 0.2, "low": None, "high": None, "n": 4},
    }


def task(folder: Path) -> Path:
    rows = [
        {"question": f"Is {n} even?", "choices": ["yes", "no"], "answer": n % 2} for n in range(6)
    ]
    write_rows(folder / "rows.jsonl", rows)
    file = folder / "even_or_odd.yaml"
    file.write_text(
        "task: even_or_odd\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    return file


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_a_task_of_ones_own_is_asked_and_kept(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "dev.jsonl", [{"messages": turns("a", "b")}])
    options = Options(tasks=(str(task(tmp_path)),))
    changes = {"generate": False}
    report = evaluate(str(tiny_glm), [str(data)], output=tmp_path / "a", changes=changes, options=options)  # fmt: skip
    score = report["targets"][0]["scores"]["even_or_odd/acc"]
    assert score["n"] == 6
    assert score["low"] < score["value"] < score["high"]
    assert "harness" in report["signatures"]["even_or_odd/acc"]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr("finetune.evaluation.job.run_tasks", refuse)
    again = evaluate(str(tiny_glm), [str(data)], output=tmp_path / "b", changes=changes, options=options)  # fmt: skip
    assert again["targets"] == report["targets"]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="no nonsense_task"):
        evaluate(str(tiny_glm), [str(data)], changes=changes, options=Options(tasks=("nonsense_task",)))  # fmt: skip
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text("utf-8"))["slices"] == {}
