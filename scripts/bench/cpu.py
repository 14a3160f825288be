"""What a CPU spends here beside plain transformers and beside the least that the work takes.

    python scripts/bench/cpu.py [depth full generate launch update] [--rounds 3] [--json]

depth      LoRA on all linear layers of 40 thin ones, CPU seconds a step: the Trainer's own Python
full       full tuning of a model that is 96 % vocabulary, 4 x 512 tokens: peak memory, CPU seconds;
           the floor is a bare loop over the same batches with the same loss and a fused AdamW
generate   32 replies of 64 tokens with an adapter, at the default batch; the floor is transformers'
           generate on all of them at once
launch     from the start of Python to the end of the first step, CPU seconds
update     AdamW of 77.6 million float32 numbers on one thread, as with deepspeed.offload_optimizer: cpu;
           beside torch's AdamW as it is by default

Every variant runs in a process of its own, in turns; medians of the rounds. Preparing has its own
script, prepare.py. Bars: depth 0.85 of the plain Trainer, full's memory and generate 1.05 of the floor,
launch 1.0 of the plain Trainer,
an update 0.2 of torch's default.
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
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from alternation import compare, report

BEGUN = time.perf_counter() - time.process_time()
"""When Python started."""
REFERENCE = {"depth": "plain Trainer", "full": "bare loop", "generate": "transformers", "launch": "plain Trainer", "update": "torch's default"}  # fmt: skip
BARS = {
    "depth": {"cpu_s": 0.85}, "full": {"peak_mib": 1.05}, "generate": {"cpu_s": 1.05},
    "launch": {"cpu_s": 1.0}, "update": {"cpu_s": 0.2},
}  # fmt: skip
WIDE = {
    "vocab_size": 151552, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
Spent = tuple[float, float]
"""CPU and wall seconds."""
STEPS = {"depth": 14, "full": 5, "launch": 2}


def _median(ticks: list[float]) -> float:
    return statistics.median(b - a for a, b in pairwise(ticks[2:]))


class Clock:
    """CPU and wall seconds at which each step of a Trainer began, from `start` on."""

    def __init__(self) -> None:
        self.ticks: list[float] = []
        self.wall: list[float] = []

    def tick(self) -> None:
        """A step begins."""
        self.ticks.append(time.process_time())
        self.wall.append(time.perf_counter())

    def start(self) -> None:
        """Begin to listen."""
        from transformers import Trainer

        step = Trainer.training_step

        def timed(trainer: Any, *given: Any, **options: Any) -> Any:
            self.tick()
            return step(trainer, *given, **options)

        Trainer.training_step = timed

    def start_late(self) -> None:
        """When the product has imported what it needs, in its own way."""
        from finetune.training import session

        entered = session.all_processes

        def timed(*given: Any, **options: Any) -> Any:
            self.start()
            return entered(*given, **options)

        session.all_processes = timed  # type: ignore[assignment]

    def of(self, work: str) -> Spent:
        """To the end of the first step, or the median step without the first two."""
        if work == "launch":
            return self.ticks[1], self.wall[1] - BEGUN
        return _median(self.ticks), _median(self.wall)


def inputs(work: str, folder: Path) -> tuple[Path, Path]:
    """A model and the dialogues that it learns; of a launch made in a process of their own."""
    if work == "launch":
        global BEGUN
        begun = time.perf_counter()
        subprocess.run([sys.executable, __file__, "--inputs", str(folder)], check=True)
        BEGUN += time.perf_counter() - begun  # a user has a model already
        return folder / "model", folder / "train.jsonl"
    return made_inputs(work, folder)


def made_inputs(work: str, folder: Path) -> tuple[Path, Path]:
    """A model and the dialogues that it learns."""
    import runs
    import tiny

    sizes = {"depth": {"num_hidden_layers": 40}, "launch": {}}.get(work, WIDE)
    model = tiny.save_model(folder / "model", "glm", **sizes)
    if work != "full":
        return model, runs.write_dialogues(folder / "train.jsonl", 60)
    rows = [
        [{"role": "user", "content": f"{n} {'the order ' * 25}"}, {"role": "assistant", "content": "the lazy dog " * 85}]
        for n in range(40)
    ]  # fmt: skip
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return model, data


def ours(work: str, folder: Path) -> Spent:
    """Through the product; what the work is measured by."""
    import runs

    model, data = inputs(work, folder)
    steps = STEPS[work]
    config = runs.config(
        model, data, folder / "run", training__max_steps=steps, training__log_every_steps=10,
        training__batch_size=4 if work == "full" else 2, data__max_length=512 if work == "full" else 256,
        data__on_too_long="drop_oldest_turns",
    )  # fmt: skip
    lora = {"kind": "lora", "rank": 8, "dropout": 0.1, "target_modules": "all-linear"}
    config["method"] = {"kind": "full"} if work == "full" else lora
    clock = Clock()
    if work == "launch":
        clock.start_late()
        train_as_typed(folder, config)
    else:
        clock.start()
        runs.run_here(config)
    return clock.of(work)


def train_as_typed(folder: Path, config: dict[str, Any]) -> None:
    """`finetune train` with this config."""
    from finetune.cli import main as finetune

    (folder / "run.yaml").write_text(json.dumps(config))
    with suppress(SystemExit):
        finetune(["train", str(folder / "run.yaml")])


def plain(work: str, folder: Path) -> Spent:
    """The Trainer of transformers and PEFT, as their documentation shows it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    model, data = inputs(work, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    ids = [tokenizer.apply_chat_template(row, tokenize=True, return_dict=False) for row in rows]

    def collate(batch: list[list[int]]) -> dict[str, Any]:
        width = max(map(len, batch))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}  # fmt: skip

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")  # fmt: skip
    arguments = TrainingArguments(
        str(folder / "run"), max_steps=STEPS[work], per_device_train_batch_size=2, use_cpu=True,
        logging_steps=10, report_to=[], disable_tqdm=True, save_strategy="no", learning_rate=1e-3,
        remove_unused_columns=False,
    )  # fmt: skip
    clock = Clock()
    clock.start()
    Trainer(get_peft_model(base, lora), arguments, collate, ids).train()
    return clock.of(work)


