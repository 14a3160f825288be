"""What `predict` opens, asks and keeps; and how dialogues are read for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pictures
import pytest
from rows import write_rows

from finetune.config.schema import EvaluationSection
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.errors import ConfigError, DataError, ModelError
from finetune.generation import generate, load, messages, predict, prompts
from finetune.generation.dialogues import Dialogues, Measured, RowOptions
from finetune.generation.predict import PredictOptions, _Work
from finetune.generation.prompts import PromptStream, prompts_of
from finetune.generation.replies import Answering
from finetune.generation.settings import GREEDY, Placement, Sampling, Settings, settings_of
from finetune.generation.structured import Form, PromptForm
from finetune.storage.seen import SeenFiles

# --- opening ---------------------------------------------------------------------------------------


def work(**changes: Any) -> _Work:
    seen = SeenFiles.of([])
    one = _Work("m", "b", PredictOptions(7, 3, placement=Placement(None, "nf4")), None, "template", Measured([4, 9], seen))  # type: ignore[arg-type]  # fmt: skip
    return one._replace(**changes)


def test_replies_are_written_by_the_model_as_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    done: list[Any] = []

    @contextmanager
    def joined() -> Iterator[None]:
        done.append("joined")
        yield
        done.append("left")

    opened = SimpleNamespace(model="model", template="its own")
    monkeypatch.setattr("finetune.distributed.processes.joined_processes", joined)
    monkeypatch.setattr(load, "open_model", lambda target, **how: done.append((target, how)) or opened)  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr(generate, "context_length", lambda model: f"room of {model}")
    monkeypatch.setattr(predict, "_check_context", lambda limit, asked: done.append((limit, asked)))
    monkeypatch.setattr(generate, "Generator", lambda *given, **how: (given, how))
    with predict._backend(work()) as made:
        assert made == (("model", "its own"), {"max_new_tokens": 7, "batch_size": 3})
        assert done == ["joined", ("m", {"base": "b", "placement": Placement(None, "nf4")}), ("room of model", work())]  # fmt: skip
    assert done[-1] == "left"


def test_vllm_has_room_for_the_longest_dialogue_and_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from finetune.generation.backends import vllm

    done: list[Any] = []
    monkeypatch.setattr(vllm, "context_of", lambda target, base: (target, base))
    monkeypatch.setattr(predict, "_check_context", lambda limit, asked: done.append(limit))
    monkeypatch.setattr(vllm, "VllmGenerator", lambda *given, **how: done.append((given, how)) or SimpleNamespace(close=lambda: done.append("closed")))  # type: ignore[func-returns-value]  # fmt: skip
    for lengths, longest in (([4, 9], 16), ([], 8)):
        done.clear()
        asked = work(options=PredictOptions(7, backend="vllm"), measured=Measured(lengths, SeenFiles.of([])))  # fmt: skip
        with predict._backend(asked):
            assert done == [("m", "b"), (("m", "template"), {"base": "b", "max_length": longest, "max_new_tokens": 7})]  # fmt: skip
        assert done[-1] == "closed"


def test_replies_are_made_and_kept_as_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(predict, "answered", lambda *given, **how: asked.append(given) or iter(()))  # type: ignore[func-returns-value]
    options = PredictOptions(7, 3, sampling=Sampling(0.5), seed=4, form=Form("{}"))
    part: Any = SimpleNamespace(open=lambda of: [], journal="journal", output=Path("o"), finish=lambda: None)  # fmt: skip
    dialogues: Any = SimpleNamespace(prompts=lambda template: iter([template]), files=[])
    predict._answer_all(work(options=options, dialogues=dialogues), part, "backend")  # type: ignore[arg-type]
    [(backend, stream, how)] = asked
    assert (backend, list(stream)) == ("backend", ["template"])
    assert how == Answering("template", 3, "journal", Sampling(0.5), 4, Form("{}"))  # type: ignore[arg-type]
    assert how.window == 3 * 64


def test_what_is_asked_of_a_window_is_drawn_and_formed_by_its_prompts() -> None:
    told: list[Any] = []
    form: Any = SimpleNamespace(constraint_at=lambda template, asked: told.append((template, asked)) or "at")  # type: ignore[func-returns-value]  # fmt: skip
    how = Answering("template", 2, None, Sampling(0.5), 4, form)  # type: ignore[arg-type]
    given: Any = [SimpleNamespace(tools=("t",), opened="o"), SimpleNamespace(tools=(), opened="")]
    extras = how.extras(9, given)
    assert extras.constraint_at == "at"
    assert extras.sampling == generate.SeededSampling(Sampling(0.5), 4, 9)
    assert told == [("template", [PromptForm(("t",), "o"), PromptForm((), "")])]
    assert replace(how, sampling=GREEDY).extras(0, given).sampling is None


def test_a_file_too_large_to_be_read_twice_is_told_by_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").write_text("w" * 9)
    asked = work(target=str(tmp_path), base=None)
    for most, same in ((9, True), (8, False)):
        monkeypatch.setattr(predict, "HASHED_WHOLE", most)
        before = predict._identity(asked)
        os.utime(tmp_path / "weights", (1, 1 + most))
        assert (predict._identity(asked) == before) is same


def test_all_is_checked_before_a_line_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for name in ("model", "base", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    model, base, data = (str(tmp_path / name) for name in ("model", "base", "data"))
    done: list[Any] = []
    options = PredictOptions(batch_size=3, form=Form("{}"))
    dialogues = SimpleNamespace(files=["d"], measured=lambda template: Measured([1], SeenFiles.of([])))  # fmt: skip
    monkeypatch.setattr(predict, "Dialogues", lambda *given: dialogues)
    monkeypatch.setattr(predict, "check_output", lambda *given, **how: done.append((given, how)))
    monkeypatch.setattr(load, "open_template", lambda target, base: done.append((target, base)) or "template")  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr(PredictOptions, "check", lambda self: done.append("options"))
    monkeypatch.setattr(Form, "check", lambda self, template: done.append((self, template)))
    monkeypatch.setattr(predict, "ResumableOutput", lambda output, key, **how: done.append((output, how)) or SimpleNamespace(close=lambda: None))  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr(predict, "_backend", nullcontext)
    monkeypatch.setattr(predict, "_answer_all", lambda asked, part, backend: asked)
    output = tmp_path / "o.jsonl"
    asked: Any = predict.predict(model, [data], output, base=base, options=options, overwrite=True)
    inputs = ["d", Path(data), Path(model) / "file", Path(base) / "file"]
    assert done == [
        ((output, inputs), {"overwrite": True, "is_ours": predict._is_output}), (model, base), "options", (Form("{}"), "template"),
        (output, {"window": 3 * 64, "overwrite": True}),
    ]  # fmt: skip
    assert (asked.target, asked.base, asked.options, asked.template) == (model, base, options, "template")  # fmt: skip


def test_an_output_is_let_go_however_the_command_ends(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    close = predict.ResumableOutput.close
    monkeypatch.setattr(predict.ResumableOutput, "close", lambda part: closed.append(part.output.name) or close(part))  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr(predict, "_backend", nullcontext)
    monkeypatch.setattr(predict, "_answer_all", lambda *_: 1 // 0)
    source = write_rows(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ZeroDivisionError):
        predict.predict(str(tiny_glm), [str(source)], tmp_path / "out.jsonl")
    assert closed == ["out.jsonl"]


@pytest.mark.parametrize(
    ("line", "ours"),
    [({"where": "x", "messages": [], "stopped": True}, True), ({"where": "x", "messages": [], "stopped": True, "more": 1}, True), ({"where": "x", "messages": []}, False), ([1], False), (None, False)],
)  # fmt: skip
def test_a_file_is_ours_by_its_first_line(line: Any, ours: bool, tmp_path: Path) -> None:
    file = tmp_path / "o.jsonl"
    file.write_text("" if line is None else json.dumps(line) + "\n")
    assert predict._is_output(file) is ours


def test_only_files_of_a_folder_are_its_model(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in "ba":
        (tmp_path / name).touch()
    assert predict._files_of(str(tmp_path)) == [tmp_path / "a", tmp_path / "b"]
    assert predict._files_of("org/model") == []


# --- dialogues -------------------------------------------------------------------------------------


def test_what_the_command_says_of_rows_stands_before_what_the_run_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from finetune.config.schema import DataSection

    trained = DataSection(train=["x"], format="openai", image_root="there", ignore_columns=["a"], max_length=9, turns="merge")  # type: ignore[call-arg]  # fmt: skip
    monkeypatch.setattr("finetune.generation.dialogues.settings_of", lambda target: Settings(trained, EvaluationSection()))  # fmt: skip
    kept = RowOptions().section("checkpoint")
    assert (kept.format, kept.image_root, kept.ignore_columns, kept.turns) == ("auto", None, ["a"], "merge")  # type: ignore[attr-defined]  # fmt: skip
    assert kept.train == []
    said = RowOptions(("q", "a"), "messages", "here", ("ignore_columns=b,c",)).section("checkpoint")
    assert (said.format, said.image_root, said.ignore_columns) == ("messages", "here", ["b", "c"])
    assert said.columns is not None
    assert (said.columns.prompt, said.columns.response) == ("q", "a")


def test_dialogues_are_measured_with_their_images_before_anything_is_asked(tmp_path: Path) -> None:
    template = ChatTemplate(load_chat_tokenizer(pictures.save_model(tmp_path / "glm4v")))
    file = pictures.write_dialogues(tmp_path / "data", 4)
    dialogues = Dialogues([str(file)], RowOptions().section("m"))
    found = dialogues.measured(template)
    assert found.lengths == [len(prompt.prompt_ids) for prompt in dialogues.prompts(template)]
    assert {Path(name).name for name in found.seen.states} == {"rows.jsonl", "red.png", "blue.png"}
    assert dialogues.files == [file]
    (tmp_path / "data/images/blue.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"rows\.jsonl:3"):
        dialogues.measured(template)


# --- prompts ---------------------------------------------------------------------------------------


class Words:
    """A template whose prompts have a token a message."""

    layout = SimpleNamespace(opens=lambda talk, reply: f"opened {reply}", as_read=lambda message: message)  # fmt: skip

    def prompts(self, questions: Any) -> list[list[int]]:
        return [self.prompt(*question) for question in questions]

    def prompt(self, conversation: Conversation, reply: int) -> list[int]:
        return [1] * reply

    def decode(self, ids: Any) -> str:
        return f"{len(ids)} tokens"

    def visible(self, message: Message) -> str:
        return message.content.removeprefix("thought ")


def talk(turns: int, **more: Any) -> Conversation:
    said = [Message(role, f"{role} {n}") for n in range(turns) for role in ("user", "assistant")]  # type: ignore[arg-type]  # fmt: skip
    return Conversation((Message("system", "S"), *said), location="f:3", **more)


def test_a_prompt_says_where_it_stands_and_what_it_is_compared_with() -> None:
    call = Message("assistant", "thought {}", "f")
    asked = Conversation((*talk(2).messages, Message("user", "q"), call), ({"type": "function"},), location="f:3")  # fmt: skip
    *_, last = PromptStream([asked], Words())  # type: ignore[arg-type]
    assert (last.location, last.name, last.index, last.turns) == ("f:3", "f:3 message 7", 6, 3)
    assert (last.tools, last.opened, last.text, last.images) == (asked.tools, "opened 6", "6 tokens", ())  # fmt: skip
    assert last.reference == Message("assistant", "{}", "f")
    assert last.prompt_ids.dtype == "int32"  # type: ignore[union-attr]


def test_prompts_are_those_that_the_section_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    data = [talk(3), talk(2), talk(1)]
    template: Any = Words()

    def found(positions: int | None = None, **section: Any) -> list[tuple[int, int]]:
        options = {"replies": "every_reply", "max_samples": None, "max_new_tokens": 10} | section
        made = prompts_of(data, template, EvaluationSection(**options), positions)
        return [(len(one.conversation.messages), one.index) for one in made]

    assert found() == [(7, 2), (7, 4), (7, 6), (5, 2), (5, 4), (3, 2)]
    assert capsys.readouterr() == ("", "")
    assert found(replies="last_reply") == [(7, 6), (5, 4), (3, 2)]
    assert len(found(max_samples=2)) == 2
    assert "generating 2 of 6 replies" in capsys.readouterr().out
    shorter = [len(one.prompt_ids) for one in prompts_of(data, template, EvaluationSection(replies="last_reply", max_samples=None, max_new_tokens=10), 14)]  # fmt: skip
    assert shorter == [4, 4, 2]
    assert "1 prompts lost their oldest turns to fit into the context" in capsys.readouterr().out


def test_a_shortened_prompt_is_laid_out_before_the_very_reply() -> None:
    """The reply stays behind it: a template may say of what is coming whether it has a thought."""
    seen: list[list[str]] = []

    class Noting(Words):
        def prompt(self, conversation: Conversation, reply: int) -> list[int]:
            seen.append([message.content for message in conversation.messages[reply:]])
            return [1] * reply

    asked = prompts.Question(talk(4), 4)
    found = prompts._shortened(asked, [1] * 9, Noting(), 3)  # type: ignore[arg-type]
    assert found == [1, 1]
    assert seen
    assert all(behind == ["assistant 1"] for behind in seen)


def test_every_system_message_stays_once_in_a_shortened_prompt() -> None:
    seen: list[list[str]] = []

    class Noting(Words):
        def prompt(self, conversation: Conversation, reply: int) -> list[int]:
            seen.append([message.content for message in conversation.messages[:reply]])
            return [1] * reply

    said = talk(4).messages  # S, then user and assistant 0 to 3
    between = [*said[:3], Message("system", "T"), *said[3:7], Message("system", "U"), *said[7:]]
    asked = prompts.Question(Conversation(tuple(between)), 10)
    assert prompts._shortened(asked, [1] * 10, Noting(), 6) == [1] * 6  # type: ignore[arg-type]
    assert ["S", "T", "user 2", "assistant 2", "U", "user 3"] in seen
    assert all(shown.count(name) == 1 for shown in seen for name in "STU")


def test_the_images_of_a_message_are_written_where_they_stand() -> None:
    first = Message("user", "Q", images=(ShownImage("a.png"),))
    assert messages.message_json(first) == {"role": "user", "content": "Q", "image": "a.png"}
    later = Message("user", "Q and", images=(ShownImage("a.png", 2), ShownImage("b.png", 5)))
    found = messages.message_json(later)
    assert found["images"] == ["a.png", "b.png"]
    assert "image" not in found
    assert found["content"] != later.content
    call = Message("assistant", "{}", "f")
    assert messages.message_json(call) == {"role": "assistant", "metadata": "f", "content": "{}"}


# --- settings --------------------------------------------------------------------------------------


def test_changed_settings_of_an_evaluation_are_checked_and_the_others_stay() -> None:
    plain = settings_of("nowhere")
    found = plain.with_changes(["x.jsonl"], {"max_new_tokens": 7, "batch_size": None, "format": "openai"})  # fmt: skip
    assert (found.evaluation.max_new_tokens, found.evaluation.batch_size) == (7, plain.evaluation.batch_size)  # fmt: skip
    assert (found.data.format, found.data.validation) == ("openai", ["x.jsonl"])
    assert found.with_changes([], {}).data.validation == ["x.jsonl"]
    assert plain.with_changes([], {}, needs_data=False).data.validation == plain.data.validation
    with pytest.raises(ConfigError, match="give held-out files with --data"):
        plain.with_changes([], {})
    with pytest.raises(ConfigError, match=r"evaluation options: max_new_tokens: .*; batch_size: "):
        plain.with_changes(["x"], {"max_new_tokens": 0, "batch_size": 0})
    policy = replace(plain, data=plain.data.model_copy(update={"max_length": 9, "train_on": "last_reply", "on_too_long": "drop"})).policy  # fmt: skip
    assert (policy.max_length, policy.train_on, policy.on_too_long) == (9, "last_reply", "drop")


# --- opening several -------------------------------------------------------------------------------


def test_models_beside_each_other_are_opened_with_their_base_and_placement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(load, "check_openable", lambda target: done.append(("checked", target)))
    monkeypatch.setattr(load.Models, "key", lambda self, target, base: (target[0], base))
    monkeypatch.setattr(load.Models, "beside", lambda self, target, base: (id(self), self._placement, target, base))  # fmt: skip
    place = Placement(None, "nf4")
    found: Any = load.open_side_by_side({"1": "a1", "2": "a2", "3": "b"}, base="base", placement=place)  # fmt: skip
    assert [one[1:] for one in found.values()] == [(place, target, "base") for target in ("a1", "a2", "b")]  # fmt: skip
    assert found["1"][0] == found["2"][0] != found["3"][0]
    assert done == [("checked", "a1"), ("checked", "a2"), ("checked", "b")]
    beside = load.SideBySide("other", place)
    again: Any = load.open_side_by_side({"1": "a1"}, beside=beside)
    assert again["1"][3] == "other"
    assert beside.open("a9")[0] == again["1"][0]  # type: ignore[index]
    asked: list[Any] = []
    monkeypatch.setattr(load.Models, "open", lambda self, target, base: asked.append((target, base, self._placement)))  # fmt: skip
    load.open_model("x", base="y", placement=place)
    assert asked == [("x", "y", place)]


def test_a_base_is_loaded_as_its_key_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune.models.load as weights
    from finetune.distributed import device

    loaded: list[Any] = []
    monkeypatch.setattr(weights, "load_model", lambda path, **how: loaded.append((path, how)) or SimpleNamespace(to=lambda where: where))  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr(device, "local_device", lambda: "here")
    monkeypatch.setattr(device, "unused", lambda: "the GPU is not used")
    key = (SimpleNamespace(path="p", revision="r"), "float32", "eager", "nf4", "torch")
    asked: list[Any] = []
    monkeypatch.setattr(load.Models, "key", lambda self, target, base, like: asked.append((target, base, like)) or key)  # type: ignore[func-returns-value]  # fmt: skip
    warned: list[str] = []
    monkeypatch.setattr(load.console, "warn_once", warned.append)
    quiet: list[int] = []
    monkeypatch.setattr("finetune.models.library_logging.quiet_libraries", lambda: quiet.append(1))
    models = load.Models()
    models._load("t", "b", "l")
    assert quiet == [1]
    assert asked == [("t", "b", "l")]
    assert loaded == [("p", {"revision": "r", "dtype": "float32", "attention": "eager", "quantization": "nf4", "kernels": "torch", "device_map": None})]  # fmt: skip
    assert (models._base, warned) == ("here", ["the GPU is not used"])


def test_an_adapter_whose_base_is_gone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    gone = SimpleNamespace(path=str(tmp_path / "gone"), revision=None)
    monkeypatch.setattr(load, "check_openable", lambda target: None)
    monkeypatch.setattr(load, "model_base", lambda target, base: gone)
    monkeypatch.setattr(load, "is_adapter", lambda target: True)
    with pytest.raises(ModelError, match="say where its base model is now"):
        load.open_template("a")
