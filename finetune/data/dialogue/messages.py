"""A list of messages, in any of the spellings of a message -> Message.

One reader for `messages`, OpenAI, ShareGPT and ChatGLM3 lists, because data in the wild mixes
them: `role` or `from`, `content` or `value`, a tool call in five ways. A field that is null
counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import Message, Role, RowError, ShownImage
from finetune.data.dialogue.images import UNNAMED, brings_image, image_of, images_of, with_own
from finetune.data.dialogue.keys import Marks, marks_of, unread_of_part
from finetune.data.dialogue.tool_calls import (
    Call,
    Tools,
    arguments_text,
    call_in_text,
    read_call,
    read_tools,
    tool_name,
)

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "observation",
    "tool": "observation",
    "function": "observation",
    "function_response": "observation",
    "tool_response": "observation",
    "tool_result": "observation",
    "ipython": "observation",
}
_IMAGE_KEYS = ("image", "image_url", "bytes", "path", "url")
_CALL_ROLES = frozenset({"function_call", "tool_call"})


_UNMARKED = Marks()


class MessageReader:
    """Messages under construction: what was read so far, and where in the row it stood."""

    def __init__(self, tools: Tools = ()) -> None:
        self.messages: list[Message] = []
        self.positions: list[int] = []
        self.call_ids: dict[int, str] = {}
        """Index into `messages` -> OpenAI's id of the call that it makes or answers."""
        self.tools = tools
        self.unread: set[str] = set()
        """Keys of messages with text that nothing reads."""
        self.reasoning: dict[int, str] = {}
        """Index into `messages` -> what the reply was thought out with, from a key of its own."""
        self.shows_images = False
        """Whether a message names images, or has a place for some."""
        self._marks = _UNMARKED

    def add(self, message: Message, position: int, call_id: object = None) -> None:
        """Append one message that came from the row's message `position`."""
        if isinstance(call_id, str):
            self.call_ids[len(self.messages)] = call_id
        self.messages.append(message)
        self.positions.append(position)

    def read(self, items: Sequence[Any]) -> None:
        """Append what the items say; RowError with the first that cannot be read."""
        for position, item in enumerate(items, 1):
            if type(item) is not dict:
                _fail(position, f"is {strict_json.describe(item)}, not an object")
            name = item.get("role") if "role" in item else item.get("from")
            role = (ROLES.get(name) or ROLES.get(name.lower())) if isinstance(name, str) else None
            if role is None:
                _fail_role(position, item, name)
            content = item["content"] if "content" in item else item.get("value")
            if (
                len(item) == 2
                and type(content) is str
                and (
                    role != "assistant"
                    or not (content.startswith(("{", "[")) or name in _CALL_ROLES)
                )
                and content
            ):
                self.messages.append(Message(role, content))
                self.positions.append(position)
                continue
            if len(item) == 2 and content is not None:
                self._marks = _UNMARKED
            else:
                self._mark(item, role, position)
            if role == "assistant":
                follower = items[position] if position < len(items) else None
                self._assistant(item, content, position, name in _CALL_ROLES, _is_result(follower))
            elif role == "observation":
                self._observation(item, content, position)
            elif role == "system":
                self._system(item, content, position)
            else:
                self._user(item, content, position)

    def _mark(self, item: Mapping[str, Any], role: Role, position: int) -> None:
        """Note what an item says besides its role and its text."""
        try:
            self._marks = marks_of(item, role)
        except RowError as error:
            _fail(position, str(error))
        self.unread |= set(self._marks.unread)

    def _user(self, item: Mapping[str, Any], content: Any, position: int) -> None:
        text, images = _parts(content, position, self.unread)
        message = self._message(item, "user", text, position)
        message = _showing(message, images, item, position)
        self.shows_images = self.shows_images or bool(message.images)
        self.add(message, position)

    def _system(self, item: Mapping[str, Any], content: Any, position: int) -> None:
        tools = read_tools(item.get("tools"))
        if tools and self.tools and tools != self.tools:
            _fail(position, "has tools, and the row has others; keep one list")
        self.tools = tools or self.tools
        if content is None and tools:
            return
        text = _text(content, position, self.unread)
        if text:  # an empty one says nothing, with or without tools
            self.add(self._message(item, "system", text, position), position)

    def _observation(self, item: Mapping[str, Any], content: Any, position: int) -> None:
        """A tool result; in ChatGLM3's layout the call that it answers too."""
        if content and item.get("observation") not in (None, content):
            _fail(position, "has 'content' and 'observation', which say different things; keep one")
        if item.get("parameters") is not None:
            name = item.get("name")
            if not isinstance(name, str) or not name:
                _fail(position, "has parameters but no name of a tool")
            arguments = arguments_text(name, item["parameters"], position)
            self.add(self._message(item, "assistant", arguments, position, metadata=name), position)
            content = item.get("observation", content)
            if content is None:
                return
        elif content is None:
            content = item.get("observation")
        text, images = _result(content, position, self.unread)
        message = self._message(item, "observation", text, position)
        message = _showing(message, images, item, position)
        self.shows_images = self.shows_images or bool(message.images)
        self.add(message, position, item.get("tool_call_id"))

    def _assistant(
        self,
        item: Mapping[str, Any],
        content: Any,
        position: int,
        is_call: bool,
        before_result: bool,
    ) -> None:
        """A reply, a call, several calls, or (OpenAI) a reply and the calls that it makes."""
        calls = self._calls(item, content, position, is_call, before_result)
        if calls is None:
            text = content
            if item.get("metadata") and isinstance(content, dict):
                text = strict_json.dump(content)
            text = _text(text, position, self.unread)
            self.add(self._message(item, "assistant", text, position), position)
            return
        if item.get("metadata"):
            _fail(position, "has metadata beside a call that names its function itself")
        if "tool_calls" in item or "function_call" in item:
            text = "" if content is None else _text(content, position, self.unread)
            if text and not text.isspace():
                self.add(self._message(item, "assistant", text, position), position)
        for source in calls:
            call: Call = read_call(source, position, self.tools)
            message = self._message(item, "assistant", call.arguments, position, metadata=call.name)
            self.add(message, position, source.get("id"))

    def _calls(
        self,
        item: Mapping[str, Any],
        content: Any,
        position: int,
        is_call: bool,
        before_result: bool,
    ) -> list[Any] | None:
        """The calls that the message makes, in whatever spelling; None when it is a reply."""
        named = item.get("tool_calls") or item.get("function_call")
        if named:
            return named if isinstance(named, list) else [named]
        if item.get("metadata"):
            return None
        if isinstance(content, dict):
            if "name" not in content:
                _fail(position, 'content is an object but not {"name": …, "arguments": …}')
            return [content]
        if is_call:
            found = _parse_call(content, position)
            return found if isinstance(found, list) else [found]
        found = call_in_text(content) if isinstance(content, str) else None
        if found is None:
            return None
        known = {tool_name(tool) for tool in self.tools}
        return found if before_result or all(c["name"] in known for c in found) else None

    def _message(
        self,
        item: Mapping[str, Any],
        role: Role,
        text: str,
        position: int,
        *,
        metadata: str | None = None,
    ) -> Message:
        """A message with the item's `metadata`, and a reply with its marks."""
        if metadata is None:
            metadata = item.get("metadata") or ""
            if not isinstance(metadata, str):
                _fail(position, f"metadata is {strict_json.describe(metadata)}, not a tool's name")
        marks = _UNMARKED if role == "observation" else self._marks
        is_first = self.positions[-1:] != [position]  # of what this item says
        if marks.reasoning and role == "assistant" and is_first:
            self.reasoning[len(self.messages)] = marks.reasoning
        if role in ("system", "assistant") and _image_key(item):
            _fail(position, f"an image on {role!r}; only users and tools show one")
        return Message(role, text, metadata, marks.train, marks.weight)


