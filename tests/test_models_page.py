"""docs/models.md says of every family what was run, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from finetune.models.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "models_page", ROOT / "scripts/docs/models_page.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["models_page"] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_what_the_script_makes_of_what_was_run(script: ModuleType) -> None:
    for file, text in script.pages().items():
        assert file.read_text("utf-8") == text, "run: python scripts/docs/models_page.py"


def test_every_family_has_its_row(script: ModuleType) -> None:
    assert {kind for _, kind, *_ in script.FAMILIES} == FAMILIES.keys()


def test_no_step_of_any_cell_failed_without_a_name(script: ModuleType) -> None:
    held = json.loads(script.FILE.read_text("utf-8"))
    failed = {
        f"{family} {method} ZeRO-{stage} {step}": text
        for family, methods in held["cells"].items()
        for method, stages in methods.items()
        for stage, cell in stages.items()
        for step, text in cell.items()
        if text and not text.startswith(script.REFUSED)
    }
    assert failed == {}
