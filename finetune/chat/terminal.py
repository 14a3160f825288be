"""Talking to a model in the terminal: its reply appears token by token.

What is typed is text: `<|user|>` or `[gMASK]` in it never becomes a control token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from finetune import console
from finetune.data.chat.image import ImageError, check_image
from finetune.data.chat.spans import keeps_first_turn
from finetune.data.dialogue.conversation import Conversation, Message, Role, RowError, ShownImage
from finetune.data.dialogue.tool_calls import read_tools, tool_name
from finetune.errors import DataError, FinetuneError
from finetune.generation.settings import GREEDY, HERE, Placement, Sampling
from finetune.generation.stream import Piece, reply_stream
from finetune.storage.given import read_given

HELP = """\
/reset         forget the dialogue, keep the system message and the tools
/system TEXT   set the system message and start afresh; without TEXT remove it
/image FILE    show an image with the next message, several one by one; GLM-4V, which takes one, starts afresh
/tools FILE    offer the functions in a JSON file and start afresh; without FILE remove them
/think off|on  whether the model is to think and start afresh (GLM-4.5 and later)
/help          this
/quit          leave; so does Ctrl-D. Ctrl-C stops a reply
A line that ends in \\ goes on in the next one; // at the start stands for /."""


def chat(
    target: str,
    *,
    base: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 1024,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    placement: Placement = HERE,
) -> None:
    """Opens `target` (a model, an adapter or a checkpoint) and talks until the input ends."""
    from finetune.generation.load import open_model
    from finetune.models.kernels.products import packed

    console.say(f"opening {target} ...")
    opened = open_model(target, base=base, placement=placement)
    name = target if opened.kind == "model" else f"{target} on {opened.base}"
    voice = Voice(opened.model, opened.template, max_new_tokens, sampling, seed)
    terminal = Terminal(sys.stdin, sys.stdout)
    terminal.line(f"{name}; /help shows the commands, /quit leaves")
    with packed(opened.model):
        Session(voice, terminal, system or "").run()


class Terminal:
    """Where lines are read and text is shown; line editing if both ends are a real terminal."""

    def __init__(self, source: TextIO, sink: TextIO) -> None:
        self._source = source
        self._sink = sink
        self._edits = source is sys.stdin and source.isatty() and sink.isatty()
        if self._edits:
            import readline  # noqa: F401  # gives input() its line editing

    def ask(self, prompt: str) -> str | None:
        """The next line, joined with those that it goes on in; None at the end of the input."""
        line = self._read(prompt)
        while line is not None and line.endswith("\\"):
            rest = self._read("... ")
            line = f"{line[:-1]}\n{rest or ''}"
        return line

    def show(self, text: str) -> None:
        """Text at once, without a line break; nothing in it is obeyed."""
        self._sink.write(console.shown(text))
        self._sink.flush()

    def line(self, text: str = "") -> None:
        """A line of text."""
        self.show(f"{text}\n")

    def _read(self, prompt: str) -> str | None:
        if self._edits:
            try:
                return input(prompt)
            except EOFError:
                return None
        self.show(prompt)
        line = self._source.readline()
        return line.removesuffix("\n") if line else None


@dataclass
class Voice:
    """The model: a dialogue in, a reply out, shown while it comes."""

    model: Any
    template: Any
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int | None = None
    """Of the first reply; the next ones follow it. None: others each time."""
    replies: int = 0
    """Asked for so far."""

    def room(self, conversation: Conversation) -> bool:
        """Whether the dialogue and a reply fit into the model's context."""
        from finetune.generation.generate import context_length

        limit = context_length(self.model)
        prompt = self.template.prompt(conversation, len(conversation.messages))
        return limit is None or len(prompt) + self.max_new_tokens <= limit

    def reply(self, conversation: Conversation, show: Callable[[str], None]) -> list[Message]:
        """The messages of the reply: one, or several calls. Ctrl-C ends it where it is."""
        from finetune.distributed.map_batches import evaluating
        from finetune.generation.decoder import Decoding, Request, write_replies
        from finetune.generation.messages import reply_messages

        prompt = self.template.prompt(conversation, len(conversation.messages))
        speech = Speech(self.template, conversation.tools, show, thinks=conversation.thinks)
        seed = None if self.seed is None else self.seed + self.replies
        decoding = Decoding(self.max_new_tokens, seed=seed, **asdict(self.sampling))
        self.replies += 1
        request = Request(prompt, decoding, speech.take)
        with suppress(KeyboardInterrupt), evaluating(self.model):
            write_replies(self.model, self.template.stop_ids, [request], slots=1)
        speech.finish()
        return reply_messages(speech.ids, self.template, conversation.tools)


