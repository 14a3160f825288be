"""The memory of a run: what is planned for a GPU, and which options need less when it runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import launcher
from finetune.artifacts.experts import num_experts
from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import read_json_if_there
from finetune.artifacts.resolve import TOKENIZER_FILES, local_folder
from finetune.config.schema import (
    DeepSpeedSection,
    EvaluationSection,
    Method,
    ModelSection,
    TrainingSection,
)
from finetune.errors import ModelError, OutOfMemoryError, is_out_of_memory
from finetune.methods import METHODS

if TYPE_CHECKING:
    from finetune.planning.plan import Gpu, Plan


LONG = 16_384
"""Tokens of a row from which on what is kept of it is worth moving."""


@dataclass(frozen=True)
class RunMemory:
    """What a run holds."""

    model: ModelSection
    method: Method
    training: TrainingSection
    deepspeed: DeepSpeedSection | None
    evaluation: EvaluationSection | None
    """None without held-out data."""
    max_length: int
    """`data.max_length`."""
    longest: int
    """Tokens of its longest example, or row of several."""

    def plan(self, gpu: Gpu, folder: Path | None = None) -> Plan:
        """What is planned for one of the GPUs."""
        from finetune.planning.plan import plan

        section = self.model
        if folder is None:
            folder = local_folder(section.path, section.revision, files=TOKENIZER_FILES)
        return plan(
            section, self.method, self.training, self.deepspeed, gpu,
            folder=folder, length=self.longest,
        )  # fmt: skip

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn any library's out-of-memory error into OutOfMemoryError."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(self._text(error)) from error

    def rows(self) -> list[list[str]]:
        """What a GPU is planned to hold, for the table of a run; on a CPU nothing is planned for."""
        from finetune.distributed import device
        from finetune.distributed.processes import is_rank0

        card = device.card()
        if card is None or not is_rank0():
            return []
        from finetune.planning.plan import Gpu
        from finetune.planning.words import in_short

        machine = Gpu(card.bytes, launcher.world_size(), native_bf16=card.native_bf16)
        found = self.plan(machine)
        filled = 100 * found.batch * found.length / max(1, found.room)
        return [
            ["planned", f"{in_short(found)} on each GPU"],
            ["a forward pass", f"fills {filled:.0f} % of what this GPU could take at once"],
        ]

    def _text(self, error: Exception) -> str:
        from finetune.distributed.device import memory_gb

        first = (str(error).splitlines() or [""])[0] or type(error).__name__
        knobs = "".join(f"\n  {knob}" for knob in self.less())
        return (
            f"out of memory: {first[:300]}\nThe most this process has used is {memory_gb():.2f} GB"
            f"{_of_gpu()}. {self._planned()} "
            "The last checkpoint is untouched, and the same command goes on from it. "
            f"To reduce memory, cheapest first:{knobs}"
        )

    def _is_mixture(self) -> bool:
        """Whether most weights are experts, which are not held in 4 bits."""
        try:
            folder = local_folder(self.model.path, self.model.revision, files=TOKENIZER_FILES)
        except ModelError:
            return False  # the message is about memory, whatever else is wrong
        return num_experts(read_json_if_there(folder / MODEL_CONFIG)) > 0

    def _planned(self) -> str:
        """What the plan of this run says; why there is none, when it cannot be made."""
        from finetune.planning.plan import Gpu
        from finetune.planning.words import in_short

        try:
            found = self.plan(Gpu(number=launcher.world_size()))
        except Exception as error:  # the message is about memory, whatever else is wrong
            return f"No plan could be made ({type(error).__name__})."
        return f"Planned were {in_short(found)} for the training itself."

    def less(self) -> list[str]:
        """Options that would lower the memory of this run, each with what it has now."""
        training, model = self.training, self.model
        knobs = []
        if training.batch_size > 1:
            steps = training.gradient_accumulation_steps * training.batch_size
            knobs.append(
                f"training.batch_size=1 training.gradient_accumulation_steps={steps} (now "
                f"{training.batch_size} and {training.gradient_accumulation_steps}): learns the same"
            )
        if not training.activation_checkpointing:
            knobs.append(
                "training.activation_checkpointing=true: the same numbers, a third more time"
            )
        elif self.longest > LONG and not training.offload_activations:
            knobs.append(
                "training.offload_activations=true: what layers are recomputed from goes to the host's memory"
            )
        if self.longest > LONG and training.sequence_parallel == 1:
            knobs.append("training.sequence_parallel=2 or more: as many GPUs share each row")
        if self.deepspeed is None:
            knobs.append("deepspeed.zero_stage=2, or 3 to shard the weights too, over several GPUs")
        elif self.deepspeed.config is None and self.deepspeed.offload_optimizer == "none":
            knobs.append("deepspeed.offload_optimizer=cpu: slower steps")
        if model.dtype in ("auto", "float32"):
            knobs.append(f"model.dtype=bfloat16 (now {model.dtype})")
        method = METHODS[self.method.kind]
        narrows = "model.quantization" in method.less_memory
        if method.less_memory and (model.quantization is None or method.less_memory_if_quantized):
            knobs += [] if narrows and self._is_mixture() else [method.less_memory]
        if self.evaluation is not None and self.evaluation.generate:
            knobs.append(
                f"evaluation.batch_size (now {self.evaluation.batch_size}), if it ran out while "
                "replies were generated"
            )
        knobs.append(
            f"data.max_length (now {self.max_length}; the longest example has {self.longest} tokens)"
        )
        return knobs


def _of_gpu() -> str:
    from finetune.distributed import device

    held = device.memory()
    if held is None:
        return ""
    return (
        f"; now {held.allocated / 1e9:.2f} GB are allocated and {held.reserved / 1e9:.2f} reserved of "
        f"the GPU's {held.total / 1e9:.1f}, {held.free / 1e9:.2f} free (much reserved and not allocated: set "
        "PYTORCH_ALLOC_CONF=expandable_segments:True)"
    )
