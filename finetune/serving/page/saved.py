"""Votes and dialogues of the page -> lines of files that `evaluate --votes` and training read."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from finetune.data.dialogue.conversation import Conversation, RowError
from finetune.data.dialogue.formats import to_conversation
from finetune.data.preview.show import ShowResult, shown
from finetune.errors import DataError
from finetune.serving.errors import ApiError, bad_request
from finetune.serving.requests.chat import image_folder
from finetune.serving.requests.fields import Strict, parse
from finetune.serving.requests.images import (
    check_sources,
    is_image,
    with_image_files,
    without_folders,
)
from finetune.serving.requests.rules import RequestRules, rules_of
from finetune.storage.files import whole_binary
from finetune.storage.journal import append, rows

VOTES, ROWS, IMAGES = "votes.jsonl", "rows.jsonl", "images"
_KEYS = ("role", "content", "tool_calls", "tool_call_id")
_SUFFIXES = {
    b"\x89PNG": ".png",
    b"\xff\xd8": ".jpg",
    b"RIFF": ".webp",
    b"GIF8": ".gif",
    b"BM": ".bmp",
}

Text = Annotated[str, Field(max_length=1_000_000)]
Name = Annotated[str, Field(min_length=1, max_length=400)]


class Vote(Strict):
    """Which reply to a question somebody liked best; `winner` is None for a tie."""

    models: Annotated[list[Name], Field(min_length=2, max_length=8)]
    """In the order in which they stood side by side."""
    winner: Name | None = None
    hidden: bool
    """The voter did not see the names."""
    dialogue: Name
    """Votes of one dialogue have the same."""
    turn: Annotated[int, Field(ge=1)]
    system: Text
    prompt: Text
    replies: Annotated[list[Text], Field(max_length=8)]


class Dialogue(Strict):
    """A dialogue as the page has it."""

    model: str
    messages: Annotated[list[Any], Field(max_length=4096)]
    tools: Annotated[list[Any], Field(max_length=128)] | None = None


class Saves:
    """The folder of one server's page."""

    def __init__(self, folder: Path, models: Mapping[str, RequestRules]) -> None:
        self.folder = folder
        self._models = models

    def vote(self, body: bytes) -> dict[str, Any]:
        """Adds a vote; ApiError for one that is none."""
        vote, unknown = parse(body, Vote)
        if unknown:
            raise bad_request(f"{unknown[0]}: is no part of a vote", unknown[0])
        for name in vote.models:
            rules_of(name, self._models)
        if len(set(vote.models)) < len(vote.models) or len(vote.replies) != len(vote.models):
            raise bad_request("a vote is between replies of different models", "models")
        if vote.winner is not None and vote.winner not in vote.models:
            raise bad_request("winner: is none of the models", "winner")
        said = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **vote.model_dump()}
        return self._added(VOTES, said)

    def row(self, body: bytes) -> dict[str, Any]:
        """Adds a dialogue as a row that training takes; ApiError for one that training would refuse."""
        dialogue, _ = parse(body, Dialogue)
        check_sources(dialogue.messages)
        self.folder.mkdir(parents=True, exist_ok=True)
        row = training_row(dialogue, self.folder)
        read_row(row)
        return self._added(ROWS, row)

    def _added(self, name: str, line: Mapping[str, Any]) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / name
        try:
            append(file, [line])
        except OSError as error:
            raise ApiError(500, f"{file} cannot be written: {error.strerror}") from error
        return {"file": str(file), "rows": sum(1 for _ in rows(file))}


def told_tokens(body: bytes, models: Mapping[str, RequestRules], folder: Path) -> dict[str, Any]:
    """The tokens of a dialogue as training lays it out, those marked that carry loss.

    Args:
        body: a Dialogue.
        models: the models that are served.
        folder: an empty one for its image.
    """
    dialogue, _ = parse(body, Dialogue)
    rules = rules_of(dialogue.model, models)
    check_sources(dialogue.messages)
    found = _shown(read_row(training_row(dialogue, folder), folder), rules)
    return {
        "num_tokens": found.num_tokens,
        "num_trained": found.num_supervised,
        "tokens": [
            {"ids": one.ids, "text": one.text, "trained": one.supervised, "control": one.control}
            for one in found.tokens
        ],
    }


def _shown(conversation: Conversation, rules: RequestRules) -> ShowResult:
    try:
        return shown(conversation, rules.template, "openai")
    except DataError as error:
        raise bad_request(without_folders(str(error)), "messages") from error


def training_row(dialogue: Dialogue, folder: Path) -> dict[str, Any]:
    """The row of a dialogue; its images become files below `folder`."""
    images: list[str] = []
    messages = [_message(one, folder, images) for one in dialogue.messages]
    row: dict[str, Any] = {"messages": messages}
    if dialogue.tools:
        row["tools"] = dialogue.tools
    if images:
        row["images"] = images
    return row


def read_row(row: Mapping[str, Any], folder: Path | None = None) -> Conversation:
    """The row as training reads it; paths of images are below `folder`, if one is given."""
    if folder is not None and "images" in row:
        row = {**row, "images": [str(folder / name) for name in row["images"]]}
    try:
        return to_conversation(dict(row), "openai", location="messages")
    except RowError as error:
        raise bad_request(str(error), "messages") from error


def _message(message: Any, folder: Path, images: list[str]) -> Any:
    if not isinstance(message, dict):
        return message
    kept = {key: message[key] for key in _KEYS if key in message}
    content = kept.get("content")
    if isinstance(content, list):
        shown = [_saved(part, folder) for part in content if is_image(part)]
        images += shown
        texts = [
            part.get("text") for part in content if isinstance(part, dict) and not is_image(part)
        ]
        kept["content"] = "\n".join(text for text in texts if isinstance(text, str))
        if shown:  # parts say where each of `images` stands
            kept["content"] = [{"type": "image"} if is_image(part) else part for part in content]
    return kept


def _saved(part: Any, folder: Path) -> str:
    """The image of a part as a file below `folder`; its path from there."""
    with image_folder() as place:
        [message] = with_image_files([{"role": "user", "content": [part]}], Path(place))
        data = Path(message["content"][0]["image"]).read_bytes()
    suffix = next((end for begin, end in _SUFFIXES.items() if data.startswith(begin)), "")
    name = f"{IMAGES}/{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
    if not (folder / name).exists():
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        with whole_binary(folder / name) as file:
            file.write(data)
    return name
