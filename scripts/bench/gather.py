"""An evaluation in the middle of a ZeRO-3 run: seconds and gathers, with the weights gathered once.

    python scripts/bench/gather.py [--checkout FOLDER] [--prompts 16] [--tokens 32]

A random model of 135 million weights (30 layers of 576), LoRA, two processes over gloo. `--checkout`
measures another checkout of this project in the same way.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    "tie_word_embeddings": True,
}  # fmt: skip


def timed(file: Path) -> Callable[[int], object]:
    """Notes how long the evaluation took, and how often something was gathered in it."""

    def before(rank: int) -> None:
        import torch.distributed as dist

        from finetune.training.trainer import FineTuner

        counts = {"gathers": 0}

        def counted(name: str) -> None:
            original = getattr(dist, name)

            def gather(*arguments: Any, **options: Any) -> Any:
                counts["gathers"] += 1
                return original(*arguments, **options)

            setattr(dist, name, gather)

        for name in ("all_gather_into_tensor", "_all_gather_base", "all_gather"):
            if hasattr(dist, name):
                counted(name)
        evaluate = FineTuner.evaluate

        def evaluating(self: Any, *arguments: Any, **options: Any) -> Any:
            counts["gathers"] = 0
            begun = time.monotonic()
            result = evaluate(self, *arguments, **options)
            found = {"seconds": round(time.monotonic() - begun, 2), **counts, "loss": result["eval_loss"]}  # fmt: skip
            if rank == 0:
                file.write_text(json.dumps(found))
            return result

        FineTuner.evaluate = evaluating  # type: ignore[method-assign]

    return before


def main() -> int:
    """One line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    sys.path[:0] = [str(options.checkout / "scripts" / "bench")]
    import cells
    import runs
    import tiny

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = tiny.save_model(folder / "model", "glm", **SIZES)
        cells.warm_up(model)
        settings = runs.config(
            model, runs.write_dialogues(folder / "train.jsonl", 8), folder / "run",
            training__max_steps=1, training__batch_size=1, data__validation=str(runs.write_dialogues(folder / "heldout.jsonl", options.prompts, seed=1)),
            evaluation__max_new_tokens=options.tokens, evaluation__batch_size=8, evaluation__replies="last_reply",
        )  # fmt: skip
        settings["deepspeed"] = {"zero_stage": 3}
        cell = cells.Cell("run", settings, 2, before=timed(folder / "found"))
        problem = cells.run(cell, folder, timeout=900)
        if problem:
            print(problem, file=sys.stderr)
            return 1
        print((folder / "found").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
