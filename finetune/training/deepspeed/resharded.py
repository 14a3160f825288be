"""DeepSpeed's states of a checkpoint, cut anew for another number of processes.

Stages 1 and 2 hold all weights of a group one behind the other and cut that into equal parts; stage 3
cuts every weight into equal parts. Both fill up with zeros. Numbers are moved and nothing else, so a run
goes on exactly, but for the order in which more or fewer processes add up. A process maps the files of
all parts and reads what it needs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from finetune.errors import CheckpointError

Pieces = Sequence[Tensor]
"""Tensors that stand for one long row of numbers."""
PART = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


def go_on_at_any_number(engine: Any, read: Callable[[Path], Any]) -> None:
    """Let the engine open checkpoints of other numbers of processes; `read` opens a file of states."""
    load = engine.load_checkpoint

    def load_checkpoint(folder: str, **options: Any) -> Any:
        tag = (Path(folder) / "latest").read_text(encoding="utf-8").strip()
        parts = _parts(Path(folder) / tag)
        if not parts or len(parts) == dist.get_world_size():
            return load(folder, **options)
        with _cut_anew(engine, [read(path)["optimizer_state_dict"] for path in parts]):
            return load(folder, **options)

    engine.load_checkpoint = load_checkpoint


def _parts(folder: Path) -> list[Path]:
    """The files of optimizer states, by process; none in stage 0, where every process has all."""
    found = {int(named[1]): path for path in folder.iterdir() if (named := PART.search(path.name))}
    return [found[rank] for rank in sorted(found)]


@contextmanager
def _cut_anew(engine: Any, saved: list[Any]) -> Iterator[None]:
    """In here the engine finds its own part of the states among those of so many others."""
    optimizer, rank, world = engine.optimizer, dist.get_rank(), dist.get_world_size()
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not optimizer.swap_optimizer:
        mine = _of_stage_3(optimizer, saved, rank)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        mine = _of_flat_groups(optimizer, saved, rank)
    else:
        raise CheckpointError(
            f"this checkpoint is of {len(saved)} processes, and the states of {type(optimizer).__name__} "
            f"cannot be cut for {world}: start {len(saved)}"
        )
    name, load = engine._get_ckpt_name, engine._load_checkpoint

    def named(folder: str, tag: str, mp_placeholder: Any = None, pp_placeholder: Any = None) -> Any:
        return name(folder, tag, mp_placeholder, pp_placeholder or str(rank % len(saved)))

    def loaded(*given: Any, **options: Any) -> Any:
        found = load(*given, **options)
        engine.loaded_checkpoint_dp_world_size = engine.seq_dp_world_size
        return found

    changed = {
        "_get_ckpt_name": named,
        "_load_checkpoint": loaded,
        "_get_all_zero_checkpoints": lambda folder, tag: [mine] * world,
    }
    vars(engine).update(changed)
    try:
        yield
    finally:
        for attribute in changed:
            delattr(engine, attribute)


def _of_flat_groups(optimizer: Any, saved: list[Any], rank: int) -> dict[str, Any]:
    """What process `rank` holds in stages 1 and 2."""
    weights = "single_partition_of_fp32_groups"
    groups = range(len(optimizer.partition_size))
    old = [state["base_optimizer_state"] for state in saved]
    sizes = [int(size) for size in optimizer.partition_size]
    # Saved weights have lost the zeros at their end: so many numbers there are.
    numbers = [sum(len(state[weights][group]) for state in saved) for group in groups]

    def cut(pieces: Pieces, group: int) -> Tensor:
        begin, size = rank * sizes[group], sizes[group]
        found = taken(pieces, begin, min(begin + size, numbers[group]))
        return torch.nn.functional.pad(found, (0, size - len(found)))

    states = {
        group: {
            key: cut([one["state"][group][key] for one in old], group) if _is_row(value) else value
            for key, value in old[0]["state"][group].items()
        }
        for group in old[0]["state"]
    }
    return {
        **saved[0],
        weights: [cut([state[weights][group] for state in saved], group) for group in groups],
        "base_optimizer_state": old[0] | {"state": states},
    }


def _of_stage_3(optimizer: Any, saved: list[Any], rank: int) -> dict[str, Any]:
    """What process `rank` holds in stage 3."""
    old = [state["optimizer_state_dict"] for state in saved]
    subgroups: list[list[Any]] = optimizer.fp16_groups

    def cut(rows: list[Pieces]) -> list[Tensor]:
        """Of the parts of all weights, one row for each earlier process: this process's, by sub-group."""
        found, offset = [], 0
        for subgroup in subgroups:
            parts = []
            for weight in subgroup:
                before, size = -(-weight.ds_numel // len(saved)), int(weight.ds_tensor.numel())
                whole = [taken(row, offset, offset + before) for row in rows]
                own = taken(whole, rank * size, min((rank + 1) * size, weight.ds_numel))
                parts.append(torch.nn.functional.pad(own, (0, size - len(own))))
                offset += before
            found.append(torch.cat(parts))
        return found

    def rows_of(key: str) -> list[Pieces]:
        return [[one["state"][group][key] for group in sorted(one["state"])] for one in old]

    states: dict[int, dict[str, Any]] = {number: {} for number in range(len(subgroups))}
    if old[0]["state"]:
        for key, value in old[0]["state"][0].items():
            if _is_row(value):
                made = cut(rows_of(key))
            else:  # one of its own for each, for each counts its own steps
                made = [copy.deepcopy(value) for _ in subgroups]
            for number, state in states.items():
                states[number] = state | {key: made[number]}
    members: Mapping[int, int] = optimizer.sub_group_to_group_id
    groups = [
        group | {"params": [number for number in states if members[number] == place]}
        for place, group in enumerate(old[0]["param_groups"])
    ]
    return {
        **saved[0],
        "fp32_flat_groups": cut([state["fp32_flat_groups"] for state in saved]),
        "optimizer_state_dict": {"state": states, "param_groups": groups},
    }


def taken(pieces: Pieces, begin: int, end: int) -> Tensor:
    """The numbers from `begin` to `end` of the row that the pieces make; nothing else is read."""
    found, first = [pieces[0][:0]], 0
    for piece in pieces:
        found.append(piece[max(0, begin - first) : max(0, end - first)])
        first += len(piece)
    return torch.cat(found)


def _is_row(value: Any) -> bool:
    """Whether a state has a number for each weight, and is not a count of steps."""
    return isinstance(value, Tensor) and value.dim() == 1 and value.numel() > 1
