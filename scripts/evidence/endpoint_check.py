"""Does `finetune serve` say what `generate` says? 20 clients at once, half of them streaming.

The prompts are those of scripts/evidence/serve_check.py, tool calls and results among them, asked with OpenAI's
own client; text, calls and the reason of the end are compared.

    python scripts/evidence/endpoint_check.py runs/quickstart-merged
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

import httpx
import openai
from serve_check import (
    MAX_NEW_TOKENS,
    NUM_PROMPTS,
    Answer,
    Request,
    openai_messages,
    our_answers,
    requests,
)

from finetune.generation.load import OpenedModel, open_model

DATA = "data/support_desk/heldout.jsonl"
Said = tuple[str, list[tuple[str, str]], str]
"""Text, name and arguments of the calls, and why it ended."""


@contextmanager
def endpoint(target: str) -> Iterator[openai.OpenAI]:
    """A client of `finetune serve`, which must end with 0 on SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "finetune", "serve", target, "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.5)
            if process.poll() is not None:
                raise SystemExit("the endpoint did not start")
        url = f"http://127.0.0.1:{port}/v1"
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    finally:
        process.terminate()
        code = process.wait(60)
    if code:
        raise SystemExit(f"the endpoint ended with {code}")


def ask(client: openai.OpenAI, request: Request, *, stream: bool) -> Said:
    """What the endpoint says."""
    asked: dict[str, Any] = {
        "model": client.models.list().data[0].id, "messages": openai_messages(request),
        "tools": list(request[0].tools) or openai.omit, "max_tokens": MAX_NEW_TOKENS,
    }  # fmt: skip
    if stream:
        with client.chat.completions.stream(**asked) as pieces:
            try:
                choice: Any = pieces.get_final_completion().choices[0]
            except openai.LengthFinishReasonError as cut:  # a model that does not stop by itself
                choice = cut.completion.choices[0]
    else:
        choice = client.chat.completions.create(**asked).choices[0]
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
    return choice.message.content or "", calls, choice.finish_reason


def expected(opened: OpenedModel, answer: Answer) -> Said:
    """What `generate` says, in the same form."""
    message = opened.template.parse(answer.reply)
    if answer.calls:
        return "", answer.calls, "tool_calls"
    text = f"{message.metadata}\n{message.content}" if message.metadata else message.content
    return text, [], "stop" if answer.stopped else "length"


def main() -> None:
    """Print how many differ; exit with 1 when any does."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", help="a base, merged model or adapter")
    target = parser.parse_args().target
    asked = requests(DATA)
    with endpoint(target) as client, ThreadPoolExecutor(NUM_PROMPTS) as clients:
        waiting = [
            clients.submit(ask, client, request, stream=bool(number % 2))
            for number, request in enumerate(asked)
        ]
        said = [future.result() for future in waiting]
    opened = open_model(target)
    ours = [expected(opened, answer) for answer in our_answers(opened, asked)]
    different = [pair for pair in zip(said, ours, strict=True) if pair[0] != pair[1]]
    for served, generated in different:
        print(f"served {served}\ngenerate {generated}")
    calls = sum(bool(one[1]) for one in said)
    print(f"{len(different)} of {len(asked)} replies differ; {calls} are calls")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
