"""Make a random GLM-4V of two to three million parameters, in the published layout.

python scripts/tiny_glm4v.py runs/tiny-glm4v --text data/shapes/train.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.data.tokenizer import CONTROL_TOKENS
from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.modeling import ChatGLMForConditionalGeneration

# The pre-tokenizer of the published tokenizer.model, with single digits.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")


def save_tokenizer(folder: Path, lines: list[str]) -> dict[str, int]:
    """Write a byte-level tokenizer trained on `lines`; returns the ids of the control tokens."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in CONTROL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    settings |= {"eos_token": STOPS[0], "pad_token": STOPS[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return {token: tokenizer.token_to_id(token) for token in CONTROL_TOKENS}


def make_config(ids: dict[str, int], size: int, width: int, layers: int) -> ChatGLMConfig:
    """The config of a model with images of `size` pixels; all widths follow from `width`."""
    vision = {
        "dropout_prob": 0.0, "hidden_act": "gelu", "in_channels": 3, "num_hidden_layers": layers,
        "hidden_size": width, "patch_size": 14, "num_heads": 4, "intermediate_size": 3 * width,
        "layer_norm_eps": 1e-6, "num_positions": (size // 14) ** 2 + 1, "image_size": size,
        "scaling_factor": 1,
    }  # fmt: skip
    needed = {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False,
        "apply_residual_connection_post_layernorm": False, "multi_query_attention": True,
        "original_rope": True, "post_layer_norm": True, "rmsnorm": True, "torch_dtype": "float32",
        "tie_word_embeddings": False,
    }  # fmt: skip
    sizes = {
        "num_layers": layers, "hidden_size": width, "ffn_hidden_size": 3 * width,
        "initializer_range": width**-0.5,  # 0.02 is for widths of thousands
        "kv_channels": width // 4, "num_attention_heads": 4, "multi_query_group_num": 2,
        "padded_vocab_size": -(-(max(ids.values()) + 1) // 16) * 16, "seq_length": 4096,
        "vision_config": vision, "boi_token_id": ids["<|begin_of_image|>"],
        "eoi_token_id": ids["<|end_of_image|>"], "pad_token_id": ids[STOPS[0]],
        "eos_token_id": [ids[token] for token in STOPS],
    }  # fmt: skip
    return ChatGLMConfig.from_dict(needed | sizes)


def make_model(folder: Path, text: list[Path], *, size: int, width: int, layers: int) -> int:
    """Write the folder; returns the number of parameters."""
    folder.mkdir(parents=True)
    lines = [line for path in text for line in path.read_text(encoding="utf-8").splitlines()]
    config = make_config(save_tokenizer(folder, lines), size, width, layers)
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(config)
    model.save_pretrained(folder)
    stops = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(stops) + "\n")
    return int(model.num_parameters())


def main() -> None:
    """Write the folder unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", help="what the tokenizer is trained on")
    parser.add_argument(
        "--size", type=int, default=112, help="pixels of an image, a multiple of 28"
    )
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args()
    if (given.folder / "config.json").is_file():
        print(f"{given.folder} is there already")
        return
    number = make_model(
        given.folder, given.text, size=given.size, width=given.width, layers=given.layers
    )
    print(f"{given.folder}: {number:,} parameters")


if __name__ == "__main__":
    main()
