"""Whether files that are read have stayed the same meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import DataError
from finetune.storage.files import file_digest

State = tuple[int, int, int]
"""Size, time of the last change of the content, and of anything: the last one cannot be set back."""


def state_of(path: Path) -> State | None:
    """Another value once a file was written to or replaced, even by a copy that keeps its times.

    None while there is no such file.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


@dataclass(frozen=True)
class SeenFiles:
    """Files as they were when they were looked at: their size and content."""

    states: dict[Path, tuple[int, str]]

    @classmethod
    def of(cls, files: Iterable[Path]) -> SeenFiles:
        """The files as they are now."""
        return cls({file: (file.stat().st_size, file_digest(file)) for file in files})

    def check(self, files: Iterable[Path], doing: str) -> None:
        """DataError naming the files that have changed, come or gone since, `doing` what went on."""
        now = SeenFiles.of(file for file in files if file.is_file()).states
        changed = [
            f"{file} (had {then[0]:,} bytes, now {now[file][0]:,})"
            if file in now
            else f"{file} (gone)"
            for file, then in self.states.items()
            if now.get(file) != then
        ]
        changed += [f"{file} (new)" for file in now if file not in self.states]
        if changed:
            raise DataError(
                f"files changed while {doing}: {', '.join(changed)}; start again when nothing writes "
                "to them"
            )
