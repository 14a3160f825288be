"""How a P-Tuning v2 prefix may start: what it does to the untuned model, and how it trains from there.

    python scripts/bench/prefix_start.py [--steps 40] [--json]
    python scripts/bench/prefix_start.py --model runs/quickstart-model \
        --data data/support_desk/train.jsonl --tokens 32 --batch 2 --steps 20

A tiny random chatglm or the model given, all starts on the same data; learning rates tried: 1e-3 to
1e-1, or those given.

  text                the base's keys and values of the first tokens of the data: what training does
  loss at the start   of the untuned model with the prefix (the base's own is the first row)
  loss at the end     mean of the last five steps, at the best of the rates, which is named
  distinct            virtual tokens of the first layer that are not copies of another one
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import cells
from cells import Cell

RATES = (1e-3, 1e-2, 3e-2, 1e-1)
STARTS = {"text": None, "zeros": 0.0, "noise 0.02": 0.02, "noise 0.2": 0.2, "noise 1": 1.0}


def cell(name: str, method: dict[str, Any], rate: float, options: argparse.Namespace) -> Cell:
    """A run of `name` under a learning rate."""
    import runs

    config = runs.config(
        options.model, options.data, options.folder / f"{name}-{rate}",
        data__max_length=512, training__learning_rate=rate,
        training__max_steps=options.steps, training__batch_size=options.batch,
    ) | {"method": method}  # fmt: skip
    return Cell(f"{name}-{rate}", config)


def best(name: str, method: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Figures of the rate that ends lowest."""
    import runs
    from safetensors.torch import load_file

    folder, steps = options.folder, options.steps
    results = []
    for rate in options.rates:
        run = cell(name, method, rate, options)
        if problem := cells.run(run, folder):
            raise SystemExit(problem)
        losses = runs.history(folder / run.name)
        result: dict[str, Any] = {"start": losses[0], "end": sum(losses[-5:]) / 5, "rate": rate}
        if method["kind"] == "ptuning_v2":
            saved = folder / run.name / f"checkpoint-{steps}" / "adapter_model.safetensors"
            rows = load_file(saved)["prompt_embeddings"]
            result["distinct"] = len(rows.unique(dim=0))
        results.append(result)
    return min(results, key=lambda result: result["end"])


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = folder = Path(temporary)
        os.environ["FINETUNE_CACHE"] = str(folder / "cache")
        import runs
        import tiny

        options.model = options.model or tiny.save_model(folder / "model", "chatglm")
        options.data = options.data or runs.write_dialogues(folder / "train.jsonl", 64)
        cells.warm_up(options.model)
        from finetune.methods import ptuning_v2
        from finetune.training.run_data import RunData

        found = {"LoRA rank 16": best("lora", {"kind": "lora", "rank": 16, "dropout": 0}, options)}
        prefix = {"kind": "ptuning_v2", "num_virtual_tokens": options.tokens}
        first_tokens = RunData.first_tokens
        for start in options.starts:
            std = STARTS[start]
            ptuning_v2.START_STD = std or 0.0
            RunData.first_tokens = first_tokens if std is None else lambda *_: []
            found[f"prefix, {start}"] = best(f"prefix-{start}", prefix, options)
        projected = prefix | {"prefix_projection": True}
        found["prefix, projection"] = best("projection", projected, options)
    if options.json:
        print(json.dumps(found))
        return 0
    rows = [
        [
            name,
            f"{r['start']:.3f}",
            f"{r['end']:.3f}",
            f"{r['rate']:g}",
            str(r.get("distinct", "–")),
        ]
        for name, r in found.items()
    ]
    print(cells.table(["", "loss at the start", "loss at the end", "best rate", "distinct"], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
