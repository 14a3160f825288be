"""`finetune serve`: a model behind an address of this machine until it is told to stop."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from finetune import collector, console
from finetune.errors import ConfigError
from finetune.generation.settings import HERE, Placement
from finetune.serving.heap import bound_pools
from finetune.storage.given import read_given

if TYPE_CHECKING:
    from fastapi import FastAPI

    from finetune.generation.load import OpenedModel, SideBySide
    from finetune.serving.engine import Engine
    from finetune.serving.page.html import PageOptions
    from finetune.serving.requests.rules import RequestRules
    from finetune.serving.watch import Watch

KEY_VARIABLE = "FINETUNE_API_KEY"
MIN_KEY = 16
"""Characters of a key; nothing limits how often one may be guessed."""
GRACE_SECONDS = 30
"""After the first signal, replies that are being written may come to their end for so long."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where the model is served, and what is taken."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_key_file: Path | None = None
    allow_hosts: tuple[str, ...] = ()
    max_new_tokens: int = 1024
    """Longest reply of a request that names no length."""
    context: int | None = None
    """Bound on prompt and reply together, below the model's own."""
    batch_size: int = 8
    max_requests: int = 64
    """Requests in work at once, those that wait among them."""
    max_request_mb: int = 16
    history: Literal["lenient", "strict"] = "lenient"
    """`strict` refuses dialogues that training data could not hold."""
    strict: bool = False
    """Fields that nobody knows are refused, not left out."""
    placement: Placement = HERE
    watch: tuple[Path, ...] = ()
    """Runs whose checkpoints are taken in while they train."""
    page: PageOptions | None = None
    """A page to try the models on, at `/`."""


def serve(
    targets: Mapping[str, str], *, base: str | None = None, options: ServeOptions = ServeOptions()
) -> None:
    """Opens the targets and answers requests until SIGTERM or Ctrl-C.

    Args:
        targets: what `open_model` opens, by the ids that clients call it by.
        base: the adapters' base where their own records are out of date.
        options: where, and what is taken.

    Raises:
        ConfigError: the address cannot be bound, or the key for it is missing.
        ModelError: a target cannot be opened.
    """
    _check_installed()
    bound_pools()
    with _bound(options.host, options.port) as listener:
        key = _key(options, listener)
        console.say(f"opening {', '.join(targets.values())} ...")
        from finetune.generation.load import SideBySide, open_side_by_side

        beside = SideBySide(base, options.placement)
        opened = open_side_by_side(targets, placement=options.placement, beside=beside)
        app, engine, rules = _assembled(opened, options, key)
        watches = [_watch(run, beside, engine, rules, options) for run in options.watch]
        for watch in watches:
            watch.start()
        listener.listen()
        verb = "answers" if len(targets) == 1 else "answer"
        page = f", the page at {_url(listener)}/" if options.page else ""
        console.say(f"{', '.join(targets)} {verb} at {_url(listener)}/v1{page}; Ctrl-C stops it")
        # A walk of the cycle collector over all of torch would hold everybody's next token up for half a second.
        with collector.passing_over_the_old():
            _run(app, engine, listener)
        for watch in watches:
            watch.stop()
    console.say("stopped")


def endpoint(
    models: Mapping[str, OpenedModel], options: ServeOptions, key: bytes | None
) -> tuple[FastAPI, Engine]:
    """The ASGI application on opened models by their ids, and the engine that writes their replies."""
    app, engine, _ = _assembled(models, options, key)
    return app, engine


def _assembled(
    models: Mapping[str, OpenedModel], options: ServeOptions, key: bytes | None
) -> tuple[FastAPI, Engine, dict[str, RequestRules]]:
    """The same with the rules of the models by their ids, to which more may be added."""
    from finetune.serving.app import Limits, make_app
    from finetune.serving.engine import Engine
    from finetune.serving.guard import Access

    rules = {name: _rules(name, opened, options) for name, opened in models.items()}
    if importlib.util.find_spec("llguidance") is not None:
        for one in rules.values():
            _ = (
                one.structures
            )  # two seconds for GLM-4's vocabulary, which no request shall wait for
    engine = Engine(models, batch_size=options.batch_size, more_come=bool(options.watch))
    limits = Limits(options.max_requests, options.max_request_mb << 20)
    hosts = {"localhost", options.host.lower(), *(host.lower() for host in options.allow_hosts)}
    return make_app(engine, rules, limits, Access(hosts, key), options.page), engine, rules


