"""A light process that runs commands in forks of itself and measures each; torch is never in it.

What a command costs a user is the start of Python, the imports and the work. Start and imports are
paid once, by the server, and added to every command's own processor time; memory is the peak of the
command's process, in which everything imported counts.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = ("torch", "transformers", "datasets", "peft", "deepspeed", "accelerate", "resvg_py")
MAX_SECONDS = 1.0
MAX_MB = 200.0


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float
    """Processor time, that of starting Python and of all imports included."""
    peak_mb: float
    heavy: list[str]
    """Heavy packages that it imported."""

    def refused(self, *said: str, code: int = 2) -> None:
        """Assert that it ended with this code and message, at once, without a traceback."""
        assert self.code == code, f"exit {self.code}: {self.err[-500:]}"
        assert "Traceback" not in self.err, self.err
        for text in said:
            assert text in self.err, f"{text!r} is not in: {self.err}"
        self.cheap()

    def cheap(self) -> None:
        """Assert that it took under a second and 200 MB."""
        assert not self.heavy, f"imported {self.heavy}"
        assert self.seconds < allowed_seconds(), f"{self.seconds:.2f} s"
        assert self.peak_mb < MAX_MB, f"{self.peak_mb:.0f} MB"


def allowed_seconds() -> float:
    """A second; up to twice that while more is running than the machine has cores for."""
    return MAX_SECONDS * min(max(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0), 2.0)


class Light:
    """The server, seen from the tests; it ends with them."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def run(self, *words: object, cwd: Path) -> Outcome:
        """`finetune WORDS...` with `cwd` as its working directory."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {
            "words": [str(word) for word in words],
            "cwd": str(cwd),
            "id": time.monotonic_ns(),
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        while True:  # what a case that ran out of time had asked for may come first
            answer = json.loads(self._server.stdout.readline())
            if answer.pop("id") == request["id"]:
                return Outcome(**answer)


def serve() -> None:
    """Answer requests until there are no more."""
    import finetune.cli.commands
    import finetune.config.load
    import finetune.data.preview.report
    import finetune.training.run  # noqa: F401

    started = time.process_time()
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(tempfile.mkdtemp(prefix="reliability-light-"))
        answer = _measured(request["words"], request["cwd"], folder)
        shutil.rmtree(folder)
        answer["seconds"] += started
        answer["id"] = request["id"]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _measured(words: list[str], cwd: str, folder: Path) -> dict[str, Any]:
    if (child := os.fork()) == 0:
        try:
            _run(words, cwd, folder)
        finally:
            os._exit(99)
    _, status, usage = os.wait4(child, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    heavy = folder / "heavy"
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": (folder / "out").read_text("utf-8", "replace"),
        "err": (folder / "err").read_text("utf-8", "replace"),
        "seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss * unit / 1e6,
        "heavy": heavy.read_text().split() if heavy.exists() else ["it did not end by itself"],
    }


def _run(words: list[str], cwd: str, folder: Path) -> None:
    from finetune.cli import main

    for number, name in ((0, os.devnull), (1, "out"), (2, "err")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT
        os.dup2(os.open(folder / name, flags, 0o600), number)
    os.chdir(cwd)
    code: object = 1
    try:
        main(words)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()  # what it started ends, and counts
    (folder / "heavy").write_text(" ".join(name for name in HEAVY if name in sys.modules))
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    serve()
