"""How a server is set up, ends, and takes in what a run saves."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import serving
from fastapi import FastAPI

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.errors import ConfigError
from finetune.generation.load import OpenedModel
from finetune.generation.settings import Placement
from finetune.serving import app as app_module
from finetune.serving import engine as engine_module
from finetune.serving import serve as serve_module
from finetune.serving import watch
from finetune.serving.app import Limits
from finetune.serving.guard import Access, TimedProtocol
from finetune.serving.page.html import PageOptions
from finetune.serving.requests.rules import RequestRules
from finetune.serving.serve import ServeOptions, _assembled, _bound, _key, _run
from finetune.serving.watch import KEPT, Watch

KEY = b"a-key-of-many-characters"


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


@pytest.fixture
def rules(template: ChatTemplate) -> RequestRules:
    return RequestRules("tiny", template, 64, 8)


def opened(template: ChatTemplate, positions: int | None = 100) -> OpenedModel:
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions), training=False)  # fmt: skip
    return OpenedModel(model, template, "model", "base")


class Stand(SimpleNamespace):
    """In the place of an engine."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What `serve` makes of its options."""

    def assembled(
        template: ChatTemplate, key: bytes | None = None, positions: int | None = 100, **options: Any
    ) -> Any:  # fmt: skip
        found: dict[str, Any] = {}
        monkeypatch.setattr(engine_module, "Engine", lambda models, **how: found.update(engine=how, models=[*models]) or Stand())  # type: ignore[func-returns-value]  # fmt: skip

        def app(engine: Any, rules: Any, limits: Any, access: Any, page: Any) -> None:
            found.update(rules=rules, limits=limits, access=access, page=page)

        monkeypatch.setattr(app_module, "make_app", app)
        _assembled({"tiny": opened(template, positions)}, ServeOptions(**options), key)
        return SimpleNamespace(**found)

    return assembled


def test_every_option_of_a_server_comes_to_where_it_acts(
    made: Callable[..., Any], template: ChatTemplate, tmp_path: Path
) -> None:
    page = PageOptions(tmp_path)
    found = made(
        template, KEY, host="Me.Example", allow_hosts=("Other.Example",), max_new_tokens=21, context=22,
        batch_size=23, max_requests=24, max_request_mb=25, history="strict", strict=True, page=page, watch=(tmp_path,),
    )  # fmt: skip
    assert (found.engine, found.models) == ({"batch_size": 23, "more_come": True}, ["tiny"])
    assert found.limits == Limits(24, 25 * 1024 * 1024)
    assert found.access == Access({"localhost", "me.example", "other.example"}, KEY)
    assert found.page is page
    rules = found.rules["tiny"]
    assert (rules.name, rules.context, rules.max_new_tokens, rules.history, rules.strict_fields) == ("tiny", 22, 21, "strict", True)  # fmt: skip
    for history, strict in (("strict", False), ("lenient", True)):
        rules = made(template, history=history, strict=strict).rules["tiny"]
        assert (rules.history, rules.strict_fields) == (history, strict)
    found = made(template)
    assert found.engine["more_come"] is False
    assert found.access.key is None
    rules = found.rules["tiny"]
    assert (rules.context, rules.history, rules.strict_fields) == (100, "lenient", False)
    assert made(template, context=200).rules["tiny"].context == 100, "the model's own bound stays"
    assert made(template, positions=None).rules["tiny"].context is None
    assert made(template, positions=None, context=50).rules["tiny"].context == 50


@pytest.mark.parametrize("installed", [True, False])
def test_a_vocabulary_is_read_for_structures_before_anybody_asks(
    installed: bool, made: Callable[..., Any], template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    asked: list[str] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: asked.append(name) or (name if installed else None))  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr("finetune.generation.structured.Structures", lambda template: "read")
    assert ("structures" in vars(made(template).rules["tiny"])) is installed
    assert asked == ["llguidance"]


