"""A linear layer's product in float32: torch's own (MKL) beside those of replies (oneDNN, its weight packed).

    python scripts/bench/products.py [--threads 1] [--turns 15]

CPU milliseconds of one layer, the lower quartile of alternating turns over layers that no cache holds together:
torch's own, oneDNN's with the weight as it lies and packed, and how many times as long as the last torch's own
takes. On an Intel processor all are torch's own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SHAPES = ((3072, 576), (576, 1536), (960, 576), (49168, 576), (49168, 192))
"""Of SmolLM2-135M re-laid as a GLM, [out, in], and the output layer of a smaller model."""
ROWS = (1, 2, 4, 16, 64, 1024)
BYTES = 200e6


def cpu(way: Callable[[Any, Any], object], x: Any, layers: Sequence[Any]) -> float:
    """CPU milliseconds of one layer."""
    begun = time.process_time()
    for layer in layers:
        way(x, layer)
    return 1000 * (time.process_time() - begun) / len(layers)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    given = parser.parse_args()
    import torch
    import torch.nn.functional as F

    from finetune.models.kernels.products import ReplyingLinear, linear, packed

    torch.set_num_threads(given.threads)
    print("| out x in | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("|---" * (len(ROWS) + 1) + "|")
    for shape in SHAPES:
        number = max(1, int(BYTES // (4 * shape[0] * shape[1])))
        layers = torch.nn.ModuleList(ReplyingLinear(shape[1], shape[0], bias=False) for _ in range(number)).eval()  # fmt: skip
        weights = [layer.weight for layer in layers]
        cells = []
        for rows in ROWS:
            x = torch.randn(rows, shape[1])
            times: dict[str, list[float]] = {"mkl": [], "lying": [], "packed": []}
            with torch.no_grad():
                for _ in range(given.turns if rows < 1024 else 5):
                    times["mkl"].append(cpu(F.linear, x, weights))
                    times["lying"].append(cpu(linear, x, weights))
                    with packed(layers):
                        times["packed"].append(cpu(linear, x, weights))
            mkl, lying, ours = (sorted(one)[len(one) // 4] for one in times.values())
            cells.append(f"{mkl:.3f} / {lying:.3f} / {ours:.3f} = {mkl / ours:.2f}")
        print(f"| {shape[0]:,} x {shape[1]:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
