"""The command line as a user starts it, and as it ends inside this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import cli

ROOT = Path(__file__).parent.parent

CONFIG = """\
model:
  path: some/model
data:
  train: no-such-file.jsonl
method:
  kind: lora
training:
  output_dir: runs/x
"""


def run(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python program with these words, as a user would start it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )


def exit_code(*words: str) -> object:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    return caught.value.code
