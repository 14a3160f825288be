"""An adapter of PEFT that brings more tokens than its base has becomes a model with all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import weights_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from finetune.errors import ConfigError, ModelError
from finetune.export.merge import merge

NEW = 2


def longer_adapter(base: Path, folder: Path, names: list[str]) -> Any:
    """PEFT's model with two tokens more and random weights, saved to `folder`."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(tiny.VOCAB_SIZE + NEW)
    options = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names)
    tuned = get_peft_model(model, options)
    with torch.no_grad():
        for weight in (p for p in tuned.parameters() if p.requires_grad):
            weight.copy_(torch.randn_like(weight) / 5)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        tuned.save_pretrained(folder)
    return tuned


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("base"), "glm4")


def test_the_merged_model_has_the_longer_vocabulary_and_answers_as_peft_does(
    base: Path, tmp_path: Path
) -> None:
    tuned = longer_adapter(base, tmp_path / "adapter", ["embed_tokens", "lm_head"])
    report = merge(tmp_path / "adapter", tmp_path / "out", base=base)
    assert any("brings no tokenizer: copy the one" in note for note in report.notes)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == tiny.VOCAB_SIZE + NEW
    assert weights_of(tmp_path / "out")["lm_head.weight"].shape[0] == tiny.VOCAB_SIZE + NEW
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([[5, tiny.VOCAB_SIZE, 9, tiny.VOCAB_SIZE + 1]])
    expected, found = (m.eval()(input_ids=ids).logits for m in (tuned, merged))
    assert torch.allclose(found, expected, atol=1e-5)
    assert isinstance(tuned, PeftModel)


def test_the_tokenizer_of_the_adapter_comes_along(base: Path, tmp_path: Path) -> None:
    longer_adapter(base, tmp_path / "adapter", ["embed_tokens", "lm_head"])
    (tmp_path / "adapter/tokenizer.json").write_text('{"own": true}')
    report = merge(tmp_path / "adapter", tmp_path / "out", base=base)
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"own": true}'
    assert f"the vocabulary has {NEW} tokens more" in report.notes[-1]
    with pytest.raises(ConfigError, match="choose --check tensors"):
        merge(tmp_path / "adapter", tmp_path / "full", base=base, check="full")


def test_one_longer_embedding_without_the_other_is_refused(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    longer_adapter(base, tmp_path / "adapter", ["embed_tokens", "lm_head"])
    file = tmp_path / "adapter/adapter_model.safetensors"
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    settings["modules_to_save"] = ["embed_tokens"]
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    save_file({k: v for k, v in load_file(file).items() if "lm_head" not in k}, file)
    with pytest.raises(ModelError, match=r"2 tokens more .* and not in lm_head.weight"):
        merge(tmp_path / "adapter", tmp_path / "out", base=base)
