"""The endpoint beside `transformers serve`: tokens a second and the time to the first token, in turns.

    python scripts/bench/endpoint_peers.py [--other /tmp/before] [--vllm VLLM_ENV] [--rounds 3] [--json]

1, 8 and 32 clients stream replies of 32 to 64 tokens of a random model (58 million parameters, `glm` layout,
float32) that never ends by itself, so that every server writes the same number of tokens. Each server runs in
a process of its own on one thread, one after the other, `--rounds` times; the figures are medians over the
rounds, those of the first tokens of the p50 and p95 of each. `--other` adds the endpoint of another checkout,
`--vllm` vLLM of an environment of its own (its engine in processes of its own; see docs/serving.md).

Bar: ahead of `transformers serve` in tokens a second and in p95 of the first token at 8 and 32 clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CLIENTS = {1: 4, 8: 24, 32: 64}
"""Clients -> requests in all."""
SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 32_768,
}
FIGURES = ("tokens_per_s", "first_p50", "first_p95", "cpu_ms_per_token")


@dataclass(frozen=True, slots=True)
class Peers:
    """What the others need."""

    other: Path | None
    vllm: Path | None


def command_of(kind: str, model: Path, port: int, peers: Peers) -> tuple[list[str], Path]:
    """How a server is started, and from which checkout."""
    if kind.startswith("transformers"):
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--port", str(port), "--device", "cpu", "--dtype", "float32"]  # fmt: skip
        return command + (["--continuous-batching"] if "continuous" in kind else []), ROOT
    if kind == "vllm":
        return [str(peers.vllm / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--generation-config", "vllm"], ROOT  # fmt: skip
    command = [sys.executable, "-m", "finetune", "serve", str(model), "--port", str(port), "--name", str(model)]  # fmt: skip
    checkout = peers.other if kind == "before" and peers.other else ROOT
    return [*command, "--batch-size", "32"], checkout


@contextmanager
def served(kind: str, model: Path, peers: Peers) -> Iterator[tuple[str, int]]:
    """A server until the block ends: its URL, and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command, checkout = command_of(kind, model, port, peers)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}  # fmt: skip
    if kind == "vllm":
        del environment["PYTHONPATH"]
    with tempfile.NamedTemporaryFile("w+") as log:
        server = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(url, server, Path(log.name))
            yield url, server.pid
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def cpu_seconds(process: int) -> float:
    """Of a process and those that it started, so far."""
    family = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in family)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the server answers; ends the program with its log when it does not."""
    for _ in range(1800):
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
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:  # fmt: skip

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


def measure(kind: str, model: Path, peers: Peers) -> dict[int, dict[str, Any]]:
    """One start of one server: what 1, 8 and 32 clients meet."""
    found = {}
    with served(kind, model, peers) as (url, process):
        asyncio.run(load(url, str(model), 2, 4))  # what is made once is no request's cost
        for clients, requests in CLIENTS.items():
            begun = cpu_seconds(process)
            found[clients] = asyncio.run(load(url, str(model), clients, requests))
            spent = cpu_seconds(process) - begun
            found[clients]["cpu_ms_per_token"] = 1000 * spent / sum(map(wanted, range(requests)))
    return found


def main() -> int:
    """Measures in turns; 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--other", type=Path, help="a checkout to compare with")
    parser.add_argument("--vllm", type=Path, help="an environment with vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="some of: here, before, transformers, ...")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import serving

    peers = Peers(options.other, options.vllm)
    kinds = ["here", "transformers", "transformers, continuous"]
    kinds += [*(["before"] if peers.other else []), *(["vllm"] if peers.vllm else [])]
    kinds = [kind for kind in kinds if not options.only or kind in options.only]
    found: dict[str, list[dict[int, dict[str, Any]]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        model = serving.save_talkative(Path(folder) / "model", ends=False, **SHAPE)
        for _ in range(options.rounds):
            for kind in kinds:
                found[kind].append(measure(kind, model, peers))
    rows = {}
    for kind, runs in found.items():
        for clients in CLIENTS:
            here, texts = found[kinds[0]][0][clients]["texts"], runs[0][clients]["texts"]
            same = sum(bare(texts[n]) == bare(here[n]) for n in here)
            row = {key: statistics.median(run[clients][key] for run in runs) for key in FIGURES}
            rows[f"{kind}/{clients}"] = {**row, "same": f"{same}/{len(here)}"}
    print(json.dumps(rows) if options.json else table(rows))
    behind = [
        f"{kind}/{n}"
        for kind in kinds
        if kind.startswith("transformers")
        for n in (8, 32)
        if rows[f"here/{n}"]["tokens_per_s"] <= rows[f"{kind}/{n}"]["tokens_per_s"]
        or rows[f"here/{n}"]["first_p95"] >= rows[f"{kind}/{n}"]["first_p95"]
    ]
    if any(kind.startswith("transformers") for kind in kinds):
        said = "\n".join(f"behind {name}" for name in behind)
        print(said or "the bar is met", file=sys.stderr)
    return int(bool(behind))


def bare(text: str) -> str:
    """Text without white space and broken characters, of which servers make different things."""
    return re.sub(r"[\s\ufffd]", "", text)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line a server and load."""
    return "\n".join(
        f"{name}: {row['tokens_per_s']:.0f} tokens/s, first token p50 {row['first_p50']:.3f} s, "
        f"p95 {row['first_p95']:.3f} s, {row['cpu_ms_per_token']:.1f} ms of CPU a token, same replies {row['same']}"
        for name, row in rows.items()
    )


if __name__ == "__main__":
    raise SystemExit(main())
