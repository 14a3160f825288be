"""Small dialogues and the template that makes examples of them, for the tests of prepared data."""

from __future__ import annotations

from pathlib import Path

import tiny

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.data.examples.dataset import LengthPolicy

LONG = LengthPolicy(max_length=10_000)


def tiny_template(folder: Path) -> ChatTemplate:
    tiny.save_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "glm"}')
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {tiny.EOS_IDS}}}')
    return ChatTemplate(load_chat_tokenizer(folder))


def dialogue(turns: int = 1, location: str = "f:1", word: str = "answer", **reply) -> Conversation:
    messages = []
    for turn in range(turns):
        messages += [
            Message("user", f"question {turn}"),
            Message("assistant", f"{word} {turn}", **reply),
        ]
    return Conversation(tuple(messages), location=location)
