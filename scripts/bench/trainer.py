"""What the Trainer costs per step beside a bare loop, and how long a launch takes: CPU and wall seconds.

    python scripts/bench/trainer.py [--steps 60] [--rounds 3] [--json]

A small random GLM (scripts/fixtures/quickstart_model.py --tiny) with LoRA on data/support_desk, one process,
one thread. The Trainer's cost per step is that of a long run minus that of a short one, so start-up
drops out; the bare loop does forward, backward, clipping and an AdamW step on the same batches.
Launch is the wall time of `finetune train` from the command to the end of its first step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHORT = 4
BATCH = 4


def children_cpu() -> float:
    """CPU seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_trainer(model: Path, folder: Path, steps: int) -> tuple[float, float]:
    """CPU and wall seconds of a whole `finetune train` of that many steps."""
    command = [
        sys.executable, "-m", "finetune", "train", "configs/quickstart.yaml", "deepspeed=null",
        f"model.path={model}", f"training.output_dir={folder / f'run-{steps}'}", "training.num_epochs=null",
        f"training.max_steps={steps}", f"training.batch_size={BATCH}", "data.validation=null",
        "evaluation.at_start=false", "data.max_length=1024", "training.resume=never", "training.save_every_steps=100000",
    ]  # fmt: skip
    cpu, wall = children_cpu(), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    return children_cpu() - cpu, time.perf_counter() - wall


def run_loop(model: Path, steps: int) -> float:
    """CPU seconds per step of the bare loop over the same batches, in this process."""
    sys.path.insert(0, str(ROOT))
    import torch

    from finetune import methods
    from finetune.config.schema import LoraMethod
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer
    from finetune.data.examples.batch_plan import BatchPlan
    from finetune.data.examples.collate import Collator
    from finetune.data.examples.dataset import LengthPolicy, load_examples
    from finetune.data.reading.sources import SourceSpec
    from finetune.models.load import load_model

    torch.set_num_threads(1)
    template = ChatTemplate(load_chat_tokenizer(model))
    policy = LengthPolicy(1024, "every_reply", "drop_oldest_turns")
    data = load_examples(
        [SourceSpec(str(ROOT / "data/support_desk/train.jsonl"))], template, policy
    )
    plan = BatchPlan(data.lengths, BATCH, seed=42, group_by_length=True)
    collate = Collator(template.pad_id)
    lora = LoraMethod(rank=16, alpha=32, dropout=0.0)
    tuned = methods.attach(load_model(model), lora).train()
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)

    def step(indices: list[int]) -> None:
        batch = collate([data[i] for i in indices])
        del batch["sample_ids"]
        tuned(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    order = [step.tolist() for step in plan.steps(0)]
    for indices in order[:SHORT]:
        step(indices)
    begun = time.process_time()
    for number in range(SHORT, steps):
        step(order[number % len(order)])
    return (time.process_time() - begun) / (steps - SHORT)


def main() -> int:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--steps", type=int, default=60, help=f"steps of the long run, more than {SHORT} (60)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns; medians are shown (3)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--loop", type=Path, help="only the bare loop on this model, in this process"
    )
    options = parser.parse_args()
    if options.steps <= SHORT:
        parser.error(f"--steps must be more than {SHORT}, the steps of the short run")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.loop:
        print(json.dumps(run_loop(options.loop, options.steps)))
        return 0
    found: dict[str, list[float]] = {"loop_cpu_s": [], "trainer_cpu_s": [], "launch_wall_s": []}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        make = [sys.executable, "scripts/fixtures/quickstart_model.py", str(model), "--tiny"]
        subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
        for number in range(options.rounds):
            folder = Path(scratch) / str(number)
            loop = [sys.executable, __file__, "--loop", str(model), "--steps", str(options.steps)]
            found["loop_cpu_s"].append(float(subprocess.run(loop, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))  # fmt: skip
            _, first = run_trainer(model, folder, 1)
            short, _ = run_trainer(model, folder, SHORT)
            long, _ = run_trainer(model, folder, options.steps)
            found["trainer_cpu_s"].append((long - short) / (options.steps - SHORT))
            found["launch_wall_s"].append(first)
    medians = {name: statistics.median(values) for name, values in found.items()}
    if options.json:
        print(json.dumps(medians))
        return 0
    overhead = 1000 * (medians["trainer_cpu_s"] - medians["loop_cpu_s"])
    print(f"bare loop        {1000 * medians['loop_cpu_s']:8.1f} CPU ms a step")
    print(
        f"finetune train   {1000 * medians['trainer_cpu_s']:8.1f} CPU ms a step: {overhead:+.1f} ms"
    )
    print(f"launch, one step {medians['launch_wall_s']:8.1f} s, checkpoint included")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
