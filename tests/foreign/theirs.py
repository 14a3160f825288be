"""Makes the fetched tests importable, as `transformers_tests` and `peft_tests`."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

from tests.foreign.sources import source_of

# What the tests import and the source distribution leaves out.
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def offer(library: str) -> ModuleType:
    """The package `<library>_tests`, and empty mixins where its folder lacks their modules."""
    name = f"{library}_tests"
    if name not in sys.modules:
        folder = source_of(library)
        sys.modules[name] = _package(name, [str(folder)])
        if library == "transformers" and not (folder / "generation").is_dir():
            for module, names in _LEFT_OUT.items():
                parent = f"{name}.{module.split('.')[0]}"
                sys.modules[parent] = _package(parent, [])
                stand_in = ModuleType(f"{name}.{module}")
                vars(stand_in).update(names)
                sys.modules[stand_in.__name__] = stand_in
    return sys.modules[name]


def has_generation() -> bool:
    """Whether transformers' tests of `generate` are there."""
    return (source_of("transformers") / "generation").is_dir()


def _package(name: str, places: list[str]) -> ModuleType:
    package = ModuleType(name)
    package.__path__ = places
    package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    return package
