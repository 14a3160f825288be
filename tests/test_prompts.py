"""Prompts whose replies are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from prompt_lists import reply_prompts

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.evaluation.predictions import slices_of
from finetune.generation import prompts as prompts_module


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "glm"}')
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {tiny.EOS_IDS}}}')
    return ChatTemplate(load_chat_tokenizer(folder))


def dialogue(turns: int, location: str = "f:1", **reply: object) -> Conversation:
    messages = [Message("system", "be brief")]
    for turn in range(turns):
        messages += [
            Message("user", f"question {turn}"),
            Message("assistant", f"answer {turn}", **reply),  # type: ignore[arg-type]
        ]
    return Conversation(tuple(messages), location=location)


CALL = Conversation(
    (
        Message("user", "weather?"),
        Message("assistant", '{"city": "北京"}', metadata="get_weather"),
        Message("observation", '{"t": 20}'),
        Message("assistant", "20 degrees"),
    ),
    tools=({"type": "function", "function": {"name": "get_weather", "parameters": {}}},),
    location="f:9",
)


def test_every_reply_has_a_prompt_that_ends_where_it_begins(template):
    prompts = reply_prompts([dialogue(2)], template)
    assert [prompt.text for prompt in prompts] == [
        "[gMASK]<sop><|system|>\nbe brief<|user|>\nquestion 0<|assistant|>",
        "[gMASK]<sop><|system|>\nbe brief<|user|>\nquestion 0<|assistant|>\nanswer 0"
        "<|user|>\nquestion 1<|assistant|>",
    ]
    assert [prompt.reference.content for prompt in prompts] == ["answer 0", "answer 1"]
    assert [prompt.index for prompt in prompts] == [2, 4]
    assert {prompt.location for prompt in prompts} == {"f:1"}


def test_a_prompt_never_contains_its_reference(template):
    for prompt in reply_prompts([dialogue(5), CALL], template):
        assert prompt.reference.content not in prompt.text


def test_a_prompt_is_a_prefix_of_the_rendered_example(template):
    for conversation in (dialogue(3), CALL):
        ids = template.render([conversation])[0].input_ids
        for prompt in reply_prompts([conversation], template):
            assert prompt.prompt_ids.tolist() == ids[: len(prompt.prompt_ids)].tolist()


def test_the_last_reply_alone_can_be_asked_for(template):
    prompts = reply_prompts([dialogue(3), CALL], template, replies="last_reply")
    assert [(p.location, p.index) for p in prompts] == [("f:1", 6), ("f:9", 3)]
    assert prompts.counts.replies == 2


def test_a_call_is_a_reply_and_brings_its_tools(template):
    call, reply = reply_prompts([CALL], template)
    assert call.reference.metadata == "get_weather"
    assert call.tools == CALL.tools
    assert call.text.endswith("<|user|>\nweather?<|assistant|>")
    assert reply.text.endswith('<|observation|>\n{"t": 20}<|assistant|>')


def test_a_reply_that_is_not_to_be_learned_is_no_reference(template):
    mixed = Conversation(
        (
            Message("user", "a"),
            Message("assistant", "wrong", train=False),
            Message("user", "b"),
            Message("assistant", "right"),
        )
    )
    assert [p.reference.content for p in reply_prompts([mixed], template)] == ["right"]
    assert len(reply_prompts([dialogue(2, train=False)], template)) == 0


def test_a_long_prompt_loses_its_oldest_turns_and_nothing_else(template):
    whole = reply_prompts([dialogue(8)], template, replies="last_reply")[0]
    limit = len(whole.prompt_ids) - 1
    prompts = reply_prompts([dialogue(8)], template, replies="last_reply", max_prompt=limit)
    expected = "[gMASK]<sop><|system|>\nbe brief" + "".join(
        f"<|user|>\nquestion {turn}<|assistant|>\nanswer {turn}" for turn in range(1, 7)
    )
    assert prompts[0].text == expected + "<|user|>\nquestion 7<|assistant|>"
    assert prompts[0].reference.content == "answer 7"
    assert prompts[0].index == 16
    assert prompts.counts.shortened == 1


def test_every_limit_keeps_as_many_turns_as_fit(template):
    question = dialogue(9)
    whole = reply_prompts([question], template, replies="last_reply")[0]
    sizes = []
    for limit in range(len(whole.prompt_ids), 0, -1):
        kept = reply_prompts([question], template, replies="last_reply", max_prompt=limit)
        if not kept:
            break
        assert len(kept[0].prompt_ids) <= limit
        sizes.append(kept[0].text.count("<|user|>"))
    assert sorted(set(sizes)) == list(range(1, 10))
    assert sizes == sorted(sizes, reverse=True)


def test_a_last_turn_that_is_too_long_is_counted_and_named(template):
    prompts = reply_prompts([dialogue(1), dialogue(2, "f:2")], template, max_prompt=5)
    assert len(prompts) == 0
    assert prompts.counts.dropped == 3
    assert prompts.counts.named[:2] == (
        "f:1: the prompt of message 3 is too long",
        "f:2: the prompt of message 3 is too long",
    )


def test_a_sample_is_the_same_every_time_and_in_order(template):
    data = [dialogue(2, f"f:{line}") for line in range(1, 301)]
    first = reply_prompts(iter(data), template, max_samples=20)
    second = reply_prompts(iter(data), template, max_samples=20)
    places = [(int(p.location[2:]), p.index) for p in first]
    assert places == [(int(p.location[2:]), p.index) for p in second]
    assert places == sorted(places)
    assert len(set(places)) == 20
    assert places[-1][0] > 150
    assert (first.counts.replies, first.counts.sampled) == (600, 20)


def test_a_sample_larger_than_the_data_is_all_of_it(template):
    assert len(reply_prompts([dialogue(2)], template, max_samples=50)) == 2


def test_dialogues_are_read_as_a_stream(template: ChatTemplate, tmp_path: Path):
    # 256 questions are encoded at once: the 257th must not be asked for before that.
    seen = []

    def stream():
        for line in range(1000):
            seen.append(line)
            yield dialogue(1, f"f:{line}")

    original = template.prompts
    sizes = []

    class Watching:
        def prompts(self, requests):
            sizes.append((len(requests), len(seen)))
            return original(requests)

    reply_prompts(stream(), Watching())  # type: ignore[arg-type]
    assert sizes == [(256, 256), (256, 512), (256, 768), (232, 1000)]


def test_a_turn_with_an_image_stays_when_later_turns_are_dropped() -> None:
    said = ["a picture", "of a cat", "a long question" * 9, "a long answer" * 9, "the last", "fine"]
    roles = ["user", "assistant"] * 3
    messages = tuple(Message(role, text) for role, text in zip(roles, said, strict=True))  # type: ignore[arg-type]
    messages = (replace(messages[0], images=(ShownImage("cat.png"),)), *messages[1:])
    asked: list[list[str]] = []

    class Layout:
        def prompt(self, conversation: Conversation, reply: int) -> list[int]:
            asked.append([message.content for message in conversation.messages[:reply]])
            return [0] * sum(len(message.content) for message in conversation.messages[:reply])

    template: Any = Layout()
    question = prompts_module.Question(Conversation(messages), 5)
    kept = prompts_module._shortened(question, [0] * 10**6, template, 60)
    assert kept is not None
    assert asked == [["a picture", "of a cat", "the last"]]


def test_images_of_what_comes_later_do_not_let_the_first_turn_go() -> None:
    """A reply is asked behind its own past: a question after it is not in its prompt."""
    roles = ["system", "user", "assistant", "user", "assistant", "user", "assistant", "user", "assistant"]  # fmt: skip
    messages = [Message(role, f"{n}") for n, role in enumerate(roles)]  # type: ignore[arg-type]
    for place in (1, 7):
        messages[place] = replace(messages[place], images=(ShownImage("cat.png"),))

    class Layout:
        def prompt(self, conversation: Conversation, reply: int) -> list[int]:
            return [int(message.content) for message in conversation.messages[:reply]]

    template: Any = Layout()
    question = prompts_module.Question(Conversation(tuple(messages)), 6)
    assert prompts_module._shortened(question, [0] * 6, template, 4) == [0, 1, 2, 5]


@pytest.mark.parametrize(
    ("tools", "name", "kind"),
    [((), "", "plain"), (({"type": "function"},), "", "tool"), ((), "get_weather", "tool")],
)
def test_a_reply_beside_tools_counts_as_one_with_tools_whether_or_not_it_calls(
    template: ChatTemplate, tools: Any, name: str, kind: str
) -> None:
    [prompt] = reply_prompts([dialogue(1)], template)
    reference = Message("assistant", "{}", name)
    messages = (*prompt.conversation.messages[: prompt.index], reference)
    asked = replace(prompt, conversation=Conversation(messages, tools))
    assert slices_of(asked)["kind"] == kind
