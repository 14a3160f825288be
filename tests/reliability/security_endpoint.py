"""The served endpoint: loopback or a key, its own names only, no addresses, no paths, limits on everything; and version floors."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.reliability.frame import Case
from tests.reliability.places import command, glm_folder, light

KEY = "k" * 20
JSON = {"content-type": "application/json"}


class _Model:
    """Stands for a model: what is asked here never gets as far."""

    config: Any = None

    def eval(self) -> _Model:
        """It never trains."""
        return self

    def modules(self) -> Iterator[Any]:
        """It has no parts."""
        return iter(())


@cache
def _template() -> Any:
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer

    return ChatTemplate(load_chat_tokenizer(glm_folder()))


def _client(key: str | None = None, **limits: int) -> Any:
    from starlette.testclient import TestClient

    from finetune.generation.load import OpenedModel
    from finetune.serving.app import Limits, make_app
    from finetune.serving.engine import Engine
    from finetune.serving.guard import Access
    from finetune.serving.requests.rules import RequestRules

    engine = Engine({"m": OpenedModel(_Model(), _template(), "model", "m")}, batch_size=1)
    rules = RequestRules("m", _template(), 512, 8)
    bounds = Limits(limits.get("requests", 4), limits.get("body_bytes", 1 << 20))
    access = Access({"localhost"}, key.encode() if key else None)
    app = make_app(engine, {"m": rules}, bounds, access)
    return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


def _ask(content: Any = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


def _image(url: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]


def turned_away(status: int, folder: Path, *, said: str = "", key: str | None = None, **request: Any) -> None:  # fmt: skip
    """Answered with this status, in OpenAI's form, without a traceback."""
    limits = request.pop("limits", {})
    method, path = request.pop("to", ("POST", "/v1/chat/completions"))
    answer = _client(key, **limits).request(method, path, **request)
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert "Traceback" not in answer.text
    if status not in (200, 405):
        error = answer.json()["error"]
        assert said in error["message"], error


REQUESTS: dict[str, dict[str, Any]] = {
    "another Host": {"status": 400, "headers": {"host": "evil.example"}, "json": _ask(), "said": "this Host is not served here"},
    "a Host that looks like ours": {"status": 400, "headers": {"host": "localhost.evil.example"}, "json": _ask()},
    "another Host for the list of models": {"status": 400, "to": ("GET", "/v1/models"), "headers": {"host": "evil.example"}},
    "another Host for the health": {"status": 400, "to": ("GET", "/health"), "headers": {"host": "evil.example"}},
    "no key": {"status": 401, "key": KEY, "json": _ask()},
    "a wrong key": {"status": 401, "key": KEY, "json": _ask(), "headers": {"authorization": f"Bearer {KEY[:-1]}x"}},
    "the beginning of the key": {"status": 401, "key": KEY, "json": _ask(), "headers": {"authorization": f"Bearer {KEY[:-1]}"}},
    "the key in another scheme": {"status": 401, "key": KEY, "json": _ask(), "headers": {"authorization": f"Basic {KEY}"}},
    "no key for the list of models": {"status": 401, "key": KEY, "to": ("GET", "/v1/models")},
    "a form of a web page": {"status": 415, "content": json.dumps(_ask()), "headers": {"content-type": "text/plain"}},
    "a body that says it is too large": {"status": 413, "limits": {"body_bytes": 1000}, "json": _ask("x" * 2000)},
    "a body that is too large": {"status": 413, "limits": {"body_bytes": 1000}, "content": iter([b"x" * 2000]), "headers": JSON},
    "a body that is no JSON": {"status": 400, "content": b"{", "headers": JSON},
    "a body that is no UTF-8": {"status": 400, "content": b'{"a": "\xff"}', "headers": JSON},
    "a body that is deep": {"status": 400, "content": b"[" * 100_000, "headers": JSON},
    "NaN": {"status": 400, "content": b'{"model": "m", "messages": [], "temperature": NaN}', "headers": JSON},
    "another model": {"status": 404, "json": _ask() | {"model": "../../etc/passwd"}},
    "an image by its address": {"status": 400, "json": _ask(_image("http://169.254.169.254/latest/meta-data")), "said": "no address is fetched"},
    "an image by a file URL": {"status": 400, "json": _ask(_image("file:///etc/passwd")), "said": "no path is read"},
    "an image by a path": {"status": 400, "json": _ask(_image("/etc/passwd")), "said": "no path is read"},
    "a path on the message": {"status": 400, "json": {"model": "m", "messages": [{"role": "user", "content": "x", "image": "/etc/passwd"}]}},
    "more tokens than fit": {"status": 400, "json": _ask("word " * 2000)},
    "a reply shorter than nothing": {"status": 400, "json": _ask(max_tokens=-1)},
    "a field that is not known": {"status": 400, "json": _ask(trust_remote_code=True)},
    "a chat template of the client's": {"status": 400, "json": _ask(chat_template="{{ messages }}")},
    "a path below another": {"status": 404, "to": ("GET", "/v1/models/../../etc/passwd")},
    "the page that loads scripts": {"status": 404, "to": ("GET", "/docs")},
}  # fmt: skip


