"""`training.profile`: a trace of some steps, and a table of the kernels that took longest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune import console
from finetune.distributed import device
from finetune.storage.files import whole_file

FOLDER = "profile"
WARM_UP = 2
"""Steps before the first one that is profiled."""
LISTED = 10


class Profiler(TrainerCallback):
    """Profiles `steps` steps of one process into `run_dir`/profile."""

    def __init__(self, run_dir: Path, steps: int) -> None:
        self.folder = run_dir / FOLDER
        self.steps = steps
        self._done = 0
        self._profile: Any = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Starts after the warm-up."""
        if state.is_world_process_zero and self._done == WARM_UP and self._profile is None:
            self._profile = torch.profiler.profile(record_shapes=False)
            self._profile.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Writes when enough was seen."""
        self._done += 1
        if self._done == WARM_UP + self.steps:
            self._write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Writes what there is of a run that ended earlier."""
        self._write()

    def _write(self) -> None:
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        device.synchronize()
        profile.stop()
        self.folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(self.folder / "trace.json"))
        order = "self_device_time_total" if device.has_accelerator() else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=order, row_limit=LISTED)
        with whole_file(self.folder / "kernels.txt") as file:
            file.write(table + "\n")
        steps = min(self.steps, self._done - WARM_UP)
        console.say(f"{self.folder}: {steps} steps profiled, kernels.txt and trace.json")
