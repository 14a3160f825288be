"""The endpoint among strangers: one client never harms another, ordinary chats go on, bombs are refused."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.reliability.frame import Case
from tests.reliability.places import shared

KEY = "k" * 20
HI = {"role": "user", "content": "hi"}


@cache
def _opened(kind: str) -> Any:
    import pictures
    import serving

    from finetune.generation.load import open_model

    if kind == "glm4v":
        return open_model(pictures.save_model(shared("glm4v")))
    return open_model(serving.save_talkative(shared("talkative")))


def _body(content: Any = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 6, "messages": [{"role": "user", "content": content}], **more}  # fmt: skip


async def _post_all(url: str, bodies: list[dict[str, Any]]) -> list[tuple[int, Any]]:
    import httpx

    async with httpx.AsyncClient(timeout=60) as client:
        answers = await asyncio.gather(
            *(client.post(f"{url}/v1/chat/completions", json=body) for body in bodies)
        )
    return [(answer.status_code, answer.json()) for answer in answers]


def _said(answer: tuple[int, Any]) -> str:
    status, body = answer
    assert status == 200, body
    return str(body["choices"][0]["message"]["content"])


def harmless(odd: dict[str, Any], allowed: tuple[int, ...], folder: Path) -> None:
    """Beside an odd request five others get what they get alone; the odd one gets one of `allowed`."""
    import serving

    innocents = [_body(f"question {n}") for n in range(5)]
    with serving.served(_opened("text")) as server:
        alone = [_said(asyncio.run(_post_all(server.url, [body]))[0]) for body in innocents]
        answers = asyncio.run(_post_all(server.url, [*innocents[:3], odd, *innocents[3:], odd]))
    assert answers[3][0] in allowed, answers[3]
    del answers[6], answers[3]
    assert [_said(answer) for answer in answers] == alone


def quick(body: dict[str, Any], reason: str, folder: Path, *, kind: str = "text") -> None:
    """Refused with a reason, before it costs a second."""
    import serving

    with serving.served(_opened(kind)) as server:
        asyncio.run(_post_all(server.url, [_body()]))
        begun = time.process_time()
        [(status, answer)] = asyncio.run(_post_all(server.url, [body]))
        taken = time.process_time() - begun
    assert status == 400, answer
    assert reason in answer["error"]["message"], answer
    assert taken < 2, f"{taken:.1f} s"  # of which the client takes a part


def _images_of_those_who_left(folder: Path) -> None:
    """Three clients send an image and leave; those who stay are answered."""
    import httpx
    import serving

    body = _body() | {"messages": serving.showing(serving.data_url())}

    async def mixed(url: str) -> list[int]:
        async with httpx.AsyncClient(timeout=60) as client:

            def post() -> asyncio.Task[Any]:
                return asyncio.create_task(client.post(f"{url}/v1/chat/completions", json=body))

            leaving, staying = [post() for _ in range(3)], [post() for _ in range(4)]
            await asyncio.sleep(0.03)
            for task in leaving:
                task.cancel()
            return [answer.status_code for answer in await asyncio.gather(*staying)]

    with serving.served(_opened("glm4v")) as server:
        for _ in range(3):
            assert asyncio.run(mixed(server.url)) == [200] * 4


def _slow_headers(sent: bytes, folder: Path) -> None:
    """A header that never ends is not waited for, on a fresh connection and on a used one."""
    import serving

    from finetune.serving import guard

    guard.HEADER_SECONDS = 0.3
    with serving.served(_opened("text")) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.settimeout(60)
            slow.sendall(sent)
            with suppress(ConnectionResetError):
                while slow.recv(1000):
                    pass


def _too_many_connections(folder: Path) -> None:
    """More connections than there are files: who comes next is answered."""
    import resource

    import httpx
    import serving

    with serving.served(_opened("text"), key=KEY) as server, ExitStack() as stack:
        files = len(list(Path("/proc/self/fd").iterdir()))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (files + 220, hard))
        from finetune.serving import guard

        assert guard.max_connections() <= files + 220 - 64
        guard.max_connections = lambda: 40  # both ends are files of this process here
        port = int(server.url.rpartition(":")[2])
        for _ in range(80):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        answer = httpx.get(
            f"{server.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        )
        assert answer.status_code == 200


def _keys_of_any_script(folder: Path) -> None:
    import httpx
    import serving

    key = "ключ-из-многих-букв-钥匙"
    with serving.served(_opened("text"), key=key) as server:
        for given, status in (
            (key.encode(), 200),
            (key.encode("utf-16"), 401),
            (b"\xff" * 20, 401),
        ):
            if b"\n" in given or b"\0" in given:
                continue
            headers = {b"Authorization": b"Bearer " + given}
            found = httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60).status_code
            assert found == status, (given, found)


def _chat_goes_on(name: str, folder: Path) -> None:
    import serving
    import test_serving_chats as chats

    messages, _ = chats.HISTORIES[name]
    body = _body() | {"messages": messages, "tools": [chats.TOOL]}
    with serving.served(_opened("text")) as server:
        assert asyncio.run(_post_all(server.url, [body]))[0][0] == 200


def _null_is_absence(field: str, folder: Path) -> None:
    import serving

    with serving.served(_opened("text")) as server:
        absent = {key: value for key, value in _body().items() if key != field}
        plain, null = asyncio.run(_post_all(server.url, [absent, _body(**{field: None})]))
    assert _said(plain) == _said(null)


def _tools(count: int) -> list[Any]:
    return [{"type": "function", "function": {"name": f"t{n}", "description": "d"}} for n in range(count)]  # fmt: skip


def _schema(schema: Any) -> dict[str, Any]:
    return _body(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )


def _bombs() -> dict[str, tuple[dict[str, Any], str]]:
    import serving

    image = serving.showing(serving.data_url())[0]["content"][1]
    deep: Any = "x"
    for _ in range(120):
        deep = [deep]
    return {
        "3,000 tools": (_body(tools=_tools(3000)), "at most 128"),
        "20,000 messages": (_body() | {"messages": [HI] * 20_000}, "more than the 4096"),
        "50,000 parts": (_body([{"type": "text", "text": "a"}] * 50_000), "more than the 8192"),
        "20,000 calls": (
            _body() | {"messages": [HI, {"role": "assistant", "tool_calls": [
                {"id": str(n), "function": {"name": "f", "arguments": "{}"}} for n in range(20_000)]}]},
            "more than the 1024",
        ),
        "nesting": (_body(tools=[{"type": "function", "function": {"name": "f", "parameters": {"a": deep}}}]), "nested"),
        "200 images for a text model": (_body([image] * 200), "takes no images"),
        "a schema that refers to itself": (_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "compiled"),
        "a schema of 50,000 values": (_schema({"enum": [f"value {n}" for n in range(50_000)]}), "characters"),
        "a schema of 3,000 keys": (_schema({"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(3000)}}), "compiled"),
        "a schema from elsewhere": (_schema({"$ref": "http://127.0.0.1/x"}), "compiled"),
        "a schema of no type": (_schema({"type": "frobnicate"}), "compiled"),
    }  # fmt: skip


ODD: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    **{f"temperature {t}": (_body(temperature=t), (200,)) for t in (1e-320, 1e-45, 1e-38, 1e-20, 1e-6, 2)},
    **{f"top_p {p}": (_body(temperature=1, top_p=p), (200,)) for p in (0, 1e-320, 1e-12, 1)},
    "an empty schema": (_schema({}), (200,)),
    "an odd seed": (_body(temperature=1, seed=-(2**63)), (200,)),
    "a tool that must be called": (_body(tools=_tools(3), tool_choice="required"), (200,)),
    "a stop string of one space": (_body(stop=" "), (200,)),
    "broken arguments": (_body() | {"messages": [HI, {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]}]}, (200,)),
}  # fmt: skip
HEADERS = {
    "nothing": b"",
    "half a line": b"GET /hea",
    "no end": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
    "the second of two": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /health HTTP/1.1\r\nX: ",
}


def cases() -> Iterator[Case]:
    """Odd requests beside ordinary ones, bombs, connections, and what chats come to."""
    import httpx  # noqa: F401
    import test_serving_chats as chats

    _opened("text")
    _opened("glm4v")
    for name, (body, allowed) in ODD.items():
        yield Case(f"server: {name} beside others", partial(harmless, body, allowed))
    for name, (body, reason) in _bombs().items():
        yield Case(f"server: {name}", partial(quick, body, reason))
    two = _body([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}] * 2)
    run: Callable[[Path], None] = partial(quick, two, "2 images", kind="glm4v")
    yield Case("server: two images for GLM-4V", run)
    yield Case("server: images of clients that left", _images_of_those_who_left)
    for name, sent in HEADERS.items():
        yield Case(f"server: a header of {name}", partial(_slow_headers, sent))
    yield Case("server: more connections than files", _too_many_connections)
    yield Case("server: a key in another script", _keys_of_any_script)
    for name in chats.HISTORIES:
        yield Case(f"chats: {name}", partial(_chat_goes_on, name))
    for field in sorted({*chats.FIELDS} - {"model", "messages"}):
        yield Case(f"chats: {field} is null", partial(_null_is_absence, field))
