"""Generation here against the original demo's way, on AdvertiseGen's dev set with the same model.

    python scripts/bench/generation.py DEV.jsonl [--model FOLDER] [--samples 128] [--rounds 2] [--json]

  demo 4       as GLM-4's demo evaluates: transformers' generate on batches in the order of the file,
               padded to the longest, until the slowest row ends; its 4 prompts a batch
  demo 16      the same with 16 a batch
  static 4     `demo 4` with transformers' static cache
  here 4       finetune.generation.generate: sorted by length, finished rows refilled, keys and
               values in place; the demo's 4 at once
  here 16      the same with 16 at once
  here 32      the same with 32 at once
  system       `here 16`, every prompt with the same system prompt of some 300 tokens before it
  system alone the same without sharing what the prompts begin with

Every reply ends where its reference ends, so that lengths are those of the data whatever the model
has learnt; tokens are greedy otherwise. All ways must give the same replies. The demo's ways load the model
with transformers alone. Without --model a random GLM with SmolLM2's vocabulary, hidden 192, 6 layers, is
made, and runs/quickstart-model lends its tokenizer.

Bars: `here 16` at most half of `demo 4`, in seconds of the clock and of the CPU, and at equal rows 1.5 x as
fast as transformers' generate in CPU seconds: `--only "demo 4" "here 4"` and `--only "demo 16" "here 16"`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from alternation import arguments_of, compare, measured, report

ROOT = Path(__file__).resolve().parents[2]
DEMO = {"demo 4": 4, "demo 16": 16, "static 4": 4}
HERE = {"here 4": 4, "here 16": 16, "here 32": 32, "system": 16, "system alone": 16}
VARIANTS = (*DEMO, *HERE)
BARS = {"here 16": {"cpu_s": 0.5, "wall_s": 0.5}}
EQUAL_ROWS = 1 / 1.5
LONGEST = 512
SYSTEM = "你是一位服装文案撰稿人，请根据给出的商品属性写一段生动的介绍，不要编造属性。" * 5


def load_model(folder: str, *, stock: bool) -> Any:
    """The model of a folder, as transformers loads it or as the commands here do."""
    import torch
    import transformers

    if stock:  # nothing of ours is imported, which would change transformers' layers
        assert "finetune.models" not in sys.modules
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    from finetune.models.load import load_model

    return load_model(folder, dtype="float32")


def make_model(folder: str) -> None:
    """Write a small random GLM with the quickstart's vocabulary."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    config = GlmConfig(vocab_size=49168, pad_token_id=0, **sizes, **heads)
    GlmForCausalLM(config).save_pretrained(folder)


def questions(options: argparse.Namespace) -> tuple[Any, list[list[int]], list[int]]:
    """The template, the prompts, and how many tokens each reply may have."""
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer
    from finetune.data.dialogue.conversation import Conversation, Message

    template = ChatTemplate(
        load_chat_tokenizer(options.model or ROOT / "runs" / "quickstart-model")
    )
    rows = [
        json.loads(line) for line in Path(options.data).read_text(encoding="utf-8").splitlines()
    ]
    system = [Message("system", SYSTEM)] if options.variant.startswith("system") else []
    prompts, lengths = [], []
    for row in rows[: options.samples]:
        user, reply = (Message(one["role"], one["content"]) for one in row["messages"])
        prompts.append(template.prompt(Conversation((*system, user)), len(system) + 1))
        text = template.tokenizer.plain.encode(f"\n{reply.content}", add_special_tokens=False)
        lengths.append(min(len(text.ids), LONGEST - 1))
    return template, prompts, lengths


