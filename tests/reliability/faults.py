"""Ways to end a process while it changes the disk, and what a power cut leaves of the changes."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = {"os.rename": "rename", "os.remove": "delete", "os.rmdir": "delete", "os.mkdir": "make", "os.truncate": "cut"}  # fmt: skip


def at(
    module: str, name: str, call: int, act: Callable[[], object], *, after: bool = False
) -> None:
    """Do `act` before (or after) a certain call of a function or method."""
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), [0]

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            act()
        result = original(*arguments, **options)
        if calls[0] == call and after:
            act()
        return result

    setattr(owner, last, wrapped)


def during(owner: Any, method: str, on: Callable[[str], None]) -> None:
    """Call `on(what)` before every change of the disk while `owner.method` runs, and at its end.

    Python tells of every open, rename and deletion; fsync is wrapped, and so are the two writers
    that are not Python: torch.save and safetensors, before and after.
    """
    import safetensors.torch
    import torch

    original, inside, lock = getattr(owner, method), [False], threading.RLock()

    def point(what: str) -> None:
        with lock:  # files are hashed and fsynced by threads
            if inside[0]:
                on(what)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        inside[0] = True
        result = original(*arguments, **options)
        point("the end")
        inside[0] = False
        return result

    setattr(owner, method, wrapped)
    for module, name, twice in ((os, "fsync", False), (torch, "save", True), (safetensors.torch, "serialize_file", True)):  # fmt: skip
        _announce(module, name, point, twice=twice)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if inside[0] and (what := _change(event, arguments)):
            point(what)

    sys.addaudithook(heard)


def _announce(module: Any, name: str, point: Callable[[str], None], *, twice: bool) -> None:
    original = getattr(module, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        point(name)
        result = original(*arguments, **options)
        if twice:
            point(f"after {name}")
        return result

    setattr(module, name, wrapped)


def _change(event: str, arguments: tuple[Any, ...]) -> str:
    """What an audit event changes on the disk; nothing for one that only reads."""
    if event == "open":
        path, mode, flags = arguments
        writes = set(mode) & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
        return f"open {_name(path)}" if writes else ""
    return f"{EVENTS[event]} {_name(arguments[0])}" if event in EVENTS else ""


def _name(path: Any) -> str:
    return str(path) if isinstance(path, int) else Path(os.fsdecode(path)).name


def exit_at(last: int) -> Callable[[str], None]:
    """Ends the process in place of change number `last`."""
    seen = [0]

    def on(what: str) -> None:
        if seen[0] == last:
            os._exit(9)
        seen[0] += 1

    return on


def listing(file: Path) -> Callable[[str], None]:
    """Writes every change down, one a line."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return lambda what: os.write(descriptor, f"{what}\n".encode()) and None


def limited_files(owner: Any, method: str, size: int, *, kill: bool) -> None:
    """While `owner.method` runs no file grows over `size` bytes.

    The write fails as on a full disk, or the kernel ends the process in the middle of the file.
    """
    original = getattr(owner, method)
    # Here and not below, which may run in a thread.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        try:
            return original(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    setattr(owner, method, wrapped)


class PowerCut:
    """Ends the process at a change, and notes what was durable by then."""

    def __init__(self, run_dir: Path, last: int, note: Path) -> None:
        self._durable = {file.stat().st_ino for file in run_dir.rglob("*")}
        self._renames: list[tuple[str, str]] = []
        self._left = last
        self._note = note
        fsync = os.fsync

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self._durable.add(os.fstat(descriptor).st_ino)
            self._renames = [pair for pair in self._renames if Path(pair[1]).parent != path]

        os.fsync = synced
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            self._renames.append((os.fsdecode(arguments[0]), os.fsdecode(arguments[1])))

    def __call__(self, what: str) -> None:
        self._left -= 1
        if self._left == -1:
            note = {"durable": sorted(self._durable), "renames": self._renames}
            descriptor = os.open(self._note, os.O_WRONLY | os.O_CREAT, 0o600)
            os.write(descriptor, json.dumps(note).encode())
            os._exit(9)

    @staticmethod
    def apply(run_dir: Path, note: Path, *, names_lost: bool) -> None:
        """Leave on the disk what a power cut may: files without fsync are empty, new names gone."""
        found = json.loads(note.read_text())
        if names_lost:
            for old, new in reversed(found["renames"]):
                if os.path.lexists(new) and not os.path.lexists(old):
                    Path(new).rename(old)
        for file in run_dir.rglob("*"):
            if file.is_file() and file.stat().st_ino not in found["durable"]:
                file.write_bytes(b"")
