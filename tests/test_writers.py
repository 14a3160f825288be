"""Nothing writes a file but the room that knows how: whole or absent, over nothing of others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = sorted((ROOT / "finetune").rglob("*.py"))
METHODS = {
    "write_text", "write_bytes", "touch", "rename", "symlink_to", "hardlink_to", "savefig",
    "save_pretrained", "save_file", "mkstemp", "NamedTemporaryFile", "copyfile", "copy", "copy2",
    "move", "copytree", "truncate", "rmtree", "link", "symlink", "ftruncate", "fdopen", "savez",
}  # fmt: skip
IN_A_STAGE = (
    "writes into a staged folder or a folder for temporary files, which storage/ made or sealed"
)
ALLOWED = {
    "cli/doctor.py NamedTemporaryFile": "looks whether a folder can be written",
    "cli/__init__.py touch": "a mark in torchrun's own folder: which process speaks",
    "console.py fdopen": "standard output",
    "console.py os.open": "the null device",
    "data/examples/preparation.py truncate": "shortens a dialogue",
    "evaluation/folder.py copyfile": IN_A_STAGE,
    "evaluation/schema.py copyfile": IN_A_STAGE,
    "evaluation/scoring.py open": IN_A_STAGE,
    "evaluation/store.py replace": "the journal of replies takes its name under its folder's lock",
    "evaluation/store.py touch": "an empty journal, under its folder's lock",
    "evaluation/store.py savez": "into a file of storage.whole_binary",
    "export/folder.py copyfile": IN_A_STAGE,
    "export/folder.py write_text": IN_A_STAGE,
    "export/push.py write_text": IN_A_STAGE,
    "export/shards.py os.open": IN_A_STAGE,
    "methods/tensor_file.py save_pretrained": "into a folder for temporary files",
    "report/plots.py NamedTemporaryFile": "a font for the painter",
    "serving/requests/images.py write_bytes": IN_A_STAGE,
    "models/vision/feature_cache.py save_file": "to a path of storage.staged_file",
    "training/measuring/choosing.py savez": "into a file of storage.whole_binary",
    "training/vision_features.py save_file": "to a path of storage.staged_file",
}


def writes(path: Path) -> Iterator[str]:
    """What in a module changes the disk: `room/module.py name`."""
    name = path.relative_to(ROOT / "finetune").as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        if called == "os.open":
            if any("O_WRONLY" in ast.unparse(a) or "O_RDWR" in ast.unparse(a) for a in node.args):
                yield f"{name} os.open"
        elif last == "open":
            words = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
            modes = [w.value for w in words if isinstance(w, ast.Constant)]
            if any(isinstance(m, str) and len(m) < 4 and set(m) & set("wax+") for m in modes):
                yield f"{name} open"
        elif last == "replace":
            # `text.replace(old, new)` has two arguments, and so have NumPy's and dataclasses'.
            if called == "os.replace" or (len(node.args) == 1 and not node.keywords):
                yield f"{name} replace"
        elif last in METHODS and (last != "copy" or called == "shutil.copy"):
            yield f"{name} {last}"


def test_only_storage_writes_files() -> None:
    found = {one for path in PRODUCT if "storage" not in path.parent.name for one in writes(path)}
    assert found - set(ALLOWED) == set(), "use finetune.storage, or say here why not"


@pytest.mark.parametrize(
    "text",
    [
        'open("x", "w")', 'Path("x").open("a")', 'path.open(mode="xb")', 'file.open("rb+")',
        'path.write_text("x")', "path.write_bytes(b'')", "os.replace(a, b)", "part.replace(final)",
        "part.rename(final)", "os.open(path, os.O_WRONLY)", "shutil.copyfile(a, b)",
        "figure.savefig(path)", "np.savez(path, a=a)",
    ],
)  # fmt: skip
def test_a_writer_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune/new.py").write_text(text + "\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert list(writes(tmp_path / "finetune/new.py"))