def demo(model: Any, template: Any, prompts: Sequence[Any], lengths: Sequence[int], size: int, cache: str | None = None) -> list[list[int]]:  # fmt: skip
    """Replies batch by batch in the order given."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    stop = template.stop_ids[0]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=LONGEST, eos_token_id=list(template.stop_ids),
        pad_token_id=template.pad_id, cache_implementation=cache,
    )  # fmt: skip
    replies = []
    for first in range(0, len(prompts), size):
        batch, wanted = prompts[first : first + size], lengths[first : first + size]
        width = max(map(len, batch))
        ids = torch.tensor([[template.pad_id] * (width - len(one)) + list(one) for one in batch])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in batch])

        def ended(ids: Any, scores: Any, width: int = width, wanted: Any = wanted) -> Any:
            scores[:, list(template.stop_ids)] = float("-inf")
            for row, length in enumerate(wanted):
                if ids.shape[1] - width >= length:
                    scores[row, stop] = float("inf")
            return scores

        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config,
                logits_processor=LogitsProcessorList([ended]),
            )  # fmt: skip
        new = output[:, width:].tolist()
        replies += [row[:length] for row, length in zip(new, wanted, strict=True)]
    return replies


class EndsAt:
    """Ends a reply at its length, whatever the model would write."""

    def __init__(self, length: int, stop_ids: Sequence[int]) -> None:
        self._left = length
        self._stop_ids = list(stop_ids)

    def restrict(self, logits: Any) -> Any:
        """No stop before the length, nothing else behind it."""
        logits[self._stop_ids] = float("-inf" if self._left else "inf")
        return logits

    def accept(self, token: int) -> None:
        """One token less to go."""
        self._left -= 1


def here(model: Any, template: Any, prompts: Sequence[Any], lengths: Sequence[int], size: int) -> list[list[int]]:  # fmt: skip
    """Replies of our own loop, each ended at its length by the choice of its tokens."""
    from finetune.generation.generate import Extras, generate

    extras = Extras(constraint_at=lambda number: EndsAt(lengths[number], template.stop_ids))
    found = generate(
        model, template, prompts, max_new_tokens=LONGEST, batch_size=size, extras=extras
    )
    return [list(reply.ids) for reply in found]


def run(options: argparse.Namespace) -> dict[str, float]:
    """Measure one variant in this process."""
    import torch

    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as made:
        if not options.model:
            make_model(made)
        model = load_model(options.model or made, stock=options.variant in DEMO)
    template, prompts, lengths = questions(options)
    if options.variant == "system alone":
        from finetune.generation import batch as tensors

        tensors.SHORTEST_PREFIX = 10**9
    way, size = (demo, DEMO[options.variant]) if options.variant in DEMO else (here, HERE[options.variant])  # fmt: skip
    if options.variant.startswith("static"):
        way = partial(demo, cache="static")
    way(model, template, prompts[:4], [3] * 4, size)
    replies: list[list[int]] = []
    begun = time.perf_counter()

    def work() -> float:
        replies.extend(way(model, template, prompts, lengths, size))
        return float(sum(map(len, replies)))

    figures = measured(work)
    assert [len(reply) for reply in replies] == lengths
    digest = hashlib.sha256(repr(replies).encode()).hexdigest()
    seconds = time.perf_counter() - begun
    return figures | {"tokens_per_s": figures["loss"] / seconds, "digest": int(digest[:12], 16)}


def main() -> int:
    """Run all variants in turns and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", help="a file of one-turn dialogues, such as AdvertiseGen's dev.jsonl"
    )
    parser.add_argument("--model", help="a model folder; by default a small random GLM")
    parser.add_argument("--samples", type=int, default=128, help="the first ones of the file (128)")
    parser.add_argument("--rounds", type=int, default=2, help="turns; medians are shown (2)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=VARIANTS, help="variants; the first is compared with")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--variant", choices=VARIANTS, help="only this one, in this process")
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(run(options)))
        return 0
    names = ("samples", "threads", *(("model",) if options.model else ()))
    medians = compare(
        __file__, options.only, rounds=options.rounds,
        arguments=[options.data, *arguments_of(options, names)],
    )  # fmt: skip
    digests = {figures["digest"] for name, figures in medians.items() if not name.startswith("system")}  # fmt: skip
    if len(digests) > 1:
        print(
            "NOTE    the ways gave different tokens somewhere: near ties of a random model, or a fault"
        )
    first = next(iter(medians.values()))
    for name, figures in medians.items():
        times = first["wall_s"] / figures["wall_s"] * figures["loss"] / first["loss"]
        print(
            f"{name:<22}{figures['tokens_per_s']:>8.1f} new tokens a second in "
            f"{figures['wall_s']:.1f} s: {times:.2f} x the first"
        )
    bars = {name: bar for name, bar in BARS.items() if name in medians}
    if len({name.split()[-1] for name in medians}) == 1:  # the same number of rows
        bars = {name: {"cpu_s": EQUAL_ROWS} for name in medians if name in HERE}
    return report(medians, bars, as_json=options.json)


if __name__ == "__main__":
    raise SystemExit(main())
