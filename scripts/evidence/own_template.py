"""Does a checkpoint's own chat template write dialogues as they are laid out here, token by token?

    python scripts/evidence/own_template.py CHECKPOINT rows.jsonl [...]

Every dialogue three times: as it is, with a thought in each reply, and with thinking switched off, where
the layout has a place for these. Says how many differ, with the first one; exit code 1 when any does.
A dialogue in which somebody typed a control string differs: here it stays text.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from finetune.data.chat.jinja import JinjaTemplate
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.template_check import own_text
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation
from finetune.data.reading.sources import SourceSpec, read_conversations

THOUGHT = "<think>\n想一想。\n\nOne, two.\n</think>\n\n"


def variants(
    conversation: Conversation, template: ChatTemplate
) -> Iterator[tuple[str, Conversation]]:
    """The dialogue, with thoughts, and with thinking switched off."""
    yield "as it is", conversation
    if template.layout.thinking:
        thoughtful = tuple(
            replace(m, content=THOUGHT + m.content)
            if m.role == "assistant" and not m.metadata
            else m
            for m in conversation.messages
        )
        yield "with thoughts", replace(conversation, messages=thoughtful)
    if template.layout.has_switch:
        yield "thinking off", replace(conversation, thinks=False)


def main() -> int:
    """Prints a line per variant."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("data", nargs="+")
    arguments = parser.parse_args()
    template = ChatTemplate(load_chat_tokenizer(arguments.checkpoint))
    tokenizer = template.tokenizer
    jinja = JinjaTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    seen, differ = Counter[str](), Counter[str]()
    for conversation in read_conversations([SourceSpec(name) for name in arguments.data]):
        for name, one in variants(conversation, template):
            seen[name] += 1
            ours = template.render([one])[0].input_ids[:-1].tolist()
            theirs = own_text(one, template, jinja)
            if ours != tokenizer.trusted(theirs):
                differ[name] += 1
                if differ.total() == 1:
                    print(f"{one.location}: its template: {theirs!r}\nour layout:   {template.decode(ours)!r}")  # fmt: skip
    for name, count in seen.items():
        print(f"{template.layout.name}'s layout, {name}: {count} dialogues, {differ[name]} differ")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
