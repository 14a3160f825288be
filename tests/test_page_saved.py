"""What the page saves and shows, without a browser."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import jinja2
import pictures
import pytest
import serving
from fastapi import FastAPI

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.language import chinese
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


@pytest.mark.parametrize(
    ("kind", "suffix"), [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp"), ("GIF", ".gif"), ("BMP", ".bmp")]
)  # fmt: skip
def test_an_image_is_kept_byte_for_byte_under_its_own_kind(
    kind: str, suffix: str, saves: Saves
) -> None:
    url = serving.data_url(kind=kind)
    saves.row(json.dumps({"model": "a", "messages": [*serving.showing(url), TALK[1]]}).encode())
    [file] = (saves.folder / "images").iterdir()
    assert file.suffix == suffix
    assert file.read_bytes() == base64.b64decode(url.partition(",")[2])


def test_a_row_keeps_what_training_reads_of_a_message(saves: Saves) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}, {"type": "text", "text": None}]  # fmt: skip
    messages = [
        {"role": "user", "content": parts, "name": "me"}, {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": "3"}, TALK[1],
    ]  # fmt: skip
    saves.row(json.dumps({"model": "a", "messages": messages, "tools": TOOLS}).encode())
    [line] = (saves.folder / "rows.jsonl").read_text().splitlines()
    kept = [{"role": "user", "content": "one\ntwo"}, {"role": "assistant", "content": None, "tool_calls": [call]}, *messages[2:]]  # fmt: skip
    assert json.loads(line) == {"messages": kept, "tools": TOOLS}


@pytest.fixture
def far_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clocks of this process go eight hours before Greenwich's."""
    monkeypatch.setenv("TZ", "CST-8")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("far_east")
def test_a_vote_has_the_time_of_greenwich_and_many_may_be_compared(saves: Saves) -> None:
    begun = time.time()
    assert time.localtime().tm_gmtoff == 8 * 3600
    eight = VOTE | {"models": list("abc"), "replies": ["1", "2", "3"]}
    saves.vote(json.dumps(eight).encode())
    line = json.loads((saves.folder / "votes.jsonl").read_text())
    said = datetime.strptime(line["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    assert begun - 2 <= said <= time.time()
    assert next(iter(line)) == "time"


def test_a_folder_that_cannot_be_written_is_named(rules: RequestRules, tmp_path: Path) -> None:
    (tmp_path / "kept" / "votes.jsonl").mkdir(parents=True)
    saves = Saves(tmp_path / "kept", {"a": rules, "b": rules})
    with pytest.raises(ApiError, match=r"votes\.jsonl cannot be written: Is a directory") as caught:
        saves.vote(json.dumps(VOTE).encode())
    assert caught.value.status == 500


@pytest.mark.parametrize("change", [{"prompt": "x" * 1_000_001}, {"dialogue": ""}, {"dialogue": "x" * 401}, {"models": list("abcdefghi")}, {"hidden": 1}, {"winner": ""}])  # fmt: skip
def test_a_vote_of_another_size_or_kind_is_refused(saves: Saves, change: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        saves.vote(json.dumps(VOTE | change).encode())
    assert str(caught.value.param).split(".")[0] in change
    assert not (saves.folder / "votes.jsonl").exists()


def test_an_image_of_a_dialogue_to_be_counted_is_found_where_it_was_put(tmp_path: Path) -> None:
    eyes = ChatTemplate(load_chat_tokenizer(pictures.save_model(tmp_path / "glm4v")))
    shown = [*serving.showing(serving.data_url()), TALK[1]]
    (tmp_path / "place").mkdir()
    rules = {"eyes": RequestRules("eyes", eyes, None, 8)}
    told = told_tokens(json.dumps({"model": "eyes", "messages": shown}).encode(), rules, tmp_path / "place")  # fmt: skip
    assert pictures.BOI in [i for one in told["tokens"] for i in one["ids"]]
    assert [one["text"] for one in told["tokens"] if one["control"]][:2] == ["[gMASK]", "<sop>"]


def test_what_is_no_dialogue_of_this_model_is_told_and_not_saved(
    rules: RequestRules, saves: Saves, tmp_path: Path
) -> None:
    shown = [*serving.showing(serving.data_url()), TALK[1]]
    (tmp_path / "place").mkdir()
    for messages, reason in ((["hi", TALK[1]], "message 1: is text, not an object"), (shown, "takes no|takes none|no image")):  # fmt: skip
        body = json.dumps({"model": "tiny", "messages": messages}).encode()
        with pytest.raises(ApiError, match=reason) as caught:
            told_tokens(body, {"tiny": rules}, tmp_path / "place")
        assert (caught.value.status, caught.value.param) == (400, "messages")
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ApiError, match="message 1: is text, not an object"):
        saves.row(json.dumps({"model": "a", "messages": ["hi"]}).encode())
    assert not (saves.folder / "rows.jsonl").exists()


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
    assert {key: page.headers[key] for key in ("Cache-Control", "X-Content-Type-Options", "Referrer-Policy", "Cross-Origin-Opener-Policy", "Cross-Origin-Resource-Policy")} == {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin"}  # fmt: skip
    for kind, tag in (("style", "style"), ("script", "script")):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside}  # fmt: skip
        assert len(hashes) == 1
        assert f"{kind}-src 'sha256-{hashes.pop()}'" in policy
    assert "sourceMappingURL" not in page.text
    assert (told["words"]["Send"], told["words"]["Try it"]) == ("发送", chinese("Try it"))
    assert chinese("Try it") != "Try it"


@pytest.mark.parametrize(("speaks", "told"), [("zh", '"zh"'), ("en", "null")])
def test_the_page_speaks_the_servers_chinese_or_its_readers_language(
    speaks: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_LANG", speaks)
    page = make_page(PageOptions(), needs_key=False)
    assert f'"language": {told}' in page.text


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
