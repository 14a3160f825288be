"""Many clients, ordinary and hostile, on one endpoint: is every ordinary one answered as if alone?

    python scripts/evidence/endpoint_load.py [--clients 64] [--seconds 300]

A tiny random model is served in this process. Two of three requests are ordinary and compared, text
for text, with what the same request got alone; the others are the odd requests and bombs of
`tests/reliability/strangers_endpoint.py`, clients that leave in the middle, and headers that never end.
Prints one line with counts, and ends with 1 if an ordinary request was answered otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import random
import resource
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def ordinary(number: int) -> dict[str, Any]:
    """One of 40 requests: greedy and sampled, short and long, whole and streaming."""
    body = {"model": "tiny", "max_tokens": 4 + number % 37, "stream": bool(number % 2)}
    question = f"question {number} {'the dog ' * (number % 11)}"
    sampled = {"temperature": 1.2, "seed": number} if number % 3 == 0 else {}
    return body | sampled | {"messages": [{"role": "user", "content": question}]}


async def text_of(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """The reply with its end, as lines of a stream or as a message."""
    answer = await client.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text[:200]}"
    if not body["stream"]:
        choice = answer.json()["choices"][0]
        return f"{choice['finish_reason']} {choice['message']['content']}"
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line[6:7] == "{"]
    parts = [chunk["choices"][0] for chunk in chunks]
    said = "".join(part["delta"].get("content") or "" for part in parts)
    return f"{parts[-1]['finish_reason']} {said}"


async def hostile(client: httpx.AsyncClient, chance: random.Random, bodies: list[Any]) -> str:
    """Something that no other client should notice; returns its kind."""
    kind = chance.choice(["odd", "odd", "leaves", "slow header"])
    if kind == "odd":
        answer = await client.post("/v1/chat/completions", json=chance.choice(bodies))
        return f"{kind} {answer.status_code}"
    if kind == "leaves":
        body = ordinary(chance.randrange(40)) | {"stream": True, "max_tokens": 200}
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
        return kind
    with socket.create_connection((client.base_url.host, client.base_url.port)) as slow:
        slow.setblocking(False)
        slow.send(b"POST /v1/chat/completions HTTP/1.1\r\nX-Never: ")
        await asyncio.sleep(chance.random())
    return kind


async def load(url: str, clients: int, seconds: float, bodies: list[Any]) -> tuple[Counter[str], float]:  # fmt: skip
    """Counts of what came, and the growth of memory after the first third, in parts of it."""
    counts: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        alone = [await text_of(client, ordinary(number)) for number in range(40)]
        end = time.monotonic() + seconds
        sizes: list[int] = []

        async def one(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < end:
                if chance.random() < 1 / 3:
                    counts[await hostile(client, chance, bodies)] += 1
                    continue
                asked = chance.randrange(40)
                same = await text_of(client, ordinary(asked)) == alone[asked]
                counts["ordinary, as alone" if same else "ORDINARY, OTHERWISE"] += 1

        async def watch() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(seconds / 30)
                sizes.append(int(Path("/proc/self/statm").read_text().split()[1]))

        await asyncio.gather(watch(), *(one(number) for number in range(clients)))
    warm = max(sizes[: len(sizes) // 3])
    return counts, max(sizes[len(sizes) // 3 :]) / warm - 1


def main() -> int:
    """Serve, load, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    import serving

    from finetune.generation.load import open_model
    from tests.reliability import strangers_endpoint as strangers

    bodies = [body for body, _ in strangers.ODD.values()]
    bodies += [body for body, _ in strangers._bombs().values()]
    with tempfile.TemporaryDirectory() as folder:
        opened = open_model(serving.save_talkative(Path(folder) / "model"))
        quiet = contextlib.redirect_stdout(io.StringIO())
        with quiet, serving.served(opened, max_requests=options.clients + 8) as server:
            counts, grown = asyncio.run(load(server.url, options.clients, options.seconds, bodies))  # fmt: skip
    told = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{told}; memory after warm-up {grown:+.1%}, at most {peak:.0f} MB", flush=True)
    return 1 if counts["ORDINARY, OTHERWISE"] or not counts["ordinary, as alone"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
