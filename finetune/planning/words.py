"""A plan in words: a table, the first knobs to turn, one line before a run."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.planning.plan import RUNTIME, Plan

GB = 1e9
_KINDS = {
    "weights": "weights",
    "adapters": "adapters, and their copies in the model's format",
    "gradients": "gradients",
    "optimizer": "optimizer's state",
    "activations": "activations of the batch",
    "transients": "held for a moment",
}


def rows(plan: Plan) -> list[list[str]]:
    """What takes how much on one GPU, and what that leaves."""
    gpu = plan.gpu
    listed = [
        [_KINDS[kind], f"{size / GB:.2f} GB"] for kind, size in plan.memory.items() if size >= 5e6
    ]
    return [
        *listed,
        ["together", f"{plan.memory_bytes / GB:.2f} GB"],
        *(
            [["of the host's memory, for activations", f"{plan.host_bytes / GB:.2f} GB"]]
            if plan.host_bytes
            else []
        ),
        ["besides, of the driver and libraries", f"about {RUNTIME / GB:.0f} GB"],
        ["number format", _format(plan)],
        *(
            [
                [
                    "weights of the model",
                    f"{plan.parameters / 1e9:.1f} billion, of which a token takes {plan.active_parameters / 1e9:.1f}",
                ]
            ]
            if plan.active_parameters < plan.parameters
            else []
        ),
        [f"fits into {gpu.bytes / GB:g} GB", "yes" if plan.fits else "no"],
        ["each further token of a batch", f"{plan.per_token / 1e6:.2f} MB"],
        [
            f"longest row, batches of {plan.batch}",
            _tokens(plan.room // plan.batch),
        ],
        [f"largest batch of {plan.length:,} tokens", f"{plan.room // plan.length:,} rows"],
        ["a step on one GPU", f"at most {_tokens(plan.tokens_per_step)}"],
        [
            f"its time at {100 * gpu.share:.0f} % of {gpu.peak_flops / 1e12:.0f} TFLOP/s",
            f"{plan.seconds_per_step:.2f} s, without communication",
        ],
        *(
            [
                [
                    f"all {plan.steps:,} steps",
                    f"at most {_tokens(plan.tokens or 0)}, {plan.hours or 0:.1f} hours",
                ]
            ]
            if plan.steps is not None
            else []
        ),
        ["a checkpoint", f"{plan.checkpoint_bytes / GB:.2f} GB"],
        ["all that are kept, and one being written", f"{plan.disk_bytes / GB:.1f} GB"],
    ]


def in_short(plan: Plan) -> str:
    """One line."""
    if plan.memory_bytes < GB:
        return f"{plan.memory_bytes / 1e6:.0f} MB"
    parts = ", ".join(
        f"{kind} {size / GB:.1f}" for kind, size in plan.memory.items() if size >= 5e7
    )
    return f"{plan.memory_bytes / GB:.1f} GB ({parts})"


def knobs(plan: Plan, advice: Sequence[str]) -> list[str]:
    """What to change first: less memory where it does not fit, fuller steps where there is room."""
    if not plan.fits:
        return list(advice)
    fuller = plan.room // (plan.batch * plan.length)
    if fuller >= 2 and plan.batch * plan.length < 4096:
        return [
            f"a step holds {_tokens(plan.batch * plan.length)} at a time where {_tokens(plan.room)} "
            "would fit; data.packing=true with data.max_length=4096 or more keeps the GPU busy"
        ]
    return []


def _format(plan: Plan) -> str:
    if plan.dtype == "float16":
        return "float16, with sums of layers in float32"
    return plan.dtype


def _tokens(number: int) -> str:
    return f"{number:,} tokens"
