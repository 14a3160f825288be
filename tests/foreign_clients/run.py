"""Client libraries against the endpoint, each in its own pinned version and in an environment of their own.

    python tests/foreign_clients/run.py [PYTEST-ARGUMENT ...]

Makes the environment once (`requirements.txt` beside this file, about 700 MB below the user's cache),
starts both endpoints of `server.py` and runs `check_*.py` there. Ends with pytest's exit code.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def environment() -> Path:
    """The Python of the libraries' environment, which is made when it is not there."""
    pins = (HERE / "requirements.txt").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"clients-{sys.version_info.major}.{sys.version_info.minor}-{hashlib.sha256(pins).hexdigest()[:12]}"
    folder = cache / "glm4-finetune" / name
    python = folder / "bin" / "python"
    if not (folder / "whole").is_file():
        print(f"installing the client libraries into {folder} ...", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        command = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
        ]
        subprocess.run([*command, "-r", HERE / "requirements.txt"], check=True)
        (folder / "whole").touch()
    return python


def main(arguments: list[str]) -> int:
    """Runs the checks; what pytest says of them."""
    python = environment()
    paths = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    server = subprocess.Popen(
        [sys.executable, HERE / "server.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        urls = json.loads(server.stdout.readline())
        addresses = {f"CLIENTS_{name.upper()}": url for name, url in urls.items()}
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [python, "-m", "pytest", "-q", "-c", HERE / "pytest.ini", "--rootdir", HERE]
        return subprocess.run(
            [*command, *(arguments or [HERE])], env=clean | addresses, cwd=HERE, check=False
        ).returncode
    finally:
        server.stdin.close()
        server.wait(60)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
