"""Whether drafting tokens out of the prompt would pay (n-gram speculative decoding), and what it would risk.

    python scripts/bench/drafts.py FILE.jsonl [FILE.jsonl ...] --model FOLDER [--drafted 3] [--samples 200]

1. A draft is what followed the last two tokens where they stood before, in the prompt or the reply. If the model
   wrote each file's references word for word: how many drafted tokens would be right, per step.
2. CPU milliseconds of a step for 1, 4 and 16 rows, and of a pass that checks as many drafts besides.
   Tokens a step over this cost is what drafting would gain, 1 being nothing.
3. How far the logits of the checking pass lie from those of the steps that it replaces, and how often the two
   likeliest tokens are nearer to each other than twice that: there a reply may become another one.

Of a folder without weights only the first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ROWS = (1, 4, 16)
PROMPT = 64


def accepted(prompt: Sequence[int], reply: Sequence[int], most: int) -> tuple[int, int]:
    """Steps that write a reply, and the tokens that drafts save."""
    text, steps, saved = list(prompt), 0, 0
    at = 0
    while at < len(reply):
        draft = drafted(text, most)
        right = 0
        while right < len(draft) and at + right < len(reply) and draft[right] == reply[at + right]:
            right += 1
        text += reply[at : at + right + 1]
        at += right + 1
        steps, saved = steps + 1, saved + right
    return steps, saved


def drafted(text: Sequence[int], most: int) -> Sequence[int]:
    """What followed the last two tokens when they came last."""
    for place in range(len(text) - 3, -1, -1):
        if text[place : place + 2] == text[-2:]:
            return text[place + 2 : place + 2 + most]
    return ()


def pairs(file: str, model: str, samples: int) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and references of a file, as tokens."""
    from finetune.config.schema import DataSection
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer
    from finetune.data.dialogue.conversation import Conversation
    from finetune.data.reading.section import reading_of, sources_of
    from finetune.data.reading.sources import read_conversations
    from finetune.generation.prompts import PromptStream

    template = ChatTemplate(load_chat_tokenizer(model))
    section = DataSection(train=[file])
    dialogues = read_conversations(sources_of(section, [file]), reading_of(section))
    for number, prompt in enumerate(PromptStream(dialogues, template)):
        if number == samples:
            return
        whole = Conversation((*prompt.conversation.messages[: prompt.index], prompt.reference), prompt.conversation.tools)  # fmt: skip
        [rendered] = template.render([whole])
        yield list(map(int, prompt.prompt_ids)), list(map(int, rendered.input_ids[len(prompt.prompt_ids) :]))  # fmt: skip


def milliseconds(model: Any, rows: int, tokens: int, turns: int = 9) -> float:
    """CPU time of a pass of so many tokens behind a prompt."""
    import torch

    from finetune.generation import batch

    found = []
    for turn in range(turns):
        cache = batch._new_cache(model)
        ids = torch.randint(0, 40000, (rows, PROMPT + tokens), generator=torch.Generator().manual_seed(turn))  # fmt: skip
        positions = torch.arange(PROMPT + tokens).expand(rows, -1)
        batch._forward(model, cache, ids[:, :PROMPT], None, positions[:, :PROMPT])
        begun = time.process_time()
        batch._forward(model, cache, ids[:, PROMPT:], None, positions[:, PROMPT:], last=torch.arange(tokens).expand(rows, -1))  # fmt: skip
        found.append(1000 * (time.process_time() - begun))
    return statistics.median(found)


def rounding(model: Any, texts: Sequence[Sequence[int]], width: int) -> tuple[float, int, int]:
    """The largest difference of logits, the gaps between the likeliest two that are smaller, and all gaps."""
    import torch

    from finetune.generation import batch

    largest, gaps = 0.0, list[float]()
    for text in texts:
        ids, positions = torch.tensor([text]), torch.arange(len(text))[None]
        found = []
        for step in (1, width):
            cache, logits = batch._new_cache(model), []
            for first in range(0, len(text) - len(text) % width, step):
                part = slice(first, first + step)
                logits.append(batch._forward(model, cache, ids[:, part], None, positions[:, part], last=torch.arange(step)[None]))  # fmt: skip
            found.append(torch.cat(logits))
        largest = max(largest, float((found[0] - found[1]).abs().max()))
        best = found[0].topk(2).values
        gaps += (best[:, 0] - best[:, 1]).tolist()
    return largest, sum(gap <= 2 * largest for gap in gaps), len(gaps)


def main() -> None:
    """Print all three."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--drafted", type=int, default=3, help="tokens of a draft (3)")
    parser.add_argument("--samples", type=int, default=200, help="replies of each file (200)")
    given = parser.parse_args()
    import torch

    from finetune.models.load import load_model

    per_step, texts = {}, []
    for file in given.files:
        counted = [(prompt, reply) for prompt, reply in pairs(file, given.model, given.samples)]
        steps, saved = map(sum, zip(*(accepted(*pair, given.drafted) for pair in counted), strict=True))  # fmt: skip
        per_step[Path(file).stem] = 1 + saved / steps
        texts += [prompt + reply for prompt, reply in counted[:4]]
        print(f"{file}: {1 + saved / steps:.2f} tokens a step if every reference is written", flush=True)  # fmt: skip
    if not list(Path(given.model).glob("*.safetensors")):
        return  # a tokenizer alone
    torch.set_num_threads(1)
    model = load_model(given.model, dtype="float32")
    with torch.no_grad():
        for rows in ROWS:
            step, check = (milliseconds(model, rows, tokens) for tokens in (1, 1 + given.drafted))
            gains = ", ".join(f"{name} {tokens * step / check:.2f}" for name, tokens in per_step.items())  # fmt: skip
            print(f"{rows} rows: a step {step:.1f} ms, a pass that checks {check:.1f} ms = {check / step:.2f}; gain: {gains}", flush=True)  # fmt: skip
        largest, near, number = rounding(model, [text[:96] for text in texts], 1 + given.drafted)
    print(f"logits differ by up to {largest:.1e}; {near} of {number} tokens have a rival within twice that")  # fmt: skip


if __name__ == "__main__":
    main()
