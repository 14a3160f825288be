"""Replies from vLLM or an endpoint, in the place of our own generation, are evaluated alike."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import serving
from fake_vllm import FakeVllm
from rows import turns, write_rows

from finetune.errors import ConfigError, DataError
from finetune.evaluation.evaluate import Options, evaluate
from finetune.generation.backends.address import Address
from finetune.generation.backends.choice import BackendChoice
from finetune.generation.load import OpenedModel, open_model

CHANGES = {"max_new_tokens": 12, "batch_size": 4}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_model(serving.save_talkative(tmp_path_factory.mktemp("model") / "talkative"))


@pytest.fixture(scope="module")
def server(opened: OpenedModel) -> Iterator[serving.Served]:
    with serving.served(opened) as running:
        yield running


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"messages": turns(f"question {'dog ' * n}", f"answer {n}")} for n in range(6)]
    return write_rows(tmp_path / "dev.jsonl", [*rows, {"messages": turns("你好", "hello", "and", "more")}])  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def evaluated(opened: OpenedModel, data: Path, place: Path, **options: Any) -> dict[str, Any]:
    found = evaluate(opened.base, [str(data)], output=place, changes=CHANGES, options=Options(**options))  # fmt: skip
    return found | {"rows": (place / "predictions.jsonl").read_text("utf-8")}


def test_vllm_replies_in_an_evaluation_and_the_loss_is_ours(
    opened: OpenedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = evaluated(opened, data, tmp_path / "ours")
    fake = FakeVllm(opened.model, opened.template)
    fake.install(monkeypatch)
    theirs = evaluated(opened, data, tmp_path / "theirs", by=BackendChoice("vllm"))
    assert theirs["rows"] == ours["rows"]
    assert theirs["scores"] == ours["scores"]
    assert theirs["scores"]["loss"] > 0
    assert fake.opened["model"] == opened.base
    assert (
        fake.ended == 1
    )  # else the program would wait for vLLM's processes, and the next has no memory
    said = json.loads((tmp_path / "theirs/evaluation.json").read_text("utf-8"))["settings"]
    assert said["decoding"] == "greedy, by vllm"
    assert theirs["settings"]["dtype"] == "float32"


def test_what_vllms_environment_lacks_is_said_before_a_model_is_opened(
    opened: OpenedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeVllm(opened.model, opened.template).install(monkeypatch)
    monkeypatch.delitem(sys.modules, "sacrebleu", raising=False)
    monkeypatch.setattr("finetune.evaluation.options.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"does not have .*sacrebleu(.|\n)*docs/serving\.md"):
        evaluated(opened, data, tmp_path / "out", by=BackendChoice("vllm"))
    assert not (tmp_path / "cache" / "evaluations").exists()


def test_an_endpoint_that_serves_the_model_gives_its_replies_and_no_loss(
    opened: OpenedModel, server: serving.Served, data: Path, tmp_path: Path
) -> None:
    ours = evaluated(opened, data, tmp_path / "ours")
    address = f"openai:tiny@{server.url}/v1"
    theirs = evaluated(opened, data, tmp_path / "theirs", by=BackendChoice(endpoint=address))
    assert theirs["rows"] == ours["rows"]
    assert {*ours["scores"]} - {*theirs["scores"]} == {"loss"}
    settings = json.loads((tmp_path / "theirs/evaluation.json").read_text("utf-8"))["settings"]
    assert settings["decoding"].endswith(f"by {address}")


def test_what_replies_from_elsewhere_do_not_go_with_is_said_first(
    opened: OpenedModel, data: Path, tmp_path: Path
) -> None:
    address = "openai:tiny@http://127.0.0.1:9/v1"
    there = BackendChoice(endpoint=address)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"by": BackendChoice(endpoint="tiny")}, "write openai:MODEL@URL"),
        ({"by": there, "tasks": ("calls:x",)}, "leave out --tasks"),
        ({"by": there, "general": (str(data),)}, "--regression-data"),
        ({"by": BackendChoice("vllm"), "temperature": 0.5}, "replies greedily"),
    ]
    for options, reason in refused:
        with pytest.raises(ConfigError, match=reason):
            evaluated(opened, data, tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="replies for one model, and 2 are named"):
        evaluate(
            [opened.base, str(tmp_path)],
            [str(data)],
            options=Options(by=BackendChoice(endpoint=address)),
        )


def test_an_endpoint_that_is_down_or_refuses_is_named(
    opened: OpenedModel, server: serving.Served, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("finetune.generation.backends.address.time.sleep", lambda _: None)
    for address, reason in (
        ("openai:tiny@http://127.0.0.1:9/v1", "--endpoint: http://127.0.0.1:9/v1 does not answer"),
        (f"openai:other@{server.url}/v1", "404"),
    ):
        with pytest.raises(DataError, match=reason):
            evaluated(opened, data, tmp_path / "out", by=BackendChoice(endpoint=address))


@pytest.mark.parametrize(
    ("answers", "asked", "waited"),
    [
        ([408, 409, 200], 3, [0.2, 0.8]),
        ([429, 500, 503, 200], 4, [0.2, 0.8, 3.2]),
        ([503] * 9, 4, [0.2, 0.8, 3.2]),
        ([400], 1, []),
        ([302], 1, []),
        ([404], 1, []),
    ],
)
def test_an_endpoint_is_asked_again_only_while_it_is_busy(
    answers: list[int], asked: int, waited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    given = list(answers)

    class Scripted(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            code = given.pop(0)
            self.send_response(code)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(b'{"ok": 1}')

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    monkeypatch.setattr(
        "finetune.generation.backends.address.time.sleep", lambda s: waits.append(s)
    )
    with HTTPServer(("127.0.0.1", 0), Scripted) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = Address.of(f"openai:m@http://127.0.0.1:{server.server_port}/v1/", "--judge")
        assert address.url.endswith("/v1")
        if 200 in answers:
            assert address.post("x", {}) == {"ok": 1}
        else:
            with pytest.raises(DataError, match=str(answers[-1])):
                address.post("x", {})
        server.shutdown()
    assert len(answers) - len(given) == asked
    assert [round(seconds, 3) for seconds in waits if seconds] == waited
