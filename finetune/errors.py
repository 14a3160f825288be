"""Every error a user can cause, each with the exit code that scripts can rely on."""

from __future__ import annotations

import re


class FinetuneError(Exception):
    """A problem that a user can act on; its text says what, where and what to do."""

    exit_code = 1
    is_echo = False
    """Another process of the run met the problem, and can say more about it."""


class ConfigError(FinetuneError):
    """The configuration or the command line does not fit; lists every problem at once."""

    exit_code = 2


class DataError(FinetuneError):
    """Rows, files or a chat template do not fit; lists every problem as ``file:line: reason``."""

    exit_code = 2


class ModelError(FinetuneError):
    """A model, tokenizer or adapter folder cannot be used as it is."""

    exit_code = 2


class CheckpointError(FinetuneError):
    """A checkpoint cannot be resumed, opened or written as asked."""

    exit_code = 3


class NonFiniteError(FinetuneError):
    """The loss or its gradient is not a number; raised before the optimizer step."""

    exit_code = 4


class OutOfMemoryError(FinetuneError):
    """A GPU or the machine has not enough memory; says how much there was and what needs less."""

    exit_code = 5


class SpaceError(CheckpointError):
    """The disk has no room for an output or cannot be written; what was there before is untouched."""

    exit_code = 6


class ProcessError(FinetuneError):
    """A process of the run failed, is gone or hangs; raised in the others, with its exit code."""

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class OutputInUseError(FinetuneError):
    """Another live process writes the same output."""

    exit_code = 7


class RunDirectoryInUseError(OutputInUseError):
    """Another live process writes to the run directory."""


class RequirementError(FinetuneError):
    """A model was evaluated and does not reach what `--require` asks for."""

    exit_code = 8


# As torch (C++), safetensors (Rust), CUDA's libraries and the C library word it.
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|bad_alloc|ALLOC_FAILED",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether any library says by this error that memory ran out; imports none of them."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, OSError)) and bool(_NO_MEMORY.search(str(error)))
