"""What a configuration will take on so many GPUs: memory by kind, tokens, time and disk.

Weights, gradients and the optimizer's state are sums over the model's shapes; activations, and what is
held for a moment, are counted (`planning.step`), and grow in proportion to the tokens of a batch.
Images are not counted: a tower's own activations come on top.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from finetune import methods
from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import read_json
from finetune.config.schema import DeepSpeedSection, Method, ModelSection, TrainingSection
from finetune.methods.optimizers import STATE_BYTES
from finetune.models.families import family_of
from finetune.models.kernels import NAMES
from finetune.models.load import check_mixture, num_heads, text_config
from finetune.models.number_format import automatic, number_format
from finetune.models.sequence_parallel import check_heads
from finetune.models.tiled_mlp import ABOVE
from finetune.planning.counting import shapes_only
from finetune.planning.sharding import LIVE_WEIGHTS, SUB_GROUP
from finetune.planning.step import Cost, Shape, count_step
from finetune.planning.subjects import on_the_host, own, shared_out, states_per_token

RUNTIME = 1_000_000_000
"""Bytes that no allocation shows: the CUDA context, libraries' work spaces, fragments."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits with double quantisation: itself and its share of the scales."""


@dataclass(frozen=True)
class Gpu:
    """What there is to fit into, and how fast it is."""

    bytes: int = 80_000_000_000
    number: int = 1
    peak_flops: float = 989e12
    """bf16, dense; of an H100."""
    share: float = 0.4
    """Of the peak that a step reaches, an assumption."""
    native_bf16: bool = True
    """Whether it multiplies bfloat16 in hardware; V100 and T4 do not."""


