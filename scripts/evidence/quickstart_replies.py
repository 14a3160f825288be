"""Show replies of two checkpoint folders side by side, opened with nothing but transformers.

python scripts/evidence/quickstart_replies.py runs/quickstart-model runs/quickstart-merged
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

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


def answers(folder: str, prompts: list[list[dict[str, Any]]]) -> list[str]:
    """Greedy replies of the checkpoint in `folder`, its stop token left out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
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
    base, tuned = sys.argv[1:]
    logging.disable_progress_bar()
    prompts = questions()
    table = Table("question", f"base ({base})", f"tuned ({tuned})", show_lines=True)
    for prompt, before, after in zip(prompts, answers(base, prompts), answers(tuned, prompts), strict=True):  # fmt: skip
        table.add_row(prompt[-1]["content"], before, after)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


if __name__ == "__main__":
    main()