class Speech:
    """Shows a reply while it is written; a call as `→ name arguments`."""

    def __init__(
        self,
        template: Any,
        tools: Sequence[Mapping[str, Any]],
        show: Callable[[str], None],
        *,
        thinks: bool | None = None,
    ) -> None:
        self._stream = reply_stream(template, tools, thinks=thinks)
        self._show = show
        self._begun = self._thinks = False

    @property
    def ids(self) -> list[int]:
        """The reply so far, without its stop."""
        return self._stream.ids

    def take(self, token: int) -> bool:
        """Shows what a token adds; True when the reply is over."""
        self._show_pieces(self._stream.take(token))
        return self._stream.over

    def finish(self) -> None:
        """Shows what is left."""
        self._show_pieces(self._stream.finish())

    def _show_pieces(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.is_thought != self._thinks:
                self._show("<think>\n" if piece.is_thought else "\n</think>\n\n")
                self._thinks = piece.is_thought
            if piece.name:
                line_break = "\n" if self._begun else ""
                self._show(f"{line_break}→ {piece.name} {piece.text}")
            else:
                self._show(piece.text)
            self._begun = True


@dataclass
class Session:
    """One dialogue with its history."""

    voice: Voice
    terminal: Terminal
    system: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    history: list[Message] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    """Shown with the next message."""
    thinks: bool | None = None
    """What `/think` said."""

    def run(self) -> None:
        """Reads lines and answers them until the input ends or /quit."""
        while True:
            try:
                line = self.terminal.ask(self._prompt())
            except KeyboardInterrupt:
                self.terminal.line("\n(/quit or Ctrl-D leaves)")
                continue
            if line is None:
                self.terminal.line()
                return
            if not line.strip():
                continue
            if line.startswith("/") and not line.startswith("//"):
                if line.split()[0] == "/quit":
                    return
                self._command(line)
            else:
                self._say(line.removeprefix("/") if line.startswith("//") else line)

    def _prompt(self) -> str:
        waiting = self._waiting()
        return f"result of {waiting[0].metadata}> " if waiting else "> "

    def _waiting(self) -> list[Message]:
        """The calls at the dialogue's end that have no result yet, in their order."""
        results = 0
        while results < len(self.history) and self.history[-1 - results].role == "observation":
            results += 1
        calls: list[Message] = []
        for message in reversed(self.history[: len(self.history) - results]):
            if message.role != "assistant" or not message.metadata:
                break
            calls.insert(0, message)
        return calls[results:]

    def _say(self, text: str) -> None:
        before = list(self.history)
        role: Role = "observation" if self._waiting() else "user"
        shown = tuple(map(ShownImage, self.images)) if role == "user" else ()
        self.history.append(Message(role, text, images=shown))
        if self._waiting():
            return
        try:
            self._make_room()
            reply = self.voice.reply(self._conversation(), self.terminal.show)
        except (FinetuneError, KeyboardInterrupt) as error:
            self.history = before
            self.terminal.line(f"error: {error}" if str(error) else "(your message is forgotten)")
            return
        self.terminal.line()
        if all(message.content.strip() for message in reply):
            self.history += reply
            self.images = [] if shown else self.images
        else:
            self.history = before
            self.terminal.line("(no reply; your message is forgotten)")

    def _make_room(self) -> None:
        """Forgets the oldest turns until the dialogue and a reply fit; not the only one with images."""
        forgotten = 0
        while not self.voice.room(self._conversation()):
            turns = [i for i, m in enumerate(self.history) if m.role == "user"]
            oldest = 1 if keeps_first_turn(self.history) else 0
            kept = self.history[: turns[1]] if oldest and len(turns) > 1 else []
            if len(turns) < oldest + 2:
                raise DataError("this does not fit into the model's context; make it shorter")
            self.history = kept + self.history[turns[oldest + 1] :]
            forgotten += 1
        if forgotten:
            self.terminal.line(f"(the {forgotten} oldest turns are forgotten, to fit the context)")

    def _conversation(self) -> Conversation:
        head = [Message("system", self.system)] if self.system else []
        messages = (*head, *self.history)
        return Conversation(messages, self.tools, "the chat", thinks=self.thinks)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            self.terminal.line(HELP)
        elif name in ("/reset", "/system", "/tools", "/image", "/think"):
            try:
                self._begin(name, rest)
            except FinetuneError as error:
                self.terminal.line(f"error: {error}")
        else:
            self.terminal.line(f"{name} is no command; /help shows them")

    def _begin(self, name: str, rest: str) -> None:
        if name == "/system":
            self.system = rest
        elif name == "/tools":
            self.tools = read_tools_file(Path(rest)) if rest else ()
        elif name == "/think":
            self.thinks = self._switched(rest)
        image = [self._checked_image(rest)] if name == "/image" else []
        if image and self.voice.template.image_rule.most is None:
            self.images += image
            self.terminal.line(f"(shown with your next message: {', '.join(self.images)})")
            return
        self.images, self.history = image, []
        named = ", ".join(tool_name(tool) for tool in self.tools)
        state = [f"system message: {self.system}" if self.system else "no system message"]
        state += [f"tools: {named}"] if named else []
        state += [f"image: {image[0]}, shown with your next message"] if image else []
        state += [f"thinking {'on' if self.thinks else 'off'}"] if self.thinks is not None else []
        self.terminal.line(f"(a new dialogue; {'; '.join(state)})")

    def _switched(self, rest: str) -> bool:
        if not self.voice.template.layout.has_switch:
            raise DataError(
                "this model's chat template has no switch for thinking; open one that has"
            )
        if rest not in ("on", "off"):
            raise DataError("on or off? Type /think off")
        return rest == "on"

    def _checked_image(self, path: str) -> str:
        if self.voice.template.image is None:
            raise DataError(
                "this model takes no images; leave them out, or open a GLM-4V or GLM-4.1V"
            )
        if not path:
            raise DataError("which image? Type /image FILE")
        try:
            check_image(path)
        except ImageError as error:
            raise DataError(f"{path}: {error}") from error
        return path


def read_tools_file(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The function definitions of a JSON file: a list, in OpenAI's form or bare."""
    text = read_given(path, str(path), DataError)
    if not text.strip():
        raise DataError(f"{path} is empty; write a JSON list of functions into it")
    try:
        return read_tools(text)
    except RowError as error:
        raise DataError(f"{path}: {error}") from error
