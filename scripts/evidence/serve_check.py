"""Do vLLM and our own generation write the same tokens? 20 prompts a model, tool calls among them.

Starts vLLM's OpenAI endpoint on loopback for each kind of checkpoint, asks it through
/v1/chat/completions with the official client, greedily, and compares prompt and reply token by token
with ours. A first difference is looked at in our own logits: a gap of the size of rounding is noise,
anything else fails. scripts/evidence/serve_check.sh makes the environment and the models and calls this.

    python scripts/evidence/serve_check.py --vllm ENV/bin/python [--only chatglm] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

import httpx
import openai
import serve_models
import torch
from openai_template import openai_template
from rich.console import Console
from rich.table import Table

from finetune.data.dialogue.conversation import Conversation
from finetune.data.reading.sources import SourceSpec, read_conversations
from finetune.generation.batch import image_inputs
from finetune.generation.generate import generate
from finetune.generation.load import OpenedModel, open_model
from finetune.serving.vllm_plugin import ARCHITECTURE

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS, MAX_NEW_TOKENS = 20, 48
# A gap between two logits that rounding can turn round: they are sums of size 10 with 24 bits, or 8.
ROUNDING = {"float32": 1e-3, "bfloat16": 0.25}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
NAMES = (
    "glm", "glm-lora", "glm-exported", "chatglm", "chatglm-merged", "chatglm-exported", "glm4v",
    "glm4v-stock",
)  # fmt: skip
Request = tuple[Conversation, int]


@dataclass(frozen=True)
class Case:
    """One vLLM server and the folders of ours that it is compared with."""

    name: str
    model: Path
    targets: dict[str, Path]
    """Name in the request -> the folder that we open: the model itself, or an adapter of it."""
    data: str = "data/support_desk/heldout.jsonl"
    flags: tuple[str, ...] = ()
    images: bool = False
    stock: bool = False
    """vLLM as it comes, which is known to differ: how much is said, and passes."""


@dataclass(frozen=True)
class Answer:
    """What a server made of one prompt."""

    prompt: list[int]
    reply: list[int]
    """Without its stop."""
    stopped: bool
    calls: list[tuple[str, str]]
    """Name and arguments of the tool calls, as the client sees them."""


def make_case(name: str, runs: Path) -> Case:
    """The checkpoints of a case; makes those that are not there, but for the quickstart's."""
    work = runs / "serve-check"
    rank = ("--enable-lora", "--max-lora-rank", "16")
    if name == "glm":
        return Case(name, runs / "quickstart-merged", {"merged": runs / "quickstart-merged"})
    if name == "glm-lora":
        tuned = max(runs.glob("quickstart/checkpoint-*"), key=lambda folder: int(folder.name[11:]))
        base = runs / "quickstart-model"
        return Case(name, base, {"base": base, "adapter": tuned}, flags=rank)
    if name.startswith("glm4v"):
        base = serve_models.published_images(work / "glm4v")
        stock = name == "glm4v-stock"
        overrides: dict[str, Any] = {"architectures": ["GLM4VForCausalLM"]}
        if not stock:
            overrides = {"architectures": [ARCHITECTURE], "mrope_section": [1, 1, 1]}
        targets = {"base": base, "adapter": serve_models.adapter(base, work / "glm4v-lora")}
        flags = (*rank, "--hf-overrides", json.dumps(overrides))
        data = "data/shapes/held_out.jsonl"
        return Case(name, base, targets, data, flags, images=True, stock=stock)
    text = serve_models.published_text(work / "chatglm")
    adapter = serve_models.adapter(text, work / "chatglm-lora")
    if name == "chatglm":
        return Case(name, text, {"base": text, "adapter": adapter}, flags=rank)
    if name.endswith("exported"):  # to glm and from there back, compared with what it was at first
        folder = serve_models.exported(text, "hf", work / "glm-exported")
        if name == "chatglm-exported":
            folder = serve_models.exported(folder, "published", work / "chatglm-exported")
        return Case(name, folder, {"base": text})
    merged = serve_models.merged(adapter, work / "chatglm-merged")
    return Case(name, merged, {"merged": merged})


