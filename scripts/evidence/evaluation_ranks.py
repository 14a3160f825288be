"""Generating in many real processes: who answered how many prompts, and that the replies are those of one.

    python scripts/evidence/evaluation_ranks.py [--processes 8] [--prompts 256 1070]

Batches of 16, a tiny random GLM, gloo on this machine's cores. Exits with an error when a reply differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    """Runs the processes for every number of prompts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 1070])
    asked = parser.parse_args()
    import tiny
    from test_deal import check_processes

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = tiny.save_model(folder / "model", "glm")
        for count in asked.prompts:
            begun = time.monotonic()
            answered = check_processes(asked.processes, count, model, folder)
            most = max(answered) * asked.processes / count
            print(
                f"{count} prompts, {asked.processes} processes: {answered}, the busiest {most:.2f} x "
                f"the mean; replies equal to one process's ({time.monotonic() - begun:.0f} s)"
            )


if __name__ == "__main__":
    main()