def bare_loop(work: str, folder: Path) -> Spent:
    """The same batches, loss and optimizer with nothing around them."""
    import torch

    from finetune import methods
    from finetune.config.schema import FullMethod
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer
    from finetune.data.examples.collate import Collator
    from finetune.data.examples.dataset import LengthPolicy, load_examples
    from finetune.data.reading.sources import SourceSpec
    from finetune.models.load import load_model
    from finetune.models.loss import for_model

    model, data = inputs(work, folder)
    template = ChatTemplate(load_chat_tokenizer(model))
    policy = LengthPolicy(512, "every_reply", "drop_oldest_turns")
    examples = load_examples([SourceSpec(str(data))], template, policy)
    tuned = methods.attach(load_model(model), FullMethod()).train()
    weights = list(tuned.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-2, fused=True)
    collate, spent = Collator(template.pad_id), Clock()
    for step in range(STEPS[work]):
        spent.tick()
        batch = collate([examples[4 * step + place] for place in range(4)])
        del batch["sample_ids"]
        tuned(**for_model(batch, torch.device("cpu")), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return spent.of(work)


def replies(by: str, folder: Path) -> Spent:
    """CPU and wall seconds of 32 replies of 64 tokens."""
    from types import SimpleNamespace

    import torch

    from finetune import methods
    from finetune.config.schema import EvaluationSection, LoraMethod
    from finetune.generation.generate import generate
    from finetune.models.load import load_model

    model = methods.attach(load_model(inputs("generate", folder)[0]), LoraMethod()).eval()
    drawn = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 300, (40 + n,), generator=drawn).tolist() for n in range(32)]
    begun, wall = time.process_time(), time.perf_counter()
    if by == "ours":
        template: Any = SimpleNamespace(stop_ids=(), pad_id=0)
        size = EvaluationSection().batch_size
        generate(model, template, prompts, max_new_tokens=64, batch_size=size)
    else:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False)  # fmt: skip
    return time.process_time() - begun, time.perf_counter() - wall


def update(variant: str) -> Spent:
    """The median of five steps of the optimizer after two."""
    import torch
    from transformers import Trainer, TrainingArguments

    from finetune.config.extras import OPTIMIZERS

    name = OPTIMIZERS["adamw"] if variant == "ours" else "adamw_torch"
    with tempfile.TemporaryDirectory() as made:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(made, optim=name))
    weights = torch.nn.Parameter(torch.randn(77_600_000))
    weights.grad = torch.randn_like(weights)
    optimizer, clock = kind([weights], **options), Clock()
    for _ in range(8):
        clock.tick()
        optimizer.step()
    return clock.of("update")


def run(work: str, variant: str) -> dict[str, float]:
    """One variant in this process."""
    if work != "launch":
        import torch

        torch.set_num_threads(1)
    ways: dict[str, Callable[[], Spent]]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        ways = {
            "ours": lambda: (
                replies("ours", folder)
                if work == "generate"
                else update("ours")
                if work == "update"
                else ours(work, folder)
            ),
            "torch's default": lambda: update("torch's default"),
            "plain Trainer": lambda: plain(work, folder),
            "bare loop": lambda: bare_loop(work, folder),
            "transformers": lambda: replies("transformers", folder),
        }
        cpu, wall = ways[variant]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu_s": cpu, "wall_s": wall, "peak_mib": peak, "above_mib": peak, "loss": 0.0}


def main() -> int:
    """Measure in turns and print; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("work", nargs="*", choices=[*BARS, []], help="all of them by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--variant", help="only this one, in this process")
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inputs:
        made_inputs("launch", asked.inputs)
        return 0
    if asked.variant:
        print(json.dumps(run(asked.work[0], asked.variant)))
        return 0
    missed = 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for work in asked.work or list(BARS):
        print(f"{work}:", flush=True)
        found = compare(__file__, (REFERENCE[work], "ours"), rounds=asked.rounds, arguments=[work])
        missed |= report(found, {"ours": BARS[work]}, as_json=asked.json)
    return missed


if __name__ == "__main__":
    raise SystemExit(main())