def _image_key(item: Mapping[str, Any]) -> str | None:
    """The key of a message that names its images."""
    found = [key for key in ("image", "images") if brings_image(item.get(key))]
    return found[0] if found else None


def _showing(
    message: Message, images: Sequence[ShownImage], item: Mapping[str, Any], position: int
) -> Message:
    """The message with the images of its content's parts, or of a key of its own."""
    shown = replace(message, images=tuple(images)) if images else message
    if (key := _image_key(item)) is None:
        return shown
    if key == "image" and brings_image(item.get("images")):
        _fail(position, "names an 'image' and 'images'; write all of them as 'images'")
    return with_own(shown, images_of(item[key], f"message {position}: {key}"), position)


def _result(content: Any, position: int, unread: set[str]) -> tuple[str, list[ShownImage]]:
    """What a tool gave back: data as JSON, OpenAI's text parts joined, and its images."""
    is_parts = isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") in ("text", "image", "image_url")
        for part in content
    )
    if isinstance(content, str) or is_parts:
        return _parts(content, position, unread)
    return strict_json.dump(content), []


def _parse_call(content: Any, position: int) -> Any:
    if not isinstance(content, str):
        return content
    try:
        return strict_json.parse(content)
    except RowError as error:
        _fail(position, f"the call is not JSON: {error}")


def _is_result(item: Any) -> bool:
    name = item.get("role", item.get("from")) if isinstance(item, dict) else None
    return isinstance(name, str) and ROLES.get(name) == "observation"


def _text(content: Any, position: int, unread: set[str]) -> str:
    text, images = _parts(content, position, unread)
    if images:
        _fail(position, "shows an image; only users and tools can")
    return text


def _odd_part(part: Any, kind: Any) -> str:
    """Why a content part cannot be taken."""
    if kind in ("video", "video_url"):
        return "content has a video, which is not read; show its frames as images, each behind its time in seconds"
    if not isinstance(part, dict) or not isinstance(kind, str):
        return "content is a list of other things than parts with a type, such as text"
    return f"content has a part of type {kind!r}; text and images are taken"


def _parts(content: Any, position: int, unread: set[str]) -> tuple[str, list[ShownImage]]:
    """(text, images) of a content that is text or a list of content parts, with `text` or `value`.

    What a part says besides goes into `unread`.
    """
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list) or not content:
        _fail(position, f"content is {strict_json.describe(content)}, not text")
    texts: list[str] = []
    images: list[ShownImage] = []
    length = 0
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        said = part.get("text", part.get("value")) if kind == "text" else None
        if isinstance(said, str):
            texts.append(said)
            length += len(said)
        elif kind in ("image", "image_url"):
            given = next((part[k] for k in _IMAGE_KEYS if part.get(k) is not None), None)
            if given is None:  # a column of the row brings it
                images.append(ShownImage(UNNAMED, length, marked=True))
            else:
                images.append(ShownImage(image_of(given, f"message {position}: image"), length))
        else:
            _fail(position, _odd_part(part, kind))
        if len(part) > 2:
            try:
                unread |= unread_of_part(part)
            except RowError as error:
                _fail(position, str(error))
    return "".join(texts), images


def _fail(position: int, problem: str) -> NoReturn:
    raise RowError(f"message {position}: {problem}")


def _fail_role(position: int, item: Mapping[str, Any], name: Any) -> NoReturn:
    if "role" not in item and "from" not in item:
        _fail(position, "has no role")
    if isinstance(name, str):
        _fail(position, f"role {name!r} is not one of {', '.join(ROLES)}")
    _fail(position, f"role is {strict_json.describe(name)}, not text")
