"""Tiny random checkpoints that look like GLM-4 ones: a folder on disk that every room can load.

Byte-level BPE of 370 ranks, the 14 control tokens as ids 370..383, an embedding of 400 rows, hidden
32, 2 layers. Weights are seeded and drawn wide enough for the logits to differ from token to token.
"""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

NUM_RANKS = 370
VOCAB_SIZE = 400
CONTROL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
    "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
CONTROL_IDS = {token: NUM_RANKS + place for place, token in enumerate(CONTROL_TOKENS)}
PAD_ID = CONTROL_IDS["<|endoftext|>"]
EOS_IDS = [CONTROL_IDS[token] for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]

# The layout of glm-4-9b-chat with a shorter preamble.
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\n"
    "你是一个名为 ChatGLM 的人工智能助手。\n\n# 可用工具{% for tool in item['tools'] %}"
    "{% if tool['type'] == 'function' %}\n\n## {{ tool['function']['name'] }}\n\n"
    "{{ tool['function'] | tojson(indent=4) }}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
    "{% endif %}{% endfor %}{% endif %}{% if item['content'] %}<|{{ item['role'] }}|>"
    "{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# The pre-tokenizer of the published tokenizer.model.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the other dog looks at the order",
    "a customer asks when the order arrives and the assistant answers the customer",
    '{"city": "北京", "name": "get_weather", "arguments": {"city": "上海"}}',
    "你好，请问有什么可以帮助你？今天的天气怎么样？这件衣服的版型很好，面料舒适。",
    "question answer question answer hello world hello there what is this thing",
)


@lru_cache(maxsize=1)
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_RANKS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    assert tokenizer.get_vocab_size() == NUM_RANKS
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in CONTROL_TOKENS])
    return str(tokenizer.to_str())


def bare_tokenizer() -> str:
    """tokenizer.json as text; whoever takes it puts control tokens of another kind in."""
    return _trained()


def save_tokenizer(
    folder: Path, *, tiktoken: bool = False, chat_template: str = CHAT_TEMPLATE
) -> None:
    """Write tokenizer files: tokenizer.json, or only a tiktoken `tokenizer.model` as published."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "added_tokens_decoder": {
            str(number): {
                "content": token, "lstrip": False, "normalized": False, "rstrip": False,
                "single_word": False, "special": True,
            }
            for token, number in CONTROL_IDS.items()
        },
        "additional_special_tokens": list(CONTROL_TOKENS),
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 2048,
        "padding_side": "left",
    }  # fmt: skip
    if tiktoken:
        config["auto_map"] = {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}
        config["tokenizer_class"] = "ChatGLM4Tokenizer"
        (folder / "tokenizer.model").write_bytes(_tiktoken_file())
    else:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer.json").write_text(_trained(), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config)


def save_model(
    folder: Path,
    family: str = "chatglm",
    *,
    seed: int = 0,
    tiktoken: bool = False,
    **overrides: Any,
) -> Path:
    """Write a tiny checkpoint of `family`, any of text; `overrides` go into its config."""
    if family.startswith("glm4_moe"):
        import mixtures

        return mixtures.save_model(folder, family, seed=seed, **overrides)
    save_tokenizer(folder, tiktoken=tiktoken)
    config = _configs(family) | overrides
    _write_json(folder / "config.json", config)
    generation = {"eos_token_id": EOS_IDS, "pad_token_id": PAD_ID, "do_sample": False}
    _write_json(folder / "generation_config.json", generation)
    shapes = chatglm_shapes(config) if family == "chatglm" else _stock_shapes(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: drawn(name, shape, generator) for name, shape in sorted(shapes.items())}
    if family == "chatglm":
        pairs = config["kv_channels"] // 4
        tensors["transformer.rotary_pos_emb.inv_freq"] = 1.0 / 10000.0 ** (
            torch.arange(pairs) / pairs
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def chatglm_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the trainable text weights in the published layout."""
    hidden, ffn = config["hidden_size"], config["ffn_hidden_size"]
    groups, head = config["multi_query_group_num"], config["kv_channels"]
    query = config["num_attention_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (config["padded_vocab_size"], hidden),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (config["padded_vocab_size"], hidden),
    }
    for layer in range(config["num_layers"]):
        at = f"transformer.encoder.layers.{layer}."
        qkv = query + 2 * groups * head
        shapes[at + "input_layernorm.weight"] = (hidden,)
        shapes[at + "self_attention.query_key_value.weight"] = (qkv, hidden)
        shapes[at + "self_attention.query_key_value.bias"] = (qkv,)
        shapes[at + "self_attention.dense.weight"] = (hidden, query)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        shapes[at + "mlp.dense_h_to_4h.weight"] = (2 * ffn, hidden)
        shapes[at + "mlp.dense_4h_to_h.weight"] = (hidden, ffn)
    return shapes


def _configs(family: str) -> dict[str, Any]:
    if family == "chatglm":
        return {
            "_name_or_path": "THUDM/glm-4-9b-chat",
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "auto_map": {
                "AutoConfig": "configuration_chatglm.ChatGLMConfig",
                "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
                "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
            },
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "apply_query_key_layer_scaling": True,
            "apply_residual_connection_post_layernorm": False,
            "attention_dropout": 0.0,
            "attention_softmax_in_fp32": True,
            "attn_implementation": "sdpa",
            "bias_dropout_fusion": True,
            "ffn_hidden_size": 64,
            "fp32_residual_connection": False,
            "hidden_dropout": 0.0,
            "hidden_size": 32,
            "kv_channels": 8,
            "layernorm_epsilon": 1.5625e-07,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_layers": 2,
            "rope_ratio": 500,
            "original_rope": True,
            "padded_vocab_size": VOCAB_SIZE,
            "post_layer_norm": True,
            "rmsnorm": True,
            "seq_length": 2048,
            "use_cache": True,
            "torch_dtype": "float32",
            "transformers_version": "4.42.4",
            "tie_word_embeddings": False,
            "eos_token_id": EOS_IDS,
            "pad_token_id": PAD_ID,
        }
    return {
        "model_type": family,
        "architectures": [{"glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM"}[family]],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": EOS_IDS,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "max_position_embeddings": 2048,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": 1.5625e-07,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        },
        "tie_word_embeddings": False,
        "dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }  # fmt: skip


def _stock_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in tied}


def drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random numbers for a weight of this name."""
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1.0 + 0.1 * noise
    if name.endswith(".bias"):
        return 0.1 * noise
    return noise if "embed" in name else noise / shape[-1] ** 0.5


def _tiktoken_file() -> bytes:
    """The same vocabulary as base64 ranks, the format of the published tokenizer.model."""
    alphabet = _byte_of_character()
    vocabulary = json.loads(_trained())["model"]["vocab"]
    lines = [
        base64.b64encode(bytes(alphabet[c] for c in token)).decode() + f" {rank}\n"
        for token, rank in sorted(vocabulary.items(), key=lambda item: item[1])
    ]
    return "".join(lines).encode()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte alphabet: printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
