"""One writer at a time: a lock on a file or folder that ends with its process.

Where the file system has no locks (some NFS, Lustre and FUSE mounts), an owner file beside it says
which process holds it; one whose process has ended counts for nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from finetune import console
from finetune.errors import ConfigError

_TRIES, _PAUSE_SECONDS = 4, 0.05
"""Somebody who only asks whether a lock is held has it for an instant."""
_QUIET_SECONDS = 1.0
"""How long a lock is waited for before the wait is mentioned."""
# flock on a folder over NFS says EBADF: there it needs a descriptor that may write.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


class Lock:
    """Held until `release`, the end of the block, or the end of the process, however it ends."""

    def __init__(self, descriptor: int, owner: Path | None = None) -> None:
        self._descriptor = descriptor
        self._owner = owner
        _HELD.add(self)

    def note(self, text: str) -> None:
        """Write into the locked file who holds it; an owner file says so already, and more."""
        if self._owner is None:
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)

    def release(self) -> None:
        """Let others have it."""
        if self._descriptor >= 0:
            if self._owner is not None:
                self._owner.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def try_lock(path: Path, *, make: bool = True) -> Lock | None:
    """The lock on a file or folder, or None while another process holds it.

    A file that is not there is made, or with `make` False not locked. A link is never followed.

    Raises:
        ConfigError: `path` is a link, a device or a pipe.
        OSError: it cannot be opened.
    """
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        try:
            descriptor = _open(path, make=make)
        except FileNotFoundError:
            if make:
                raise
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            return _own(path, error)
        else:
            if _is_still(path, descriptor):
                return Lock(descriptor)
            os.close(descriptor)  # renamed or removed by whoever held it before
    return None


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """The block, when no other process is in one of the same path; a longer wait is said once.

    Args:
        path: As for `try_lock`, which may raise.
        waiting: What is said when that takes longer than a second.
    """
    started, said = time.monotonic(), False
    while (lock := try_lock(path)) is None:
        if not said and time.monotonic() - started > _QUIET_SECONDS:
            console.say(waiting)
            said = True
        time.sleep(_PAUSE_SECONDS)
    with lock:
        yield


def is_held(path: Path) -> bool:
    """Whether a live process holds the lock on a file or folder that is there."""
    try:
        descriptor = _open(path, make=False)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return _lives(_owner_file(path))
    finally:
        os.close(descriptor)
    return False


def holder(path: Path) -> str:
    """Who holds the lock, in words, as far as a file says it."""
    for file in (path, _owner_file(path)):
        try:
            with file.open(encoding="utf-8", errors="replace") as opened:
                said = opened.read(512).strip()
        except OSError:
            continue
        if said:
            return said.partition(", started")[0]
    return "another process"


def this_process() -> str:
    """How `holder` names the process that calls."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _open(path: Path, *, make: bool) -> int:
    if path.is_dir() and not path.is_symlink():
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if make else 0)
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise ConfigError(f"{path} is a link, which a lock never follows; remove it") from None
        if error.errno != errno.ENXIO:  # a socket
            raise
        raise ConfigError(
            f"{path} is not a regular file; remove it or choose another name"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path} is not a regular file; remove it or choose another name")
    return descriptor


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.owner")


def _own(path: Path, reason: OSError) -> Lock | None:
    """The lock by an owner file; its text is a process of this machine, or of another one."""
    console.warn_once(
        f"{path.parent}: this file system has no file locks ({reason.strerror}); files named .owner "
        "say who writes there instead"
    )
    owner = _owner_file(path)
    text = f"{this_process()}, started {_started(os.getpid())}\n"
    for _ in range(_TRIES):
        try:
            descriptor = os.open(owner, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            if _lives(owner):
                return None
            owner.unlink(missing_ok=True)
            continue
        os.write(descriptor, text.encode())
        time.sleep(_PAUSE_SECONDS)  # another one that met the same dead owner may have removed it
        if _is_still(owner, descriptor):
            return Lock(descriptor, owner)
        os.close(descriptor)
    return None


def _lives(owner: Path) -> bool:
    """Whether the process that an owner file names lives, as far as it can be seen from here."""
    try:
        words = owner.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return owner.exists()
    if len(words) < 6:
        return False  # written half when its process ended
    number, host, started = words[1], words[3].rstrip(","), words[5]
    return host != socket.gethostname() or _started(int(number)) == started


def is_running(process: int) -> bool:
    """Whether a process of this machine lives."""
    return bool(_started(process))


def _started(process: int) -> str:
    """When a process began, in the kernel's ticks; empty for one that is gone."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            return "unknown"
        return "unknown"
    return text.rpartition(")")[2].split()[19]


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _release_in_child() -> None:
    # A forked loader worker shares the lock and could outlive a killed run.
    for lock in list(_HELD):
        if lock._descriptor >= 0:
            lock._close()


os.register_at_fork(after_in_child=_release_in_child)
