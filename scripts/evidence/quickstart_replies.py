"""Show replies of the quickstart's base and of its tuned model, opened with nothing but transformers.

    python scripts/evidence/quickstart_replies.py runs/quickstart-model runs/quickstart-merged

The base answers in the chat layout that it was published with (ChatML), which is how it answers
best: laid out as a GLM it has never seen a role token. A folder that is not SmolLM2's, such as the
random one of `--tiny`, answers in its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

from quickstart_model import original
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from finetune.distributed.device import local_device

SMOLLM2_WIDTH = 576
HELD_OUT = Path(__file__).resolve().parents[2] / "data" / "support_desk" / "heldout.jsonl"


def questions() -> list[list[dict[str, Any]]]:
    """Three held-out prompts: a fault code, a term of the shop, an order to look up."""
    rows = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    tool_row = next(row for row in rows if "tools" in row)
    system = {"role": "system", "content": "", "tools": tool_row["tools"]}
    return [
        rows[0]["messages"][:1],
        rows[9]["messages"][:1],
        [system, *tool_row["messages"][:1]],
    ]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for tool in m['tools'] %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def opened(folder: str, *, as_published: bool) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, or SmolLM2 as it was published."""
    if as_published and AutoConfig.from_pretrained(folder).hidden_size == SMOLLM2_WIDTH:
        model, tokenizer = original()
        tokenizer.chat_template = CHATML
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        return model, tokenizer
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def answers(
    folder: str, prompts: list[list[dict[str, Any]]], *, as_published: bool = False
) -> list[str]:
    """Greedy replies of the checkpoint in `folder`, its stop token left out."""
    device = local_device()
    model, tokenizer = opened(folder, as_published=as_published)
    model = model.to(device)
    texts = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(device)
        ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        texts.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())  # fmt: skip
    return texts


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", help="the folder that scripts/fixtures/quickstart_model.py wrote")
    parser.add_argument("tuned", help="the merged folder")
    given = parser.parse_args()
    base, tuned = given.base, given.tuned
    logging.disable_progress_bar()
    prompts = questions()
    table = Table("question", "base, in its own chat layout", f"tuned ({tuned})", show_lines=True)
    print(f"the base answers {len(prompts)} held-out questions: {base} …", flush=True)
    before = answers(base, prompts, as_published=True)
    print(f"the tuned model answers them: {tuned} …", flush=True)
    replies = before, answers(tuned, prompts)
    for prompt, before, after in zip(prompts, *replies, strict=True):
        table.add_row(prompt[-1]["content"], before, after)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


if __name__ == "__main__":
    main()
