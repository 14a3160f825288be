"""What torch.compile would make of one layer, counted beside our kernels; no GPU and no compiler is needed.

    python scripts/bench/count_compile.py --model FOLDER [--length 4096]

FOLDER needs no more than GLM-4-9B's config.json. A layer with LoRA, on tensors that have shapes only, goes
through torch's own tracing, partitioning and fusing up to the kernels that Inductor would write; those and
the bytes that they read and write are counted, forward, recomputed and backward. Of our own way it is what a
third layer adds to a step of two (planning/step.py). Inductor's fusing is asked for a CPU, which is where the
shapes lie; its rules of fusing are the same for a GPU.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    fake_tensor_prop,
    shape_env_from_inputs,
)
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V

from finetune.config.schema import LoraMethod
from finetune.methods.lora_forward import LowRank
from finetune.models.kernels import NAMES, running
from finetune.planning.counting import Ledger, _as_on_gpu, shapes_only
from finetune.planning.roofline import Ceilings
from finetune.planning.step import Shape, count_layers
from finetune.planning.subjects import own


@dataclass
class Found:
    """Of one pass through a layer."""

    kernels: int = 0
    bytes: int = 0


def uncompiled(folder: Path, length: int, kernels: tuple[str, ...]) -> Found:
    """What a layer costs without torch.compile, all passes of a step."""
    subject = own(folder, LoraMethod(), checkpointing=True, kernels=kernels)
    two, three = (count_layers(subject, Shape(1, length), Ceilings(), n) for n in (2, 3))
    return Found(three.kernels - two.kernels, three.bytes - two.bytes)


def compiled(folder: Path, length: int, kernels: tuple[str, ...]) -> Found:
    """The same of a layer that Inductor has taken apart."""
    passes = {"forward": Found(), "backward": Found()}
    shapes = shapes_only()
    with ExitStack() as here:
        for one in (shapes, running(kernels, "cpu"), _as_on_gpu(Ledger()), patch.object(LowRank, "forward", _every_pass)):  # fmt: skip
            here.enter_context(one)
        # It asks for real weights; shapes are enough to be counted.
        here.enter_context(patch("torch._dynamo.utils.assert_no_fake_params_or_buffers"))
        model: Any = own(folder, LoraMethod(), checkpointing=False, kernels=kernels).build(1)
        inner = model.get_base_model().transformer
        rotation = inner.rotary_pos_emb(torch.arange(length)[None], torch.bfloat16)
        width = inner.config.hidden_size
        hidden = torch.empty(1, length, width, dtype=torch.bfloat16, requires_grad=True)
        made = aot_module(
            _Layer(inner.encoder.layers[0]),
            _counting(passes["forward"], shapes, is_backward=False),
            _counting(passes["backward"], shapes, is_backward=True),
            partition_fn=partial(_parted, shapes=shapes),
            decompositions=select_decomp_table(),
        )
        made(hidden, *rotation).sum().backward()
    once, back = passes["forward"], passes["backward"]
    return Found(2 * once.kernels + back.kernels, 2 * once.bytes + back.bytes)


class _Layer(nn.Module):
    """A layer as a function of tensors alone."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return self.block(hidden, attention_mask=None, rotation=(cos, sin), past_key_values=None)


def _every_pass(low: Any, rows: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """LoRA's product with its weight cast where it is used, which a compiler fuses."""
    weight = (low.weight * scale).to(rows.dtype)
    return nn.functional.linear(rows, weight) if onto is None else torch.addmm(onto, rows, weight.T)


def _parted(graph: Any, inputs: Any, *, shapes: Any, **options: Any) -> Any:
    with V.set_fake_mode(shapes):
        joint_graph_passes(graph)
    return min_cut_rematerialization_partition(graph, inputs, **options | {"compiler": "inductor"})


def _counting(found: Found, shapes: Any, *, is_backward: bool) -> Callable[..., Any]:
    def count(graph: Any, inputs: Any) -> Any:
        with V.set_fake_mode(shapes):
            _recursive_post_grad_passes(graph, is_inference=False)
            fake_tensor_prop(graph, inputs, True)
            lowered = GraphLowering(graph, example_inputs=inputs, shape_env=shape_env_from_inputs(inputs), is_backward=is_backward)  # fmt: skip
            with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
                lowered.run(*inputs)
                lowered._update_scheduler()
                total, nodes, _ = lowered.count_bytes()
        found.bytes += total
        found.kernels += sum("Nop" not in type(node).__name__ for node, _ in nodes)
        return graph

    return count


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder with a config.json")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| a layer, forward, recomputed and backward | kernels | GB moved |\n|---|---|---|")
    for name, kernels in (("kernels torch", ()), ("kernels auto", NAMES)):
        for how, count in (("", uncompiled), (", compiled", compiled)):
            found = count(asked.model, asked.length, kernels)
            print(f"| {name}{how} | {found.kernels} | {found.bytes / 1e9:.2f} |")


if __name__ == "__main__":
    main()