def requests(path: str) -> list[Request]:
    """20 dialogues and the message that is asked for: calls, answers to results, plain replies."""
    rows = list(read_conversations([SourceSpec(str(ROOT / path))]))
    rows.sort(key=lambda row: (not row.tools, -len(row.messages)))  # tools, then many turns first
    chosen = []
    for number, row in enumerate(rows[:NUM_PROMPTS]):
        replies = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
        chosen.append((row, replies[0] if row.tools and number % 2 else replies[-1]))
    return chosen


def openai_messages(request: Request) -> list[dict[str, Any]]:
    """The prompt as OpenAI's clients send it: `tool_calls`, role `tool`, images as data URLs."""
    conversation, end = request
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(conversation.messages[:end]):
        if message.metadata:
            function = {"name": message.metadata, "arguments": message.content}
            call = {"id": f"call_{number}", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif message.role == "observation":
            tool = {"role": "tool", "tool_call_id": f"call_{number - 1}"}
            messages.append(tool | {"content": message.content})
        elif message.images:
            data = base64.b64encode(Path(message.images[0].path).read_bytes()).decode()
            url = {"url": f"data:image/png;base64,{data}"}
            parts = [{"type": "text", "text": message.content}, {"type": "image_url", "image_url": url}]  # fmt: skip
            messages.append({"role": message.role, "content": parts})
        else:
            messages.append({"role": message.role, "content": message.content})
    return messages


@contextmanager
def server(case: Case, python: Path, dtype: str) -> Iterator[str]:
    """The address of vLLM serving the case; it is stopped afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        template, log = Path(scratch) / "openai.jinja", Path(scratch) / "log"
        template.write_text(openai_template(case.model), encoding="utf-8")
        command = [
            str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(case.model),
            "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager",
            "--max-model-len", "2048", "--served-model-name", "base", "merged",
            "--chat-template", str(template), "--enable-auto-tool-choice", "--tool-call-parser", "glm4",
            "--tool-parser-plugin", str(ROOT / "scripts" / "vllm_glm4_tools.py"), *case.flags,
        ]  # fmt: skip
        if adapter := case.targets.get("adapter"):
            command += ["--lora-modules", f"adapter={adapter}"]
        environment = os.environ | ENVIRONMENT
        if case.images:  # torchvision and what makes it import, see serve_check.sh
            environment |= {"PYTHONPATH": str(python.parent.parent / "for-images")}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        try:
            wait_until_up(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        except openai.APIError as error:
            raise SystemExit(f"{case.name}: {error}\n{ending(log)}") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def wait_until_up(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the server answers.

    Raises:
        SystemExit: it ended, or took ten minutes; with the end of its log.
    """
    for _ in range(600):
        try:
            if httpx.get(address).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            time.sleep(1)
        if process.poll() is not None:
            break
    raise SystemExit(f"vLLM did not start:\n{ending(log)}")


def ending(log: Path) -> str:
    """The last lines of a log, and before them the errors of any process of vLLM, the cause first."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines[:-30] if re.search(r"\w*(Error|Exception): ", line)]
    return "\n".join([*errors[:10], *lines[-30:]])


def their_answer(client: openai.OpenAI, model: str, request: Request, stops: set[int]) -> Answer:
    """The greedy answer of vLLM."""
    said = client.chat.completions.create(
        model=model,
        messages=openai_messages(request),  # type: ignore[arg-type]
        tools=list(request[0].tools) or openai.omit,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=MAX_NEW_TOKENS,
        extra_body={"return_token_ids": True},
    )
    choice = said.choices[0]
    ids = choice.model_extra["token_ids"]  # type: ignore[index]
    stopped = bool(ids) and ids[-1] in stops
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]  # type: ignore[union-attr]
    prompt = said.model_extra["prompt_token_ids"]  # type: ignore[index]
    return Answer(prompt, ids[:-1] if stopped else ids, stopped, calls)


def our_answers(opened: OpenedModel, asked: list[Request]) -> list[Answer]:
    """Our greedy answers."""
    prompts = opened.template.prompts(asked)
    replies = generate(
        opened.model, opened.template, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=10
    )
    answers = []
    for prompt, reply, (conversation, _) in zip(prompts, replies, asked, strict=True):
        message = opened.template.parse(reply.ids)
        names = {tool["function"]["name"] for tool in conversation.tools}
        calls = [(message.metadata, message.content)] if message.metadata in names else []
        answers.append(Answer(list(prompt), list(reply.ids), reply.stopped, calls))
    return answers


def common(one: list[int], other: list[int]) -> int:
    """How many ids the two have in common from the start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def first_difference(opened: OpenedModel, request: Request, ours: Answer, theirs: Answer) -> str:
    """Where the replies part, and by how much our logits prefer our token; empty if they are equal."""
    if ours.prompt != theirs.prompt:
        place = common(ours.prompt, theirs.prompt)
        around = slice(max(0, place - 4), place + 4)
        shown = [opened.template.decode(ids[around]) for ids in (ours.prompt, theirs.prompt)]
        return f"prompt, token {place}: ours {shown[0]!r}, vLLM's {shown[1]!r}"
    if (ours.reply, ours.stopped) == (theirs.reply, theirs.stopped):
        return ""
    place = common(ours.reply, theirs.reply)
    prompt = opened.template.prompts([request])[0]
    ids = torch.tensor([[*prompt, *ours.reply[:place]]])
    with torch.no_grad():
        pixels = image_inputs([prompt], ids.device)
        logits = opened.model(input_ids=ids, use_cache=False, **pixels).logits[0, -1].float()
    token = theirs.reply[place] if place < len(theirs.reply) else opened.template.stop_ids[0]
    gap = float(logits.max() - logits[token])
    return f"reply, token {place}: logit gap {gap:.2g}"


def compare(case: Case, address: str, name: str) -> list[str]:
    """One line for every prompt that differs."""
    opened = open_model(case.targets[name])
    asked = requests(case.data)
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=300)
    stops = set(opened.template.stop_ids)
    ours = our_answers(opened, asked)
    theirs = [their_answer(client, name, request, stops) for request in asked]
    lines = []
    for number, (request, mine, other) in enumerate(zip(asked, ours, theirs, strict=True), 1):
        line = first_difference(opened, request, mine, other)
        if not line and mine.calls != other.calls:
            line = f"calls: ours {mine.calls}, vLLM's {other.calls}"
        if line:
            lines.append(f"{request[0].location} ({number}): {line}")
    words = sum(len(answer.reply) for answer in ours)
    calls = sum(map(bool, (answer.calls for answer in ours)))
    stopped = sum(answer.stopped for answer in ours)
    lines.insert(0, f"{words} tokens, {calls} calls, {stopped} stopped")
    return lines


