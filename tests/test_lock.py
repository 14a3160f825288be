"""The lock of uv and the constraints of pip install the same versions, from the public index."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = dict(
    re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
)
LOCK = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_has_the_versions_of_the_constraints() -> None:
    locked = {package["name"]: package.get("version") for package in LOCK["package"]}
    pins = {normal(name): version for name, version in PINS.items()}
    both = locked.keys() & pins.keys()
    assert len(both) > 40
    assert {name: locked[name] for name in both if locked[name] != pins[name]} == {}, "run: uv lock"


def test_the_lock_names_the_public_index_only() -> None:
    hosts = set(re.findall(r'"https?://([^/"]+)', (ROOT / "uv.lock").read_text(encoding="utf-8")))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}


def test_uv_is_told_the_same_versions_as_pip() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    told = dict(pin.split("==") for pin in project["tool"]["uv"]["constraint-dependencies"])
    assert {name: told[name] for name in told if told[name] != PINS.get(name)} == {}
