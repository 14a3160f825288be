"""Sequence parallelism (DeepSpeed Ulysses) over gloo: one text cut in two, against one process.

    python scripts/bench/ulysses.py [--tokens 64] [--families glm glm4 chatglm]

Each of two processes runs half of the tokens; Ulysses exchanges heads for tokens around every
attention. Prints the loss of both ways and the largest difference of any gradient, or what stops it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import cells

ROOT = cells.ROOT


def halves(family: str, tokens: int, folder: Path) -> dict[str, Any]:
    """The comparison, in one of the two processes."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    from finetune.models.load import load_model

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 370, (1, tokens), generator=generator)
    following = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    places = torch.arange(tokens).unsqueeze(0)

    def backward(model: Any, part: slice) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits = model(ids[:, part], position_ids=places[:, part], use_cache=False).logits
        losses = F.cross_entropy(logits[0], following[0, part], reduction="sum")
        (losses / (tokens - 1)).backward()
        return losses.detach() / (tokens - 1), [p.grad for p in model.parameters()]

    loss, gradients = backward(load_model(folder, attention="sdpa").train(), slice(0, tokens))
    model = load_model(folder, attention="sdpa").train()
    model.config._attn_implementation = "sdpa"  # the function that Ulysses puts itself around
    UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", sequence_parallel_size=2, micro_batch_size=1
    )
    half, rank = tokens // 2, dist.get_rank()
    try:
        both, sums = backward(model, slice(rank * half, (rank + 1) * half))
    except AssertionError as error:
        return {"family": family, "stopped": str(error).split(". ")[0]}
    for tensor in [both, *sums]:
        dist.all_reduce(tensor)
    pairs = zip(gradients, sums, strict=True)
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    return {"family": family, "loss": float(loss), "in two": float(both), "gradients": worst}


def process(rank: int, port: int, family: str, tokens: int, folder: Path) -> None:
    """The life of a forked process."""
    import torch.distributed as dist

    from finetune.training.deepspeed import zero

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in place.items()}, MASTER_ADDR="127.0.0.1")  # fmt: skip
    code = 1
    try:
        dist.init_process_group("gloo")
        zero.join()
        found = halves(family, tokens, folder)
        if rank == 0:
            print(json.dumps(found), flush=True)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    """One line of JSON for every family."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--families", nargs="+", default=["glm", "glm4", "chatglm"])
    options = parser.parse_args()
    import runs
    import tiny

    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        for family in options.families:
            folder = tiny.save_model(Path(temporary) / family, family)
            cells.warm_up(folder)
            port, children = runs.free_port(), []
            for rank in range(2):
                if (child := os.fork()) == 0:
                    process(rank, port, family, options.tokens, folder)
                children.append(child)
            bad |= any(os.waitpid(child, 0)[1] for child in children)
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
