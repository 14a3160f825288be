"""The shortest configuration, and what becomes of a text as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config_file import load_config
from finetune.errors import ConfigError

MINIMAL = """\
model:
  path: some/model
data:
  train: train.jsonl
method:
  kind: lora
training:
  output_dir: runs/x
"""


def write(content: str | bytes) -> Path:
    """Writes a text (or bytes) as x.yaml into the working directory, and gives its path."""
    path = Path("x.yaml")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(content: str | bytes, *overrides: str) -> str:
    """The message with which a text and overrides are refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(content), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)
