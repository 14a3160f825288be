"""The board: what runs write while they are trained, as one page for this machine."""

from __future__ import annotations

import json
import re
import threading
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from finetune.cli import main
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
            connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
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
