"""How a P-Tuning v2 prefix may start: what it does to the untuned model, and how it trains from there.

    python scripts/bench/prefix_start.py [--steps 40] [--json]

A tiny random chatglm, 16 virtual tokens, learning rates tried 1e-3 to 1e-1, the same data for all.

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
STARTS = {"zeros": "0", "noise 0.02": "0.02", "noise 0.2": "0.2", "noise 1": "1"}
TOKENS = 16


def cell(name: str, method: dict[str, Any], rate: float, settings: tuple[Path, Path, int]) -> Cell:
    """A run of `name` under a learning rate."""
    import runs

    model, data, steps = settings
    config = runs.config(
        model, data, data.parent / f"{name}-{rate}", training__learning_rate=rate,
        training__max_steps=steps, training__batch_size=8,
    ) | {"method": method}  # fmt: skip
    return Cell(f"{name}-{rate}", config)


def best(name: str, method: dict[str, Any], settings: tuple[Path, Path, int]) -> dict[str, Any]:
    """Figures of the rate that ends lowest."""
    import runs
    from safetensors.torch import load_file

    folder, steps = settings[1].parent, settings[2]
    results = []
    for rate in RATES:
        run = cell(name, method, rate, settings)
        if problem := cells.run(run, folder):
            raise SystemExit(problem)
        losses = runs.history(folder / run.name)
        result: dict[str, Any] = {"start": losses[0], "end": sum(losses[-5:]) / 5, "rate": rate}
        if method["kind"] == "ptuning_v2":
            saved = folder / run.name / f"checkpoint-{steps}" / "adapter_model.safetensors"
            rows = load_file(saved)["prompt_embeddings"][:, : 2 * 2 * 8]
            result["distinct"] = len(rows.unique(dim=0))
        results.append(result)
    return min(results, key=lambda result: result["end"])


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["FINETUNE_CACHE"] = str(folder / "cache")
        import runs
        import tiny

        model = tiny.save_model(folder / "model", "chatglm")
        data = runs.write_dialogues(folder / "train.jsonl", 64)
        cells.warm_up(model)
        from finetune.methods import ptuning_v2

        settings = (model, data, options.steps)
        found = {"LoRA rank 4": best("lora", {"kind": "lora", "rank": 4, "dropout": 0}, settings)}
        prefix = {"kind": "ptuning_v2", "num_virtual_tokens": TOKENS}
        for start, std in STARTS.items():
            ptuning_v2.START_STD = float(std)
            found[f"prefix, {start}"] = best(f"prefix-{std}", prefix, settings)
        ptuning_v2.START_STD = 0.02
        projected = prefix | {"prefix_projection": True, "encoder_hidden_size": 64}
        found["prefix, projection"] = best("projection", projected, settings)
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
