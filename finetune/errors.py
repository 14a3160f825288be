"""Every error a user can cause, each with the exit code that scripts can rely on."""

from __future__ import annotations


class FinetuneError(Exception):
    """A problem that a user can act on; its text says what, where and what to do."""

    exit_code = 1


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


class SpaceError(CheckpointError):
    """The disk has no room for a checkpoint; what was there before is untouched."""

    exit_code = 6


class RunDirectoryInUseError(FinetuneError):
    """Another live process writes to the run directory."""

    exit_code = 7