@dataclass(frozen=True)
class Plan:
    """The numbers of a run on one of its GPUs."""

    memory: dict[str, int]
    """Bytes by kind where most is held."""
    host_bytes: int
    """What its process keeps in the host's memory of activations."""
    per_token: int
    """Bytes that each further token of a batch adds."""
    batch: int
    length: int
    """Of a row, whichever GPUs share it."""
    sharing: int
    """GPUs that share a row."""
    accumulation: int
    checkpoint_bytes: int
    disk_bytes: int
    flops: int
    """Of one forward and backward pass, of one GPU."""
    model_milliseconds: float
    """Of the same by the roofline, `planning.roofline`."""
    dtype: str
    """The number format of the frozen weights and of the computation."""
    parameters: int
    """Of the model itself."""
    active_parameters: int
    """Of these, what a token goes through: in a mixture the experts that it takes, and no table of tokens."""
    layers: int
    steps: int | None
    """`training.max_steps`; what epochs come to depends on the data."""
    gpu: Gpu

    @property
    def model_bytes(self) -> int:
        """Of the model itself, as wide as it is multiplied."""
        return self.parameters * int(getattr(torch, self.dtype).itemsize)

    @property
    def memory_bytes(self) -> int:
        """Of all kinds."""
        return sum(self.memory.values())

    @property
    def tokens_per_step(self) -> int:
        """Of one GPU; at most, where rows are shorter than `data.max_length`."""
        return self.batch * self.length * self.accumulation // self.sharing

    @property
    def room(self) -> int:
        """Tokens that could be in a batch, 0 when not even the weights fit."""
        left = self.gpu.bytes - RUNTIME - self.memory_bytes
        return max(0, self.batch * self.length + int(left // max(1, self.per_token)))

    @property
    def fits(self) -> bool:
        """Whether the batch that is asked for has room."""
        return self.memory_bytes + RUNTIME <= self.gpu.bytes

    @property
    def seconds_per_step(self) -> float:
        """At the assumed share of the GPU's peak."""
        return self.flops * self.accumulation / (self.gpu.peak_flops * self.gpu.share)

    @property
    def tokens(self) -> int | None:
        """Of all steps and GPUs."""
        return None if self.steps is None else self.steps * self.tokens_per_step * self.gpu.number

    @property
    def hours(self) -> float | None:
        """Of all steps, at the assumed share; without evaluations and saves."""
        return None if self.steps is None else self.steps * self.seconds_per_step / 3600

    def numbers(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "memory_bytes_per_gpu": self.memory_bytes,
            "memory": self.memory,
            "host_bytes": self.host_bytes,
            "runtime_bytes": RUNTIME,
            "gpu_bytes": self.gpu.bytes,
            "gpus": self.gpu.number,
            "number_format": self.dtype,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "fits": self.fits,
            "bytes_per_token": self.per_token,
            "tokens_per_step_per_gpu": self.tokens_per_step,
            "largest_batch": self.room // self.length,
            "longest_length": self.room // self.batch,
            "steps": self.steps,
            "tokens": self.tokens,
            "hours": self.hours,
            "seconds_per_step": self.seconds_per_step,
            "assumed_share_of_peak": self.gpu.share,
            "roofline_milliseconds": self.model_milliseconds,
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_bytes": self.disk_bytes,
        }


def plan(
    model: ModelSection,
    method: Method,
    training: TrainingSection,
    deepspeed: DeepSpeedSection | None,
    gpu: Gpu,
    *,
    folder: Path,
    length: int,
) -> Plan:
    """The plan of a run.

    Args:
        model: What is trained,
        method: in which way,
        training: in which batches; `settled`, for as many GPUs as `gpu` says,
        deepspeed: and cut in which way.
        gpu: What on.
        folder: The model; a config.json is enough.
        length: Tokens of the longest row.
    """
    batch = training.batch_size
    dtype = _format(model, gpu, folder)
    check_mixture(family_of(read_json(folder / MODEL_CONFIG)), dtype, model.quantization)
    subject = own(
        folder,
        method,
        checkpointing=training.activation_checkpointing,
        dtype=dtype,
        sharded=deepspeed is not None,
        kernels=NAMES if model.kernels == "auto" else (),
        four_bits=model.quantization is not None,
    )
    subject = replace(subject, optimizer=training.optimizer)
    sharing, host = training.sequence_parallel, 0
    own_length = -(-length // sharing)
    if sharing > 1:
        check_heads(sharing, *num_heads(folder))
        subject = shared_out(subject, sharing)
    if training.offload_activations:
        subject = on_the_host(subject)
        host = batch * own_length * states_per_token(folder, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        one = count_step(subject, Shape(batch, own_length))
        other = _length_alike(batch, own_length)
        further = one.working - count_step(subject, Shape(batch, other)).working
        sizes = _sizes(model, method, folder, dtype)
    trains_all = methods.METHODS[method.kind].trains_the_model
    if deepspeed is None:
        memory = _whole(sizes, one, gpu.number, training.optimizer)
    else:
        memory = _sharded(deepspeed, sizes, one, gpu.number, trains_all=trains_all)
    state = _state_bytes(training.optimizer, sizes, one)
    written = sizes.trained_bytes if trains_all and deepspeed is not None else 4 * sizes.trained
    checkpoint = written + (12 * sizes.trained if deepspeed is not None else state)
    return Plan(
        memory=memory,
        host_bytes=host,
        per_token=further * own_length // ((own_length - other) * batch * length),
        batch=batch,
        length=length,
        sharing=sharing,
        accumulation=training.gradient_accumulation_steps,
        checkpoint_bytes=checkpoint,
        # The newest ones, the best one, and one that is being written.
        disk_bytes=checkpoint * (training.keep_checkpoints + 2),
        flops=sum(one.flops.values()),
        model_milliseconds=one.milliseconds * training.gradient_accumulation_steps,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sizes.everything,
        active_parameters=sizes.active,
        layers=subject.layers,
        steps=training.max_steps,
        gpu=gpu,
    )


def _length_alike(batch: int, length: int) -> int:
    """Another length of rows whose memory grows in the same way: tiled like these, or not."""
    half = max(1, length // 2)
    if batch * half > ABOVE or batch * length <= ABOVE < 2 * batch * length:
        return half
    return 2 * length


def _format(section: ModelSection, gpu: Gpu, folder: Path) -> torch.dtype:
    """What `model.dtype` means on the GPU that is planned for."""
    if section.dtype != "auto":
        return number_format(section.dtype)
    model = read_json(folder / MODEL_CONFIG)
    sees_images = family_of(model).sees_images(model)
    return automatic(native_bf16=gpu.native_bf16, sees_images=sees_images)


@dataclass(frozen=True)
class _Sizes:
    frozen: int
    """Bytes of what is not trained, buffers too."""
    trained: int
    """Numbers that are trained."""
    trained_bytes: int
    """Of the trained weights in the format in which the model computes with them."""
    largest_bytes: int
    """Of the weights of the largest single module."""
    everything: int
    """Numbers of the model itself."""
    active: int
    """Those of them that a token goes through."""


def _sizes(model: ModelSection, method: Method, folder: Path, dtype: torch.dtype) -> _Sizes:
    """All layers are alike: what 40 of them hold follows from one and two."""
    subject = own(folder, method, checkpointing=False, dtype=dtype, sharded=True)
    fewest = subject.dense + 1
    one, two = (_sizes_with(subject.build, layers) for layers in (fewest, fewest + 1))
    further = subject.layers - fewest
    whole = {name: one[name] + (two[name] - one[name]) * further for name in one}
    frozen, trained = whole["frozen"], whole["trained"]
    if model.quantization is not None:
        frozen -= int(whole["linear"] * (dtype.itemsize - NF4_BYTES))
    text, everything, active = text_config(folder), whole["own"], whole["own"]
    if whole["experts"]:
        unused = text.n_routed_experts - text.num_experts_per_tok
        active -= whole["experts"] * unused // text.n_routed_experts + text.vocab_size * text.hidden_size  # fmt: skip
    return _Sizes(frozen, trained, whole["trained bytes"], one["largest"], everything, active)


def _sizes_with(build: Callable[[int], nn.Module], layers: int) -> dict[str, int]:
    with shapes_only():
        model = build(layers)
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    held = [t for t in (*weights, *model.buffers()) if not t.requires_grad]
    linear = [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and "lora_" not in name
    ]
    return {
        "frozen": sum(t.numel() * t.element_size() for t in held),
        "trained": sum(t.numel() for t in trained),
        "trained bytes": sum(t.numel() * t.element_size() for t in trained),
        "linear": sum(linear),
        "largest": max(
            sum(t.numel() * t.element_size() for t in module.parameters(recurse=False))
            for module in model.modules()
        ),
        "own": sum(t.numel() for name, t in model.named_parameters() if not _ADDED.search(name)),
        "experts": sum(t.numel() for name, t in model.named_parameters() if _EXPERTS.search(name)),
    }


_ADDED = re.compile(r"lora_|\.prefix\.|^prefix_encoder\.")
"""In the names of what a method adds to a model."""
_EXPERTS = re.compile(r"\.experts\.(base_layer\.)*\w+$")
"""Ends of the names of routed experts' own weights."""


def _whole(sizes: _Sizes, cost: Cost, gpus: int, optimizer: str) -> dict[str, int]:
    """Bytes by kind on one GPU that holds the whole model, where most is held."""
    held = dict(cost.peak)
    if (size := STATE_BYTES.get(optimizer)) is not None:
        held["optimizer"] = int(size * sizes.trained)
    # Buckets in which DDP sums gradients, besides the gradients.
    held["gradients"] += 4 * sizes.trained if gpus > 1 else 0
    return held


def _sharded(
    section: DeepSpeedSection, sizes: _Sizes, cost: Cost, gpus: int, *, trains_all: bool
) -> dict[str, int]:
    """Bytes by kind under DeepSpeed where most is held: in the passes or in the optimizer's turn."""
    stage = section.zero_stage
    cut = {0: (1, 1, 1), 1: (1, 1, gpus), 2: (1, gpus, gpus), 3: (gpus, gpus, gpus)}[stage]
    everything = sizes.frozen + (sizes.trained_bytes if trains_all else 0)
    gathered = 0
    if stage == 3 and gpus > 1:
        # A weight that is larger is gathered all the same when its turn comes.
        gathered = min(everything, max(2 * LIVE_WEIGHTS, sizes.largest_bytes))
    states = 0 if section.offload_optimizer == "cpu" else 12 * sizes.trained // cut[2]
    gradient = sizes.trained_bytes // cut[1]
    turn = 0 if section.offload_optimizer == "cpu" else 4 * sizes.trained // cut[2]
    if stage == 3:
        turn = min(turn, 4 * SUB_GROUP)
    elif trains_all:
        turn += gradient  # made one tensor before its turn
    passing, updating = gathered + cost.working, turn
    return {
        "weights": everything // cut[0] + gathered,
        "adapters": 0 if trains_all else 6 * sizes.trained,
        "gradients": gradient,
        "optimizer": states,
        "activations": max(0, passing - gathered) if passing >= updating else 0,
        "transients": 0 if passing >= updating else updating - gathered,
    }


def _state_bytes(optimizer: str, sizes: _Sizes, cost: Cost) -> int:
    """Bytes of the optimizer's state as a checkpoint holds it, in whichever memory it is else."""
    if "8bit" in optimizer:
        return int(STATE_BYTES["adamw_8bit"] * sizes.trained)
    return cost.peak["optimizer"]
