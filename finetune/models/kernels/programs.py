"""The kernels as Triton programs; imported only where they run.

Every scalar is a constexpr, so that Triton's interpreter runs them as a GPU does. Rows are addressed
with 64 bits: 131,072 tokens x 27,392 numbers are more than 2**31.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_forward(x, weight, out, scale, D: tl.constexpr, EPS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row: weight * (x / rms), in float32; with FIRST the quotient is rounded before."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    value = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / D + EPS)
    tl.store(scale + row, inverse)
    value = value * inverse
    if FIRST:
        value = value.to(out.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + at, (gain * value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_backward(grad, x, weight, scale, out, of_weight, rows, D: tl.constexpr, PROGRAMS: tl.constexpr, TRAINED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Rows n, n + PROGRAMS, ...: the gradient of x, and this program's share of the weight's."""
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < D
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK,), dtype=tl.float32)
    for number in range(program, rows, PROGRAMS):
        row = tl.cast(number, tl.int64)
        inverse = tl.load(scale + row)
        value = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32) * inverse
        slope = tl.load(grad + row * D + at, mask=inside, other=0.0).to(tl.float32)
        if TRAINED:
            share += slope * value
        slope = slope * gain
        slope = inverse * (slope - value * (tl.sum(slope * value, axis=0) / D))
        tl.store(out + row * D + at, slope.to(out.dtype.element_ty), mask=inside)
    if TRAINED:
        tl.store(of_weight + program * D + at, share, mask=inside)


@triton.jit
def swiglu_forward(x, out, F: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row: silu(gate) * up of [gate | up]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < F
    gate = tl.load(x + row * 2 * F + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + at, mask=inside, other=0.0).to(tl.float32)
    turned = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * F + at, (turned * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(grad, x, out, F: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row of the gradients of [gate | up]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < F
    gate = tl.load(x + row * 2 * F + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + row * F + at, mask=inside, other=0.0).to(tl.float32)
    part = 1.0 / (1.0 + tl.exp(-gate))
    of_gate = slope * up * part * (1.0 + gate * (1.0 - part))
    of_up = slope * gate * part
    tl.store(out + row * 2 * F + at, of_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * 2 * F + F + at, of_up.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate(x, cos, sin, out, T, X_ROW, X_HEAD, X_TOKEN, A_ROW, HEADS: tl.constexpr, PAIRS: tl.constexpr, C: tl.constexpr, BACK: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr):  # fmt: skip
    """One token of all heads: neighbouring pairs turned (BACK: turned back), the rest copied."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    here = place * X_ROW + token * X_TOKEN + head * X_HEAD
    there = (place * T + token) * HEADS * C + head * C
    inside = (head < HEADS) & (pair < PAIRS)
    angle = place * A_ROW + token * PAIRS + pair
    c = tl.load(cos + angle, mask=pair < PAIRS, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=pair < PAIRS, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    even = tl.load(x + here + 2 * pair, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(x + here + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + there + 2 * pair, (even * c - odd * s).to(kind), mask=inside)
    tl.store(out + there + 2 * pair + 1, (odd * c + even * s).to(kind), mask=inside)
    rest = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, :]
    left = (head < HEADS) & (rest < C)
    tl.store(out + there + rest, tl.load(x + here + rest, mask=left, other=0.0), mask=left)


@triton.jit
def cross_entropy(logits, target, loss, V: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its loss; its logits become their own gradient, softmax - one-hot."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * V
    highest = tl.full((), -float("inf"), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(base + at, mask=at < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(value, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(value - higher), axis=0)
        highest = higher
    chosen = tl.load(target + row)
    tl.store(loss + row, highest + tl.log(total) - tl.load(base + chosen).to(tl.float32))
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(base + at, mask=at < V, other=-float("inf")).to(tl.float32)
        slope = tl.exp(value - highest) / total - tl.where(at == chosen, 1.0, 0.0)
        tl.store(base + at, slope.to(logits.dtype.element_ty), mask=at < V)
