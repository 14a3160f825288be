"""`finetune status`: what a run's files say of how far it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import exit_code
from config_text import MINIMAL

from finetune.artifacts.run_dir import LOCK, RunDirectory
from finetune.errors import ConfigError
from finetune.report.status import read_status


def write_run(folder: Path, training: str = "  max_steps: 20\n") -> Path:
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(MINIMAL + training, encoding="utf-8")
    lines = [
        {"step": 0, "eval_loss": 3.0},
        {"step": 5, "epoch": 0.5, "loss": 2.5, "learning_rate": 1e-4, "tokens_per_second": 900.0, "seconds_per_step": 2.0},
        {"step": 10, "epoch": 1.0, "loss": 2.0, "learning_rate": 2e-4, "tokens_per_second": 1000.0, "seconds_per_step": 3.0},
        {"step": 10, "epoch": 1.0, "eval_loss": 2.1},
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / LOCK).write_text("process 1 on there\n")
    return run


def test_a_run_that_is_held_says_step_loss_pace_and_who_is_at_it(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with RunDirectory.open(run):
        found = read_status(run)
    assert (found.state, found.step, found.steps) == ("running", 10, 20)
    assert (found.loss, found.learning_rate, found.tokens_per_second) == (2.0, 2e-4, 1000.0)
    assert found.seconds_left == 30.0
    assert found.process is not None
    assert found.process.startswith("process ")
    assert (found.checkpoint, found.best) == (None, None)


def test_a_run_that_nobody_holds_is_stopped_or_done(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert (read_status(run).state, read_status(run).seconds_left) == ("stopped", None)
    (run / "config.yaml").write_text(MINIMAL + "  max_steps: 10\n", encoding="utf-8")
    assert read_status(run).state == "done"


def test_steps_of_a_run_by_epochs_are_the_checkpoint_s_or_follow_from_the_pace(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path, "  num_epochs: 2\n")
    assert read_status(run).steps == 20
    saved = run / "checkpoint-10"
    saved.mkdir()
    (saved / "trainer_state.json").write_text(json.dumps({"max_steps": 19}))
    best = {"checkpoint": "checkpoint-10", "metric": "loss", "value": 2.1}
    (run / "best.json").write_text(json.dumps(best))
    found = read_status(run)
    assert (found.steps, found.checkpoint, found.best) == (19, str(saved), str(saved))
    assert ["best checkpoint", f"{saved} (loss 2.1)"] in found.rows()


def test_a_run_before_its_first_line_has_a_status(tmp_path: Path) -> None:
    run = write_run(tmp_path, "")
    (run / "metrics.jsonl").unlink()
    found = read_status(run)
    assert (found.step, found.steps, found.loss, found.written) == (0, None, None, None)
    assert found.rows() == [["state", "stopped"], ["step", "0"], ["newest checkpoint", "none"]]


def test_the_command_answers_in_json_without_torch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it would fail
    assert exit_code("status", str(write_run(tmp_path)), "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["state"], found["step"], found["loss"]) == ("stopped", 10, 2.0)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        read_status(tmp_path)
