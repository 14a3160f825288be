"""The notebook runs from its first cell to its last, in a kernel of its own, on a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from runs import write_dialogues

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples/finetune.ipynb"


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


def test_the_notebook_trains_scores_talks_and_merges(
    tmp_path: Path, tiny_chatglm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nbclient", reason="pip install 'glm4-finetune[notebook]'; CI does")
    pytest.importorskip("ipykernel", reason="pip install 'glm4-finetune[notebook]'; CI does")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("MODEL", str(tiny_chatglm))
    monkeypatch.setenv("DATA", str(write_dialogues(tmp_path / "rows.jsonl", 20)))
    monkeypatch.setenv("RUN", str(tmp_path / "run"))
    monkeypatch.setenv("STEPS", "3")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = json.dumps(notebook.cells, ensure_ascii=False)
    assert "«" in texts
    assert "assistant" in texts
    assert (tmp_path / "run-evaluation/report.html").exists()
    assert (tmp_path / "run-merged/model.safetensors").exists()
