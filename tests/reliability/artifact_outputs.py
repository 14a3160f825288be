"""Merging and exporting: killed at every change of the disk, with no place to write to, or with no room."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability import faults
from tests.reliability.frame import ROOT, Case, in_fork
from tests.reliability.places import command, glm_folder, shared, trained

WRITERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "merge": ("finetune.export.merge", ("--no-check",)),
    "export": ("finetune.export.convert", ("--no-check", "--layout", "published")),
}


def _source(writer: str) -> Path:
    return trained("lora") / "checkpoint-2" if writer == "merge" else glm_folder()


def _run(writer: str, out: Path | str, *more: str) -> tuple[int, str]:
    return command(writer, _source(writer), "--output", out, *WRITERS[writer][1], *more)


def _owner(writer: str) -> Any:
    import importlib

    return importlib.import_module(WRITERS[writer][0])


def _content(folder: Path) -> dict[str, str]:
    """All files but the card, which names the folder, and the manifest, which has the card's sum."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("README.md", "manifest.json")
    }


# --- killed --------------------------------------------------------------------------------------


def _changes(writer: str) -> list[str]:
    """What changes on the disk; also makes the output that others are compared with."""
    listed, whole = shared(f"{writer}-changes"), shared(f"{writer}-whole")
    if not whole.exists():

        def work(_: Path) -> str:
            faults.during(_owner(writer), writer, faults.listing(listed))
            return str(_run(writer, whole))

        answer = in_fork(work, seconds=100)
        assert answer.startswith("(0, "), answer
    return listed.read_text().splitlines()


def killed(writer: str, last: int, folder: Path) -> None:
    """Absent or whole; the next try, which finds what was left, gives the same bytes."""
    from finetune.storage.manifest import verify

    out = folder / "out"
    if (child := os.fork()) == 0:
        faults.during(_owner(writer), writer, faults.exit_at(last))
        _run(writer, out)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 9, f"it ended with {code}"
    if out.exists():
        assert verify(out) == []
    else:
        ended, said = _run(writer, out)
        assert ended == 0, said[-800:]
    assert _content(out) == _content(shared(f"{writer}-whole"))
    assert not list(folder.glob(".staging-*"))


# --- places --------------------------------------------------------------------------------------


def _taken(folder: Path) -> Path:
    (folder / "taken").mkdir()
    return folder / "taken"


def _file(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file"


def _below_a_file(folder: Path) -> Path:
    return _file(folder) / "out"


def _link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nowhere")
    return folder / "link"


def _inside_through_a_link(folder: Path) -> Path:
    (folder / "alias").symlink_to(glm_folder())
    return folder / "alias" / "new"


PLACES: dict[str, tuple[Callable[[Path], Path], tuple[int, ...]]] = {
    "an empty folder that exists": (_taken, (2,)),
    "a file that exists": (_file, (2,)),
    "a link to nowhere": (_link, (2,)),
    "the base itself": (lambda folder: glm_folder(), (2,)),
    "inside the base": (lambda folder: glm_folder() / "new", (2,)),
    "inside the base, through a link": (_inside_through_a_link, (2,)),
    "below a file": (_below_a_file, (2,)),
    "a read-only file system": (lambda folder: Path("/proc/out"), (2, 6)),
    "a name of 255 bytes": (lambda folder: folder / ("x" * 255), (2,)),
    "a name of 300 bytes": (lambda folder: folder / ("x" * 300), (2,)),
}


def no_place(
    writer: str, place: Callable[[Path], Path], codes: tuple[int, ...], folder: Path
) -> None:
    """Refused with a message that names the place; nothing else is touched."""
    out = place(folder)
    before = _content(folder), _content(glm_folder()), _content(trained("lora"))
    ended, said = _run(writer, out)
    assert "Traceback" not in said, said[-1500:]
    assert ended in codes, (ended, said[-500:])
    assert out.name[:40] in said
    assert (_content(folder), _content(glm_folder()), _content(trained("lora"))) == before
    assert not list(folder.glob(".staging-*"))


def predict_has_no_place(place: Callable[[Path], Path], folder: Path) -> None:
    """The same for a file of replies."""
    data = shared("ask.jsonl")
    data.write_text('{"prompt": "the quick"}\n')
    out = place(folder)
    before = _content(folder)
    ended, said = command("predict", glm_folder(), "--data", data, "--output", out)
    assert "Traceback" not in said, said[-1500:]
    assert ended == 2, (ended, said[-500:])
    assert out.name[:40] in said
    assert _content(folder) == before


def inside_the_adapter(folder: Path) -> None:
    """An output below the adapter that is read."""
    no_place("merge", lambda _: trained("lora") / "checkpoint-2" / "new", (2,), folder)


# --- room ----------------------------------------------------------------------------------------


def too_small(writer: str, folder: Path) -> None:
    """A disk without room is said before the first byte."""
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5)  # type: ignore[attr-defined]
    shutil.disk_usage = lambda path: usage  # type: ignore[assignment]
    ended, said = _run(writer, folder / "out")
    assert (ended, "nothing was written" in said) == (6, True), said[-500:]
    assert not list(folder.iterdir())


