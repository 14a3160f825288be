"""Which prompts are asked, what is written of replies, when lines are kept, and what a base's own replies are kept by."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rows import read_rows, write_rows

from finetune.config.forgetting import ReplaySection
from finetune.config.schema import EvaluationSection
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.errors import ConfigError, DataError, ModelError
from finetune.generation import messages, predict, prompts, replay
from finetune.generation.dialogues import Measured
from finetune.generation.generate import Reply
from finetune.generation.predict import PredictOptions, _Work
from finetune.generation.prompts import PromptStream, Question
from finetune.generation.settings import Placement, Sampling
from finetune.generation.structured import Form
from finetune.storage.seen import SeenFiles

# --- prompts -----------------------------------------------------------------------------------


def dialogue(*roles: str, location: str = "d:1", **train: bool) -> Conversation:
    turns = [Message(role, f"{role} {n}", train=train.get(f"m{n}")) for n, role in enumerate(roles)]  # type: ignore[arg-type]  # fmt: skip
    return Conversation(tuple(turns), location=location)


class Template:
    """A template whose prompts have a token for every message before the reply."""

    layout = SimpleNamespace(opens=lambda *_: "", as_read=lambda message: message)

    def prompts(self, questions: Any) -> list[list[int]]:
        return [self.prompt(conversation, reply) for conversation, reply in questions]

    def prompt(self, conversation: Conversation, reply: int) -> list[int]:
        return [ord(message.content[0]) for message in conversation.messages[:reply] for _ in range(3)]  # fmt: skip


def stream(*dialogues: Conversation, **options: Any) -> PromptStream:
    template: Any = Template()
    return PromptStream(dialogues, template, **options)


TWO = dialogue("system", "user", "assistant", "user", "assistant", "assistant")


@pytest.mark.parametrize(
    ("replies", "asked"), [("every_reply", [2, 4, 5]), ("last_reply", [5]), ("next_reply", [4])]
)  # fmt: skip
def test_the_replies_that_are_asked_for_are_those_of_the_option(replies: Any, asked: list[int]) -> None:  # fmt: skip
    assert [one.index for one in stream(TWO, replies=replies)] == asked
    open_end = dialogue("user", "assistant", "user")
    assert [one.index for one in stream(open_end, replies="next_reply")] == [3]


def test_a_reply_that_is_not_to_be_learned_is_not_asked_for() -> None:
    one = dialogue("user", "assistant", "user", "assistant", m1=True, m3=False)
    assert [found.index for found in stream(one)] == [1]
    assert [found.index for found in stream(one, replies="last_reply")] == [1]


def test_each_reply_of_the_data_is_as_likely_in_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Question(dialogue("user", "assistant", location=f"d:{n}"), 1) for n in range(5)]
    counts = dict.fromkeys(range(5), 0)
    for seed in range(600):
        monkeypatch.setattr(prompts, "_SAMPLE_SEED", seed)
        found = [int(one.conversation.location[2:]) for one in prompts._sample(iter(asked), 2)]
        assert found == sorted(set(found))
        for place in found:
            counts[place] += 1
    assert all(190 < number < 290 for number in counts.values()), (
        counts
    )  # 240, four standard errors
    assert len(prompts._sample(iter(asked), 9)) == 5


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, 15), (15, 15), (14, 9), (9, 9), (8, 6), (6, 6), (5, None)]
)  # fmt: skip
def test_as_many_turns_stay_as_fit_to_the_last_token(limit: int | None, kept: int | None) -> None:
    # Three tokens a message: a system message and three turns, the first of two messages.
    one = dialogue("system", "user", "assistant", "user", "user", "assistant")
    found = stream(one, replies="last_reply", max_prompt=limit)
    lengths = [len(prompt.prompt_ids) for prompt in found]
    assert lengths == ([] if kept is None else [kept])
    counts = found.counts
    assert (counts.replies, counts.sampled, counts.dropped) == (1, 1, int(kept is None))
    assert counts.shortened == int(kept is not None and kept < 15)
    if kept is None:
        assert counts.named == ("d:1: the prompt of message 6 is too long",)


def test_a_prompt_leaves_room_for_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    section = EvaluationSection(max_new_tokens=10, max_samples=None, replies="last_reply")
    template: Any = Template()
    for positions, number in ((None, 1), (16, 1), (15, 0)):
        one = dialogue("system", "user", "assistant")
        assert len(list(PromptStream.of([one], template, section, positions))) == number, positions


def test_only_the_first_that_do_not_fit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = stream(*[dialogue("user", "assistant", location=f"d:{n}") for n in range(8)], max_prompt=1, max_samples=7)  # fmt: skip
    assert list(found) == []
    counts = found.counts
    assert (counts.replies, counts.sampled, counts.dropped, len(counts.named)) == (8, 7, 7, 5)
    counts.say()
    said = capsys.readouterr()
    assert "generating 7 of 8 replies, always the same ones" in said.out
    assert "7 prompts do not fit into the context" in said.err


# --- what is written ---------------------------------------------------------------------------


def asked(conversation: Conversation, index: int) -> Any:
    template: Any = SimpleNamespace(layout=None, messages=lambda ids, tools: list(ids))
    return SimpleNamespace(conversation=conversation, index=index, template=template, reference=conversation.messages[index] if index < len(conversation.messages) else None)  # fmt: skip


TOOLS = ({"type": "function", "function": {"name": "f"}},)
CALL, TEXT = Message("assistant", "{}", "f"), Message("assistant", "said")


def test_a_line_has_the_dialogue_the_reply_and_the_reference_where_there_is_one() -> None:
    one = dialogue("user", "assistant", location="d:7")
    row = messages.reply_row(asked(one, 1), Reply(0, (TEXT,), True))  # type: ignore[arg-type]
    assert row == {
        "where": "d:7", "messages": [{"role": "user", "content": "user 0"}, {"role": "assistant", "content": "said"}],
        "reference": {"role": "assistant", "content": "assistant 1"}, "stopped": True,
    }  # fmt: skip
    bare = messages.reply_row(asked(dialogue("user"), 1), Reply(0, (TEXT,), False))  # type: ignore[arg-type]
    assert "reference" not in bare
    assert bare["stopped"] is False


def test_calls_are_written_in_both_forms_up_to_a_text() -> None:
    one = replace(dialogue("user"), tools=TOOLS)
    row = messages.reply_row(asked(one, 1), Reply(0, (CALL, CALL, TEXT, CALL), True))  # type: ignore[arg-type]
    assert [message.get("metadata") for message in row["messages"][1:]] == ["f", "f", None]
    assert [call["id"] for call in row["tool_calls"]] == ["call_0", "call_1"]
    assert row["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert row["tools"] == list(TOOLS)


@pytest.mark.parametrize(
    ("message", "tools", "is_call"),
    [(CALL, TOOLS, True), (CALL, (), False), (replace(CALL, metadata="no name"), TOOLS, False), (TEXT, TOOLS, False)],
)  # fmt: skip
def test_a_first_line_is_a_name_where_a_function_can_be_meant(
    message: Message, tools: Any, is_call: bool
) -> None:
    found = messages.as_reply(message, tools)
    assert bool(found.metadata) is is_call
    if message.metadata and not is_call:
        assert found.content == f"{message.metadata}\n{message.content}"


# --- predict -----------------------------------------------------------------------------------


def work(tmp_path: Path, **changes: Any) -> _Work:
    data = write_rows(tmp_path / "d.jsonl", [{"a": 1}])
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "weights").write_text("w")
    one = _Work(str(model), None, PredictOptions(), None, None, Measured([1, 2], SeenFiles.of([data])))  # type: ignore[arg-type]  # fmt: skip
    return one._replace(**changes)


def test_lines_are_kept_for_the_same_request_alone(tmp_path: Path) -> None:
    found = {"as it is": predict._identity(work(tmp_path))}
    assert predict._identity(work(tmp_path)) == found["as it is"]
    found["base"] = predict._identity(work(tmp_path, base="b"))
    for name, change in {"max_new_tokens": 7, "batch_size": 7, "seed": 7, "num_replies": 7, "sampling": Sampling(0.5), "form": Form("{}"), "placement": Placement(quantization="nf4")}.items():  # fmt: skip
        found[name] = predict._identity(work(tmp_path, options=PredictOptions(**{name: change})))
    (tmp_path / "d.jsonl").write_text('{"a": 2}\n')
    changed = SeenFiles.of([tmp_path / "d.jsonl"])
    found["data"] = predict._identity(work(tmp_path)._replace(measured=Measured([1], changed)))
    (tmp_path / "model" / "weights").write_text("v")
    one = work(tmp_path)
    (tmp_path / "model" / "weights").write_text("v")
    found["weights"] = predict._identity(one)
    (tmp_path / "model" / "more").write_text("")
    found["another file"] = predict._identity(one)
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_replies": 2}, "2 greedy replies to a dialogue are all the same"), ({"backend": "vllm", "form": Form("{}")}, "--json-schema and --require-call go with"),
        ({"backend": "vllm", "placement": Placement(device_map="auto")}, "--device-map and --quantization go with"), ({"backend": "vllm", "sampling": Sampling(0.5)}, "sampling and --num-replies go with"),
        ({"num_replies": 2, "sampling": Sampling(0.5)}, None), ({"backend": "vllm"}, None), ({"form": Form("{}"), "placement": Placement(device_map="auto")}, None),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], said: str | None) -> None:  # fmt: skip
    if said is None:
        PredictOptions(**options).check()
        return
    with pytest.raises(ConfigError, match=said):
        PredictOptions(**options).check()


class Part:
    """The output of `predict`, in memory."""

    def __init__(self, kept: list[bool]) -> None:
        self.kept, self.rows, self.finished = kept, list[Any](), False
        self.journal: Any = SimpleNamespace(append=lambda rows: self.rows.extend(rows))
        self.output = Path("out.jsonl")

    def open(self, of: Any) -> list[bool]:
        return self.kept

    def finish(self) -> None:
        self.finished = True


def answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: Part, seen: Any, **options: Any) -> Any:  # fmt: skip
    """Six replies to three dialogues, four of them after a kill."""

    def answered(backend: Any, stream: Any, how: Any, *, behind: int, total: int) -> Any:
        assert (behind, total) == (len(part.kept), 6)
        left = list(stream)[behind:]
        for window in (left[:3], left[3:]):
            yield [(prompt, SimpleNamespace(stopped=prompt != "b")) for prompt in window]

    monkeypatch.setattr(predict, "answered", answered)
    monkeypatch.setattr(predict, "reply_row", lambda prompt, reply: {"where": prompt})
    dialogues: Any = SimpleNamespace(prompts=lambda _: iter("abc"), files=["d.jsonl"])
    chosen = PredictOptions(num_replies=2, sampling=Sampling(0.5), **options)
    one = work(tmp_path)._replace(
        options=chosen, dialogues=dialogues, measured=Measured([1] * 3, seen)
    )
    return predict._answer_all(one, part, None)  # type: ignore[arg-type]


def test_several_replies_are_numbered_for_each_dialogue_after_a_kill_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked: list[Any] = []
    seen = SimpleNamespace(states={"i.png": 1}, check=lambda *words: checked.append(words))
    part = Part([True, False, True])
    assert answer(monkeypatch, tmp_path, part, seen) == {"output": "out.jsonl", "replies": 6, "cut": 2}  # fmt: skip
    assert part.rows == [{"where": "b", "reply": 1}, {"where": "c", "reply": 0}, {"where": "c", "reply": 1}]  # fmt: skip
    assert checked == [(["d.jsonl", "i.png"], "they were answered")]
    assert part.finished
    said = capsys.readouterr().out
    assert "3 of 6 replies are there already" in said
    assert "6 replies in out.jsonl; 2 were cut at 512 tokens" in said

    def changed(*_: Any) -> None:
        raise DataError("changed")

    torn = Part([])
    with pytest.raises(DataError, match="changed"):
        answer(monkeypatch, tmp_path, torn, SimpleNamespace(states={}, check=changed))
    assert not torn.finished
    assert predict._number(3, 1) == {}


# --- a base's own replies ----------------------------------------------------------------------


def key_of(monkeypatch: pytest.MonkeyPatch, section: ReplaySection, **model: Any) -> str:
    keys: list[str] = []

    def build(root: Path, key: str, make: Any) -> Any:
        keys.append(key)
        return SimpleNamespace(folder=root, facts={"replies": 1, "cut": 0})

    monkeypatch.setattr(replay, "open_or_build", build)
    monkeypatch.setattr(replay, "local_folder", lambda *_: Path("folder"))
    monkeypatch.setattr(replay, "is_folder", lambda name: name != "hub/model")
    monkeypatch.setattr(replay, "model_fingerprint", lambda _: model.get("fingerprint", "f"))
    replay.replay_of(section, model.get("name", "folder"), model.get("revision"))
    return keys[0]


def test_replies_of_a_base_are_kept_by_the_model_the_prompts_and_the_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    section = ReplaySection(prompts=str(file))
    found = {"as it is": key_of(monkeypatch, section)}
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(file.read_bytes())
    assert key_of(monkeypatch, ReplaySection(prompts=[str(moved)])) == found["as it is"]
    found["model"] = key_of(monkeypatch, section, fingerprint="g")
    found["hub"] = key_of(monkeypatch, section, name="hub/model")
    found["revision"] = key_of(monkeypatch, section, name="hub/model", revision="v2")
    found["length"] = key_of(monkeypatch, ReplaySection(prompts=str(file), max_new_tokens=7))
    found["our prompts"] = key_of(monkeypatch, ReplaySection())
    file.write_text(file.read_text().replace("a", "b"))
    found["content"] = key_of(monkeypatch, section)
    assert len(set(found.values())) == len(found)


def said(content: str, *, stopped: bool = True, question: str = "q") -> dict[str, Any]:
    return {"where": "x", "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": content}], "stopped": stopped}  # fmt: skip


@pytest.mark.parametrize(("row", "kept"), [(said("a"), True), (said(" \n"), False), (said("a", stopped=False), False)])  # fmt: skip
def test_a_reply_that_did_not_end_or_says_nothing_is_not_learned(row: dict[str, Any], kept: bool) -> None:  # fmt: skip
    found = replay._kept(row | {"tools": [1]})
    assert found == ({"messages": row["messages"], "tools": [1]} if kept else None)


@pytest.mark.parametrize(("good", "warned"), [(10, False), (5, False), (4, True), (0, None)])
def test_a_base_that_hardly_answers_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], good: int, warned: bool | None
) -> None:  # fmt: skip
    rows = [said("a" if n < good else "", question=f"q{n}") for n in range(10)]
    monkeypatch.setattr(replay, "load_chat_tokenizer", str)
    monkeypatch.setattr(replay, "ChatTemplate", lambda _: SimpleNamespace(takes_tools=False))
    monkeypatch.setattr(replay, "_predict", lambda _, __, output, ___: write_rows(output, rows))
    prompts_file = write_rows(tmp_path / "p.jsonl", [*[{"messages": []}] * 10, {"messages": [], "tools": [1]}])  # fmt: skip
    stage = tmp_path / "stage"
    stage.mkdir()
    if warned is None:
        with pytest.raises(DataError, match="none of 10 replies"):
            replay._build(stage, Path("m"), [prompts_file], 5)
        return
    assert replay._build(stage, Path("m"), [prompts_file], 5) == {"replies": good, "cut": 10 - good}
    assert ("so little will not keep" in capsys.readouterr().err) is warned
    parts = [read_rows(stage / name) for name in (replay.TRAIN, replay.HELD_OUT)]
    assert sum(map(len, parts)) == good
    assert all(replay._is_held_out(row) is held for part, held in zip(parts, (False, True), strict=True) for row in part)  # fmt: skip
    files = replay.ReplayFiles(stage / replay.TRAIN, stage / replay.HELD_OUT, good, 0)
    replay.write_replay(files, tmp_path / "all.jsonl")
    assert read_rows(tmp_path / "all.jsonl") == parts[0] + parts[1]


def test_a_fifth_is_held_out_by_the_prompt_alone() -> None:
    held = [replay._is_held_out(said("a", question=f"q{n}")) for n in range(500)]
    assert 70 <= sum(held) <= 130
    assert held == [replay._is_held_out(said("b", question=f"q{n}")) for n in range(500)]


def test_a_bases_replies_are_made_alone_and_a_failure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    done: list[Any] = []

    def run(command: list[str], **options: Any) -> Any:
        done.append((command, options))
        return SimpleNamespace(returncode=len(done) - 1, stderr="x" * 3000 + "end\n")

    monkeypatch.setattr(replay.subprocess, "run", run)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "1")
    replay._predict(Path("m"), Path("p"), Path("o"), 33)
    command, options = done[0]
    assert command[0] == sys.executable
    assert command[-2:] == ["--max-new-tokens", "33"]
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & options["env"].keys()
    assert options["env"]["KEPT"] == "1"
    with pytest.raises(ModelError, match="m could not answer the prompts") as error:
        replay._predict(Path("m"), Path("p"), Path("o"), 33)
    assert str(error.value).endswith("x" * 1997 + "end")
