"""`training.on_end`: a command of the user's that is told how a run ended."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from finetune import console
from finetune.errors import FinetuneError

SECONDS = 60.0
"""How long the command may take; what takes longer should go on by itself."""


@contextmanager
def told_at_the_end(command: str | None, run_dir: str) -> Iterator[None]:
    """Runs `command` when the block is left, however it is left; on the leading process only.

    It gets `FINETUNE_RUN`, the run directory, and `FINETUNE_EXIT_CODE`. No shell reads it. What goes
    wrong with it is a warning.
    """
    code = 1
    try:
        yield
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    except FinetuneError as error:
        code = error.exit_code
        raise
    finally:
        if command is not None and console.is_rank0():
            _tell(command, run_dir, code)


def _tell(command: str, run_dir: str, code: int) -> None:
    environment = os.environ | {"FINETUNE_RUN": run_dir, "FINETUNE_EXIT_CODE": str(code)}
    try:
        done = subprocess.run(
            shlex.split(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        console.warn(f"training.on_end: {command}: {error}")
        return
    if done.returncode:
        console.warn(f"training.on_end: {command}: ended with {done.returncode}")
