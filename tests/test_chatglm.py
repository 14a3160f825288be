"""The published layout against the published code's outputs, names, bytes and config."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from closeness import additions, assert_close, rounding
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import finetune.models  # noqa: F401 - registers chatglm
from finetune.errors import ModelError
from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.layers import RMSNorm

LAYERS = "transformer.encoder.layers.{}."


def open_model(folder: Path, attention: str = "sdpa") -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


@pytest.fixture(scope="module")
def golden(glm4_assets: Path) -> dict[str, Tensor]:
    with np.load(glm4_assets / "golden/glm4v/glm4_text_tiny.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def golden_folder(glm4_assets: Path) -> Path:
    return glm4_assets / "golden/glm4v/glm4_text_tiny"


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def golden_model(golden_folder: Path, request: pytest.FixtureRequest) -> PreTrainedModel:
    return open_model(golden_folder, request.param)


# --- the published code's numbers ----------------------------------------------------------------


def test_logits_and_hidden_states_are_those_of_the_published_code(
    golden_model: PreTrainedModel, golden: dict[str, Tensor]
) -> None:
    before_final_norm: list[Tensor] = []
    norm = golden_model.transformer.encoder.final_layernorm
    hook = norm.register_forward_hook(lambda _m, given, _out: before_final_norm.append(given[0]))
    output = golden_model(golden["single.input_ids"], output_hidden_states=True)
    hook.remove()
    sums = additions(golden_model.config, 34)
    assert_close(output.logits, golden["single.logits"], sums)
    states = [*output.hidden_states[:3], before_final_norm[0]]
    for layer, state in enumerate(states):
        assert_close(state, golden[f"single.hidden_{layer}"], sums)


def test_the_loss_is_that_of_the_published_code(
    golden_model: PreTrainedModel, golden: dict[str, Tensor]
) -> None:
    loss = golden_model(golden["single.input_ids"], labels=golden["single.labels"]).loss
    assert_close(loss, golden["single.loss"], additions(golden_model.config, 34))


@pytest.mark.parametrize("positions", ["given", "derived"])
@pytest.mark.parametrize("side", ["leftpad", "rightpad"])
def test_padded_logits_are_those_of_the_published_code(
    golden_model: PreTrainedModel, golden: dict[str, Tensor], side: str, positions: str
) -> None:
    mask = golden[f"{side}.attention_mask"]
    given = golden[f"{side}.position_ids"] if positions == "given" else None
    logits = golden_model(golden[f"{side}.input_ids"], mask, position_ids=given).logits
    expected = golden[f"{side}.logits"]
    assert_close(logits[mask == 1], expected[mask == 1], additions(golden_model.config, 20))


def test_greedy_tokens_with_a_cache_are_those_of_the_published_code(
    golden_model: PreTrainedModel, golden: dict[str, Tensor]
) -> None:
    output = golden_model.generate(
        golden["gen.input_ids"], max_new_tokens=8, do_sample=False,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(output.sequences, golden["gen.sequences"])
    scores = torch.stack(output.scores, dim=1)
    assert_close(scores, golden["gen.scores"], additions(golden_model.config, 34))


# --- names, bytes, config ------------------------------------------------------------------------


def test_a_saved_checkpoint_has_the_published_names_bytes_and_config(
    golden_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(golden_folder, dtype="auto")
    model.save_pretrained(tmp_path)
    with safe_open(golden_folder / "model.safetensors", "pt") as ours:
        assert "transformer.rotary_pos_emb.inv_freq" in ours.keys()  # noqa: SIM118 - no mapping
    saved = tmp_path / "model.safetensors"
    assert saved.read_bytes() == (golden_folder / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    published = json.loads((golden_folder / "config.json").read_text(encoding="utf-8"))
    assert list(config.items()) == list(published.items())


def test_a_saved_config_says_that_nothing_is_tied_even_if_it_was_read_from_one_that_does_not(
    tiny_chatglm: Path, tmp_path: Path
) -> None:
    # vLLM's ChatGLM ends at its start without the key (vllm/model_executor/models/chatglm.py).
    values = json.loads((tiny_chatglm / "config.json").read_text(encoding="utf-8"))
    values.pop("tie_word_embeddings", None)
    ChatGLMConfig.from_dict(values).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved == values | {"tie_word_embeddings": False}


def test_shards_are_read_and_written(tiny_chatglm: Path, tmp_path: Path) -> None:
    open_model(tiny_chatglm).save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    whole = load_file(tiny_chatglm / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    again = open_model(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_the_9b_model_has_the_published_names_and_shapes(glm4_assets: Path) -> None:
    folder = glm4_assets / "assets/glm-4-9b-chat"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert model.state_dict().keys() == index["weight_map"].keys()
    shapes = json.loads(
        (glm4_assets / "golden/glm4v/full_param_shapes.json").read_text(encoding="utf-8")
    )
    text = {n: tuple(s) for n, s in shapes.items() if not n.startswith("transformer.vision.")}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == text


def test_the_real_config_survives_a_round_trip_key_for_key(
    glm4_assets: Path, tmp_path: Path
) -> None:
    folder = glm4_assets / "assets/glm-4-9b-chat"
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    published = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert list(saved.items()) == list(published.items())


def test_a_changed_value_is_saved_under_all_its_names(tiny_chatglm: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_chatglm)
    config.num_hidden_layers = 1
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (saved["num_layers"], saved["num_hidden_layers"]) == (1, 1)
    assert saved["torch_dtype"] == "bfloat16"
    assert "dtype" not in saved


def test_a_checkpoint_without_the_unused_buffer_gets_it(tiny_chatglm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_chatglm, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    expected = weights.pop("transformer.rotary_pos_emb.inv_freq")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = open_model(folder)
    assert torch.equal(model.transformer.rotary_pos_emb.inv_freq, expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"original_rope": False}, "`original_rope` is false"),
        ({"rmsnorm": False}, "`rmsnorm` is false"),
        ({"post_layer_norm": False}, "`post_layer_norm` is false"),
        ({"multi_query_attention": False}, "`multi_query_attention` is false"),
        ({"add_bias_linear": True}, "`add_bias_linear` is true"),
        (
            {"apply_residual_connection_post_layernorm": True},
            "`apply_residual_connection_post_layernorm` is true",
        ),
        ({"fp32_residual_connection": True}, "`fp32_residual_connection` is set"),
        ({"quantization_bit": 4}, "`quantization_bit` is set"),
        ({"pre_seq_len": 128}, "`pre_seq_len` is set"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings` is true"),
        ({"padded_vocab_size": 65024}, "ChatGLM2 or ChatGLM3"),
        ({"_name_or_path": "THUDM/cogagent-9b-20241220"}, "this is CogAgent"),
        ({"cross_hidden_size": 1024}, "this is CogAgent"),
        ({"num_hidden_layers": 3}, "`num_layers` is 2 but `num_hidden_layers` is 3"),
    ],
)
def test_variants_that_are_not_glm4_are_refused_by_name(
    tiny_chatglm: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    config = json.loads((tiny_chatglm / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(ModelError, match=re.escape(said)):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["original_rope", "rmsnorm", "multi_query_attention"])
def test_a_config_without_the_fields_of_glm4_is_refused(
    tiny_chatglm: Path, tmp_path: Path, key: str
) -> None:
    config = json.loads((tiny_chatglm / "config.json").read_text(encoding="utf-8"))
    del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=f"`{key}` is missing"):
        AutoConfig.from_pretrained(tmp_path)


# --- the same function, said differently ---------------------------------------------------------


def as_glm(folder: Path) -> GlmForCausalLM:
    """The checkpoint as transformers' GlmForCausalLM: q|k|v split, the rest renamed."""
    config = ChatGLMConfig.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {
        "model.embed_tokens.weight": weights["transformer.embedding.word_embeddings.weight"],
        "model.norm.weight": weights["transformer.encoder.final_layernorm.weight"],
        "lm_head.weight": weights["transformer.output_layer.weight"],
    }
    group = config.multi_query_group_num * config.kv_channels
    widths = (config.num_attention_heads * config.kv_channels, group, group)
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}.", LAYERS.format(layer)
        for kind in ("weight", "bias"):
            parts = weights[f"{ours}self_attention.query_key_value.{kind}"].split(widths)
            for letter, part in zip("qkv", parts, strict=True):
                renamed[f"{theirs}self_attn.{letter}_proj.{kind}"] = part
        for new, old in {
            "self_attn.o_proj": "self_attention.dense",
            "mlp.gate_up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_attention_layernorm",
        }.items():
            renamed[f"{theirs}{new}.weight"] = weights[f"{ours}{old}.weight"]
    model = GlmForCausalLM(
        GlmConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            pad_token_id=config.pad_token_id,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0 * config.rope_ratio,
                "partial_rotary_factor": 0.5,
            },
        )
    )
    model.load_state_dict(renamed)
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_converted_weights_in_transformers_glm_give_the_same_logits(
    tiny_chatglm: Path, attention: str
) -> None:
    ids = torch.randint(0, 370, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    theirs = as_glm(tiny_chatglm)
    theirs.set_attn_implementation(attention)
    expected = theirs(ids, mask).logits
    logits = open_model(tiny_chatglm, attention)(ids, mask).logits
    assert_close(logits[mask == 1], expected[mask == 1], additions(theirs.config, 30))


def test_the_norm_multiplies_by_its_weight_before_it_rounds_to_bfloat16() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(64, 1e-6).bfloat16()
    norm.weight.data.uniform_(0.5, 1.5)
    hidden = torch.randn(100, 64).bfloat16()
    exact = hidden.double() / (hidden.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    product = (exact.float() * norm.weight.float()).bfloat16()
    rounded_first = exact.bfloat16() * norm.weight
    # What the order of float32 sums leaves carries this share of the numbers over a border of bfloat16.
    carried = rounding(64) / torch.finfo(torch.bfloat16).eps
    assert (norm(hidden) != product).double().mean() < carried < 1e-3
    assert (product != rounded_first).double().mean() > 0.1


def test_left_padded_generation_equals_one_prompt_at_a_time(tiny_chatglm: Path) -> None:
    model = open_model(tiny_chatglm)
    prompts = [[372, 374, 377, 5, 6, 378], [372, 374, 377, 9, 378], [372, 374, 378]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[tiny.PAD_ID] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    together = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=12)[0, len(prompt) :]
        assert row[longest : longest + len(alone)].tolist() == alone.tolist()


def test_repeated_positions_are_one_document(tiny_chatglm: Path) -> None:
    model = open_model(tiny_chatglm)
    ids = torch.arange(10, 20).unsqueeze(0)
    positions = torch.tensor([[0, 1, 2, 2, 2, 2, 3, 4, 5, 6]])  # the patches of an image share one
    free = model(ids, position_ids=positions, use_cache=False).logits
    masked = model(ids, torch.ones_like(ids), position_ids=positions).logits
    assert_close(free, masked, additions(model.config, 10))


def test_activation_checkpointing_changes_no_gradient(tiny_chatglm: Path) -> None:
    ids = torch.randint(0, 370, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointed in (False, True):
        model = open_model(tiny_chatglm).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None, name
        assert torch.equal(found[1][name], gradient), name  # recomputed by the same kernels


def test_flash_attention_is_told_where_packed_documents_end(
    tiny_chatglm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, object]] = []

    def flash(module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
        """What flash_attn_varlen_func computes, document by document over the flattened rows."""
        assert attention_mask is None
        seen.append(kwargs)
        flat = [t.transpose(1, 2).flatten(0, 1).transpose(0, 1) for t in (query, key, value)]
        borders = kwargs["cu_seq_lens_q"].tolist()
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(t[:, start:end] for t in flat), is_causal=True, enable_gqa=True
            )
            for start, end in pairwise(borders)
        ]
        return torch.cat(parts, dim=1).transpose(0, 1).unflatten(0, query.shape[::2][:2]), None

    ids = torch.randint(0, 370, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3], [*range(7), *range(5)]])
    model = open_model(tiny_chatglm)
    expected = model(ids, position_ids=positions).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_test", flash)
    model.config._attn_implementation = "flash_test"
    logits = model(ids, position_ids=positions).logits
    assert_close(logits, expected, additions(model.config, 12))
    assert seen[0]["cu_seq_lens_k"].tolist() == [0, 3, 8, 12, 19, 24]
    assert seen[0]["max_length_q"] == seen[0]["max_length_k"] == 7
    assert "position_ids" not in seen[0]
