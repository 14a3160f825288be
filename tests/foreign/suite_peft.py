"""PEFT's tests of decoders on each family; collected by `runner.py` only."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import finetune.models  # noqa: F401 - registers the classes
from tests.foreign.theirs import offer

offer("peft")
if not importlib.util.find_spec("diffusers"):  # their common file wants a name from it
    sys.modules["diffusers"] = SimpleNamespace(StableDiffusionPipeline=type("None", (), {}))  # type: ignore[assignment]
from peft_tests import test_decoder_models as theirs  # noqa: E402

MODEL = os.environ["FOREIGN_MODEL"]
"""A tiny checkpoint, in the place of the ones on the hub that PEFT's tests name."""


_FROM_THE_HUB = "wants a checkpoint or data from the hub"
# Methods for which PEFT names no layers of model_type chatglm; who uses them gives the names.
_NAMED: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {"target_modules": ["query_key_value"]},
    "BeftConfig": {"target_modules": ["query_key_value"]},
    "IA3Config": {
        "target_modules": ["query_key_value", "dense_4h_to_h"],
        "feedforward_modules": ["dense_4h_to_h"],
    },
    "ShadowConfig": {"target_modules": r".*encoder\.layers\.\d+$"},
    "VBLoRAConfig": {"target_modules": ["query_key_value"]},
}
for kind, options in theirs.ALL_CONFIGS:
    options |= _NAMED.get(kind.__name__, {})


class TestDecoder(theirs.TestDecoderModels):
    """PEFT's tests, each on our checkpoint alone."""

    @pytest.mark.skip(reason=_FROM_THE_HUB)
    def test_prompt_tuning_text_tokenizer_kwargs(self) -> None:
        """Not here."""

    @pytest.mark.skip(reason=_FROM_THE_HUB)
    def test_prompt_tuning_trust_remote_code(self) -> None:
        """Not here."""


def _on_ours(function: Any) -> Any:
    """The test with the one checkpoint wherever it lists models; once where it listed several."""
    marks = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize" and "model_id" in str(mark.args[0]).split(","):
            mark = pytest.mark.parametrize("model_id", [MODEL], ids=["ours"]).mark
        marks.append(mark)
    function.pytestmark = marks
    return function


for name in dir(TestDecoder):
    if name.startswith("test_"):
        setattr(TestDecoder, name, _on_ours(getattr(TestDecoder, name)))