def _watch(
    run: Path,
    beside: SideBySide,
    engine: Engine,
    rules: dict[str, RequestRules],
    options: ServeOptions,
) -> Watch:
    """What takes in the checkpoints of a run; ConfigError when its id is taken."""
    from finetune.serving.watch import Watch

    if options.placement.device_map:
        raise ConfigError("--device-map auto is for one model: several share one accelerator; leave it out")  # fmt: skip
    if run.name in rules:
        raise ConfigError(f"--watch {run}: another model is called {run.name!r}; rename the first with --name")  # fmt: skip

    def put(name: str, newest: str, opened: OpenedModel) -> None:
        engine.put(name, opened)
        rules[name] = rules[newest] = _rules(name, opened, options)

    def drop(name: str) -> bool:
        if not engine.drop(name):
            return False
        del rules[name]
        return True

    return Watch(run, beside.open, put, drop)


def _rules(name: str, opened: OpenedModel, options: ServeOptions) -> RequestRules:
    from finetune.generation.generate import context_length
    from finetune.serving.requests.rules import RequestRules

    contexts = [n for n in (options.context, context_length(opened.model)) if n is not None]
    return RequestRules(
        name,
        opened.template,
        min(contexts, default=None),
        options.max_new_tokens,
        options.history,
        strict_fields=options.strict,
    )


def _check_installed() -> None:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serving needs {' and '.join(missing)}: pip install 'glm4-finetune[serve]'"
        )


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address but does not listen yet: clients wait for the model elsewhere."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"--host {host}: {error.strerror or error}; give an address of this machine"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot bind {host}:{port}: {error.strerror}; choose another --port or --host"
        ) from error
    return listener


def _key(options: ServeOptions, listener: socket.socket) -> bytes | None:
    """The API key; ConfigError when one is needed and not there. It is never printed."""
    source, key = f"the variable {KEY_VARIABLE}", os.environ.get(KEY_VARIABLE, "")
    if options.api_key_file is not None:
        source = str(options.api_key_file)
        key = read_given(options.api_key_file, f"--api-key-file {source}")
    key = key.strip()
    if key and len(key) < MIN_KEY:
        raise ConfigError(
            f"the API key in {source} is shorter than {MIN_KEY} characters; make a longer one"
        )
    if key:
        return key.encode()
    address = listener.getsockname()[0]
    if options.api_key_file is not None:
        raise ConfigError(f"--api-key-file {source} is empty; write a key into it")
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise ConfigError(
            f"--host {options.host} can be reached from other machines, which needs an API key: set "
            f"{KEY_VARIABLE} or give --api-key-file FILE"
        )
    return None


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _run(app: FastAPI, engine: Engine, listener: socket.socket) -> None:
    """Serves until a signal. Returns when everything is closed; a second signal ends the process.

    At once, and past every `finally`: uvicorn's own forced exit leaves the loop while the model's
    thread still writes, so that what happens next depends on the moment (a traceback of a cancelled
    request, a reply sent to a closed loop, ten seconds of waiting). There is nothing to be saved.
    """
    import uvicorn

    from finetune.distributed.signals import SIGNALS
    from finetune.serving.guard import KEEP_ALIVE_SECONDS, TimedProtocol

    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = uvicorn.Server(config)

    def stop(sig: int, frame: FrameType | None) -> None:
        if server.should_exit:
            console.say("stopped in the middle of a reply")
            sys.stdout.flush()
            os._exit(128 + sig)
        server.should_exit = True
        engine.drain()

    # Instead of uvicorn's own, which ends the process with the signal once more; and for a signal
    # that comes when uvicorn has ended.
    server.handle_exit = stop  # type: ignore[method-assign]
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, stop)
    try:
        server.run(sockets=[listener])
    finally:
        engine.close()
