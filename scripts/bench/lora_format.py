"""What LoRA in the model's number format does to a training, beside PEFT's float32 adapters.

    python scripts/bench/lora_format.py [--steps 200]

A tiny random GLM-4 of four layers learns 64 rows; dropout 0, AdamW, the same rows in the same order. Each
way's losses are compared step by step with those of the same training in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
WAYS = {
    "float32": ("float32", True),
    "bfloat16, PEFT's float32 adapters": ("bfloat16", False),
    "bfloat16, ours": ("bfloat16", True),
}


def losses(model: Path, rows: Any, steps: int, *, dtype: str, ours: bool) -> list[float]:
    """The loss of every step."""
    import torch

    from finetune import methods
    from finetune.config.schema import LoraMethod
    from finetune.methods import lora
    from finetune.models.load import load_model

    torch.manual_seed(0)
    way = lora.use_input_format if ours else lambda model: None
    with patch.object(lora, "use_input_format", way):
        tuned = methods.attach(load_model(model, dtype=dtype), LoraMethod(dropout=0.0)).train()
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, fused=True)
    found = []
    for step in range(steps):
        ids = rows[step * 8 % len(rows) :][:8]
        loss = tuned(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    import torch

    from tests import tiny

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="lora-format-"))
    model = tiny.save_model(folder, "chatglm", num_layers=4, num_hidden_layers=4)
    drawn = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 7, (64, 48), generator=drawn).cumsum(1)
    rows = (torch.randint(0, 370, (64, 1), generator=drawn) + steps) % 370
    found = {
        name: losses(model, rows, asked.steps, dtype=dtype, ours=ours)
        for name, (dtype, ours) in WAYS.items()
    }
    exact = found["float32"]
    print("| | loss, mean of the last 20 steps | off float32 a step: mean | largest |")
    print("|---|---|---|---|")
    for name, curve in found.items():
        off = [abs(a - b) for a, b in zip(curve, exact, strict=True)]
        last = statistics.mean(curve[-20:])
        print(f"| {name} | {last:.4f} | {statistics.mean(off):.4f} | {max(off):.4f} |")


if __name__ == "__main__":
    main()
