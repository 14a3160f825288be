"""Paths -> rows, streaming: Parquet and Arrow; JSONL, JSON arrays, CSV and text, in gzip or zstd too.

Every row comes with the `file:line` it stands on, and whatever cannot be read comes as a BadRow
with the reason; nothing is left out. Memory does not grow with the file.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePath

from finetune import console
from finetune.artifacts import hub
from finetune.data.reading.json_rows import read_json
from finetune.data.reading.streams import TEXT_SUFFIXES, BadRow, Row, StreamError, open_stream
from finetune.data.reading.tables import read_arrow, read_csv, read_parquet
from finetune.data.reading.texts import read_text
from finetune.errors import DataError
from finetune.storage.given import read_given_json

__all__ = ["SUFFIXES", "BadRow", "Row", "expand", "read_rows"]

SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv", ".arrow")
_NO_DATA = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "cache.json"}
)
"""What the `datasets` library and LLaMA-Factory write beside data files."""
_SPLIT = re.compile(r"(?:^|[-_./])(train|test|dev|valid|validation|val|eval|held_out)(?=[-_./])")
_REGISTER_KEYS = frozenset(
    {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"}
)
_TEXTS = tuple(s + c for s in TEXT_SUFFIXES for c in ("", ".gz", ".zst"))
_ALL_SUFFIXES = tuple(s + c for s in SUFFIXES for c in ("", ".gz", ".zst"))
_FETCHED = [f"*{name}" for name in (*_ALL_SUFFIXES, *_TEXTS, ".png", ".jpg", ".jpeg", ".webp")]
"""What is fetched of a hub's data set; never code, never a pickle."""


def expand(path: str) -> list[Path]:
    """The files that a path, a glob or a folder means, sorted; DataError if there are none.

    Of a folder these are all files in it and below whose names end like data files; of one without
    any, its .txt and .md files.
    """
    if not path or "\0" in path:
        raise DataError(f"{path!r} is not a path; name a file or a folder")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        return _fetched(path)
    try:
        target = Path(path)
        if target.is_file():
            return [target]
        if target.is_dir():
            return _files_in(target)
        if target.exists():
            raise DataError(
                f"{path} is neither a regular file nor a folder; name a file or a folder"
            )
        if target.is_symlink():
            raise DataError(f"{path} is a link to nowhere ({target.readlink()}); correct the link")
        if glob.has_magic(path):
            names = glob.glob(path, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
            found = sorted(p for p in map(Path, names) if p.is_file())
            if found:
                return found
            raise DataError(f"no file matches {path} (seen from {Path.cwd()}); correct the pattern")
        raise DataError(
            f"{path} does not exist{_near_name(target)}{_of_a_hub(path) or '; correct the path'}"
        )
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened: {error.strerror}; check the path and its permissions"
        ) from None


def _fetched(address: str) -> list[Path]:
    """The data files of a hub's repository, or those that the address names."""
    found = hub.repository(address)
    if found is None:
        raise DataError(
            f"{address} is a URL; download the file and name it by its path, or name a data set of a hub: "
            "hf://owner/name, ms://owner/name"
        )
    folder = hub.fetch(address, "dataset", [found.files] if found.files else _FETCHED)
    if not found.files:
        return _files_in(folder)
    files = sorted(p for p in folder.glob(found.files) if p.is_file())
    if not files:
        raise DataError(f"{address}: the data set has no file {found.files}; correct the name")
    return files


def _of_a_hub(path: str) -> str:
    """How to name it if it is meant to be a data set of a hub."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w-]*", path):
        return ""
    return f"; a data set of a hub is named hf://{path} or ms://{path}"


def data_files(paths: Iterable[PurePath]) -> list[PurePath]:
    """Those of the files of a folder, by their paths in it, that hold data; sorted."""
    shown = [p for p in paths if not any(part.startswith(".") for part in p.parts)]
    found = [p for p in shown if p.name.lower().endswith(_ALL_SUFFIXES) and p.name not in _NO_DATA]
    return sorted(found or (p for p in shown if p.name.lower().endswith(_TEXTS)))


def _files_in(folder: Path) -> list[Path]:
    _refuse_register(folder)
    there = (p.relative_to(folder) for p in folder.rglob("*") if not p.is_dir())
    found = [folder / p for p in data_files(there)]
    _say_splits(folder, found)
    odd = next((p for p in found if not p.is_file()), None)
    if odd:
        raise DataError(f"{odd} is not a regular file; remove it")
    if not found:
        raise DataError(
            f"folder {folder} holds no {', '.join(SUFFIXES)} file, and no .txt or .md (.gz, .zst allowed); name the files that are meant"
        )
    return found


def _say_splits(folder: Path, files: Sequence[Path]) -> None:
    """A word about a folder that holds a training split and another one, since all are read."""
    names = [_SPLIT.findall(p.relative_to(folder).as_posix().lower()) for p in files]
    found = sorted({name for of_file in names for name in of_file})
    if "train" in found and len(found) > 1:
        console.warn_once(
            f"{folder} holds files of several splits ({', '.join(found)}) and all are read; name the "
            "files that are meant if it should be one"
        )


def _refuse_register(folder: Path) -> None:
    """DataError for LLaMA-Factory's data folder, whose dataset_info.json names sets of many kinds."""
    register = folder / "dataset_info.json"
    try:
        listed = read_given_json(register, str(register), DataError)
    except DataError:
        return
    sets = listed if isinstance(listed, dict) else {}
    named = [
        f"{name} ({about['file_name']})" if about.get("file_name") else name
        for name, about in sets.items()
        if isinstance(about, dict) and _REGISTER_KEYS & about.keys()
    ]
    if named:
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        raise DataError(
            f"folder {folder} is LLaMA-Factory's: its dataset_info.json names {', '.join(named[:5])}"
            f"{more}; name the files that you mean, each with its columns, or let `finetune migrate` "
            "turn a config with `dataset: NAME` into ours"
        )


def _near_name(target: Path) -> str:
    """The most similar name beside it, or where relative paths start."""
    seen_from = "" if target.is_absolute() else f" (seen from {Path.cwd()})"
    if not target.parent.is_dir():
        return seen_from
    near = difflib.get_close_matches(target.name, [p.name for p in target.parent.iterdir()], n=1)
    return f"; did you mean {target.parent / near[0]}?" if near else seen_from


def read_rows(path: Path, skip: int = 0) -> Iterator[Row | BadRow]:
    """Each row of one file in order, behind the first `skip`.

    The layout is told from the first bytes; CSV by its name.
    """
    last = f"{path}:1"
    empty = not skip
    try:
        for item in _open_rows(path, skip):
            empty = False
            last = item.location
            yield item
    except StreamError as error:
        yield BadRow(last, str(error), fatal=True)
    except OSError as error:
        yield BadRow(last, f"the file cannot be read: {error.strerror or error}", fatal=True)
    else:
        if empty:
            yield BadRow(last, "the file is empty: it holds no rows", fatal=True)


def _open_rows(path: Path, skip: int) -> Iterator[Row | BadRow]:
    with open_stream(path) as stream:
        if stream.layout == "parquet":
            yield from read_parquet(path, skip)
        elif stream.layout == "arrow":
            yield from islice(read_arrow(path), skip, None)
        elif stream.layout == "csv":
            yield from islice(read_csv(stream.file, str(path)), skip, None)
        elif stream.layout == "text":
            yield from islice(read_text(stream.file, str(path)), skip, None)
        else:
            yield from read_json(stream.file, str(path), skip)
