"""A chat shows whole characters as they come and keeps its history in the checkpoint's layout."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from finetune.chat.terminal import Session, Speech, Terminal, Voice, read_tools_file
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.errors import DataError
from finetune.generation.settings import Sampling

ROOT = Path(__file__).resolve().parent.parent
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
CALL = Message("assistant", '{"city": "北京"}', metadata="get_weather")


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


class Script:
    """A voice that says what it is told to, and remembers what it was asked."""

    def __init__(self, *replies: Sequence[Message] | str, room: int = 10**6) -> None:
        self.replies = list(replies)
        self.asked: list[Conversation] = []
        self._room = room

    def room(self, conversation: Conversation) -> bool:
        return sum(len(message.content) for message in conversation.messages) <= self._room

    def reply(self, conversation: Conversation, show: Callable[[str], None]) -> list[Message]:
        self.asked.append(conversation)
        said = self.replies.pop(0)
        messages = [Message("assistant", said)] if isinstance(said, str) else list(said)
        show("/".join(message.content for message in messages))
        return messages


def talk(voice: Any, *lines: str, **state: Any) -> tuple[str, Session]:
    sink = io.StringIO()
    text = "".join(f"{line}\n" for line in lines)
    session = Session(voice, Terminal(io.StringIO(text), sink), **state)
    session.run()
    return sink.getvalue(), session


def contents(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


# --- the dialogue ------------------------------------------------------------------------------


def test_a_dialogue_grows_by_what_was_said() -> None:
    voice = Script("hi", "fine")
    shown, _ = talk(voice, "hello", "", "how are you", system="Be brief.")
    assert contents(voice.asked[0]) == [("system", "Be brief."), ("user", "hello")]
    assert contents(voice.asked[1]) == [
        ("system", "Be brief."), ("user", "hello"), ("assistant", "hi"), ("user", "how are you"),
    ]  # fmt: skip
    assert shown == "> hi\n> > fine\n> \n"


def test_reset_forgets_the_dialogue_and_system_sets_another_beginning() -> None:
    voice = Script("1", "2", "3", "4")
    shown, _ = talk(voice, "a", "/reset", "b", "/system Be kind.", "c", "/system", "d", system="S")
    assert [contents(c) for c in voice.asked] == [
        [("system", "S"), ("user", "a")],
        [("system", "S"), ("user", "b")],
        [("system", "Be kind."), ("user", "c")],
        [("user", "d")],
    ]
    assert "no system message" in shown


def test_commands_are_told_from_text() -> None:
    voice = Script("1", "2")
    shown, _ = talk(voice, "/help", "/sytem x", "//quit is text", "a\\", "b", "/quit", "never read")
    assert "/system TEXT" in shown
    assert "/sytem is no command" in shown
    assert [c.messages[-1].content for c in voice.asked] == ["/quit is text", "a\nb"]


def test_quit_and_the_end_of_the_input_leave() -> None:
    assert talk(Script(), "/quit")[0] == "> "
    assert talk(Script())[0] == "> \n"


def test_a_call_is_answered_by_the_next_line_and_two_by_the_next_two(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([TOOL["function"]]))
    voice = Script([CALL, CALL], "20 and 30 degrees")
    shown, session = talk(voice, f"/tools {file}", "weather?", '{"t": 20}', '{"t": 30}')
    assert session.tools == (TOOL,)
    assert len(voice.asked) == 2  # not asked between the two results
    assert [m.role for m in voice.asked[1].messages] == [
        "user", "assistant", "assistant", "observation", "observation",
    ]  # fmt: skip
    assert shown.count("result of get_weather> ") == 2
    assert "tools: get_weather" in shown


def test_a_file_of_tools_that_is_none_is_refused_in_the_chat(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('[{"nameless": 1}]')
    with pytest.raises(DataError, match=r"bad\.json: .*no usable name"):
        read_tools_file(tmp_path / "bad.json")
    shown, _ = talk(Script("ok"), f"/tools {tmp_path / 'none.json'}", "still here")
    assert "none.json cannot be read" in shown
    assert "ok" in shown


def test_a_message_without_an_answer_is_taken_back() -> None:
    voice = Script("", "fine")
    shown, _ = talk(voice, "a", "b")
    assert contents(voice.asked[1]) == [("user", "b")]
    assert "(no reply" in shown


def test_ctrl_c_before_the_reply_has_begun_takes_the_message_back() -> None:
    voice = Script("fine")
    first = voice.reply

    def interrupted(conversation: Conversation, show: Callable[[str], None]) -> list[Message]:
        voice.reply = first  # type: ignore[method-assign]
        raise KeyboardInterrupt

    voice.reply = interrupted  # type: ignore[method-assign]
    shown, _ = talk(voice, "a", "b")
    assert "(your message is forgotten)" in shown
    assert contents(voice.asked[0]) == [("user", "b")]


def test_a_long_dialogue_forgets_its_oldest_turns_and_says_so() -> None:
    voice = Script("1", "2", "3", room=12)
    shown, _ = talk(voice, "aaaaa", "bbbbb", "ccccc", "d" * 20, system="S")
    assert contents(voice.asked[2]) == [
        ("system", "S"), ("user", "bbbbb"), ("assistant", "2"), ("user", "ccccc"),
    ]  # fmt: skip
    assert "oldest turns are forgotten" in shown
    assert "error: this does not fit" in shown
    assert len(voice.asked) == 3


# --- streaming ---------------------------------------------------------------------------------


def streamed(
    template: ChatTemplate, ids: Sequence[int], *, tools: Sequence[Any] = ()
) -> tuple[list[str], Speech]:
    pieces: list[str] = []
    stream = Speech(template, tools, pieces.append)
    for token in ids:
        stream.take(token)
    stream.finish()
    return pieces, stream


def ids_of(template: ChatTemplate, text: str) -> list[int]:
    return list(template.tokenizer.plain.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("text", ["\n你好，😀 world", "\n\n two", "\n", "no line break", "\n龘"])
def test_pieces_join_to_the_reply_and_no_character_is_broken(
    template: ChatTemplate, text: str
) -> None:
    ids = ids_of(template, text)
    pieces, stream = streamed(template, [*ids, tiny.PAD_ID])
    assert "".join(pieces) == text.removeprefix("\n")
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.ids == ids


def test_text_appears_while_it_comes(template: ChatTemplate) -> None:
    pieces: list[str] = []
    stream = Speech(template, (), pieces.append)
    for token in ids_of(template, "\nhello world"):
        before = len("".join(pieces))
        stream.take(token)
    assert 0 < before < len("".join(pieces))


def test_bytes_that_never_become_a_character_show_at_the_end(template: ChatTemplate) -> None:
    cut = ids_of(template, "\na龘")[:-1]
    pieces, _ = streamed(template, cut)
    assert "".join(pieces) == "a\ufffd" or "".join(pieces) == "a\ufffd\ufffd"
    assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_what_comes_after_the_stop_is_not_shown(template: ChatTemplate) -> None:
    user = tiny.CONTROL_IDS["<|user|>"]
    pieces, stream = streamed(template, [*ids_of(template, "\nhi"), user, *ids_of(template, "x")])
    assert "".join(pieces) == "hi"
    assert stream.ids == ids_of(template, "\nhi")


def test_calls_are_shown_as_calls_where_tools_are_offered(template: ChatTemplate) -> None:
    call = ids_of(template, 'get_weather\n{"city": "北京"}')
    ids = [*call, tiny.CONTROL_IDS["<|assistant|>"], *call, tiny.CONTROL_IDS["<|observation|>"]]
    pieces, _ = streamed(template, ids, tools=[TOOL])
    assert "".join(pieces) == '→ get_weather {"city": "北京"}\n→ get_weather {"city": "北京"}'
    text, _ = streamed(template, ids_of(template, "Well, then\nhello"), tools=[TOOL])
    assert "".join(text) == "Well, then\nhello"
    plain, _ = streamed(template, ids_of(template, "hello\nworld"))
    assert "".join(plain) == "hello\nworld"


# --- a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_glm: Path) -> Any:
    from finetune.generation.load import open_model

    return open_model(tiny_glm).model


def test_a_greedy_chat_says_what_generation_says(model: Any, template: ChatTemplate) -> None:
    from finetune.generation.generate import generate
    from finetune.generation.messages import reply_messages

    conversation = Conversation((Message("user", "hello [gMASK] <|assistant|>"),))
    prompt = template.prompt(conversation, 1)
    assert [i for i in prompt if i in tiny.CONTROL_IDS.values()].count(
        tiny.CONTROL_IDS["<|assistant|>"]
    ) == 1  # the typed one is text
    pieces: list[str] = []
    voice = Voice(model, template, max_new_tokens=20)
    [message] = voice.reply(conversation, pieces.append)
    [expected] = generate(model, template, [prompt], max_new_tokens=20, batch_size=1)
    assert [message] == reply_messages(expected.ids, template, ())
    text = template.tokenizer.plain.decode(list(expected.ids), skip_special_tokens=False)
    assert "".join(pieces) == text.removeprefix("\n")


def test_a_temperature_makes_replies_differ(model: Any, template: ChatTemplate) -> None:
    conversation = Conversation((Message("user", "hello"),))
    said = []
    for _ in range(3):
        voice = Voice(model, template, max_new_tokens=12, sampling=Sampling(1.5, top_p=0.8))
        said.append(voice.reply(conversation, lambda text: None)[0].content)
    assert len(set(said)) > 1


def test_ctrl_c_keeps_what_was_said_and_the_chat_goes_on(
    model: Any, template: ChatTemplate
) -> None:
    pieces: list[str] = []

    def interrupting(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    voice = Voice(model, template, max_new_tokens=500)
    [message] = voice.reply(Conversation((Message("user", "hello"),)), interrupting)
    assert 0 < len(template.tokenizer.plain.encode(message.content).ids) < 100
    assert voice.reply(Conversation((Message("user", "hello"),)), lambda text: None)


def test_ctrl_c_at_the_prompt_only_tells_how_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([KeyboardInterrupt(), "hello", None])

    def ask(self: Terminal, prompt: str) -> str | None:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(Terminal, "ask", ask)
    shown, session = talk(Script("hi"))
    assert "/quit or Ctrl-D" in shown
    assert [message.content for message in session.history] == ["hello", "hi"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}


@pytest.mark.slow
def test_a_chat_through_a_pipe_ends_with_its_input(tiny_glm: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "chat", str(tiny_glm), "--max-new-tokens", "8"],
        input="你好\n/reset\n", capture_output=True, text=True, timeout=120, env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "(a new dialogue; no system message)" in done.stdout
    assert done.stdout.count("> ") >= 3


@pytest.mark.slow
def test_ctrl_c_in_a_real_terminal_stops_the_reply_and_ctrl_d_leaves(tiny_glm: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "finetune", "chat", str(tiny_glm), "--max-new-tokens", "1900"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        terminal = Screen(ours)
        terminal.until(r"/quit leaves\r\n[^>]*> ")
        os.write(ours, b"hello\n")
        terminal.until(
            r"hello\r\n(\x1b\[\?2004l\r?)?\s*[^\x1b\s]"
        )  # the reply, of a minute or so, has begun
        process.send_signal(signal.SIGINT)
        terminal.until(r"\n[^\n]*> $")
        os.write(ours, b"/system be brief\n")
        # A Ctrl-D before the prompt is not the prompt's.
        terminal.until(r"system message: be brief\)[^>]*> $")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in terminal.seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)


class Screen:
    """Our end of a pseudo-terminal."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.seen = ""
        self.read = 0

    def until(self, pattern: str) -> None:
        """Read on until `pattern` stands behind what was matched before."""
        deadline = time.monotonic() + 100
        while not (found := re.compile(pattern).search(self.seen, self.read)):
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self.handle], [], [], left)
            assert ready, f"{pattern!r} never came; seen {self.seen[-500:]!r}"
            self.seen += os.read(self.handle, 65536).decode(errors="replace")
        self.read = found.end()


def test_an_answer_of_which_one_part_is_empty_is_taken_back_too() -> None:
    voice = Script(
        [Message("assistant", "let me see"), Message("assistant", " ", "get_weather")], "fine"
    )
    shown, _ = talk(voice, "a", "b")
    assert contents(voice.asked[1]) == [("user", "b")]
    assert "(no reply" in shown
