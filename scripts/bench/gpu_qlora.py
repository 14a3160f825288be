"""The stage `qlora` of gpu.py: layers in NF4 by bitsandbytes under LoRA, as `model.quantization: nf4` trains them.

same numbers     two layers: loss and gradients in 4 bits beside those of the same weights made wide
20 steps         two layers learn one batch, in 4 bits and in the weights' own format
steps            the whole model: milliseconds, memory, tokens/s beside what was counted
"""

from __future__ import annotations

import statistics
from importlib.util import find_spec
from typing import Any

from gpu import Bench, batch_of, draw, measured

STEPS = 20


def qlora(bench: Bench) -> None:
    """Answer all three."""
    if find_spec("bitsandbytes") is None:
        raise SystemExit("bitsandbytes is not installed: pip install 'glm4-finetune[qlora]'")
    from finetune.config.schema import LoraMethod
    from finetune.models.kernels import NAMES, check
    from finetune.planning.step import Shape, count_step
    from finetune.planning.subjects import own

    torch, cuda = bench.torch, bench.device.type == "cuda"
    _same_numbers(bench)
    _learns(bench)
    used = check.choose("auto", bench.device, torch.bfloat16).used
    subject = own(
        bench.folder, LoraMethod(), checkpointing=True, four_bits=True, kernels=used or NAMES if cuda else ()
    )  # fmt: skip
    for length in (32,) if bench.rehearses else (1024, 4096):
        cost = count_step(subject, Shape(1, length))
        model = _tuned(_base(bench, subject.layers)[0], dropout=0.1)
        figures = measured(bench, subject, length, model)
        bench.answer(
            f"ours, lora in 4 bits, {length:,}", **figures,
            predicted_gb=cost.peak_bytes / 1e9, roofline_ms=round(cost.milliseconds, 1),
            tokens_per_second=round(1000 * length / figures["ms"]),
        )  # fmt: skip
        del model
        if cuda:
            torch.cuda.empty_cache()


def _base(bench: Bench, layers: int, *, wide: bool = False) -> tuple[Any, Any]:
    """A model in 4 bits, and beside it, for `wide`, one with the weights that the 4 bits stand for."""
    from finetune.models.quantization import FourBits, take_over
    from finetune.planning.subjects import narrow

    model = _drawn(bench, layers)
    twin = _drawn(bench, layers) if wide else None
    narrow(model, _in_four_bits)
    model.is_loaded_in_4bit = True  # PEFT asks for it, as from_pretrained sets it
    take_over(model)
    for name, layer in model.named_modules() if twin is not None else ():
        if isinstance(layer, FourBits):
            twin.get_submodule(name).weight.data = layer.wide()
    return model, twin


def _drawn(bench: Bench, layers: int) -> Any:
    from finetune.models.load import shape_of
    from finetune.planning.subjects import made_in

    torch = bench.torch
    torch.manual_seed(0)
    with made_in(torch.bfloat16), torch.device(bench.device):
        model = shape_of(bench.folder, layers)
    draw(model)
    return model


def _in_four_bits(layer: Any) -> Any:
    """A layer of bitsandbytes with the same weight; it quantises when it is moved to its device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = layer.weight.data
    made = Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None,
        compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    made.weight = Params4bit(weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4")  # fmt: skip
    made.bias = layer.bias
    return made.to(weight.device)


def _tuned(model: Any, *, dropout: float) -> Any:
    """With LoRA whose B is drawn too, so that A learns at once."""
    import torch

    from finetune import methods
    from finetune.config.schema import LoraMethod
    from finetune.planning.subjects import ready

    torch.manual_seed(1)
    tuned = methods.attach(model, LoraMethod(dropout=dropout))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return ready(tuned, checkpointing=True)


def _same_numbers(bench: Bench) -> None:
    torch = bench.torch
    batch = batch_of(bench, 64 if bench.rehearses else 512)
    found = []
    for model in _base(bench, 2, wide=True):
        tuned = _tuned(model, dropout=0.0)
        loss = tuned(**batch, use_cache=False).loss
        weights = [weight for weight in tuned.parameters() if weight.requires_grad]
        found.append((float(loss.detach()), torch.autograd.grad(loss, weights)))
    (ours, gradients), (exact, expected) = found
    off = [float((a - b).norm() / b.norm()) for a, b in zip(gradients, expected, strict=True)]
    bench.answer(
        "the same numbers", loss_off=abs(ours - exact) / exact,
        worst_gradient_off=max(off), median_gradient_off=statistics.median(off), band=1e-2,
    )  # fmt: skip


def _learns(bench: Bench) -> None:
    batch = batch_of(bench, 64 if bench.rehearses else 512)
    losses = {}
    for name in ("four_bits", "wide"):
        base = _base(bench, 2)[0] if name == "four_bits" else _drawn(bench, 2)
        tuned = _tuned(base, dropout=0.0)
        weights = [weight for weight in tuned.parameters() if weight.requires_grad]
        optimizer = bench.torch.optim.AdamW(weights, lr=1e-3, fused=True)
        losses[name] = []
        for _ in range(STEPS):
            loss = tuned(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(float(loss.detach()))
    four, wide = losses["four_bits"], losses["wide"]
    bench.answer(
        f"{STEPS} steps", first=four[0], last=four[-1], first_wide=wide[0], last_wide=wide[-1],
        most_apart=max(abs(a - b) for a, b in zip(four, wide, strict=True)),
    )  # fmt: skip
