"""What a full or failing disk costs: one output, not the run."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from finetune import console
from finetune.console import NO_SPACE

FAILING = (
    errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ENXIO,
    errno.ENODEV, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EBUSY, errno.ENFILE, errno.EMFILE,
    errno.EACCES, errno.EPERM, errno.EKEYEXPIRED,
)  # fmt: skip
"""The disk or the network file system fails, or takes no more of this user.

A read-only mount is what Linux makes of a bad disk; a ticket that runs out ends permissions.
"""

# How safetensors (Rust) and torch.save (C++) word it; neither raises OSError.
_NO_SPACE_TEXT = re.compile(
    r"os error (28|122|27)\b|No space left|File too large|quota exceeded"
    r"|PytorchStreamWriter failed|unexpected pos|iostream error",
    re.IGNORECASE,
)
_FAILING_TEXT = re.compile(
    rf"os error ({'|'.join(map(str, FAILING))})\b|Input/output error", re.IGNORECASE
)


def is_out_of_space(error: BaseException | None) -> bool:
    """Whether the disk, a quota or a limit on file sizes is behind `error`."""
    return _is_behind(error, NO_SPACE, _NO_SPACE_TEXT)


def is_disk_error(error: BaseException | None) -> bool:
    """Whether a full or failing disk is behind `error`."""
    return is_out_of_space(error) or _is_behind(error, FAILING, _FAILING_TEXT)


def _is_behind(
    error: BaseException | None, numbers: tuple[int, ...], texts: re.Pattern[str]
) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        if not isinstance(error, OSError) and texts.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


class BestEffort:
    """Writes what is worth less than the run: a full or failing disk costs it, with one warning.

    writing = BestEffort("metrics.jsonl", "it is written when the disk allows")
    with writing():
        ...
    if writing.failed: ...
    """

    def __init__(self, what: str, otherwise: str) -> None:
        self.failed = False
        """Whether the last block failed."""
        self._what, self._otherwise = what, otherwise
        self._has_warned = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Ends a block that meets a disk error; every other error goes through."""
        try:
            yield
            self.failed = False
        except Exception as error:
            if not is_disk_error(error):
                raise
            self.failed = True
            if not self._has_warned:
                reason = "no room to write" if is_out_of_space(error) else "unable to write"
                console.warn(f"{reason} {self._what} ({error}); {self._otherwise}")
            self._has_warned = True
