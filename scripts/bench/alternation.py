"""Variants of one piece of work, each run in a process of its own, in turns, and compared."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, float]


def measured(work: Callable[[], float]) -> Figures:
    """CPU seconds of `work`, its peak memory in MiB (all of it, and above the start), its value."""
    base = _reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = _memory("VmHWM")
    return {"cpu_s": cpu, "wall_s": wall, "peak_mib": peak, "above_mib": peak - base, "loss": value}


def compare(
    script: str, variants: Sequence[str], *, rounds: int, arguments: Sequence[str]
) -> dict[str, Figures]:
    """Medians over `rounds` of every variant; round by round, so that a slow minute hits all."""
    found: dict[str, list[Figures]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            command = [sys.executable, script, "--variant", variant, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"variant {variant} failed:\n{done.stderr[-4000:]}")
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for variant, runs in found.items()
    }


def report(medians: dict[str, Figures], bars: dict[str, dict[str, float]], *, as_json: bool) -> int:
    """Print the figures as ratios to the first variant; 1 when a bar (variant, key: most) is missed."""
    reference = next(iter(medians.values()))
    ratios = {
        variant: {
            key: figures[key] / reference[key]
            for key in ("cpu_s", "wall_s", "peak_mib", "above_mib")
        }
        for variant, figures in medians.items()
    }
    missed = [
        f"{variant}: {key} is {ratios[variant][key]:.2f} of the first variant, the bar is {most}"
        for variant, wanted in bars.items()
        for key, most in wanted.items()
        if ratios[variant][key] > most
    ]
    if as_json:
        print(json.dumps({"medians": medians, "ratios": ratios, "bars": bars, "missed": missed}))
        return bool(missed)
    print(f"{'variant':<22}{'CPU s':>8}{'ratio':>7}{'wall s':>8}{'ratio':>7}{'peak MiB':>10}{'ratio':>7}{'above':>8}{'ratio':>7}{'loss':>11}")  # fmt: skip
    for variant, figures in medians.items():
        share = ratios[variant]
        print(
            f"{variant:<22}{figures['cpu_s']:>8.2f}{share['cpu_s']:>7.2f}"
            f"{figures['wall_s']:>8.2f}{share['wall_s']:>7.2f}"
            f"{figures['peak_mib']:>10.0f}{share['peak_mib']:>7.2f}"
            f"{figures['above_mib']:>8.0f}{share['above_mib']:>7.2f}{figures['loss']:>11.6f}"
        )
    for line in missed:
        print(f"MISSED  {line}")
    if bars and not missed:
        print(f"all bars met: {bars}")
    return bool(missed)


def _reset_peak() -> float:
    """Let the kernel count the peak from here; the memory held now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _memory("VmRSS")


def _memory(field: str) -> float:
    for line in Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit("this benchmark reads /proc/self/status and needs Linux")


def arguments_of(options: Any, names: Sequence[str]) -> list[str]:
    """The command line of a child: `--name value` for every name."""
    return [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
