"""What the page saves and shows, without a browser."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import jinja2
import pytest
import serving
from fastapi import FastAPI

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.serving.errors import ApiError
from finetune.serving.page.html import PageOptions, make_page
from finetune.serving.page.routes import add_page
from finetune.serving.page.saved import Saves, told_tokens
from finetune.serving.requests.rules import RequestRules
from finetune.webpages import templates


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


@pytest.fixture
def rules(template: ChatTemplate) -> RequestRules:
    return RequestRules("tiny", template, 64, 8)


@pytest.fixture
def saves(tmp_path: Path, rules: RequestRules) -> Saves:
    return Saves(tmp_path / "kept", {"a": rules, "b": rules, "c": rules})


VOTE = {"models": ["a", "b"], "winner": "b", "hidden": True, "dialogue": "d1", "turn": 1, "system": "s", "prompt": "p", "replies": ["1", "2"]}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "param"),
    [({"winner": "c"}, "winner"), ({"winner": "x"}, "winner"), ({"models": ["a", "a"]}, "models"), ({"models": ["a", "x"]}, "model"),
     ({"replies": ["1"]}, "models"), ({"replies": ["1", "2", "3"]}, "models"), ({"models": ["a"], "replies": ["1"]}, "models"), ({"turn": 0}, "turn"), ({"more": 1}, "more")],
)  # fmt: skip
def test_a_vote_is_between_replies_of_different_models(
    saves: Saves, change: dict[str, Any], param: str
) -> None:
    saved = saves.vote(json.dumps(VOTE).encode())
    assert saved == {"file": str(saves.folder / "votes.jsonl"), "rows": 1}
    line = json.loads((saves.folder / "votes.jsonl").read_text())
    assert {key: line[key] for key in VOTE} == VOTE
    with pytest.raises(ApiError) as caught:
        saves.vote(json.dumps(VOTE | change).encode())
    assert caught.value.param == param
    assert saves.vote(json.dumps(VOTE | {"winner": None}).encode())["rows"] == 2


TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_a_dialogue_becomes_a_row_as_training_takes_it_or_is_refused(saves: Saves) -> None:
    def row(messages: Any, **more: Any) -> Any:
        return saves.row(json.dumps({"model": "a", "messages": messages, **more}).encode())

    assert row(TALK)["rows"] == 1
    assert row([TALK[0] | {"id": "x"}, TALK[1]], tools=TOOLS)["rows"] == 2
    lines = [json.loads(line) for line in (saves.folder / "rows.jsonl").read_text().splitlines()]
    assert lines == [{"messages": TALK}, {"messages": TALK, "tools": TOOLS}]
    for messages in (TALK[:1] * 2, [{"role": "user", "content": "x", "image": "/etc/passwd"}]):
        with pytest.raises(ApiError) as caught:
            row(messages)
        assert caught.value.status == 400
    assert len((saves.folder / "rows.jsonl").read_text().splitlines()) == 2


def test_an_image_of_a_dialogue_is_kept_once_beside_its_rows(saves: Saves) -> None:
    for colour in ("red", "red", "blue"):
        shown = [*serving.showing(serving.data_url(colour=colour)), TALK[1]]
        saves.row(json.dumps({"model": "a", "messages": shown}).encode())
    lines = [json.loads(line) for line in (saves.folder / "rows.jsonl").read_text().splitlines()]
    paths = [line["images"][0] for line in lines]
    assert paths[0] == paths[1] != paths[2]
    assert all((saves.folder / path).read_bytes().startswith(b"\x89PNG") for path in paths)
    assert all(path.startswith("images/") and path.endswith(".png") for path in paths)
    assert len(list((saves.folder / "images").iterdir())) == 2
    assert lines[0]["messages"][0]["content"] == [{"type": "text", "text": "what is this?"}, {"type": "image"}]  # fmt: skip


def test_tokens_of_a_dialogue_are_marked_where_they_carry_loss(
    rules: RequestRules, tmp_path: Path
) -> None:
    body = json.dumps({"model": "tiny", "messages": TALK}).encode()
    told = told_tokens(body, {"tiny": rules}, tmp_path)
    assert told["num_tokens"] == sum(len(one["ids"]) for one in told["tokens"])
    trained = [one for one in told["tokens"] if one["trained"]]
    assert told["num_trained"] == sum(len(one["ids"]) for one in trained) < told["num_tokens"]
    assert "".join(one["text"] for one in trained).startswith("\nhello")
    with pytest.raises(ApiError):
        told_tokens(json.dumps({"model": "tiny", "messages": TALK[:1]}).encode(), {"tiny": rules}, tmp_path)  # fmt: skip


def test_no_setting_can_end_the_script_of_the_page_and_nobody_may_frame_it(tmp_path: Path) -> None:
    page = make_page(PageOptions(None, "</script><script>alert(1)", {"seed": 0}), needs_key=True)
    assert "</script><script>alert" not in page.text
    setup = page.text.partition('id="setup">')[2].partition("</script>")[0]
    told = json.loads(setup)
    assert told["system"] == "</script><script>alert(1)"
    assert (told["saves"], told["needs_key"], told["sampling"]) == (False, True, {"seed": 0})
    assert '"saves": true' in make_page(PageOptions(tmp_path), needs_key=False).text
    policy = page.headers["Content-Security-Policy"]
    for part in ("default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "form-action 'none'", "base-uri 'none'", "require-trusted-types-for 'script'"):  # fmt: skip
        assert part in policy
    assert "unsafe" not in policy
    assert {key: page.headers[key] for key in ("Cache-Control", "X-Content-Type-Options", "Referrer-Policy")} == {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}  # fmt: skip


def test_one_vote_or_row_is_written_at_a_time(
    rules: RequestRules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[int] = []
    most: list[int] = []

    def slow(self: Saves, body: bytes) -> dict[str, Any]:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return {}

    for name in ("vote", "row"):
        monkeypatch.setattr(Saves, name, slow)
    app = FastAPI()
    add_page(app, {"a": rules}, PageOptions(tmp_path), needs_key=False, body_bytes=100)

    async def together() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", timeout=60
        ) as client:
            paths = ["/page/votes", "/page/votes", "/page/rows", "/page/rows"]
            answers = await asyncio.gather(*(client.post(path, json={}) for path in paths))
        assert [answer.status_code for answer in answers] == [200] * 4

    asyncio.run(together())
    assert most == [1] * 4


def test_what_is_put_into_a_page_is_escaped_and_what_is_missing_is_an_error(tmp_path: Path) -> None:
    made = templates(tmp_path)
    assert made.from_string("{{ said }}").render(said="<b>") == "&lt;b&gt;"
    with pytest.raises(jinja2.UndefinedError):
        made.from_string("{{ missing }}").render()
