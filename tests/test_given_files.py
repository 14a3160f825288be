"""Small files that a user names beside data and models: whatever they are, they are read or refused in words."""

from __future__ import annotations

import ast
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.chat.terminal import read_tools_file
from finetune.config.migrate import migrate
from finetune.config.migrate_sources import read_register
from finetune.data.reading.files import expand
from finetune.errors import FinetuneError
from finetune.evaluation.scores.votes import score_votes
from finetune.evaluation.tasks.calls import _rows as rows_of_calls
from finetune.generation.structured import read_schema
from finetune.serving.serve import ServeOptions, _key
from finetune.storage import given
from finetune.training.deepspeed.zero import _read as read_deepspeed

ROOT = Path(__file__).resolve().parent.parent


def _key_of(file: Path) -> object:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return _key(ServeOptions(api_key_file=file), listener)


def _register_of(file: Path) -> object:
    if os.path.lexists(file):
        file.rename(file.with_name("dataset_info.json"))
    return read_register(str(file.parent), file.parent)


READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "--json-schema": (lambda file: read_schema(file, "--json-schema"), '{"type": "object"}'),
    "--api-key-file": (_key_of, "k" * 20),
    "--votes": (lambda file: score_votes([file]), '{"models": ["a", "b"], "winner": "a"}\n'),
    "migrate": (migrate, '{"stage": "sft", "finetuning_type": "lora", "dataset": "a"}'),
    "dataset_info.json": (_register_of, "{}"),
    "deepspeed.config": (read_deepspeed, '{"zero_optimization": {"stage": 2}}'),
    "/tools": (read_tools_file, '[{"name": "f", "parameters": {}}]'),
    "calls": (lambda file: [*rows_of_calls(file, ["id"])], '{"id": 1}\n'),
}
ODD: dict[str, Callable[[Path], object]] = {
    "a pipe that nobody writes to": os.mkfifo,
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "no file": lambda path: None,
    "UTF-16": lambda path: path.write_text("{}", "utf-16"),
    "GBK": lambda path: path.write_bytes('{"a": "你好"}'.encode("gbk")),
    "brackets without end": lambda path: path.write_text("[" * 100_000),
}
NO_PROBLEM = {
    ("--api-key-file", "brackets without end"),  # a key like any other
    ("calls", "a pipe that nobody writes to"),  # no questions
    *(("dataset_info.json", what) for what in list(ODD)[:4]),  # looked for, not named: not there
}


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_of_text_is_refused_by_name(
    tmp_path: Path, reader: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given, "LARGEST", 1 << 20)
    read, _ = READERS[reader]
    path = tmp_path / "given"
    ODD[what](path)
    if (reader, what) in NO_PROBLEM:
        read(path)
        return
    with pytest.raises(FinetuneError, match=r"given|dataset_info"):
        read(path)


@pytest.mark.parametrize("reader", READERS)
def test_marks_and_line_ends_of_windows_change_nothing(tmp_path: Path, reader: str) -> None:
    read, text = READERS[reader]
    (tmp_path / "plain").mkdir()
    (tmp_path / "windows").mkdir()
    plain, windows = tmp_path / "plain/given", tmp_path / "windows/given"
    plain.write_text(text)
    windows.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    one, other = (str(read(path)).replace(str(path.parent), "") for path in (plain, windows))
    assert one == other


def test_what_a_process_writes_into_a_pipe_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writing = threading.Thread(
        target=lambda: (tmp_path / "pipe").write_text("a key of some length")
    )
    writing.start()  # its open waits for ours
    assert given.read_given(Path(f"{tmp_path}/pipe"), "the key") in ("a key of some length", "")
    if writing.is_alive():  # ours came first, found nobody and has gone
        (tmp_path / "pipe").open("rb").close()
    writing.join(10)


def test_a_folder_of_rows_is_read_beside_a_register_that_is_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    os.mkfifo(tmp_path / "dataset_info.json")
    assert expand(str(tmp_path)) == [tmp_path / "rows.jsonl"]


READ_ELSEWHERE = {
    "artifacts/checkpoint.py": "best.json of a run",
    "artifacts/plain_files.py": "checked to be a plain file of its folder before",
    "config/extras.py": "a file of transformers as installed",
    "data/chat/tokenizer.py": "files of a checked model folder, and our own templates",
    "distributed/device.py": "/proc",
    "evaluation/schema.py": "checked to lie in its folder before",
    "evaluation/scoring.py": "a module that was imported",
    "evaluation/store.py": "our own cache",
    "export/card.py": "files of a checked folder",
    "generation/replay.py": "our own file for a while",
    "language/__init__.py": "our own catalogue",
    "language/pages.py": "our own pages",
    "methods/tensor_file.py": "a folder of our own for a while",
    "models/kernels/products.py": "/proc",
    "models/tokenizer.py": "our own template",
    "report/page.py": "our own assets",
    "report/page_data.py": "our own assets",
    "report/runs.py": "checked to be a regular file before",
    "serving/page/html.py": "our own assets",
    "serving/page/saved.py": "an image that was written before",
    "storage/journal.py": "our own journal",
    "storage/lock.py": "our own lock, and /proc",
    "storage/manifest.py": "a file of a checked folder",
    "training/deepspeed/resharded.py": "a verified checkpoint",
    "training/loading/streams.py": "a verified checkpoint",
    "training/resume.py": "a verified checkpoint",
    "webpages/__init__.py": "our own assets",
}


def test_whole_files_are_read_by_the_function_for_them_or_with_a_reason() -> None:
    found: dict[str, Any] = {}
    for path in sorted((ROOT / "finetune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("read_text", "read_bytes"):
                found[path.relative_to(ROOT / "finetune").as_posix()] = node.lineno
    assert found.keys() == READ_ELSEWHERE.keys()
