"""`finetune doctor`: what this machine has, what a run will miss, and what to do about it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.storage.cache import default_root

if TYPE_CHECKING:
    from finetune.distributed.device import Card

PORT = 29500
"""Where torchrun meets by default."""
FREE_BYTES, SHARED_BYTES = 20e9, 1e9
PACKAGE = "glm4-finetune"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    found: str
    remedy: str = ""
    """What to do; empty when all is well."""

    @property
    def is_well(self) -> bool:
        """Whether nothing need be done."""
        return not self.remedy


def examine(*, hub: bool = False) -> list[Finding]:
    """Every finding; with `hub` the model hub is asked for too, which needs the network."""
    looks: list[Callable[[], Iterator[Finding]]] = [
        _libraries,
        _devices,
        _room,
        _locks,
        _port,
        _host_name,
    ]
    looks += [_hub] * hub
    return [finding for look in looks for finding in look()]


def _libraries() -> Iterator[Finding]:
    yield Finding("Python", sys.version.split()[0])
    for line in requires(PACKAGE) or []:
        name, _, condition = line.partition(";")
        if condition or not (match := re.match(r"[\w.-]+", name)):
            continue  # of an extra
        yield _library(match[0], name[len(match[0]) :].strip())


def _library(name: str, wanted: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "missing", f"pip install '{name}{wanted}'")
    from packaging.specifiers import SpecifierSet

    fits = SpecifierSet(wanted).contains(found, prereleases=True)
    return Finding(name, found, "" if fits else f"pip install '{name}{wanted}'")


def _devices() -> Iterator[Finding]:
    from finetune.distributed import device

    if not device.has_accelerator():
        remedy = device.unused()
        yield Finding("GPU", "none that torch can use" if remedy else "none", remedy)
        yield Finding("CPU", f"{os.cpu_count()} cores, {_memory():.0f} GB")
        return
    cards, exchange = device.cards(), device.device_backend()
    for number, card in enumerate(cards):
        yield _card(card, number)
    if exchange == "nccl":
        version = device.collective_version()
        missing = "several GPUs need a torch with NCCL" if len(cards) > 1 else ""
        yield Finding("NCCL", version or "none", "" if version else missing)
    elif len(cards) > 1:
        yield Finding("exchange between the cards", exchange)


def _card(card: Card, number: int) -> Finding:
    found = f"{card.name}, {card.bytes / 2**30:.0f} GiB"
    found += f", capability {card.capability}" * bool(card.capability)
    if not card.native_bf16:
        # What `model.dtype: auto` takes then is right, so nothing need be done.
        found += ", no bfloat16 in hardware: models compute in float16 with sums in float32"
    return Finding(f"GPU {number}", found)


def _memory() -> float:
    """GB of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _room() -> Iterator[Finding]:
    for what, folder in (("disk, working directory", Path.cwd()), ("disk, cache", default_root())):
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        said = "checkpoints of a 9B model take 19 GB, of full tuning 130 GB; make room or use another disk"
        yield Finding(what, f"{free / 1e9:.0f} GB free", "" if free > FREE_BYTES else said)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        said = "NCCL and data.loader_workers use it; in Docker: --shm-size=8g or --ipc=host"
        yield Finding("shared memory", f"{size / 1e9:.1f} GB", "" if size >= SHARED_BYTES else said)


def _locks() -> Iterator[Finding]:
    if not os.access(".", os.W_OK):
        yield Finding("working directory", "cannot be written", "start where you can write")
        return
    try:
        with tempfile.NamedTemporaryFile(dir=".", prefix=".doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Finding("file locks here", "yes")
    except OSError as error:
        said = "files named .owner say who writes instead; if a process on another machine dies, remove its own"
        yield Finding("file locks here", error.strerror or str(error), said)


def _port() -> Iterator[Finding]:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", PORT))
            yield Finding(f"port {PORT}", "free")
        except OSError:
            yield Finding(f"port {PORT}", "in use", "torchrun --standalone takes a free one")


def _host_name() -> Iterator[Finding]:
    """Torchrun waits in silence for minutes where the machine's own name is not known, as in some containers."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, PORT)
        yield Finding("host name", name)
    except OSError:
        said = f"add it to /etc/hosts, or give torchrun --local-addr=127.0.0.1; `finetune launch` does ({name})"
        yield Finding("host name", "has no address", said)


def _hub() -> Iterator[Finding]:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi(endpoint=address).model_info("THUDM/glm-4-9b-chat", timeout=5)
        yield Finding("hub", address)
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        said = (
            "set HF_ENDPOINT to a mirror, or download the model by other means and give its folder"
        )
        yield Finding("hub", f"{address}: {reason}", said)
