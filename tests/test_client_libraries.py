"""The calls of client libraries: openai's here, the others' in an environment of their own.

`python tests/foreign_clients/run.py` runs langchain, litellm, instructor, llama-index, pydantic-ai,
openai-agents and smolagents too; so does this module where `FINETUNE_CLIENTS=1` is set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("llguidance")
HERE = Path(__file__).parent / "foreign_clients"
sys.path.append(str(HERE))

from check_openai import *  # noqa: E402, F403
from server import both  # noqa: E402


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    with both() as served:
        yield served


@pytest.fixture
def random(urls: dict[str, str]) -> str:
    return urls["random"] + "/v1"


@pytest.fixture
def obedient(urls: dict[str, str]) -> str:
    return urls["obedient"] + "/v1"


@pytest.mark.skipif(
    not os.environ.get("FINETUNE_CLIENTS"),
    reason="700 MB and two minutes: FINETUNE_CLIENTS=1, or python tests/foreign_clients/run.py",
)
def test_the_other_libraries_are_answered() -> None:
    done = subprocess.run([sys.executable, HERE / "run.py"], check=False)
    assert done.returncode == 0
