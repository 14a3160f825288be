"""Peak memory of one training step as a function of the text's length, 4 K to 128 K tokens.

    python scripts/bench/long_text.py [--lengths 4096 131072] [--plot docs/long_text.png] [--json]

A GLM of two layers (hidden 32, one head of 16, vocabulary 8,192), LoRA rank 8, fp32, one row, every
token supervised, each measurement in a process of its own:

  plain          stock loss over all logits, activations kept
  ours           chunked loss, activations kept
  checkpointed   chunked loss, activations recomputed
  packed         the same, the row made of documents of 4,096 tokens

`above` is the peak above what the process held before the step. No variant has an attention mask of
T x T: a single document is causal, packed documents are attended to piece by piece
(finetune/models/packed_attention.py). The logits of the plain loss end it at 32 K.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from alternation import measured

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
VARIANTS = ("plain", "ours", "checkpointed", "packed")
MOST = {"plain": 32768, "ours": 131072, "checkpointed": 131072, "packed": 131072}
DOCUMENT = 4096
VOCABULARY = 8192


def build(variant: str, length: int, family: str) -> Any:
    """The model with LoRA."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from finetune.models.chatglm.configuration import ChatGLMConfig
    from finetune.models.chatglm.modeling import ChatGLMForConditionalGeneration
    from finetune.models.families import GlmForCausalLM
    from finetune.models.packed_attention import DOCUMENT_SDPA

    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj"]
    if family == "chatglm" and variant != "plain":
        targets = ["query_key_value"]
        config: Any = ChatGLMConfig(
            padded_vocab_size=VOCABULARY, hidden_size=32, ffn_hidden_size=64, num_layers=2,
            num_attention_heads=1, multi_query_attention=True, multi_query_group_num=1,
            kv_channels=16, seq_length=length, add_qkv_bias=True,
        )  # fmt: skip
        model: Any = ChatGLMForConditionalGeneration(config)
    else:
        config = transformers.GlmConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=1, num_key_value_heads=1, head_dim=16, pad_token_id=0,
            max_position_embeddings=length,
        )  # fmt: skip
        model = (transformers.GlmForCausalLM if variant == "plain" else GlmForCausalLM)(config)
    if variant in ("checkpointed", "packed"):
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if variant != "plain":
        model.config._attn_implementation = DOCUMENT_SDPA
    return get_peft_model(model, LoraConfig(r=8, target_modules=targets)).train()


def run(options: argparse.Namespace) -> dict[str, float]:
    """One forward and backward pass in this process."""
    import torch

    torch.set_num_threads(options.threads)
    model = build(options.variant, options.length, options.family)
    ids = torch.randint(1, VOCABULARY, (1, options.length))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if options.variant == "packed":
        places = torch.arange(DOCUMENT).repeat(options.length // DOCUMENT)
        batch["position_ids"] = places.unsqueeze(0)

    def step() -> float:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return measured(step)


def measure(options: argparse.Namespace) -> dict[str, dict[int, dict[str, float]]]:
    """Figures by variant and length."""
    found: dict[str, dict[int, dict[str, float]]] = {variant: {} for variant in VARIANTS}
    for variant in VARIANTS:
        for length in (n for n in options.lengths if n <= MOST[variant]):
            command = [
                sys.executable, __file__, "--variant", variant, "--length", str(length),
                "--threads", str(options.threads), "--family", options.family,
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{variant} at {length} failed:\n{done.stderr[-3000:]}")
            found[variant][length] = json.loads(done.stdout.splitlines()[-1])
            if not options.json:
                figures = found[variant][length]
                print(f"{variant} {length}: {figures['above_mib']:.0f} MiB, {figures['cpu_s']:.1f} CPU s", flush=True)  # fmt: skip
    return found


def plot(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Peak memory over length, both on logarithmic scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for variant, figures in found.items():
        lengths = sorted(figures)
        axes.plot(lengths, [figures[n]["above_mib"] for n in lengths], marker="o", label=variant)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(LENGTHS, [f"{n // 1024} K" for n in LENGTHS])
    axes.set_xlabel("tokens")
    axes.set_ylabel("peak above the start, MiB")
    axes.set_title("One training step of a tiny GLM, fp32, CPU")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> int:
    """Print the table; write the plot when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(LENGTHS), metavar="N",
        help=f"tokens of the row, {min(LENGTHS):,} or more (one packed document)",
    )  # fmt: skip
    parser.add_argument("--family", choices=("chatglm", "glm"), default="chatglm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="a PNG file; needs: pip install matplotlib")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--variant", choices=VARIANTS, help="only this one, in this process")
    parser.add_argument("--length", type=int)
    options = parser.parse_args()
    if min(options.lengths) < min(LENGTHS):
        parser.error(f"--lengths must be {min(LENGTHS):,} or more")
    if options.variant:
        print(json.dumps(run(options)))
        return 0
    found = measure(options)
    if options.plot:
        plot(found, options.plot)
    if options.json:
        print(json.dumps(found))
        return 0
    from cells import table

    rows = [
        [f"{length:,}", *(
            f"{found[v][length]['above_mib']:.0f} MiB, {found[v][length]['cpu_s']:.0f} s"
            if length in found[v] else "–" for v in VARIANTS
        )]
        for length in options.lengths
    ]  # fmt: skip
    print(table(["tokens", *VARIANTS], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
