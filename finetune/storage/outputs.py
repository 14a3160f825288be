"""What a command may write over, and whether what it reads has stayed the same meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import ConfigError, DataError
from finetune.storage.files import file_digest, refuse_odd


def check_output(
    output: Path, inputs: Iterable[Path], *, overwrite: bool, is_ours: Callable[[Path], bool]
) -> None:
    """ConfigError unless the file `output` may be written.

    It may not be a link, a device or a pipe, nor one of `inputs` under whatever name, nor lie in a
    folder of them; a file that this program did not write only with `overwrite`.
    """
    refuse_odd(output)
    for path in inputs:
        if path.is_dir():
            if output.absolute().resolve().is_relative_to(path.resolve()):
                raise ConfigError(
                    f"{output} lies inside {path}, which is read, and would be read the next time; "
                    "choose another --output"
                )
        elif is_same_file(output, path):
            raise ConfigError(f"{output} is read as {path}; choose another --output")
    if output.exists() and output.stat().st_size and not overwrite and not is_ours(output):
        raise ConfigError(
            f"{output} is there, and this program did not write it; choose another --output, or say "
            "--overwrite"
        )


def is_same_file(path: Path, other: Path) -> bool:
    """Whether two names lead to one file on the disk."""
    try:
        return path.samefile(other)
    except OSError:
        return False


@dataclass(frozen=True)
class SeenFiles:
    """Files as they were when they were looked at: their size and content."""

    states: dict[Path, tuple[int, str]]

    @classmethod
    def of(cls, files: Iterable[Path]) -> SeenFiles:
        """The files as they are now."""
        return cls({file: (file.stat().st_size, file_digest(file)) for file in files})

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each, in their order."""
        return [digest for _, digest in self.states.values()]

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
                f"files changed while {doing}: {', '.join(changed)}; what was written is of both "
                "states. Start again when nothing writes to them"
            )
