"""The endpoint of this checkout against that of another one, in turns: CPU seconds of the server.

    git worktree add /tmp/before a008844
    python scripts/bench/endpoint.py /tmp/before [--rounds 3] [--json]

  1 client    one request after the other, 8 new tokens: what a request costs besides its tokens
  8 clients   eight at a time, 4 to 44 new tokens, half of them streaming
  32 clients  the same with 32

A tiny random model is served by each checkout's own `finetune serve` in a process of its own; replies are
greedy and must be the same. CPU seconds are those of the server alone, and hardly depend on what else the
machine does; `first` is the median time until a streaming client has its first token.

Bar: no more CPU seconds than the other checkout, in any of the three.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LOADS = {"1 client": (1, 120), "8 clients": (8, 240), "32 clients": (32, 240)}
NOISE = 1.03


@contextmanager
def served(checkout: Path, model: Path) -> Iterator[tuple[str, int]]:
    """A checkout's `finetune serve` until the block ends: its URL and its process."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "finetune",
        "serve",
        str(model),
        "--port",
        "0",
        "--name",
        "tiny",
    ]
    with tempfile.NamedTemporaryFile("w+") as log:
        server = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while not (found := re.search(r"http://[^/]+", Path(log.name).read_text())):
                if server.poll() is not None:
                    raise SystemExit(Path(log.name).read_text())
                time.sleep(0.1)
            yield found[0], server.pid
        finally:
            server.terminate()
            server.wait(60)


def cpu_seconds(process: int) -> float:
    """CPU time that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask(client: httpx.AsyncClient, number: int, short: bool) -> tuple[str, float | None]:
    """A reply, and the seconds until its first token where it streams."""
    words = " ".join(["the dog and the order"] * (number % 7 + 1))
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": words}]}
    body["max_tokens"] = 8 if short else 4 + number % 41
    if short or number % 2:
        answer = await client.post("/v1/chat/completions", json=body)
        return answer.json()["choices"][0]["message"]["content"], None
    begun, first, said = time.perf_counter(), None, ""
    async with client.stream(
        "POST", "/v1/chat/completions", json=body | {"stream": True}
    ) as answer:
        async for line in answer.aiter_lines():
            if line[6:7] == "{":
                first = first or time.perf_counter() - begun
                said += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    return said, first


async def replies(url: str, clients: int, requests: int) -> tuple[list[str], list[float]]:
    """All replies in the order of their requests, and the seconds to the first token."""
    said, firsts = [""] * requests, list[float]()
    numbers = iter(range(requests))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def one() -> None:
            for number in numbers:
                said[number], first = await ask(client, number, clients == 1)
                if first is not None:
                    firsts.append(first)

        await asyncio.gather(*(one() for _ in range(clients)))
    return said, firsts


def measured(checkout: Path, model: Path) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Load -> CPU seconds and median seconds to the first token; and every reply."""
    found, said = {}, list[str]()
    with served(checkout, model) as (url, process):
        asyncio.run(replies(url, 4, 20))  # what is made once is no request's cost
        for name, (clients, requests) in LOADS.items():
            begun = cpu_seconds(process)
            texts, firsts = asyncio.run(replies(url, clients, requests))
            cpu = cpu_seconds(process) - begun
            found[name] = (cpu, statistics.median(firsts) if firsts else float("nan"))
            said += texts
    return found, said


def main() -> int:
    """Measure in turns; 1 when a bar is missed or the replies differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("other", type=Path, help="a checkout to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import serving

    runs: dict[str, list[dict[str, tuple[float, float]]]] = {"here": [], "other": []}
    texts = set()
    with tempfile.TemporaryDirectory() as folder:
        model = serving.save_talkative(Path(folder) / "model")
        for _ in range(options.rounds):
            for name, checkout in (("here", ROOT), ("other", options.other.resolve())):
                found, said = measured(checkout, model)
                runs[name].append(found)
                texts.add(tuple(said))
    table = {
        load: {
            f"{name} {what}": statistics.median(run[load][place] for run in runs[name])
            for name in runs
            for place, what in enumerate(("cpu_s", "first_s"))
        }
        for load in LOADS
    }
    ratios = {load: row["here cpu_s"] / row["other cpu_s"] for load, row in table.items()}
    if options.json:
        print(json.dumps({"table": table, "ratios": ratios, "same replies": len(texts) == 1}))
    for load, row in table.items() if not options.json else ():
        figures = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
        print(f"{load}: {ratios[load]:.2f} x the CPU seconds ({figures})")
    return int(len(texts) != 1 or any(ratio > NOISE for ratio in ratios.values()))


if __name__ == "__main__":
    raise SystemExit(main())
