"""Where the tests of an installed library lie: fetched once with its source distribution.

Nothing of them is kept in this repository. Without a network, or an index that has the source
distribution, there are none, and who wanted them says so.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CHECKOUT = "TRANSFORMERS_CHECKOUT"
"""Names a git checkout of transformers: the distribution leaves out the folders under tests/."""


class NoSourceError(RuntimeError):
    """Why the tests of a library are not here."""


def source_of(library: str) -> Path:
    """The folder tests/ of the version that is installed; NoSourceError when it cannot be had."""
    if library == "transformers" and (checkout := os.environ.get(CHECKOUT)):
        folder = Path(checkout) / "tests"
        if not (folder / "generation" / "test_utils.py").is_file():
            raise NoSourceError(f"{CHECKOUT}={checkout} has no tests/generation/test_utils.py")
        return folder
    name = f"{library}-{version(library)}"
    folder = cache() / name / "tests"
    if not folder.is_dir():
        _fetch(library, name)
    return folder


def cache() -> Path:
    """Where fetched sources stay."""
    return Path(os.environ.get("FOREIGN_TESTS", Path.home() / ".cache" / "glm4-foreign-tests"))


def _fetch(library: str, name: str) -> None:
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as place:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
            "--dest", place, f"{library}=={version(library)}",
        ]  # fmt: skip
        if importlib.util.find_spec("setuptools"):
            command.insert(
                4, "--no-build-isolation"
            )  # else pip installs a builder to ask for a name
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        except subprocess.TimeoutExpired:
            raise NoSourceError(
                f"the source distribution of {name} did not come in 180 s"
            ) from None
        archives = list(Path(place).glob("*.tar.gz"))
        if done.returncode or not archives:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise NoSourceError(f"the source distribution of {name} cannot be fetched: {last}")
        with tarfile.open(archives[0]) as archive:
            wanted = [m for m in archive.getmembers() if m.name.startswith(f"{name}/tests/")]
            archive.extractall(place, members=wanted, filter="data")
        if not (Path(place) / name / "tests").is_dir():
            raise NoSourceError(f"the source distribution of {name} has no tests")
        (Path(place) / name / "tests" / "__init__.py").touch()  # there in the repository
        target = cache() / name
        if not target.exists():  # another process may have been first
            (Path(place) / name).rename(target)
