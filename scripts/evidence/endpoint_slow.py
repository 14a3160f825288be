"""200 slow clients and cancelled streams on one endpoint: do a thousand requests get their replies, and is memory flat?

    python scripts/evidence/endpoint_slow.py [--slow 200] [--requests 1000] [--legs 4]

A tiny random model is served by `finetune serve` in a process of its own. Of the requests of a leg a fifth is
cancelled in the middle of its stream, two fifths come from clients that send their request in pieces and read
its stream through a small buffer, a line every few milliseconds, and two fifths from sixteen quick ones. All
replies that are read to their end are compared with what the same request got alone. Memory is read in the quiet
behind each leg. Prints one line, and ends with 1 if a reply is another, a request is refused, replies are still
being written when all clients are gone, or memory in the last quiet is more than 2 percent above the first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts/evidence")]

from endpoint_load import QUESTIONS, ordinary, pages, served, streamed, text_of  # noqa: E402

from finetune.serving.heap import TRIM_SECONDS  # noqa: E402

QUICK = 16
"""Quick clients."""


@dataclass
class Load:
    """One server, and what came of the requests."""

    host: str
    port: int
    client: httpx.AsyncClient
    alone: list[str]
    counts: Counter[str] = field(default_factory=Counter)
    waited: list[float] = field(default_factory=list)
    """Seconds that quick clients waited for a whole reply."""

    async def quick(self, number: int) -> None:
        """A client that takes what it gets."""
        begun = time.monotonic()
        said = await text_of(self.client, ordinary(number))
        self.waited.append(time.monotonic() - begun)
        self._compare("quick", number, said)

    async def slow(self, number: int, chance: random.Random) -> None:
        """A client on a thin line."""
        asked = ordinary(number) | {"stream": True}
        body = json.dumps(asked).encode()
        end = socket.socket()
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        end.setblocking(False)
        await asyncio.get_running_loop().sock_connect(end, (self.host, self.port))
        reader, writer = await asyncio.open_connection(sock=end, limit=1 << 16)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        request = head.encode() + body
        step = -(-len(request) // 5)
        for begin in range(0, len(request), step):
            writer.write(request[begin : begin + step])
            await writer.drain()
            await asyncio.sleep(chance.uniform(0.0, 0.6))
        lines = []
        while line := await reader.readline():
            lines.append(line.decode())
            await asyncio.sleep(chance.uniform(0.0, 0.05))
        writer.close()
        is_well = " 200 " in lines[0]
        told = streamed("".join(lines), asked) if is_well else lines[0].strip()
        self._compare("slow", number, told)

    async def cancelled(self, number: int, chance: random.Random) -> None:
        """A client that leaves when it has seen some tokens, or before the first."""
        body = ordinary(number) | {"stream": True, "max_tokens": 400}
        wanted = chance.randrange(12)
        try:
            async with self.client.stream("POST", "/v1/chat/completions", json=body, timeout=60 if wanted else 0.05) as answer:  # fmt: skip
                async for line in answer.aiter_lines():
                    wanted -= bool(line)
                    if wanted <= 0:
                        break
        except httpx.TimeoutException:
            pass  # this one did not want to wait
        self.counts["cancelled"] += 1

    def _compare(self, kind: str, number: int, said: str) -> None:
        if said != self.alone[number]:
            print(f"{kind} {number}: {said!r}, alone {self.alone[number]!r}", file=sys.stderr)
        self.counts[f"{kind}, as alone" if said == self.alone[number] else "OTHERWISE"] += 1


async def leg(load: Load, requests: int, slow: int, number: int) -> None:
    """All kinds at once."""
    chance = random.Random(number)
    left = iter(range(2 * requests // 5))

    async def quick_one() -> None:
        for _ in left:
            await load.quick(chance.randrange(QUESTIONS))

    async def others(count: int, one: Any) -> None:
        for _ in range(count):
            await one(chance.randrange(QUESTIONS), chance)

    each = -(-2 * requests // 5 // slow)
    leaving = requests - 2 * (2 * requests // 5)
    await asyncio.gather(
        *(quick_one() for _ in range(QUICK)),
        *(others(each, load.slow) for _ in range(slow)),
        *(others(leaving // 8, load.cancelled) for _ in range(8)),
    )


async def measured(url: str, process: int, options: argparse.Namespace) -> tuple[Load, list[int]]:
    """All legs; the memory in the quiet behind each."""
    address = httpx.URL(url)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        alone = [await text_of(client, ordinary(number)) for number in range(QUESTIONS)]
        load = Load(address.host, address.port or 80, client, alone)
        quiet = []
        for number in range(options.legs):
            await leg(load, options.requests, options.slow, number)
            await asyncio.sleep(TRIM_SECONDS + 2)
            counts = (await client.get("/metrics")).text
            for name in ("running", "waiting"):
                if not re.search(rf"replies_{name} 0$", counts, re.MULTILINE):
                    load.counts[f"STILL {name.upper()}"] += 1
            quiet.append(pages(process))
    return load, quiet


def main() -> int:
    """Serve, load, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--slow", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000, help="of a leg")
    parser.add_argument("--legs", type=int, default=4)
    options = parser.parse_args()
    import serving

    with tempfile.TemporaryDirectory() as folder:
        model = serving.save_talkative(Path(folder) / "model")
        places = options.slow + QUICK + 16
        with served(model, Path(folder) / "log", places) as (url, process):
            load, quiet = asyncio.run(measured(url, process, options))
    told = ", ".join(f"{name}: {count}" for name, count in sorted(load.counts.items()))
    grown = quiet[-1] / quiet[0] - 1
    unit = os.sysconf("SC_PAGE_SIZE") / 1e6
    levels = ", ".join(f"{size * unit:.0f}" for size in quiet)
    load.waited.sort()
    half, most = (load.waited[int(part * (len(load.waited) - 1))] for part in (0.5, 0.95))
    print(
        f"{told}; quick clients waited {half:.2f} s (p50) and {most:.2f} s (p95) for a whole reply; "
        f"memory {levels} MB in the quiet after each leg ({grown:+.1%} after the first)"
    )
    return int(grown >= 0.02 or any(name.isupper() or name == "OTHERWISE" for name in load.counts))


if __name__ == "__main__":
    raise SystemExit(main())
