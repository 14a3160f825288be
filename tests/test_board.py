"""The board: what runs write while they are trained, as one page for this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.cli import main
from finetune.errors import ConfigError
from finetune.report import board
from finetune.report.terminal import curve

LOGS = [
    {"step": 1, "loss": 3.0, "learning_rate": 1e-4, "tokens_per_second": 900.0, "memory_gb": 1.5, "grad_norm": 2.0},
    {"step": 2, "loss": 2.0, "learning_rate": 2e-4, "tokens_per_second": 950.0, "memory_gb": 1.6, "grad_norm": 1.0},
    {"step": 2, "eval_loss": 2.5, "eval_rouge-l": 41.0},
]  # fmt: skip


def make_run(folder: Path, name: str = "lora") -> Path:
    run = folder / name
    run.mkdir(parents=True)
    run.joinpath("config.yaml").write_text(
        "model: {path: m}\ndata: {train: d}\nmethod: {kind: lora}\ntraining: {output_dir: r, max_steps: 4}\n"
    )
    run.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOGS))
    row = {"prompt": "<|user|>\n几点？", "reference": "三点", "prediction": "<b>三</b>"}
    run.joinpath("predictions-2.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return run


def test_the_page_shows_curves_scores_states_and_replies_of_every_run(tmp_path: Path) -> None:
    make_run(tmp_path, "one")
    make_run(tmp_path, "two")
    page = board.page(tmp_path)
    for title in ("loss", "learning rate, 1e-4", "tokens a second", "memory, GB", "gradient norm", "rouge-l"):  # fmt: skip
        assert f"<span>{title}</span>" in page
    assert page.count("<svg") == 6
    assert page.count('class="state stopped"') == 2
    assert "<dd>三点</dd>" in page
    assert "<dd>&lt;b&gt;三&lt;/b&gt;</dd>" in page, "replies are text"
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page), "nothing is fetched"


def test_a_line_that_is_being_written_and_odd_rows_are_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1')
    (run / "predictions-2.jsonl").write_text("[1]\nno json\n")
    (run / "predictions-3.jsonl").write_text("")
    assert "replies after step" not in board.page(tmp_path)
    (run / "config.yaml").write_text("model: [")
    assert "config.yaml" in board.panels(tmp_path)


def test_an_empty_folder_waits_and_a_missing_one_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "No runs yet" in board.page(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["board", str(tmp_path / "none")])
    assert end.value.code == 2
    assert "is not a folder" in capsys.readouterr().err


def test_a_file_of_it_is_written_once_and_over_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs")
    words = ["board", str(tmp_path / "runs"), "--output", str(tmp_path / "board.html")]
    for code in (0, 2):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == code
    assert "exists already; choose another --output, or say --overwrite" in capsys.readouterr().err
    assert 'data-every="0.0"' in (tmp_path / "board.html").read_text(encoding="utf-8")


def test_it_is_served_to_this_machine_and_follows_the_files(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    handler = type("Handler", (board._Handler,), {"folder": tmp_path, "every": 2.0})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def get(path: str, **headers: str) -> tuple[int, str]:
            connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        status, page = get("/")
        assert status == 200
        assert 'data-every="2.0"' in page
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 3, "loss": 1.0}) + "\n")
        assert "3 of 4" in get("/panels")[1]
        assert get("/etc/passwd")[0] == 404
        assert get("/", Host="example.com")[0] == 403
        server.shutdown()


def test_a_taken_port_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = type("Handler", (board._Handler,), {"folder": tmp_path, "every": 2.0})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, pytest.raises(SystemExit):
        main(["board", str(tmp_path), "--port", str(server.server_port)])
    assert "choose another --port" in capsys.readouterr().err


def test_a_curve_is_drawn_in_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = curve([(0, 3.0), (5, 1.0), (10, 1.0)], columns=10, rows=3)
    assert [line[:10] for line in drawn[:3]] == ["       3 │", "         │", "       1 │"]
    assert drawn[0][10] == "⡇" or ord(drawn[0][10]) > 0x2800
    assert drawn[2].endswith(chr(0x28C0)), "a flat end lies on the lowest dots"
    assert drawn[-1] == "          0       10"
    assert curve([(1, 2.0)]) == []
    with pytest.raises(SystemExit):
        main(["status", str(make_run(tmp_path))])
    assert "loss over steps" in capsys.readouterr().out


def test_every_curve_is_drawn_in_its_own_unit_and_each_run_in_its_own_colour(
    tmp_path: Path,
) -> None:
    runs = [make_run(tmp_path, f"run{number}") for number in range(9)]
    found = board.find_runs(tmp_path)
    assert len(found) == len(runs)
    rate, loss = (board._series(found[0], 0, key) for key in ("learning_rate", "loss"))
    assert [(p.x, p.y) for p in rate.points] == [(1, 1.0), (2, 2.0)], "in units of 1e-4"
    assert [(p.x, p.y) for p in loss.points] == [(1, 3.0), (2, 2.0)]
    assert [board._colour(number) for number in range(9)] == [1, 2, 3, 4, 5, 6, 7, 8, 1]
    titles = [title for title, chart in board._charts(found) if chart]
    assert titles == [*board.CURVES.values(), "rouge-l"]
    [held_out] = [one for one in (board._series(found[0], 0, "eval_loss", "line"),) if one.points]
    assert (held_out.style, [(p.x, p.y) for p in held_out.points]) == ("line", [(2, 2.5)])


def test_the_newest_replies_are_shown_a_few_of_them_and_their_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    rows = [{"prompt": "x" * 700 + "end", "reference": ["not", "text"], "prediction": f"reply {n}"} for n in range(5)]  # fmt: skip
    (run / "predictions-10.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [found] = board._samples(board.find_runs(tmp_path))
    assert (found["step"], found["name"], found["colour"]) == (10, "lora", 1)
    assert [row["prediction"] for row in found["rows"]] == ["reply 0", "reply 1", "reply 2"]
    assert found["rows"][0]["prompt"] == "… " + "x" * 597 + "end"
    assert found["rows"][0]["reference"] == '["not", "text"]'
    monkeypatch.setattr(board, "LARGEST_FILE", 100)
    assert board._samples(board.find_runs(tmp_path)) == [], "too large to be opened for three lines"


def test_only_names_of_this_machine_and_known_pages_are_answered(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path)
    handler = type("Handler", (board._Handler,), {"folder": tmp_path, "every": 2.0})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        for host, path, status in (
            (f"127.0.0.1:{port}", "/", 200), (f"localhost:{port}", "/panels", 200), (f"[::1]:{port}", "/", 200),
            (f"evil.localhost:{port}", "/", 403), ("localhost.evil.com:80", "/panels", 403), ("", "/", 403),
            (f"localhost:{port}", "/panels/x", 404), (f"localhost:{port}", "/panels2", 404),
        ):  # fmt: skip
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == status, (host, path)
            if status == 200:
                assert answer.headers["Cache-Control"] == "no-store"
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
                assert int(answer.headers["Content-Length"]) == len(body)
        server.shutdown()
    assert capfd.readouterr() == ("", ""), "a look every few seconds is no news"


def test_a_page_with_chinese_in_it_is_sent_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, str] = {}
    body: list[bytes] = []
    handler: Any = SimpleNamespace(
        send_response=lambda _: None, send_header=sent.__setitem__, end_headers=lambda: None,
        wfile=SimpleNamespace(write=body.append),
    )  # fmt: skip
    board._Handler._send(handler, "损失 \ud800")
    assert body[0].decode().startswith("损失 ")
    assert int(sent["Content-Length"]) == len(body[0])


def test_the_server_listens_on_the_loopback_address_alone_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[Any] = []

    class Server(ThreadingHTTPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            handler: Any = self.RequestHandlerClass
            served.append((self.server_address, handler.folder, handler.every))

    monkeypatch.setattr(board, "ThreadingHTTPServer", Server)
    board.serve(tmp_path, port=0, every=2.5)
    [((host, port), folder, every)] = served
    assert (host, folder, every) == ("127.0.0.1", tmp_path, 2.5)
    assert capsys.readouterr().out == f"http://127.0.0.1:{port}  the runs in {tmp_path}; Ctrl-C ends it\n"  # fmt: skip
    with pytest.raises(ConfigError, match="is not a folder"):
        board.serve(tmp_path / "none", port=0, every=2.5)


def test_a_file_of_it_lies_in_none_of_the_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(ConfigError, match="lies inside"):
        board.write(tmp_path, run / "board.html")
    assert not (run / "board.html").exists()
    (run / "predictions-2.jsonl").write_text('{"prediction": "half \\ud800 a pair"}\n')
    board.write(tmp_path, tmp_path / "board.html")
    assert "half \\ud800 a pair" in (tmp_path / "board.html").read_text("utf-8")
    page = (tmp_path / "board.html").read_text(encoding="utf-8")
    assert "as it was when this file was written" in page
    assert "renewed every 2.5 s" in board.page(tmp_path, every=2.5)
    for part in ("style", "script"):  # what the policy names is what stands there
        [text] = re.findall(rf"<{part}>(.*?)</{part}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{part}-src 'sha256-{digest}'" in page


def test_each_panel_draws_its_own_numbers_and_the_loss_both_of_training_and_held_out(
    tmp_path: Path,
) -> None:
    make_run(tmp_path, "one")
    run = make_run(tmp_path, "two")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "eval_chrf": 7.0}) + "\n")
    charts = dict(board._charts(sorted(board.find_runs(tmp_path), key=lambda run: run.path.name)))
    said = {title: re.findall('aria-label="([^"]*)"', chart)[0].split(". ", 1)[1] for title, chart in charts.items()}  # fmt: skip
    wanted = {
        "loss": "3 to 2", "learning rate, 1e-4": "1 to 2", "tokens a second": "900 to 950", "memory, GB": "1.5 to 1.6",
        "gradient norm": "2 to 1", "rouge-l": "41",
    }  # fmt: skip
    for title, numbers in wanted.items():
        assert said[title].startswith(f"one: {numbers}; two: {numbers}"), title
        assert f'aria-label="{title} over steps' in charts[title]
    assert said["loss"].endswith("; one: 2.5; two: 2.5")
    assert said["chrf"] == "two: 7"
    dots = {
        title: re.findall(r'<circle class="dot (c\d)"', chart) for title, chart in charts.items()
    }
    assert dots == {title: [] for title in wanted} | {"loss": ["c1", "c2"], "rouge-l": ["c1", "c2"], "chrf": ["c2"]}  # fmt: skip
    assert re.findall('"curve thin (c.)"', charts["memory, GB"]) == ["c1", "c2"]


def test_a_run_stands_with_its_colour_its_state_and_what_else_is_known(tmp_path: Path) -> None:
    make_run(tmp_path, "one")
    os.utime(tmp_path / "one" / "config.yaml", (1, 1))
    (make_run(tmp_path, "two") / "predictions-2.jsonl").write_bytes(b'{"prediction": "\xff"}\n')
    [first, second] = [(run, board.read_status(run.path)) for run in board.find_runs(tmp_path)]
    row = board._row(1, *second)
    assert (row["colour"], row["name"], row["state"]) == (2, str(tmp_path / "two"), "stopped")
    assert row["facts"][:2] == [["step", "2 of 4"], ["loss", "2.0000"]]
    panels = board.panels(tmp_path)
    assert re.findall(r'<article class="run (c\d)">', panels) == ["c1", "c2"]
    assert re.findall(r"<h3>.*?</i>(.*?) <small", panels) == [str(tmp_path / name) for name in ("one", "two")]  # fmt: skip
    (first[0].path / "predictions-2.jsonl").write_text('no json\n[1]\n{"prompt": "p"}\n{}\n')
    few, odd = board._samples([first[0], second[0]])
    assert [row["prompt"] for row in few["rows"]] == ["p"], "of the first three rows"
    assert (odd["colour"], odd["rows"]) == (2, [{"prompt": "null", "reference": "null", "prediction": "\ufffd"}])  # fmt: skip


def test_a_panel_without_a_number_is_left_out_and_a_large_file_is_opened_up_to_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    panels = board.panels(tmp_path)
    assert re.findall("<figcaption><span>(.*?)</span>", panels) == ["loss"]
    size = (run / "predictions-2.jsonl").stat().st_size
    for limit, number in ((size, 1), (size - 1, 0)):
        monkeypatch.setattr(board, "LARGEST_FILE", limit)
        assert len(board._samples(board.find_runs(tmp_path))) == number