def gap_of(line: str) -> float:
    """The logit gap of a difference; infinite where prompts or calls differ."""
    _, found, gap = line.partition("logit gap ")
    return float(gap) if found else float("inf")


def main() -> None:
    """Print a table; exit with 1 when a difference is not explained."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vllm", type=Path, required=True, help="python of vLLM's environment")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs", help="with the quickstart's models"
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="cases")
    parser.add_argument("--dtype", choices=list(ROUNDING), default="float32")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server must not outlive us
    console = Console(width=130)
    table = Table("checkpoint", "folder", "differences", "compared", title=f"vLLM, {given.dtype}")
    failed = False
    for case in [make_case(name, given.runs.resolve()) for name in given.only]:
        started = time.monotonic()
        with server(case, given.vllm, given.dtype) as address:
            console.print(f"{case.name}: up after {time.monotonic() - started:.0f} s")
            for name in case.targets:
                compared, *lines = compare(case, address, name)
                largest = max(map(gap_of, lines), default=0.0)
                failed = failed or (largest > ROUNDING[given.dtype] and not case.stock)
                text = f"{len(lines)} of {NUM_PROMPTS}"
                text += f", logit gap up to {largest:.2g}" if lines else ""
                table.add_row(case.name, name, text, compared)
                console.print(*[json.dumps(line, ensure_ascii=False) for line in lines], sep="\n")
    console.print(table)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
