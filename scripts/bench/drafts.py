"""What drafting tokens out of the prompt and the reply gains (n-gram drafts), and that no token is another one.

    python scripts/bench/drafts.py FILE.jsonl [FILE.jsonl ...] --model FOLDER [--samples 200] [--copies 8]

1. If the model wrote each file's references word for word: passes for each token, where a step is 1.
2. CPU milliseconds of a step of one row, and of passes that check drafts of 3 and 7 tokens.
3. Replies to prompts that hold a reference twice and begin it anew, which a model goes on to copy, and to the
   file's own prompts: CPU seconds and passes with drafts and without, alternating. The tokens must be the same.

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

NEW_TOKENS = 96
BEGUN = 8
"""Tokens of the third copy that a prompt holds."""


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


def passes(prompt: Sequence[int], reply: Sequence[int]) -> tuple[int, int]:
    """Steps, and passes that check drafts, which write a reply behind its first token."""
    from finetune.generation.drafts import Drafts

    ids = list(reply[:1])
    drafts = Drafts(prompt, ids, len(reply))
    steps = checks = 0
    while len(ids) < len(reply):
        draft, right = drafts._found(), 0
        while right < len(draft) and draft[right] == reply[len(ids) + right]:
            right += 1
        ids += reply[len(ids) : len(ids) + right + 1]
        if draft:
            drafts.judge(right)
        steps, checks = steps + (not draft), checks + bool(draft)
    return steps, checks


def milliseconds(model: Any, prompt: Sequence[int], tokens: int, turns: int = 15) -> float:
    """CPU time of a pass of so many tokens behind a prompt."""
    from finetune.generation.batch import Batch, SharedPrefix

    batch, found = Batch(model, SharedPrefix(model, [])), []
    batch.prefill([prompt])
    for _ in range(turns):
        begun = time.process_time()
        batch.step(prompt[:1]) if tokens == 1 else batch.check(prompt[:tokens])
        found.append(1000 * (time.process_time() - begun))
        batch.forget(tokens)
    return statistics.median(found)


def replied(model: Any, prompt: Sequence[int], *, drafted: bool) -> tuple[list[int], int, float]:
    """A reply, its passes behind the first token, and their CPU seconds."""
    from finetune.generation.decoder import Decoder, Decoding, Request

    decoder, number = Decoder(model, (), drafts=drafted), 0
    [row] = decoder.add([Request(prompt, Decoding(NEW_TOKENS))])
    begun = time.process_time()
    while decoder.active:
        decoder.step()
        number += 1
    return row.ids, number, time.process_time() - begun


def compare(model: Any, name: str, prompts: Sequence[Sequence[int]]) -> None:
    """Print passes and CPU seconds of replies with and without drafts."""
    replied(model, prompts[0], drafted=True)  # what is compared once per model
    numbers, seconds = {True: 0, False: 0}, {True: 0.0, False: 0.0}
    for place, prompt in enumerate(prompts):
        replies = []
        for drafted in (place % 2 == 0, place % 2 == 1):
            ids, number, spent = replied(model, prompt, drafted=drafted)
            numbers[drafted] += number
            seconds[drafted] += spent
            replies.append(ids)
        assert replies[0] == replies[1], "drafts changed a token"
    print(
        f"{name}: {numbers[False]} steps in {seconds[False]:.1f} CPU s; drafted {numbers[True]} passes in "
        f"{seconds[True]:.1f} CPU s = {seconds[False] / seconds[True]:.2f} x; the same tokens", flush=True,
    )  # fmt: skip


def main() -> None:
    """Print all three."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--samples", type=int, default=200, help="replies of each file (200)")
    parser.add_argument("--copies", type=int, default=8, help="replies of each kind that are written (8)")  # fmt: skip
    given = parser.parse_args()
    import torch

    from finetune.models.kernels.products import packed
    from finetune.models.load import load_model

    read = {}
    for file in given.files:
        read[file] = list(pairs(file, given.model, given.samples))
        steps, checks = map(sum, zip(*(passes(*pair) for pair in read[file]), strict=True))
        tokens = sum(len(reply) - 1 for _, reply in read[file])
        print(f"{file}: {tokens} tokens of references in {steps} steps and {checks} passes over drafts = {(steps + checks) / tokens:.3f}", flush=True)  # fmt: skip
    if not list(Path(given.model).glob("*.safetensors")):
        return  # a tokenizer alone
    torch.set_num_threads(1)
    model = load_model(given.model, dtype="float32")
    with torch.no_grad(), packed(model):
        prompt = read[given.files[0]][0][0]
        step, *checks = (milliseconds(model, prompt, tokens) for tokens in (1, 4, 8))
        print(f"a step {step:.1f} ms, over 3 drafted tokens {checks[0] / step:.2f} steps, over 7 {checks[1] / step:.2f}")  # fmt: skip
        for file, found in read.items():
            chosen = [pair for pair in found if len(pair[1]) >= 2 * BEGUN][: given.copies]
            compare(model, f"{file}, copied", [[*p, *r, *r, *r[:BEGUN]] for p, r in chosen])
            compare(model, f"{file}, its prompts", [p for p, _ in chosen])


if __name__ == "__main__":
    main()
