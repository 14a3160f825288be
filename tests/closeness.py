"""How far apart two computations of the same numbers may be when they add in another order.

Bits are equal between runs of the same shapes, threads and kernels, and only there. Otherwise the
order in which a sum is taken differs: with the processor, the number of threads, the rows of a batch,
the number of processes, the library. Every addition rounds to the number format, by at most half of
its `eps` times the sum so far, up or down. `n` additions one after another so end about sqrt(n) such
halves away from the exact sum, two orders of them sqrt(2) times that from each other, and four
standard deviations are

    4 x sqrt(2) x sqrt(n) x eps / 2 x size  <  3 x eps x sqrt(n) x size
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import runs
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

import finetune.models  # noqa: F401 - registers chatglm

ADAM_EPSILON = 1e-2
# For runs whose weights are compared. A gradient that is zero but for rounding, such as that of a
# bias of the keys, moves its weight by a full step of AdamW when epsilon is 1e-8, whichever sign the
# rounding has. With an epsilon above the rounding a step stays a function of the gradient.
SMOOTH_STEPS = {"training__extra": {"adam_epsilon": ADAM_EPSILON}}

LARGEST_LOGIT = 5.0
"""Of the tiny models: their logits are about standard normal, and a test looks at some thousands."""


def rounding(sums: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """What other orders of so many additions of numbers that grow to `size` leave between results."""
    return 3 * torch.finfo(dtype).eps * sums**0.5 * size


def additions(config: Any, positions: int) -> int:
    """How many additions follow one another from the embedding of a token to its logits."""
    text = getattr(config, "text_config", config)
    hidden, ffn = text.hidden_size, text.intermediate_size
    # Two norms, up to two more after them (0414), q | k | v, attention's output, gate | up.
    sums_of_hidden = 4 + 3
    head = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    attention = head + 2 * positions  # scores; softmax and weighted values
    layer = sums_of_hidden * hidden + attention + ffn + 2  # two residuals
    tower = getattr(config, "vision_config", None)
    return text.num_hidden_layers * layer + 2 * hidden + (_tower(tower) if tower else 0)


def loss_rounding(config: Any, positions: int) -> float:
    """What other orders leave between losses: of the logits, and of softmax's sum over the vocabulary."""
    text = getattr(config, "text_config", config)
    return rounding(additions(config, positions), LARGEST_LOGIT) + rounding(text.vocab_size)


def _tower(config: Any) -> int:
    """The same from a pixel to the embedding of its patch."""
    size = config if isinstance(config, dict) else config.to_dict()
    hidden, patch = size["hidden_size"], size["patch_size"] ** 2 * size["in_channels"]
    layers = size.get("num_hidden_layers") or size["depth"]
    patches = (size["image_size"] // size["patch_size"]) ** 2 + 1
    layer = 5 * hidden + size["intermediate_size"] + 2 * patches
    return patch + layers * layer + 4 * hidden + 4 * size["intermediate_size"]


def assert_close(found: Tensor, expected: Tensor, sums: int, what: str = "") -> None:
    """`found` is `expected` up to the order of so many additions."""
    assert found.shape == expected.shape, what
    coarser = max(found.dtype, expected.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    allowed = rounding(sums, float(expected.detach().abs().max()), coarser)
    apart = float((found.detach().double() - expected.detach().double()).abs().max())
    assert apart <= allowed, f"{what} {apart:.2e} apart, {allowed:.2e} allowed"


def assert_same_gradients(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], sums: int
) -> None:
    """Gradients up to the order of additions: so many to the loss, as many back, and over positions.

    A gradient may cancel to less than its terms: their size is the largest of all gradients.
    """
    assert found.keys() == expected.keys()
    allowed = rounding(2 * sums, max(float(g.abs().max()) for g in expected.values()))
    for name, gradient in expected.items():
        apart = float((found[name] - gradient).abs().max())
        assert apart <= allowed, f"{name} {apart:.2e} apart, {allowed:.2e} allowed"


def assert_trained_alike(one: Path, other: Path) -> None:
    """Two run directories with `SMOOTH_STEPS` hold the losses and the weights of the same training.

    A gradient is clipped to a norm of 1 and off by its rounding, and a step moves a weight by
    rate x gradient / (size of gradients + epsilon): off by at most rate x rounding / epsilon. The
    weights of a prefix are trained in units of about their own size, which may be more than 1.
    """
    config = yaml.safe_load((one / "config.yaml").read_text(encoding="utf-8"))
    training = config["training"]
    assert training["extra"]["adam_epsilon"] == ADAM_EPSILON
    model = AutoConfig.from_pretrained(config["model"]["path"])
    sums = additions(model, config["data"]["max_length"])
    left, right = runs.history(one), runs.history(other)
    assert len(left) == len(right) == training["max_steps"]
    apart = max(abs(a - b) for a, b in zip(left, right, strict=True))
    allowed = loss_rounding(model, config["data"]["max_length"])
    assert apart <= allowed, f"losses are {apart:.2e} apart, {allowed:.2e} allowed"
    steps, rate = training["max_steps"], training["learning_rate"]
    gradient = min(training["max_grad_norm"], max(runs.history(one, "grad_norm")))
    moved = steps * rate * rounding(2 * sums, gradient) / ADAM_EPSILON
    ours, theirs = (_weights(run / f"checkpoint-{steps}") for run in (one, other))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        apart, size = float((weight - theirs[name]).abs().max()), float(weight.abs().max())
        allowed = moved * max(1.0, size)
        assert apart <= allowed, f"{name} {apart:.2e} apart, {allowed:.2e} allowed"


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found |= load_file(file)
    assert found, checkpoint
    return found
