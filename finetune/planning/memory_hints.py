"""When memory runs out: how much there was, and which options of this run need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from finetune.config.schema import RunConfig
from finetune.errors import OutOfMemoryError, is_out_of_memory
from finetune.methods import METHODS


@contextmanager
def memory_explained(config: RunConfig, longest: int) -> Iterator[None]:
    """Turn any library's out-of-memory error into OutOfMemoryError.

    Args:
        config: Of the run.
        longest: Tokens of its longest example.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(_text(config, longest, error)) from error


def planned_rows(config: RunConfig, longest: int) -> list[list[str]]:
    """What a GPU is planned to hold, for the table of a run; on a CPU nothing is planned for."""
    from finetune.distributed import device
    from finetune.distributed.processes import is_rank0, rank_and_world

    card = device.card()
    if card is None or not is_rank0():
        return []
    from finetune.artifacts.resolve import local_folder
    from finetune.planning.plan import Gpu, plan
    from finetune.planning.words import in_short

    folder = local_folder(config.model.path, config.model.revision)
    machine = Gpu(
        bytes=card.bytes,
        number=rank_and_world()[1],
        native_bf16=card.native_bf16,
    )
    length = config.data.max_length if config.data.packing else longest
    found = plan(config, machine, folder=folder, length=length)
    filled = 100 * found.batch * found.length / max(1, found.room)
    return [
        ["planned", f"{in_short(found)} on each GPU"],
        ["a forward pass", f"fills {filled:.0f} % of what this GPU could take at once"],
    ]


def _text(config: RunConfig, longest: int, error: Exception) -> str:
    from finetune.distributed.device import memory_gb

    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    knobs = "".join(f"\n  {knob}" for knob in less_memory(config, longest))
    return (
        f"out of memory: {first[:300]}\nThe most this process has used is {memory_gb():.2f} GB"
        f"{_of_gpu()}. {_planned(config, longest)} "
        "The last checkpoint is untouched, and the same command goes on from it. "
        f"To reduce memory, cheapest first:{knobs}"
    )


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


def _planned(config: RunConfig, longest: int) -> str:
    """What the plan of this run says; why there is none, when it cannot be made."""
    from finetune import launcher
    from finetune.artifacts.resolve import local_folder
    from finetune.planning.plan import Gpu, plan
    from finetune.planning.words import in_short

    length = config.data.max_length if config.data.packing else longest
    try:
        folder = local_folder(config.model.path, config.model.revision)
        found = plan(config, Gpu(number=launcher.world_size()), folder=folder, length=length)
    except Exception as error:  # the message is about memory, whatever else is wrong
        return f"No plan could be made ({type(error).__name__})."
    return f"Planned were {in_short(found)} for the training itself."


def less_memory(config: RunConfig, longest: int) -> list[str]:
    """Options that would lower the memory of this run, each with what it has now."""
    training, data, model = config.training, config.data, config.model
    knobs = []
    if training.batch_size > 1:
        steps = training.gradient_accumulation_steps * training.batch_size
        knobs.append(
            f"training.batch_size=1 training.gradient_accumulation_steps={steps} (now "
            f"{training.batch_size} and {training.gradient_accumulation_steps}): learns the same"
        )
    if not training.activation_checkpointing:
        knobs.append("training.activation_checkpointing=true: the same numbers, a third more time")
    if config.deepspeed is None:
        knobs.append("deepspeed.zero_stage=2, or 3 to shard the weights too, over several GPUs")
    elif config.deepspeed.config is None and config.deepspeed.offload_optimizer == "none":
        knobs.append("deepspeed.offload_optimizer=cpu: slower steps")
    if model.dtype in ("auto", "float32"):
        knobs.append(f"model.dtype=bfloat16 (now {model.dtype})")
    method = METHODS[config.method.kind]
    if method.less_memory and (model.quantization is None or method.less_memory_if_quantized):
        knobs.append(method.less_memory)
    if data.validation is not None and config.evaluation.generate:
        knobs.append(
            f"evaluation.batch_size (now {config.evaluation.batch_size}), if it ran out while "
            "replies were generated"
        )
    knobs.append(
        f"data.max_length (now {data.max_length}; the longest example has {longest} tokens)"
    )
    return knobs
