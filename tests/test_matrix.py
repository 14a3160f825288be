"""Methods x stages x processes: parts of the tables of scripts/bench, through the same programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs

ROOT = Path(__file__).resolve().parent.parent
# SMOOTH_STEPS of tests/closeness.py, as the programs take it.
SMOOTH = 'training__extra={"adam_epsilon": 0.01}'


def answer(program: str, *arguments: str) -> dict[str, Any]:
    """What a program prints as JSON; it ends well."""
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *arguments],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_losses_saved_weights_and_replies_do_not_depend_on_the_stage() -> None:
    found = answer(
        "scripts/bench/stage_matrix.py", "--json", "--processes", "2", "--stages", "0", "3",
        "--methods", "ptuning_v2_projection", "full", "--with", SMOOTH,
    )  # fmt: skip
    assert found["missed"] == {}
    assert len(found["cells"]) == 4
    assert all(cell["same_replies"] for cell in found["cells"].values())


def test_a_prefix_is_trained_alike_when_packed_recomputed_and_sharded() -> None:
    found = answer(
        "scripts/bench/stage_matrix.py", "--json", "--processes", "2", "--stages", "3",
        "--methods", "ptuning_v2", "--family", "glm4",
        "--with", "data__packing=true", "training__activation_checkpointing=true", SMOOTH,
    )  # fmt: skip
    assert found["missed"] == {}


def test_bfloat16_stays_in_its_band_around_float32() -> None:
    found = answer(
        "scripts/bench/stage_matrix.py", "--json", "--processes", "1", "--dtype", "bfloat16",
        "--methods", "lora", "full", "--stages", "0", "3",
    )  # fmt: skip
    assert found["missed"] == {}


def test_with_images_among_the_dialogues_stages_and_processes_agree() -> None:
    found = answer(
        "scripts/bench/stage_matrix.py", "--json", "--processes", "2", "--stages", "2", "3",
        "--methods", "ptuning_v2", "full", "--family", "glm4v", "--with", SMOOTH,
    )  # fmt: skip
    assert found["missed"] == {}
    assert len(found["cells"]) == 4
    assert all(cell["same_replies"] for cell in found["cells"].values())


def test_batches_without_any_image_train_a_tower_alike_on_every_rank(tmp_path: Path) -> None:
    data = runs.write_dialogues(tmp_path / "text.jsonl", 21)
    found = answer(
        "scripts/bench/stage_matrix.py", "--json", "--processes", "2", "--stages", "2", "3",
        "--methods", "full", "--family", "glm4v",
        "--with", f"data__train={json.dumps(str(data))}", "model__freeze=[]", SMOOTH,
    )  # fmt: skip
    assert found["missed"] == {}
    assert len(found["cells"]) == 2


@pytest.mark.parametrize(
    ("method", "stage", "variant", "family"),
    [
        ("full", "3", "accumulation", "chatglm"),
        ("ptuning_v2", "2", "packing", "chatglm"),
        ("lora", "none", "evaluation", "chatglm"),
        ("lora", "3", "loader_workers", "glm4v"),
        ("lora", "3", "plain", "glm4.1v"),
    ],
)
def test_a_resumed_run_is_equal_bit_for_bit(
    method: str, stage: str, variant: str, family: str
) -> None:
    found = answer(
        "scripts/bench/resume_matrix.py", "--json", "--methods", method, "--stages", stage,
        "--variants", variant, "--moments", "middle", "epoch", "--family", family,
    )  # fmt: skip
    assert (found["equal"], found["of"]) == (2, 2)


def test_a_cell_of_the_table_of_families_is_trained_resumed_evaluated_merged_and_served(
    tmp_path: Path,
) -> None:
    file = tmp_path / "cells.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/evidence/family_matrix.py"), str(file),
         "--families", "glm4v_moe", "--methods", "lora", "--stages", "2"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = json.loads(file.read_text(encoding="utf-8"))["cells"]["glm4v_moe"]["lora"]["2"]
    assert steps == dict.fromkeys(("train", "resume", "evaluate", "merge", "serve"), "")


def test_a_run_goes_on_at_another_number_of_processes_under_zero_too() -> None:
    found = answer("scripts/bench/world_size.py", "--json")
    assert found["good"], found
    assert len(found["places"]) == 9


def test_every_config_runs_two_steps_on_a_tiny_model(tmp_path: Path) -> None:
    found = answer("tests/config_runs.py", str(tmp_path))
    assert found["problems"] == {}
    assert found["ran"] == sorted(path.name for path in (ROOT / "configs").rglob("*.yaml"))
    assert len(found["ran"]) >= 10
