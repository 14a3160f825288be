"""PEFT's tests of decoders on each family; collected by `runner.py` only."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

import finetune.models  # noqa: F401 - registers the classes
from tests.foreign.theirs import offer

offer("peft")
if not importlib.util.find_spec("diffusers"):  # their common file wants a name from it
    sys.modules["diffusers"] = SimpleNamespace(StableDiffusionPipeline=type("None", (), {}))  # type: ignore[assignment]
from peft_tests import test_decoder_models as theirs  # noqa: E402

MODEL = os.environ["FOREIGN_MODEL"]
"""A tiny checkpoint, in the place of the ones on the hub that PEFT's tests name."""
theirs.PEFT_DECODER_MODELS_TO_TEST[:] = [MODEL]  # one test takes the first of them by itself


def _quotes() -> DatasetDict:
    """Sentences in the place of the data set on the hub that one test trains on."""
    rows = [f"The quick fox jumps over {n} lazy dogs." for n in range(64)]
    return DatasetDict(train=Dataset.from_dict({"quote": rows}))


theirs.load_dataset_english_quotes = _quotes

_MODELS_OF_THEIR_OWN = [
    "test_prompt_tuning_text_tokenizer_kwargs",
    "test_prompt_tuning_trust_remote_code",
    "test_generate_adalora_no_dropout",
    "test_lora_layer_replication",
    "test_prefix_tuning_qwen2_with_grouped_query_attention",
    "test_prefix_tuning_qwen3_with_grouped_query_attention",
    "test_prefix_tuning_offsets_position_ids_in_forward",
    "test_prefix_tuning_mistral",
    "test_prompt_tuning_prepare_inputs_for_generation_4d_attention_mask",
    "test_save_pretrained_targeting_lora_to_embedding_layer",
    "test_lora_embed_scale_is_applied",
    "test_lora_embed_scale_is_applied_mixed_batch",
    "test_merge_and_unload_fixes_tie_word_embeddings_config",
    "test_prefix_tuning_gemma4_works",
    "test_prefix_tuning_gemma4_warns_if_some_layers_skipped",
    "test_prefix_tuning_gemma4_raises_if_all_layers_skipped",
]
"""Tests that name another model on the hub and try nothing of ours."""
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

    def test_training_decoders_layer_indexing(
        self, model_id: str, config_cls: Any, config_kwargs: Any
    ) -> None:
        """Theirs, but for the method whose layers must be named by a regex here."""
        if config_cls is theirs.ShadowConfig:
            pytest.skip("PEFT takes no numbers of layers beside the regex that Shadow needs here")
        super().test_training_decoders_layer_indexing(model_id, config_cls, config_kwargs)

    test_training_decoders_layer_indexing.pytestmark = (  # type: ignore[attr-defined]
        theirs.TestDecoderModels.test_training_decoders_layer_indexing.pytestmark
    )


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


@pytest.mark.skip(reason="a test of another model, which the hub has")
def _elsewhere(self: TestDecoder) -> None:
    """Not here."""


for name in _MODELS_OF_THEIR_OWN:
    setattr(TestDecoder, name, _elsewhere)
