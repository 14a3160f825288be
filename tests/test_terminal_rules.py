"""What a chat in the terminal remembers, forgets and asks, line by line and without a model."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from finetune.chat import terminal
from finetune.chat.terminal import Session, Speech, Terminal, Voice, chat
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.errors import DataError
from finetune.generation.settings import Placement, Sampling
from finetune.generation.stream import Piece


class Script:
    """A voice that says what it is told to, of a model that takes pictures or has a switch for thinking."""

    def __init__(
        self, *replies: Sequence[Message] | str | Exception, room: Callable[[Conversation], bool] = bool,
        most: int | None = 1, switch: bool = False, sees: bool = True,
    ) -> None:  # fmt: skip
        self.replies = list(replies)
        self.asked: list[Conversation] = []
        self.room = room
        self.template = SimpleNamespace(
            image=object() if sees else None, image_rule=SimpleNamespace(most=most), layout=SimpleNamespace(has_switch=switch)
        )  # fmt: skip

    def reply(self, conversation: Conversation, show: Callable[[str], None]) -> list[Message]:
        self.asked.append(conversation)
        said = self.replies.pop(0)
        if isinstance(said, Exception):
            raise said
        return [Message("assistant", said)] if isinstance(said, str) else list(said)


def talk(voice: Any, *lines: str, **state: Any) -> tuple[str, Session]:
    sink = io.StringIO()
    session = Session(voice, Terminal(io.StringIO("".join(f"{x}\n" for x in lines)), sink), **state)
    session.run()
    return sink.getvalue(), session


def said(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages]


def picture(path: Path) -> str:
    Image.new("RGB", (4, 4)).save(path)
    return str(path)


def test_nothing_that_is_shown_is_obeyed_by_the_terminal() -> None:
    sink = io.StringIO()
    Terminal(io.StringIO(), sink).line("a\x1b[2Jb\x07\nc")
    assert "\x1b" not in sink.getvalue()
    assert "\x07" not in sink.getvalue()
    assert sink.getvalue().endswith("\nc\n")


def test_an_error_takes_the_message_back_and_the_dialogue_stays() -> None:
    voice = Script("1", DataError("too odd"), "3")
    shown, session = talk(voice, "a", "b", "c")
    assert "error: too odd" in shown
    assert said(voice.asked[2]) == ["a", "1", "c"]
    assert [message.content for message in session.history] == ["a", "1", "c", "3"]


def test_calls_are_answered_in_their_order_and_asked_for_by_name() -> None:
    calls = [Message("assistant", "{}", name) for name in ("first", "second", "third")]
    voice = Script(calls, "done")
    shown, session = talk(voice, "go", "r1", "r2", "r3")
    asked = [line.removesuffix("> ") for line in shown.split("result of ")[1:]]
    assert [line.split(">")[0] for line in asked] == ["first", "second", "third"]
    assert [m.role for m in session.history] == ["user", *["assistant"] * 3, *["observation"] * 3, "assistant"]  # fmt: skip
    assert len(voice.asked) == 2


def test_the_turn_that_shows_the_picture_stays_when_others_are_forgotten(tmp_path: Path) -> None:
    shows = Message("user", "look", images=(ShownImage(picture(tmp_path / "a.png")),))
    turns = [shows, Message("assistant", "1"), Message("user", "b"), Message("assistant", "2")]
    voice = Script("3", room=lambda conversation: len(conversation.messages) <= 3)
    shown, session = talk(voice, "c", history=list(turns))
    assert said(voice.asked[0]) == ["look", "1", "c"]
    assert "(the 1 oldest turns are forgotten" in shown
    voice = Script("3", room=lambda conversation: len(conversation.messages) <= 3)
    plain = [Message("user", "a"), *turns[1:]]
    talk(voice, "c", history=plain)
    assert said(voice.asked[0]) == ["b", "2", "c"]
    voice = Script("3", room=lambda conversation: len(conversation.messages) <= 2)
    shown, session = talk(voice, "c", history=list(turns))
    assert "error: this does not fit" in shown
    assert session.history == turns, "nothing is forgotten for a message that is not asked"


def test_a_picture_goes_with_the_next_message_alone(tmp_path: Path) -> None:
    file, other = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    voice = Script("1", "2", "3")
    shown, _ = talk(voice, "old", f"/image {file}", "what", "and", system="S")
    assert [len(conversation.messages[-1].images) for conversation in voice.asked] == [0, 1, 0]
    assert said(voice.asked[1]) == ["S", "what"], "a model of one picture begins anew"
    assert f"image: {file}, shown with your next message" in shown
    voice = Script("1", "2", most=None)
    shown, _ = talk(voice, "old", f"/image {file}", f"/image {other}", "what")
    assert said(voice.asked[1]) == ["old", "1", "what"]
    assert [image.path for image in voice.asked[1].messages[-1].images] == [file, other]
    for words, sees, reason in (("/image", True, "which image? Type /image FILE"), (f"/image {file}", False, "takes no images"), (f"/image {tmp_path / 'none'}", True, "none: ")):  # fmt: skip
        shown, session = talk(Script(sees=sees), words, history=[Message("user", "kept")])
        assert reason in shown
        assert session.history, "a command that fails begins nothing anew"


def test_thinking_is_switched_where_there_is_a_switch() -> None:
    voice = Script("1", "2", "3", switch=True)
    shown, _ = talk(voice, "a", "/think on", "b", "/think off", "c")
    assert [conversation.thinks for conversation in voice.asked] == [None, True, False]
    assert [said(conversation) for conversation in voice.asked] == [["a"], ["b"], ["c"]]
    assert "thinking on" in shown
    assert "thinking off" in shown
    assert "on or off?" in talk(Script(switch=True), "/think maybe")[0]
    assert "has no switch for thinking" in talk(Script(), "/think on")[0]


def test_a_dialogue_fits_with_the_longest_reply_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    template = SimpleNamespace(prompt=lambda conversation, index: [1] * 10)
    for limit, fits in ((None, True), (15, True), (14, False)):
        monkeypatch.setattr("finetune.generation.generate.context_length", lambda model, limit=limit: limit)  # fmt: skip
        assert Voice(None, template, 5).room(Conversation((Message("user", "a"),))) is fits


@pytest.mark.parametrize("seed", [None, 7])
def test_each_reply_has_the_next_seed_and_all_that_was_said_of_sampling(
    seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Silent:
        ids = ()
        take = finish = staticmethod(lambda *_: None)

    monkeypatch.setattr(terminal, "Speech", lambda *_, **how: asked.append(how) or Silent())  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr("finetune.generation.decoder.write_replies", lambda model, stops, requests, slots: asked.extend(requests))  # fmt: skip
    monkeypatch.setattr("finetune.generation.messages.reply_messages", lambda *_: [])
    monkeypatch.setattr("finetune.distributed.map_batches.evaluating", lambda model: nullcontext())
    template = SimpleNamespace(prompt=lambda conversation, index: [1], stop_ids=(3,))
    how = Sampling(0.5, 0.6, 7, 0.08, 0.9, 1.1, 1.2)
    voice = Voice(None, template, 5, how, seed)
    for _ in range(2):
        voice.reply(Conversation((Message("user", "a"),), thinks=True), lambda text: None)
    decodings = [one.decoding for one in asked[1::2]]
    assert [one.seed for one in decodings] == ([None, None] if seed is None else [7, 8])
    for one in decodings:
        assert (one.max_new_tokens, one.temperature, one.top_p, one.top_k, one.min_p, one.presence_penalty, one.frequency_penalty, one.repetition_penalty) == (5, 0.5, 0.6, 7, 0.08, 0.9, 1.1, 1.2)  # fmt: skip
    assert asked[0] == {"thinks": True}


def test_a_thought_stands_between_marks_and_calls_on_lines_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[str] = []
    given: list[Any] = []
    monkeypatch.setattr(terminal, "reply_stream", lambda template, tools, thinks: given.append((tools, thinks)))  # fmt: skip
    speech = Speech(None, ["tool"], shown.append, thinks=False)  # type: ignore[list-item]
    speech._show_pieces([Piece("hm", is_thought=True), Piece(" yes", is_thought=True), Piece("so"), Piece("{", 0, "f"), Piece("}", 0), Piece("{}", 1, "g")])  # fmt: skip
    assert "".join(shown) == "<think>\nhm yes\n</think>\n\nso\n→ f {}\n→ g {}"
    assert given == [(["tool"], False)]
    shown.clear()
    Speech(None, (), shown.append)._show_pieces([Piece("{}", 0, "f")])
    assert shown == ["→ f {}"]


@pytest.mark.parametrize(("kind", "name"), [("model", "m"), ("adapter", "m on base")])
def test_a_chat_is_held_with_what_was_opened_as_it_was_asked_for(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = SimpleNamespace(model="model", template="template", kind=kind, base="base")
    asked: list[Any] = []
    held: list[str] = []

    @contextmanager
    def packed(model: str) -> Iterator[None]:
        held.append(model)
        yield
        held.remove(model)

    def session(voice: Voice, at: Terminal, system: str) -> Any:
        asked.append((voice, system))
        return SimpleNamespace(run=lambda: asked.append(list(held)))

    monkeypatch.setattr("finetune.generation.load.open_model", lambda target, base, placement: asked.append((target, base, placement)) or opened)  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr("finetune.models.kernels.products.packed", packed)
    monkeypatch.setattr(terminal, "Session", session)
    how, place = Sampling(0.5), Placement(None, "nf4")
    chat("m", base="b", system="be", max_new_tokens=3, sampling=how, seed=4, placement=place)
    assert asked == [("m", "b", place), (Voice("model", "template", 3, how, 4), "be"), ["model"]]
    first, second = capsys.readouterr().out.splitlines()
    assert first == "opening m ..."
    assert second == f"{name}; /help shows the commands, /quit leaves"
    chat("m")
    assert asked[3:5] == [("m", None, Placement()), (Voice("model", "template", 1024), "")]


class Tape(io.StringIO):
    """What is shown, and how much of it has gone out."""

    out = ""
    is_terminal = False

    def flush(self) -> None:
        self.out = self.getvalue()

    def isatty(self) -> bool:
        return self.is_terminal


def test_every_text_is_seen_at_once() -> None:
    sink = Tape()
    at = Terminal(io.StringIO("a\n"), sink)
    for text in ("he", "llo"):
        at.show(text)
        assert sink.out == sink.getvalue()
    at.ask("> ")
    assert sink.out == "hello> "


def test_lines_go_on_behind_a_backslash_and_end_with_the_input() -> None:
    sink = io.StringIO()
    at = Terminal(io.StringIO("a\\\nb\\\nc\n\nlast\\\n"), sink)
    assert [at.ask("> ") for _ in range(4)] == ["a\nb\nc", "", "last\n", None]
    assert sink.getvalue() == "> ... ... > > ... > "


@pytest.mark.parametrize(
    ("stdin", "reads", "shows", "edits"),
    [(True, True, True, True), (False, True, True, False), (True, False, True, False), (True, True, False, False)],
)  # fmt: skip
def test_lines_are_edited_where_a_person_types_and_sees(
    stdin: bool, reads: bool, shows: bool, edits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sink = Tape("typed\n"), Tape()
    source.is_terminal, sink.is_terminal = reads, shows
    monkeypatch.setattr("sys.stdin", source if stdin else io.StringIO())
    edited = iter(["edited"])

    def asked(prompt: str) -> str:
        assert prompt == "> "
        for line in edited:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", asked)
    at = Terminal(source, sink)
    assert [at.ask("> ") for _ in range(2)] == ["edited" if edits else "typed", None]
    assert (sink.getvalue() == "") is edits, "input() shows the prompt itself"


def test_pictures_wait_for_a_message_of_the_user_that_is_answered(tmp_path: Path) -> None:
    """What a function gave back shows none, and a message that is taken back has shown none."""
    file = picture(tmp_path / "a.png")
    call = [Message("assistant", "{}", "f")]
    voice = Script(call, "done", DataError("odd"), "", "seen", "no more", most=None)
    talk(voice, "go", f"/image {file}", "result", "one", "two", "three", "four")
    shown = [[len(m.images) for m in asked.messages] for asked in voice.asked]
    assert shown[0] == [0]
    assert shown[1] == [0, 0, 0]
    assert [one[-1] for one in shown[2:]] == [1, 1, 1, 0]


def test_commands_that_begin_anew_forget_the_dialogue_and_its_picture(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text('[{"name": "f"}]')
    for words in ("/reset", "/system S", f"/tools {file}", "/think on"):
        voice = Script("1", "2", switch=True)
        shown, session = talk(voice, "a", f"/image {picture(tmp_path / 'a.png')}", words, "b", "/quit now", "c")  # fmt: skip
        assert [m.content for m in voice.asked[1].messages if m.role != "system"] == ["b"]
        assert not voice.asked[1].images
        assert len(voice.asked) == 2, "/quit leaves, whatever stands behind it"
    _, session = talk(Script(), f"/tools {file}", "/tools")
    assert session.tools == ()
    file.write_text(" \n")
    shown, session = talk(Script(), f"/tools {file}", history=[Message("user", "kept")])
    assert f"error: {file} is empty; write a JSON list of functions into it" in shown
    assert len(session.history) == 1
