"""Many clients, ordinary and hostile, on one endpoint: is every ordinary one answered as if alone?

    python scripts/evidence/endpoint_load.py [--clients 64] [--seconds 300]

A tiny random model is served by `finetune serve` in a process of its own, whose memory is watched. Two
of three requests are ordinary (chats, text completions, tools that must be called, replies by a schema,
several replies, log probabilities; greedy and sampled, whole and streaming) and compared with what the
same request got alone. The others are the odd requests and bombs of
`tests/reliability/strangers_endpoint.py`, bodies that are no JSON, clients that leave in the middle of
their request or of the reply, that read nothing of it, and headers that never end.

The time is cut into legs with a quiet moment behind each, in which memory is read: in the middle of the
load it is that of the requests that happen to be there. A first leg, in which the heap and the kept
prompts fill, warms up. Prints one line with counts, and ends with 1 if an ordinary request was answered
otherwise, or if what is held in the quiet grew by more than 2 percent from the warm server's to the
last leg's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LEGS = 5
WARM_UP_SECONDS = 60
QUESTIONS = 60

from finetune.serving.heap import TRIM_SECONDS  # noqa: E402

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"enum": ["sky", "sea"]}}},
    },
}
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.2},
    {"tools": [TOOL], "tool_choice": "required", "max_tokens": 120},
    {
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
        "max_tokens": 60,
    },
    {"n": 2, "temperature": 0.9},
    {"logprobs": True, "top_logprobs": 2},
)


def ordinary(number: int) -> dict[str, Any]:
    """One of `QUESTIONS` requests, of every kind, short and long, whole and streaming."""
    body = {
        "model": "tiny",
        "max_tokens": 4 + number % 37,
        "stream": bool(number % 2),
        "seed": number,
    }
    question = f"question {number} {'the dog ' * (number % 11)}"
    messages = [{"role": "user", "content": question}]
    return body | KINDS[number // 2 % len(KINDS)] | {"messages": messages}


async def text_of(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """The replies with their ends, as events of a stream or as messages."""
    try:
        answer = await client.post("/v1/chat/completions", json=body)
    except httpx.HTTPError as error:
        return f"{type(error).__name__} {error}"
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text[:200]}"
    if not body["stream"]:
        return " | ".join(said(choice["message"], choice) for choice in answer.json()["choices"])
    return streamed(answer.text, body)


def streamed(text: str, body: dict[str, Any]) -> str:
    """The same of the events of a stream."""
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line[6:7] == "{"]
    parts = [part for chunk in chunks for part in chunk["choices"]]
    by_reply = [[p for p in parts if p["index"] == n] for n in range(body.get("n", 1))]
    return " | ".join("".join(said(part["delta"], part) for part in reply) for reply in by_reply)


def said(message: dict[str, Any], choice: dict[str, Any]) -> str:
    """What is said and called, and the end."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    called = "".join(f"{call.get('name') or ''}{call.get('arguments') or ''}" for call in calls)
    return f"{message.get('content') or ''}{called}{choice['finish_reason'] or ''}"


HOSTILE = (
    "odd",
    "odd",
    "leaves",
    "slow header",
    "half a body",
    "reads nothing",
    "no JSON",
    "noise",
)
NO_JSON = (
    b"",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":1' + b"0" * 100_000,
    b"null",
    b'{"model":"tiny"}',
    b"\0",
)


async def hostile(client: httpx.AsyncClient, chance: random.Random, bodies: list[Any]) -> str:
    """Something that no other client should notice; returns its kind and what came of it."""
    kind = chance.choice(HOSTILE)
    try:
        return await sent(kind, client, chance, bodies)
    except (httpx.HTTPError, OSError) as error:
        return f"{kind} {type(error).__name__}"


