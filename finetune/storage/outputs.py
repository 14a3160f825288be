"""What a command may write over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from finetune.errors import ConfigError
from finetune.storage.files import refuse_odd, write_file


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


def write_marked(output: Path, text: str, *, mark: str) -> Path:
    """Write `text`, which holds `mark` near its beginning, over an earlier one of its kind; `output`.

    ConfigError when what stands there has no such mark: another wrote it.
    """
    refuse_odd(output)
    if output.exists():
        with output.open("rb") as file:
            if mark.encode() not in file.read(4096):
                raise ConfigError(f"{output} was not written by this program; move it away")
    write_file(output, text)
    return output


def is_same_file(path: Path, other: Path) -> bool:
    """Whether two names lead to one file on the disk."""
    try:
        return path.samefile(other)
    except OSError:
        return False


def check_not_read(folder: Path, sources: Iterable[str], option: str) -> None:
    """ConfigError when `folder` lies in a folder of `sources`, whose files would be read as data.

    A source is a file, a glob or a folder; of a glob only `**` reaches into folders below.
    """
    for source in sources:
        outer = Path(source.partition("**")[0] or ".") if "**" in source else Path(source)
        if outer.is_dir() and folder.resolve().is_relative_to(outer.resolve()):
            raise ConfigError(
                f"{option}: {folder} lies inside {source}, which is read as data, so the next start "
                "would read what this one writes; choose a folder beside it"
            )