def fills_up(writer: str, size: int, folder: Path) -> None:
    """No file may grow over `size` bytes: nothing is left, and the message is about room."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        ended, said = _run(writer, folder / "out")
        os._exit(ended if ended and "no room to write" in said else 99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 6, code
    assert not list(folder.iterdir())


# --- two at once ---------------------------------------------------------------------------------


def _start(folder: Path, *, hold: float) -> subprocess.Popen[bytes]:
    """A process that holds the lock of `folder/run` and says so."""
    program = (
        "import sys, time\nfrom finetune.artifacts.run_dir import RunDirectory\n"
        f"with RunDirectory.open({str(folder / 'run')!r}):\n"
        f"    print('held', flush=True)\n    time.sleep({hold})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def _resume_in(folder: Path) -> tuple[int, str]:
    import json

    settings = json.loads(trained("lora").with_suffix(".yaml").read_text())
    settings["training"]["output_dir"] = str(folder / "run")
    (folder / "x.yaml").write_text(json.dumps(settings))
    return command("train", folder / "x.yaml")


def in_use(folder: Path) -> None:
    """A second run ends with 7, names the holder, and touches nothing."""
    holder = _start(folder, hold=30)
    before = _content(folder / "run")
    ended, said = _resume_in(folder)
    assert ended == 7, (ended, said)
    assert f"process {holder.pid} on " in said
    assert _content(folder / "run") == before
    holder.kill()
    holder.wait()


def free_after_a_kill(folder: Path) -> None:
    """kill -9 frees the directory at once; the lock file that stays says nothing."""
    holder = _start(folder, hold=30)
    holder.kill()
    holder.wait()
    assert (folder / "run/.lock").exists()
    assert _resume_in(folder)[0] == 0


def free_when_it_ends(folder: Path) -> None:
    """And so does a run that ends by itself."""
    _start(folder, hold=0).wait()
    assert _resume_in(folder)[0] == 0


def two_writers(writer: str, folder: Path) -> None:
    """Two outputs of one name at once: one is made, whole, the other is refused."""
    from finetune.storage import folders

    lock = folders.open_stage(folder / "out")
    begun = time.monotonic()
    ended, said = _run(writer, folder / "out")
    assert (ended, "another process is writing" in said) == (7, True), said[-500:]
    assert time.monotonic() - begun < 20
    lock.release()
    assert _run(writer, folder / "out")[0] == 0


def cases() -> Iterator[Case]:
    """All of it."""
    glm_folder()
    trained("lora")
    import finetune.export.convert
    import finetune.export.merge  # noqa: F401

    for writer in WRITERS:
        for last, what in enumerate(_changes(writer)):
            yield Case(
                f"killed: {writer}, change {last + 1} ({what})", partial(killed, writer, last)
            )
        for name, (place, codes) in PLACES.items():
            run = partial(no_place, writer, place, codes)
            yield Case(f"outputs: {writer} to {name}", run)
        yield Case(f"outputs: {writer}, the disk is too small", partial(too_small, writer))
        for size in (100, 4_000, 100_000):
            run = partial(fills_up, writer, size)
            yield Case(f"outputs: {writer}, no file over {size} bytes", run)
        yield Case(f"locks: {writer}, twice at once", partial(two_writers, writer))
    for name in ("an empty folder that exists", "below a file", "a read-only file system",
                 "a name of 255 bytes", "a name of 300 bytes"):  # fmt: skip
        yield Case(f"outputs: predict to {name}", partial(predict_has_no_place, PLACES[name][0]))
    yield Case("outputs: merge into the adapter", inside_the_adapter)
    yield Case("locks: two runs in one directory", in_use)
    yield Case("locks: free after kill -9", free_after_a_kill)
    yield Case("locks: free when a run ends", free_when_it_ends)