def test_a_key_is_read_without_its_line_break_and_an_empty_file_is_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FINETUNE_API_KEY", raising=False)
    file = tmp_path / "key"
    options = ServeOptions(api_key_file=file)
    with _bound("127.0.0.1", 0) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1, "a restart binds at once"  # fmt: skip
        for text, key in ((" sixteen-letters!\n", b"sixteen-letters!"), ("a-longer-key-than-that", b"a-longer-key-than-that")):  # fmt: skip
            file.write_text(text)
            assert _key(options, listener) == key
        file.write_text(" fifteen-letter\n")
        with pytest.raises(ConfigError, match="shorter than 16"):
            _key(options, listener)
        file.write_text("\n")
        with pytest.raises(ConfigError, match="is empty; write a key into it"):
            _key(options, listener)
        file.write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match="is not UTF-8"):
            _key(options, listener)


@pytest.mark.parametrize(
    ("address", "needs"),
    [("127.0.0.1", False), ("127.9.9.9", False), ("::1", False), ("::1%lo", False), ("10.0.0.7", True), ("192.168.1.2", True), ("8.8.8.8", True), ("0.0.0.0", True), ("fe80::1%eth0", True)],
)  # fmt: skip
def test_only_this_machine_is_served_without_a_key(
    address: str, needs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FINETUNE_API_KEY", raising=False)
    listener: Any = SimpleNamespace(getsockname=lambda: (address, 80))
    if not needs:
        assert _key(ServeOptions(host="it"), listener) is None
        return
    with pytest.raises(ConfigError, match="--host it can be reached from other machines"):
        _key(ServeOptions(host="it"), listener)


def test_the_address_that_is_said_can_be_clicked() -> None:
    for name, said in ((("127.0.0.1", 80), "http://127.0.0.1:80"), (("::1", 81, 0, 0), "http://[::1]:81")):  # fmt: skip
        listener: Any = SimpleNamespace(getsockname=lambda name=name: name)
        assert serve_module._url(listener) == said


@pytest.fixture
def handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}  # fmt: skip
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("ignored", [True, False])
def test_the_first_signal_lets_replies_end_and_the_second_ends_all(
    ignored: bool, handlers: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    import uvicorn

    done: list[Any] = []
    found: list[uvicorn.Config] = []
    app = FastAPI()
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    engine: Any = SimpleNamespace(drain=lambda: done.append("drained"), close=lambda: done.append("closed"))  # fmt: skip

    def run(server: Any, sockets: Any) -> None:
        done.append(sockets)
        found.append(server.config)
        if not ignored:
            os.kill(os.getpid(), signal.SIGHUP)
        else:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, "as nohup has it"
            os.kill(os.getpid(), signal.SIGTERM)
        assert server.should_exit
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("uvicorn's end")

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setattr(serve_module.os, "_exit", lambda code: done.append(code))
    with pytest.raises(RuntimeError, match="uvicorn's end"):
        _run(app, engine, "listener")  # type: ignore[arg-type]
    [config] = found
    assert (config.app, config.http) == (app, TimedProtocol)
    assert (config.timeout_keep_alive, config.timeout_graceful_shutdown) == (75, 30)
    assert (config.log_config, config.log_level, config.access_log, config.server_header) == (None, "error", False, False)  # fmt: skip
    assert done[:2] == [["listener"], "drained"]
    assert done[2] == 128 + signal.SIGINT
    assert done[-1] == "closed"
    assert "stopped in the middle of a reply" in capfd.readouterr().out


class Run:
    """A run whose checkpoints a test makes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.damaged: set[str] = set()
        self.put: list[tuple[str, str, str]] = []
        self.dropped: list[str] = []
        self.busy: set[str] = set()
        monkeypatch.setattr(watch, "verify", lambda path: ["damaged"] * (path.name in self.damaged))
        monkeypatch.setattr(watch, "is_adapter", lambda path: True)
        self.watch = Watch(folder, lambda path: path, self._put, self._drop, every=0.01)  # type: ignore[arg-type, return-value]  # fmt: skip

    def _put(self, name: str, newest: str, opened: Any) -> None:
        self.put.append((name, newest, opened.name))

    def _drop(self, name: str) -> bool:
        if name in self.busy:
            return False
        self.dropped.append(name)
        return True

    def saved(self, *names: str) -> None:
        for name in names:
            (self.folder / name).mkdir(parents=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path / "run", monkeypatch)


def test_of_what_is_new_the_newest_whole_one_is_served_and_the_others_never(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    run.saved("checkpoint-1", "checkpoint-2", "checkpoint-3")
    run.damaged = {"checkpoint-3"}
    run.watch.look()
    assert run.put == [("run@2", "run", "checkpoint-2")]
    assert capfd.readouterr().out == "run is checkpoint-2 now, also as run@2\n"
    run.watch.look()
    run.damaged = set()
    run.watch.look()
    assert [name for name, _, _ in run.put] == ["run@2"], "what was older or damaged then was seen"
    run.saved("checkpoint-4")
    run.watch.look()
    assert run.put[1:] == [("run@4", "run", "checkpoint-4")]
    run.saved("weights-4")
    run.watch.look()
    assert len(run.put) == 2, "the same weights, saved once more"


def test_the_newest_three_are_kept_and_one_that_answers_stays_longer(run: Run) -> None:
    assert KEPT == 3
    for step in range(1, 6):
        run.saved(f"checkpoint-{step}")
        run.busy = {"run@1"} if step == 4 else set()
        run.watch.look()
        assert run.dropped == {4: [], 5: ["run@1", "run@2"]}.get(step, [])


@pytest.mark.parametrize("error", [OSError("gone"), ConfigError("whole"), PermissionError("no")])
def test_a_look_that_fails_is_said_once_and_looked_again(
    error: Exception, run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        raise error

    monkeypatch.setattr(run.watch, "look", look)
    run.watch.start()
    serving.until(lambda: len(looks) > 2)
    run.watch.stop()
    run.watch._thread.join(60)
    assert not run.watch._thread.is_alive()
    assert capfd.readouterr().err.count(str(error)) == 1


def test_what_is_not_served_any_more_is_not_listed(
    template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = SimpleNamespace(put=lambda *_: None, drop=lambda name: name != "busy")
    rules = {"base": RequestRules("base", template, 8, 8)}
    options = ServeOptions(max_new_tokens=5)
    made = serve_module._watch(tmp_path / "run", SimpleNamespace(open=None), engine, rules, options)  # type: ignore[arg-type]  # fmt: skip
    made._put("run@1", "run", opened(template))
    assert {name: one.name for name, one in rules.items()} == {"base": "base", "run@1": "run@1", "run": "run@1"}  # fmt: skip
    assert rules["run"].max_new_tokens == 5
    rules["busy"] = rules["run"]
    assert not made._drop("busy")
    assert made._drop("run@1")
    assert set(rules) == {"base", "run", "busy"}
    with pytest.raises(ConfigError, match="another model is called 'run'; rename the first"):
        serve_module._watch(tmp_path / "run", None, engine, rules, options)  # type: ignore[arg-type]
    spread = ServeOptions(placement=Placement("auto", None))
    with pytest.raises(ConfigError, match="--device-map auto is for one model"):
        serve_module._watch(tmp_path / "new", None, engine, rules, spread)  # type: ignore[arg-type]
    serve_module._watch(tmp_path / "new", SimpleNamespace(open=None), engine, rules, ServeOptions(placement=Placement(None, "nf4")))  # type: ignore[arg-type]  # fmt: skip


def test_an_address_that_cannot_be_bound_leaves_no_socket_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[socket.socket] = []
    plain = socket.socket

    def noted(*given: Any) -> socket.socket:
        made.append(plain(*given))
        return made[-1]

    with _bound("127.0.0.1", 0) as listener:
        listener.listen()
        monkeypatch.setattr(serve_module.socket, "socket", noted)
        with pytest.raises(ConfigError, match="cannot bind"):
            _bound("127.0.0.1", listener.getsockname()[1])
    assert [one.fileno() for one in made] == [-1]
