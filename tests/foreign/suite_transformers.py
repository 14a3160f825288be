"""transformers' tests of models on each family; collected by `runner.py` only."""

from __future__ import annotations

import unittest
from typing import Any

from transformers.models.auto import modeling_auto

import finetune.models  # noqa: F401 - registers the classes
from finetune.models.chatglm.configuration import ChatGLMConfig
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


class _Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """What transformers' own test of a decoder consists of, but for pipelines, which want the hub."""

    family: Any
    test_can_init_all_missing_weights_before_2023 = True  # our files name no year
    config_class: Any
    model_tester = None

    def setUp(self) -> None:
        """Before each test."""
        self.model_tester = self.family(self)
        self.config_tester = ConfigTester(self, config_class=self.config_class, hidden_size=37)

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


class TestChatGLM(_Suite, unittest.TestCase):
    """GLM-4 in the published layout."""

    family = families.ChatGLMTester
    config_class = ChatGLMConfig


class TestChatGLMVision(_Suite, unittest.TestCase):
    """GLM-4V."""

    family = families.ChatGLMVisionTester
    additional_model_inputs = ("pixel_values",)
    config_class = ChatGLMConfig


class TestOurGlm(_Suite, unittest.TestCase):
    """The -hf conversions with the loss of this project."""

    family = families.OurGlmTester
    config_class = families.OurGlmTester.config_class


class TestOurGlm4(_Suite, unittest.TestCase):
    """GLM-4-0414 with the loss of this project."""

    family = families.OurGlm4Tester
    config_class = families.OurGlm4Tester.config_class


class TestGlm(_Suite, unittest.TestCase):
    """transformers' own class, for comparison."""

    family = families.GlmTester
    config_class = families.GlmTester.config_class
