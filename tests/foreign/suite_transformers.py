"""transformers' tests of models on each family; collected by `runner.py` only."""

from __future__ import annotations

import unittest
from typing import Any

from transformers.models.auto import modeling_auto

import finetune.models  # noqa: F401 - registers the classes
from tests.foreign import families
from tests.foreign.theirs import has_generation, offer

offer("transformers")
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import (  # noqa: E402
    GenerationTesterMixin,
    ModelTesterMixin,
)
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

# By these names the mixins know which classes take labels.
modeling_auto.MODEL_MAPPING_NAMES["chatglm"] = "ChatGLMModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["chatglm"] = "ChatGLMForConditionalGeneration"


class _Suite(ModelTesterMixin, GenerationTesterMixin):
    """What transformers' own test of a decoder consists of, but for pipelines, which want the hub."""

    family: Any
    test_can_init_all_missing_weights_before_2023 = True  # our files name no year
    config_class: Any
    model_tester = None

    def setUp(self) -> None:
        """Before each test."""
        self.model_tester = self.family(self)
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, **self.family.config_options
        )

    @property
    def all_model_classes(self) -> tuple[Any, ...]:
        """The base and the language model."""
        return (self.family.base_model_class, self.family.causal_lm_class)

    def test_config(self) -> None:
        """transformers' test of a config."""
        self.config_tester.run_common_tests()

    if not has_generation():
        test_generation_tester_mixin_inheritance = unittest.skip(
            "the source distribution has no tests/generation; give a checkout for these tests"
        )(lambda self: None)


FAMILIES = {
    "ChatGLM": families.ChatGLMTester,
    "ChatGLMVision": families.ChatGLMVisionTester,
    "OurGlm": families.OurGlmTester,
    "OurGlm4": families.OurGlm4Tester,
    "OurMixture": families.OurMixtureTester,
    "OurMla": families.OurMlaTester,
    "OurGrid": families.OurGridTester,
    "OurGrid46": families.OurGrid46Tester,
    "OurOcr": families.OurOcrTester,
    "OurGridMixture": families.OurGridMixtureTester,
    "Glm": families.GlmTester,
    "Mixture": families.MixtureTester,
    "Mla": families.MlaTester,
    "Grid": families.GridTester,
    "Grid46": families.Grid46Tester,
    "Ocr": families.OcrTester,
    "GridMixture": families.GridMixtureTester,
}
"""Those of this project, then transformers' own for comparison."""

for _name, _family in FAMILIES.items():
    _own = {
        "__doc__": _family.__doc__,
        "__module__": __name__,
        "family": _family,
        "config_class": _family.config_class,
        "additional_model_inputs": _family.additional_model_inputs,
        "_is_composite": _family.is_composite,
    }
    # That mixin knows models of text alone.
    _bases = (_Suite,) if _family.is_composite else (_Suite, TrainingTesterMixin)
    globals()[f"Test{_name}"] = type(f"Test{_name}", (*_bases, unittest.TestCase), _own)
