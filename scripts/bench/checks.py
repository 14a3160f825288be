"""What looking for numbers that are none costs: before every step, and before every save.

    python scripts/bench/checks.py [--steps 24] [--json]

Trains a random GLM (hidden 512, 6 layers, 16 million weights) on batches of four dialogues, saves every
fourth step, and times the checks inside of it: losses and gradient before an optimizer step, all trained
weights before a save. `full` trains every weight, so that there is most to look at. On a GPU the first
check is the one moment of a step at which its results are waited for, which is not measured here.

Bars: at most 1 % of a step, 2 % of a save.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 64},
    "full": {"kind": "full"},
}
SIZES = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
BARS = {"step": 0.01, "save": 0.02}


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """CPU seconds in each of the parts of a run, while the block lasts."""
    from finetune.training import checkpointing, trainer

    spent: dict[str, float] = defaultdict(float)

    def clocked(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **named: Any) -> Any:
            begun = time.process_time()
            try:
                return work(*arguments, **named)
            finally:
                spent[name] += time.process_time() - begun

        return measured

    parts = [
        (trainer.FineTuner, "_guard", "step check"),
        (trainer.FineTuner, "_save_checkpoint", "save"),
        (checkpointing, "check_weights", "save check"),
    ]
    originals = [getattr(place, name) for place, name, _ in parts]
    for place, name, shown in parts:
        setattr(place, name, clocked(shown, getattr(place, name)))
    try:
        yield spent
    finally:
        for (place, name, _), original in zip(parts, originals, strict=True):
            setattr(place, name, original)


def measured(method: str, folder: Path, steps: int) -> dict[str, float]:
    """The share of a step and of a save that their checks take."""
    import runs
    import tiny

    model = folder / "model"
    if not model.exists():
        tiny.save_model(model, "glm", **SIZES)
    data = runs.write_dialogues(folder / "train.jsonl", 200)
    settings = runs.config(
        model, data, folder / method, training__max_steps=steps, training__batch_size=4,
        training__save_every_steps=4, training__keep_checkpoints=2, training__learning_rate=1e-4,
    )  # fmt: skip
    settings["method"] = METHODS[method]
    with timed() as spent:
        begun = time.process_time()
        runs.run_here(settings)
        whole = time.process_time() - begun
    return {
        "step": spent["step check"] / (whole - spent["save"]),
        "save": spent["save check"] / spent["save"],
        "step_s": (whole - spent["save"]) / steps,
        "save_s": spent["save"] / (steps // 4),
    }


def main() -> int:
    """Measure both methods; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {method: measured(method, Path(folder), options.steps) for method in METHODS}
    if options.json:
        print(json.dumps(found))
    for method, one in found.items() if not options.json else ():
        print(
            f"{method}: {one['step']:.2%} of a step ({one['step_s']:.3f} CPU s), "
            f"{one['save']:.2%} of a save ({one['save_s']:.3f} CPU s)"
        )
    return int(any(one[name] > bar for one in found.values() for name, bar in BARS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
