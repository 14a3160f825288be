"""What LoRA in the model's number format does to a training, beside PEFT's float32 adapters.

    python scripts/bench/lora_format.py [--model FOLDER] [--steps 200] [--rank 16]

The quickstart's data, batches, rank and rate for 200 steps, dropout 0, the same rows in the same order. FOLDER
is what scripts/fixtures/quickstart_model.py makes: SmolLM2-135M, about an hour on two cores; without it the
script makes the tiny one, of half a million weights, in seconds. Each way's losses are compared step by step
with those of the same training in float32.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
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


def batches(model: Path, steps: int) -> list[Any]:
    """The quickstart's, in the order of its seed."""
    import torch

    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer
    from finetune.data.examples.batch_plan import BatchPlan
    from finetune.data.examples.collate import Collator
    from finetune.data.examples.dataset import LengthPolicy, load_examples
    from finetune.data.reading.sources import SourceSpec
    from finetune.models.loss import for_model

    template = ChatTemplate(load_chat_tokenizer(model))
    policy = LengthPolicy(512, "every_reply", "drop_oldest_turns")
    data = load_examples(
        [SourceSpec(str(ROOT / "data/support_desk/train.jsonl"))], template, policy
    )
    plan, collate = (
        BatchPlan(data.lengths, 4, seed=42, group_by_length=True),
        Collator(template.pad_id),
    )
    found: list[Any] = []
    for epoch in range(steps):
        for indices in plan.steps(epoch):
            batch = collate([data[i] for i in indices.tolist()])
            del batch["sample_ids"]
            found.append(for_model(batch, torch.device("cpu")))
            if len(found) == steps:
                return found
    return found


def losses(model: Path, given: list[Any], *, rank: int, dtype: str, ours: bool) -> list[float]:
    """The loss of every step."""
    import torch

    from finetune import methods
    from finetune.config.schema import LoraMethod
    from finetune.methods import lora
    from finetune.models.load import load_model

    torch.manual_seed(0)
    way = lora.use_input_format if ours else lambda model: None
    with patch.object(lora, "use_input_format", way):
        section = LoraMethod(rank=rank, alpha=2 * rank, dropout=0.0)
        tuned = methods.attach(load_model(model, dtype=dtype), section).train()
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    found = []
    for batch in given:
        loss = tuned(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="the quickstart's model; default: the tiny one")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=16)
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    model = asked.model
    if model is None:
        model = Path(tempfile.mkdtemp(prefix="lora-format-")) / "model"
        make = [sys.executable, "scripts/fixtures/quickstart_model.py", str(model), "--tiny"]
        subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
    given = batches(model, asked.steps)
    found = {
        name: losses(model, given, rank=asked.rank, dtype=dtype, ours=ours)
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
