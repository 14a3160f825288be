"""Look at a row, train, score, talk: `python examples/ten_lines.py MODEL data/support_desk/train.jsonl runs/python`."""

import sys
from typing import Any

from finetune import evaluate, load, render, train


def main(model: str, data: str, run: str, **training: Any) -> str:
    """The tuned model's reply to a question."""
    question = {"role": "user", "content": "What does a new battery cost?"}
    reply = {"role": "assistant", "content": "A new battery costs 79 euros."}
    print(render([question, reply], model).plain())  # « » around what carries loss
    config = {
        "model": {"path": model},
        "data": {"train": data, "validation": "10%", "max_length": 1024},
        "method": {"kind": "lora"},
        "training": {"output_dir": run, **training},
    }
    print(train(config)["scores"])
    print(evaluate(run, max_samples=20)["output"], "has report.html")
    return str(load(run).reply([question], max_new_tokens=64)["content"])


if __name__ == "__main__":
    print(main(*sys.argv[1:4], max_steps=20))