def _pixels(folder: Path) -> None:
    from tests.reliability.input_images import _bomb

    url = "data:image/png;base64," + base64.b64encode(_bomb(30_000, 30_000)).decode()
    turned_away(400, folder, json=_ask(_image(url)), said="takes no images")


def _away_from_loopback(folder: Path) -> None:
    """`finetune serve --host 0.0.0.0` without a key: refused before the model is opened."""
    code, said = command("serve", glm_folder(), "--host", "0.0.0.0", "--port", 0)
    assert code == 2, said
    assert "needs an API key" in said


def _short_key(folder: Path) -> None:
    """A key that can be guessed."""
    (folder / "key").write_text("12345")
    code, said = command("serve", glm_folder(), "--port", 0, "--api-key-file", folder / "key")
    assert (code, "shorter than 16 characters" in said) == (2, True), said
    assert "12345" not in said


# --- floors --------------------------------------------------------------------------------------

OLD = {"torch": "2.5.1", "transformers": "5.10.3", "pillow": "12.2.0", "deepspeed": "0.15.0"}


def _too_old(name: str, folder: Path) -> None:
    """One line that names library, version, floor and reason; before anything is opened."""
    from finetune.cli import floors

    original = floors.version
    floors.version = lambda asked: OLD[name] if asked == name else original(asked)  # type: ignore[assignment]
    code, said = command("train", folder / "nowhere.yaml")
    lines = said.strip().splitlines()
    assert (code, len(lines)) == (2, 1), said
    floor, why = floors.FLOORS[name]
    assert lines[0].startswith(f"error: {name} {OLD[name]} is installed and {floor} is the oldest")
    assert why in lines[0]


def _not_too_old(name: str, folder: Path) -> None:
    """The floor itself, newer ones and builds of them are taken."""
    from finetune.cli import floors

    floor = floors.FLOORS[name][0]
    for found in (floor, f"{floor}.1", f"{floor}+cu128", "99.0", f"{floor}a0+nv24.12"):
        floors.version = lambda asked, found=found: found if asked == name else "99"  # type: ignore[assignment]
        floors.check_versions()


def _floors_are_the_package_s(folder: Path) -> None:
    """pyproject.toml and constraints.txt ask for nothing older."""
    import re
    import tomllib

    from finetune.cli.floors import FLOORS, _numbers
    from tests.reliability.frame import ROOT

    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for name, (floor, _) in FLOORS.items():
        asked = [
            line for line in (*needed, *pins) if re.match(rf"{name}[=<>]", line, re.IGNORECASE)
        ]
        assert asked, name
        for line in asked:
            numbers = re.search(r"[>=]=\s*([\d.]+)", line)
            assert numbers, line
            assert _numbers(numbers[1]) >= _numbers(floor), line


def _floors_are_cheap(folder: Path) -> None:
    """They are looked up, not imported."""
    outcome = light().run("train", "nowhere.yaml", cwd=folder)
    outcome.refused("no such file")


FLOOR_CHECKS: dict[str, Callable[[Path], None]] = {
    "the package asks for nothing older": _floors_are_the_package_s,
    "they cost nothing": _floors_are_cheap,
}


def cases() -> Iterator[Case]:
    """Both."""
    _template()
    import finetune.serving.app  # noqa: F401

    for name, request in REQUESTS.items():
        more = {key: value for key, value in request.items() if key != "status"}
        run = partial(turned_away, request["status"], **more)
        yield Case(f"endpoint: {name}", run)
    yield Case("endpoint: an image of too many pixels", _pixels)
    yield Case("endpoint: other machines without a key", _away_from_loopback)
    yield Case("endpoint: a short key", _short_key)
    for name in OLD:
        yield Case(f"floors: {name} {OLD[name]}", partial(_too_old, name))
        yield Case(f"floors: {name}, as old as may be", partial(_not_too_old, name))
    for name, check in FLOOR_CHECKS.items():
        yield Case(f"floors: {name}", check)
