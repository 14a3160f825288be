"""A callback of your own: end a run when its loss is low enough. `python examples/custom_callback.py CONFIG 0.5`."""

import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune import train


class StopAtLoss(TrainerCallback):
    """Asks the run to end, with its checkpoint and scores, once the logged loss is below `bound`."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **rest: Any,
    ) -> None:
        """Called with every log line, in every process."""
        if (logs or {}).get("loss", float("inf")) < self.bound:
            control.should_training_stop = True


if __name__ == "__main__":
    print(train(sys.argv[1], callbacks=[StopAtLoss(float(sys.argv[2]))]))
