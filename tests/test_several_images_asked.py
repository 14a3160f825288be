"""Several images in any turn, asked of the endpoint, on its page and in the chat."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pictures
import pytest
import serving
from pictures import NAMES, user

from finetune.chat.terminal import Session, Terminal, Voice
from finetune.data.chat.image import image_size
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.generation.load import open_model
from finetune.serving.errors import ApiError
from finetune.serving.page.saved import Dialogue, read_row, training_row
from finetune.serving.requests.completion import AskedCompletion
from finetune.serving.requests.images import PREFIX
from finetune.serving.requests.rules import RequestRules

ANSWER = {"role": "assistant", "content": "A"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.save_grid_model(tmp_path_factory.mktemp("grid") / "model")


@pytest.fixture(scope="module")
def template(folder: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(folder))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.draw(tmp_path_factory.mktemp("drawn"))


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def shown_part(size: tuple[int, int], colour: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": serving.data_url(size, colour)}}


def rules_of(template: ChatTemplate) -> RequestRules:
    return RequestRules("tiny", template, None, 8)


def test_the_endpoint_takes_images_in_any_question(
    template: ChatTemplate, drawn: Path, tmp_path: Path
) -> None:
    body = {"model": "tiny", "messages": [
        {"role": "user", "content": [shown_part((60, 60), "red"), text_part("or"), shown_part((40, 120), "green")]},
        ANSWER,
        {"role": "user", "content": [text_part("and "), shown_part((150, 70), "blue")]},
    ]}  # fmt: skip
    prompt: Any = serving.read_chat(body, rules_of(template), tmp_path).prompt
    dialogue = Conversation((
        user("a.png", "or", "b.png", folder=drawn), Message("assistant", "A"),
        user("and ", "c.png", folder=drawn),
    ))  # fmt: skip
    wanted: Any = template.prompt(dialogue, 3)
    assert prompt == wanted
    for name, array in wanted.arrays().items():
        assert (prompt.arrays()[name] == array).all()


def test_a_request_of_too_many_images_or_pixels_is_refused_before_one_is_decoded(
    template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.serving.requests.images.check_image", lambda *_, **__: 1 // 0)
    monkeypatch.setattr("finetune.serving.requests.images.MAX_PIXELS_TOGETHER", 7_000)
    small, large = shown_part((20, 10), "red"), shown_part((40, 50), "red")
    for content, reason, param in (
        ([small] * 33, "33 images are more than the 32 taken", "messages"),
        ([large] * 5, "the images have more than 7,000 pixels together", "messages.1.content.3"),
    ):
        body = {"model": "tiny", "messages": [ANSWER, {"role": "user", "content": content}]}
        with pytest.raises(ApiError, match=reason) as caught:
            serving.read_chat(body, rules_of(template), tmp_path)
        assert caught.value.param == param
    body["messages"] = [{"role": "user", "content": [small] * 32}]
    with pytest.raises(ZeroDivisionError):
        serving.read_chat(body, rules_of(template), tmp_path)
    body["messages"] = [{"role": "user", "content": [large, large, large, shown_part((10, 100), "red")]}]  # fmt: skip
    with pytest.raises(ZeroDivisionError):  # 7,000 are not more
        serving.read_chat(body, rules_of(template), tmp_path)


@pytest.mark.parametrize(
    ("url", "reason"),
    [("data:image/png;base64,QUJD", "the image cannot be shown"), ("data:image/png;base64,@", "holds no base64"), ("data:image/png,x", "is not data:image"), ("http://x/y.png", "no address is fetched")],
)  # fmt: skip
def test_an_image_that_cannot_be_taken_is_named_by_its_place(
    template: ChatTemplate, tmp_path: Path, url: str, reason: str
) -> None:
    content = [text_part("Q"), shown_part((4, 4), "red"), {"type": "image_url", "image_url": {"url": url}}]  # fmt: skip
    body = {"model": "tiny", "messages": [ANSWER, {"role": "user", "content": content}]}
    with pytest.raises(ApiError, match=reason) as caught:
        serving.read_chat(body, rules_of(template), tmp_path)
    assert (caught.value.status, caught.value.param) == (400, "messages.1.content.2")
    body["messages"] = [ANSWER, {"role": "user", "content": "Q", "image": "x.png"}]
    with pytest.raises(ApiError, match="comes as an image_url part") as caught:
        serving.read_chat(body, rules_of(template), tmp_path)
    assert caught.value.param == "messages.1"


def test_a_url_may_stand_without_its_object(template: ChatTemplate, tmp_path: Path) -> None:
    shown = shown_part((60, 60), "red")
    bare = {"type": "image_url", "image_url": shown["image_url"]["url"]}
    prompts = []
    for number, part in enumerate((shown, bare)):
        body = {"model": "tiny", "messages": [{"role": "user", "content": [part, text_part("Q")]}]}
        (tmp_path / str(number)).mkdir()
        prompts.append(serving.read_chat(body, rules_of(template), tmp_path / str(number)).prompt)
    assert prompts[0] == prompts[1]


def test_a_message_for_a_client_numbers_its_images_and_names_no_folder_of_this_machine(
    template: ChatTemplate, tmp_path: Path
) -> None:
    folder = tmp_path / f"{PREFIX}abc"
    folder.mkdir()
    content = [shown_part((20, 10), "red"), shown_part((4000, 2), "red")]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    with pytest.raises(ApiError, match="image 2: absolute aspect ratio") as caught:
        serving.read_chat(body, rules_of(template), folder)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("begins", [True, False])
def test_a_completion_of_ids_shows_no_image_and_says_so(
    template: ChatTemplate, begins: bool
) -> None:
    assert template.image is not None
    ids = template.tokenizer.control_ids
    token = template.image.begin_id if begins else ids[template.image.patch_token]
    body = json.dumps({"model": "tiny", "prompt": [1, token, 2]}).encode()
    with pytest.raises(ApiError, match="tokens of an image"):
        AskedCompletion(body, {"tiny": rules_of(template)}).replies()
    plain = json.dumps({"model": "tiny", "prompt": [1, 2]}).encode()
    assert len(AskedCompletion(plain, {"tiny": rules_of(template)}).replies()) == 1


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_request_names_no_file_of_the_server(
    template: ChatTemplate, drawn: Path, tmp_path: Path, role: str
) -> None:
    message = {"role": role, "content": "x", "images": [str(drawn / "a.png")]}
    with pytest.raises(ApiError, match="no path is read"):
        serving.read_chat({"model": "tiny", "messages": [message]}, rules_of(template), tmp_path)


def test_a_saved_row_keeps_every_image_at_its_place(drawn: Path, tmp_path: Path) -> None:
    dialogue = Dialogue.model_validate({"model": "tiny", "messages": [
        {"role": "user", "content": [shown_part((60, 60), "red"), text_part("Q")]}, ANSWER,
        {"role": "user", "content": [text_part("and "), shown_part((40, 120), "green"), text_part("?")]}, ANSWER,
    ]})  # fmt: skip
    row = training_row(dialogue, tmp_path)
    questions = [m for m in read_row(row, tmp_path).messages if m.role == "user"]
    assert [(m.content, [i.at for i in m.images]) for m in questions] == [
        ("Q", [0]),
        ("and ?", [4]),
    ]
    sizes = [image_size(i.path) for m in questions for i in m.images]
    assert sizes == [(60, 60), (40, 120)]


def test_the_chat_shows_images_with_any_message(folder: Path, drawn: Path) -> None:
    opened = open_model(folder)
    asked: list[Conversation] = []

    class Answers(Voice):
        def reply(self, conversation: Conversation, show: Any) -> list[Message]:
            asked.append(conversation)
            return [Message("assistant", "A")]

    a, b, c = (drawn / name for name in NAMES)
    typed = io.StringIO(f"/image {a}\n/image {b}\nfirst\nnone\n/image {c}\nsecond\n/quit\n")
    session = Session(Answers(opened.model, opened.template, 3), Terminal(typed, io.StringIO()))
    session.run()
    questions = [m for m in asked[-1].messages if m.role == "user"]
    assert [[Path(i.path).name for i in m.images] for m in questions] == [
        ["a.png", "b.png"],
        [],
        ["c.png"],
    ]


def test_a_tools_images_are_laid_out_as_its_template_does(
    tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = pictures.GRID_TEMPLATE.replace(
        "{%- elif msg.role == 'assistant' %}",
        "{%- elif msg.role == 'observation' %}\n<|observation|>{{ '\\n' }}{%- if msg.content is string %}"
        "{{ msg.content }}{%- else %}{%- for item in msg.content %}{%- if item.type == 'image' %}"
        "<|begin_of_image|><|image|><|end_of_image|>{%- else %}{{ item.text }}{%- endif %}{%- endfor %}"
        "{%- endif %}\n    {%- elif msg.role == 'assistant' %}",
    )
    monkeypatch.setattr(pictures, "GRID_TEMPLATE", seen)
    template = ChatTemplate(load_chat_tokenizer(pictures.save_grid_model(tmp_path / "m")))
    assert template.image_rule.roles == ("user", "observation")
    dialogue = Conversation((
        user("Q"), Message("assistant", "{}", "look"),
        replace(user("seen: ", "a.png", folder=drawn), role="observation"),
    ))  # fmt: skip
    prompt = template.prompt(dialogue, 3)
    assert template.decode(prompt).endswith(
        "<|observation|>\nseen: <|begin_of_image|><|image|><|end_of_image|><|assistant|>\n"
    )
