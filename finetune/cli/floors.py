"""The oldest library versions that other people's files may be opened with; looked up, not imported."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from finetune.errors import ConfigError

FLOORS: dict[str, tuple[str, str]] = {
    "torch": ("2.6", "its weights_only=True ran code of a crafted file before (CVE-2025-32434)"),
    "transformers": ("5.10.4", "older ones run code of a model folder that nobody asked for"),
    "pillow": ("12.3", "older ones have known holes in their image decoders"),
    "deepspeed": ("0.15.1", "older ones run code sent to their ports (CVE-2024-43497)"),
}
"""Name on the package index -> the oldest version that is safe, and why."""


def check_versions() -> None:
    """ConfigError with one line for every library that is too old."""
    problems = []
    for name, (floor, why) in FLOORS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue  # whoever needs it says so
        if _numbers(found) < _numbers(floor):
            problems.append(
                f"{name} {found} is installed and {floor} is the oldest that is safe: {why}; "
                f"pip install '{name}>={floor}'"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _numbers(text: str) -> list[int]:
    """`2.6.0a0+cu12` -> [2, 6, 0]: what is before a local label or a pre-release counts."""
    found = re.match(r"\d+(\.\d+)*", text)
    return [int(part) for part in found[0].split(".")] if found else []