async def sent(kind: str, client: httpx.AsyncClient, chance: random.Random, bodies: list[Any]) -> str:  # fmt: skip
    """A hostile request of a kind."""
    if kind == "odd":
        answer = await client.post("/v1/chat/completions", json=chance.choice(bodies))
        return f"{kind} {answer.status_code}"
    if kind == "no JSON":
        headers = {"Content-Type": "application/json"}
        body = chance.choice(NO_JSON)
        answer = await client.post("/v1/chat/completions", content=body, headers=headers)
        return f"{kind} {answer.status_code}"
    body = ordinary(chance.randrange(QUESTIONS)) | {"stream": True, "max_tokens": 200}
    if kind == "leaves":
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
        return kind
    whole = client.build_request("POST", "/v1/chat/completions", json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in whole.headers.items())
    request = f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + whole.content
    raw = {
        "slow header": b"POST /v1/chat/completions HTTP/1.1\r\nX-Never: ",
        "half a body": request[:-20],
        "reads nothing": request,
        "noise": chance.randbytes(300),
    }
    with socket.create_connection((client.base_url.host, client.base_url.port)) as slow:
        slow.setblocking(False)
        slow.send(raw[kind])
        await asyncio.sleep(3 * chance.random())
    return kind


@contextlib.contextmanager
def served(model: Path, log: Path, requests: int) -> Iterator[tuple[str, int]]:
    """`finetune serve` on a free port until the block ends: its URL and the process."""
    command = [sys.executable, "-m", "finetune", "serve", str(model), "--port", "0"]
    command += ["--name", "tiny", "--max-requests", str(requests)]
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        while not (found := re.search(r"http://[^/]+", log.read_text())):
            if server.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        yield found[0], server.pid
    finally:
        server.terminate()
        server.wait(60)


def pages(process: int) -> int:
    """Memory pages of a process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1])


def cpu_seconds(process: int) -> float:
    """CPU time that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(
    url: str, process: int, options: argparse.Namespace, bodies: list[Any]
) -> tuple[Counter[str], list[int], list[int]]:
    """Counts of what came; the memory of the server in the quiet after each leg, and every five seconds."""
    counts: Counter[str] = Counter()
    quiet: list[int] = []
    sizes: list[int] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        alone = [await text_of(client, ordinary(number)) for number in range(QUESTIONS)]

        async def one(chance: random.Random, end: float) -> None:
            while time.monotonic() < end:
                if chance.random() < 1 / 3:
                    counts[await hostile(client, chance, bodies)] += 1
                    continue
                asked = chance.randrange(QUESTIONS)
                told = await text_of(client, ordinary(asked))
                if told != alone[asked]:
                    print(f"{asked}: {told!r}, alone {alone[asked]!r}", file=sys.stderr)
                counts["ordinary, as alone" if told == alone[asked] else "ORDINARY, OTHERWISE"] += 1

        async def watch(end: float) -> None:
            while time.monotonic() < end:
                await asyncio.sleep(5)
                sizes.append(pages(process))

        for leg in range(LEGS + 1):
            seconds = options.seconds / LEGS if leg else WARM_UP_SECONDS
            end = time.monotonic() + seconds
            chances = [random.Random(f"{leg} {number}") for number in range(options.clients)]
            await asyncio.gather(watch(end), *(one(chance, end) for chance in chances))
            await asyncio.sleep(TRIM_SECONDS + 2)
            quiet.append(pages(process))
            print(f"leg {leg}: {quiet[-1]} pages, {sum(counts.values())} requests", file=sys.stderr)
    return counts, quiet, sizes


def main() -> int:
    """Serve, load, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    import serving

    from tests.reliability import strangers_endpoint as strangers

    bodies = [body for body, _ in strangers.ODD.values()]
    bodies += [body for body, _ in strangers._bombs().values()]
    with tempfile.TemporaryDirectory() as folder:
        model = serving.save_talkative(Path(folder) / "model")
        with served(model, Path(folder) / "log", 2 * options.clients) as (url, process):
            begun = cpu_seconds(process)
            counts, quiet, sizes = asyncio.run(load(url, process, options, bodies))
            cpu = cpu_seconds(process) - begun
    told = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
    grown = quiet[-1] / quiet[0] - 1
    unit = os.sysconf("SC_PAGE_SIZE") / 1e6
    levels = ", ".join(f"{size * unit:.0f}" for size in quiet)
    print(
        f"{told}; {cpu:.0f} CPU seconds; memory {levels} MB in the quiet after each leg "
        f"({grown:+.1%} from the warm server to the end), at most {max(sizes) * unit:.0f} MB"
    )
    well = counts["ordinary, as alone"] and not counts["ORDINARY, OTHERWISE"] and grown < 0.02
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
