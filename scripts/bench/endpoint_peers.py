"""The endpoint beside `transformers serve`: tokens a second and the time to the first token, in turns.

    python scripts/bench/endpoint_peers.py [--other /tmp/before] [--rounds 2] [--json]

1, 8 and 32 clients stream replies of 32 to 64 tokens of a tiny random model that never ends by itself, so that
every server writes the same number of tokens. Each server runs in a process of its own, one after the other,
`--rounds` times; the figures are the best round's tokens a second, and the medians of the first tokens' times.
`--other` adds the endpoint of another checkout.

Bar: ahead of `transformers serve` in tokens a second and in p95 of the first token at 8 and 32 clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
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
CLIENTS = {1: 8, 8: 48, 32: 96}
"""Clients -> requests in all."""


@contextmanager
def served(kind: str, model: Path, other: Path | None) -> Iterator[tuple[str, str]]:
    """A server until the block ends: its URL, and what it calls the model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    checkout = other if kind == "before" and other else ROOT
    if kind.startswith("transformers"):
        command = ["-m", "transformers.cli.transformers", "serve", str(model), "--port", str(port), "--device", "cpu", "--dtype", "float32"]  # fmt: skip
        command += ["--continuous-batching"] if "continuous" in kind else []
        name = str(model)
    else:
        command, name = ["-m", "finetune", "serve", str(model), "--port", str(port), "--name", "tiny", "--batch-size", "32"], "tiny"  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    with tempfile.NamedTemporaryFile("w+") as log:
        server = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(url, server, Path(log.name))
            yield url, name
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the server answers; ends the program with its log when it does not."""
    for _ in range(1200):
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
        if server.poll() is not None:
            break
    raise SystemExit(log.read_text()[-3000:])


async def ask(client: httpx.AsyncClient, model: str, number: int) -> tuple[float, str]:
    """Seconds to the first text, and the text."""
    words = " ".join(["the dog and the order"] * (number % 7 + 1))
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": words}], "stream": True, "max_tokens": wanted(number), "temperature": 0}  # fmt: skip
    begun, first, said = time.perf_counter(), 0.0, ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line[6:7] == "{" and (choices := json.loads(line[6:]).get("choices")):
                said += choices[0]["delta"].get("content") or ""
                first = first or (time.perf_counter() - begun if said else 0.0)
    return first, said


def wanted(number: int) -> int:
    """Tokens of a reply."""
    return 32 + number % 33


async def load(url: str, model: str, clients: int, requests: int) -> dict[str, Any]:
    """What so many clients meet."""
    numbers = iter(range(requests))
    firsts, texts = list[float](), dict[int, str]()
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:  # fmt: skip

        async def one() -> None:
            for number in numbers:
                first, texts[number] = await ask(client, model, number)
                firsts.append(first)

        begun = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        seconds = time.perf_counter() - begun
    firsts.sort()
    return {
        "tokens_per_s": sum(map(wanted, range(requests))) / seconds,
        "first_p50": firsts[len(firsts) // 2],
        "first_p95": firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
        "texts": texts,
    }


def main() -> int:
    """Measures in turns; 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--other", type=Path, help="a checkout to compare with")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import serving

    kinds = ["here", *(["before"] if options.other else []), "transformers", "transformers, continuous"]  # fmt: skip
    found: dict[str, dict[int, list[dict[str, Any]]]] = {k: {n: [] for n in CLIENTS} for k in kinds}
    with tempfile.TemporaryDirectory() as folder:
        model = serving.save_talkative(Path(folder) / "model", ends=False)
        for _ in range(options.rounds):
            for kind in kinds:
                with served(kind, model, options.other) as (url, name):
                    asyncio.run(load(url, name, 2, 4))  # what is made once is no request's cost
                    for clients, requests in CLIENTS.items():
                        found[kind][clients].append(asyncio.run(load(url, name, clients, requests)))
    rows = {}
    for kind, loads in found.items():
        for clients, runs in loads.items():
            best = max(runs, key=lambda run: run["tokens_per_s"])
            here = found["here"][clients][0]["texts"]
            same = sum(re.sub(r"\s", "", best["texts"][n]) == re.sub(r"\s", "", here[n]) for n in here)  # fmt: skip
            rows[f"{kind}/{clients}"] = {key: best[key] for key in ("tokens_per_s", "first_p50", "first_p95")} | {"same": f"{same}/{len(here)}"}  # fmt: skip
    if options.json:
        print(json.dumps(rows))
    for name, row in rows.items() if not options.json else ():
        print(f"{name}: {row['tokens_per_s']:.0f} tokens/s, first token p50 {row['first_p50']:.3f} s, p95 {row['first_p95']:.3f} s, same replies {row['same']}")  # fmt: skip
    peers = [kind for kind in kinds if kind.startswith("transformers")]
    ahead = all(
        rows[f"here/{n}"]["tokens_per_s"] > rows[f"{kind}/{n}"]["tokens_per_s"]
        and rows[f"here/{n}"]["first_p95"] < rows[f"{kind}/{n}"]["first_p95"]
        for kind in peers
        for n in (8, 32)
    )
    return int(not ahead)


if __name__ == "__main__":
    raise SystemExit(main())
