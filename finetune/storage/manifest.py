"""The manifest of a folder: size and SHA-256 of every file, so that damage never goes unseen.

    {"format": 1, "files": {"NAME": {"size": 1, "sha256": "..."}}, "facts": {...}}

`facts` is what the folder's maker noted about it; left out when there is nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from finetune.errors import CheckpointError
from finetune.storage.files import fsync_folder, moved, write_file

MANIFEST = "manifest.json"
LARGEST = 256 << 20
"""Bytes of one; a million files have half of it."""

_LONGEST_NAME = 255  # bytes; longer ones are on no file system
_CHUNK = 1 << 20
_HASH_THREADS = 4


Files = Mapping[str, tuple[int, str]]
"""Size and SHA-256 by name."""


class Manifest(NamedTuple):
    """What a manifest says."""

    files: dict[str, tuple[int, str]]
    facts: dict[str, Any]


def seal(
    folder: Path, known: Files | None = None, *, facts: Mapping[str, Any] | None = None
) -> None:
    """Fsync every file of ``folder`` and write its manifest, last.

    ``known`` holds size and SHA-256 of files that their writer hashed and fsynced.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    files, folders, odd = walk(folder)
    if odd:
        raise CheckpointError(f"{folder / odd[0]} is neither a file nor a folder; remove it")
    digests = dict(known or {})
    digests |= _hash_all(folder, [name for name in files if name not in digests], fsync=True)
    for name in folders:
        fsync_folder(folder / name)
    ordered = {name: digests[name] for name in sorted(digests)}
    text = _manifest_text(Manifest(ordered, dict(facts or {})))
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)


def verify(folder: Path, *, others_allowed: bool = False) -> list[str]:
    """Everything that is wrong with a committed folder: missing, extra, resized, changed files.

    With ``others_allowed`` files that the manifest does not name are nobody's business.
    """
    manifest = _read(folder)
    if isinstance(manifest, str):
        return [manifest]
    recorded = manifest.files
    try:
        files, _, odd = walk(folder)
    except OSError as error:
        return [f"{error.filename} cannot be read ({error.strerror})"]
    present = set(files) - {MANIFEST}
    problems = [f"{name} is missing" for name in recorded if name not in present]
    if not others_allowed:
        problems = [f"{name} is neither a file nor a folder" for name in odd] + problems
        problems += [f"{name} is not in the manifest" for name in sorted(present - set(recorded))]
    same_size = []
    for name, (size, _) in recorded.items():
        if name not in present:
            continue
        found = (folder / name).stat().st_size
        if found == size:
            same_size.append(name)
        else:
            problems.append(f"{name} has {found} bytes instead of {size}")
    try:
        digests = _hash_all(folder, same_size, fsync=False)
    except OSError as error:
        return [*problems, f"{error.filename or folder} cannot be read ({error.strerror})"]
    problems += [
        f"{name} has other content than {MANIFEST} says"
        for name in same_size
        if digests[name] != recorded[name]
    ]
    return problems


def is_untouched(folder: Path) -> bool:
    """Whether nobody has changed a committed folder since its manifest was written, its last file.

    By names, sizes and times; nothing is read but the manifest. What a disk does to content by itself
    only `verify` finds.
    """
    manifest = _read(folder)
    if isinstance(manifest, str):
        return False
    try:
        files, _, odd = walk(folder)
        found = {name: (folder / name).stat() for name in files}
    except OSError:
        return False
    sealed = found.pop(MANIFEST).st_mtime_ns
    return (
        not odd
        and found.keys() == manifest.files.keys()
        and all(
            said.st_size == manifest.files[name][0] and said.st_mtime_ns <= sealed
            for name, said in found.items()
        )
    )


def walk(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Relative names of files, of folders (deepest first), and of anything else (links, devices)."""
    files, folders, odd = [], [], []
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                    pending.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    files.append(name)
                else:
                    odd.append(name)
    return sorted(files), sorted(folders, reverse=True), sorted(odd)


def recorded(folder: Path) -> Manifest:
    """What the manifest of ``folder`` says; CheckpointError without a whole one."""
    found = _read(folder)
    if isinstance(found, str):
        raise CheckpointError(f"{folder / MANIFEST} is missing or damaged; use another checkpoint")
    return found


def add(folder: Path, name: str) -> None:
    """Note a file that was written into ``folder`` after it was sealed, or before it ever was."""
    known = noted_files(folder)
    entry = _hash(folder / name, fsync=False)
    write_file(folder / MANIFEST, _manifest_text(Manifest(known | {name: entry}, {})))


def is_whole(folder: Path, name: str) -> bool:
    """Whether a file is there, and is what was noted by ``add``."""
    noted = noted_files(folder).get(name)
    return (
        noted is not None
        and (folder / name).is_file()
        and noted == _hash(folder / name, fsync=False)
    )


def noted_files(folder: Path) -> dict[str, tuple[int, str]]:
    """What the manifest names; nothing without a whole one."""
    try:
        return recorded(folder).files
    except CheckpointError:
        return {}


def _read(folder: Path) -> Manifest | str:
    """The manifest, or why there is none."""
    file = folder / MANIFEST
    try:
        if file.exists() and not file.is_file():
            return f"{MANIFEST} is not a file"  # a pipe would be waited for
        if file.exists() and file.stat().st_size > LARGEST:
            return f"{MANIFEST} is larger than {LARGEST >> 20} MiB"
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the save did not finish, or this is no checkpoint"
    except (OSError, UnicodeDecodeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return _parse_manifest(text) or f"{MANIFEST} is damaged, or of an older version"


def _manifest_text(manifest: Manifest) -> str:
    entries = {
        name: {"size": size, "sha256": digest} for name, (size, digest) in manifest.files.items()
    }
    facts = {"facts": manifest.facts} if manifest.facts else {}
    return json.dumps({"format": 1, "files": entries, **facts}, indent=1) + "\n"


def _parse_manifest(text: str) -> Manifest | None:
    """Names, sizes, hashes and facts, or None unless the text is exactly what ``seal`` writes."""
    try:
        found = json.loads(text)
        files = {
            str(name): (entry["size"], str(entry["sha256"]))
            for name, entry in found["files"].items()
        }
        manifest = Manifest(files, dict(found.get("facts", {})))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not all(map(_is_inside, files)):
        return None
    return manifest if _manifest_text(manifest) == text else None


def _is_inside(name: str) -> bool:
    """Whether a name is one that `walk` gives: a stranger's manifest must lead nowhere else."""
    path = PurePosixPath(name)
    try:
        fits = all(len(os.fsencode(part)) <= _LONGEST_NAME for part in path.parts)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return False
    return (
        name == str(path) and bool(path.name) and not path.is_absolute() and ".." not in path.parts
        and "\0" not in name and name != MANIFEST and fits
    )  # fmt: skip


def _hash_all(folder: Path, names: list[str], *, fsync: bool) -> dict[str, tuple[int, str]]:
    # hashlib releases the GIL, so files are hashed in parallel.
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        found = pool.map(lambda name: _hash(folder / name, fsync=fsync), names)
        return dict(zip(names, found, strict=True))


def _hash(path: Path, *, fsync: bool) -> tuple[int, str]:
    """Size and SHA-256 of a file; ``hashlib.file_digest`` needs Python 3.11."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
            size += read
            moved(read)
        if fsync:
            os.fsync(file.fileno())
    return size, digest.hexdigest()
