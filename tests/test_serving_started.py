"""`serve` from its options to its end: who is told what, in which order, and what it says."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.cli import main
from finetune.errors import ConfigError
from finetune.generation import load
from finetune.generation.predict import PredictOptions
from finetune.generation.settings import Placement
from finetune.serving import serve as serve_module
from finetune.serving.page.html import PageOptions
from finetune.serving.serve import ServeOptions, _bound, _check_installed, _key, serve

KEY = "a-key-of-many-characters"


@pytest.mark.parametrize("several", [True, False])
def test_serve_opens_what_it_is_told_and_watches_until_it_is_stopped(
    several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setenv("FINETUNE_API_KEY", KEY)
    targets = {"a": "runs/x", "b": "runs/y"} if several else {"a": "runs/x"}
    options = ServeOptions(
        port=0, placement=Placement(None, "nf4"), watch=(tmp_path / "one", tmp_path / "two") if several else (),
        page=PageOptions() if several else None,
    )  # fmt: skip
    done: list[Any] = []
    listeners: list[Any] = []

    def noted(*what: Any) -> Any:
        done.append(what)

    def watch(run: Path, *given: Any) -> Any:
        noted("watch", run.name, *given)
        return SimpleNamespace(start=lambda: noted("start", run.name), stop=lambda: noted("stop", run.name))  # fmt: skip

    def run(app: Any, engine: Any, listener: Any) -> None:
        noted("run", app, engine)
        listeners.append(listener)
        socket.create_connection(listener.getsockname(), timeout=60).close()

    monkeypatch.setattr(serve_module, "bound_pools", lambda: noted("pools"))
    monkeypatch.setattr(load, "SideBySide", lambda *given: noted("beside", *given) or "beside")
    monkeypatch.setattr(load, "open_side_by_side", lambda names, **how: noted("open", names, how) or "opened")  # fmt: skip
    monkeypatch.setattr(serve_module, "_assembled", lambda *given: noted("made", *given) or ("app", "engine", "rules"))  # fmt: skip
    monkeypatch.setattr(serve_module, "_watch", watch)
    monkeypatch.setattr(serve_module, "_run", run)
    serve(targets, base="base", options=options)
    runs = ["one", "two"] if several else []
    assert done == [
        ("pools",), ("beside", "base", options.placement),
        ("open", targets, {"placement": options.placement, "beside": "beside"}),
        ("made", "opened", options, KEY.encode()),
        *(("watch", name, "beside", "engine", "rules", options) for name in runs),
        *(("start", name) for name in runs), ("run", "app", "engine"), *(("stop", name) for name in runs),
    ]  # fmt: skip
    assert listeners[0].fileno() == -1, "and the address is free again"
    first, second, third = capfd.readouterr().out.splitlines()
    assert first == ("opening runs/x, runs/y ..." if several else "opening runs/x ...")
    place = r"http://127\.0\.0\.1:\d+"
    said = rf"a, b answer at ({place})/v1, the page at \1/; Ctrl-C stops it" if several else rf"a answers at {place}/v1; Ctrl-C stops it"  # fmt: skip
    assert re.fullmatch(said, second)
    assert third == "stopped"


@pytest.mark.parametrize("missing", [("fastapi",), ("uvicorn",), ("fastapi", "uvicorn")])
def test_each_package_that_is_missing_is_named(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else name)
    with pytest.raises(ConfigError, match=f"serving needs {' and '.join(missing)}: pip install"):
        _check_installed()


def test_a_short_key_of_the_environment_is_named_by_its_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FINETUNE_API_KEY", "short")
    with (
        _bound("127.0.0.1", 0) as listener,
        pytest.raises(ConfigError, match="in the variable FINETUNE_API_KEY is shorter than 16"),
    ):
        _key(ServeOptions(), listener)


def test_what_the_command_does_not_say_is_what_the_program_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`chat --web` and Python callers have the defaults of `serve` and `predict`."""
    given: list[Any] = []
    monkeypatch.setattr(serve_module, "serve", lambda targets, *, base, options: given.append(options))  # fmt: skip
    monkeypatch.setattr("finetune.generation.predict.predict", lambda *_, **how: given.append(how["options"]))  # fmt: skip
    for command in ("serve", "predict --data x.jsonl --output"):
        words = [*command.split(), *([str(tmp_path / "o.jsonl")] if "output" in command else [])]
        with pytest.raises(SystemExit):
            main([words[0], "org/model", *words[1:]])
    assert given == [ServeOptions(), PredictOptions()]
    assert (ServeOptions().host, ServeOptions().port) == ("127.0.0.1", 8000)
