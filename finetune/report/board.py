"""Runs while they are trained, as one page that renews itself; served to this machine only. No torch.

Everything is read from the run directories: metrics.jsonl, the replies of the last evaluation, the lock.
The page is one file and asks nobody but this server for anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup

from finetune import console
from finetune.errors import ConfigError, FinetuneError
from finetune.report.charts import Point, Series, lines
from finetune.report.page import asset
from finetune.report.page_data import ASSETS
from finetune.report.runs import Run, find_runs
from finetune.report.status import Status, read_status
from finetune.storage.files import write_file
from finetune.storage.outputs import check_output
from finetune.webpages import encodable, hashed, templates, theme

CURVES = {
    "loss": "loss",
    "learning_rate": "learning rate, 1e-4",
    "tokens_per_second": "tokens a second",
    "memory_gb": "memory, GB",
    "grad_norm": "gradient norm",
}
"""Key of metrics.jsonl -> title of its panel."""
NUM_COLOURS = 8
NUM_SAMPLES = 3
LONGEST_TEXT = 600
LARGEST_FILE = 64 << 20
"""Bytes of predictions that are still opened for a few samples."""
HOSTS = ("127.0.0.1", "localhost", "[::1]")


def serve(folder: Path, *, port: int, every: float) -> None:
    """Serves the page on the loopback address until Ctrl-C; ConfigError when the port is taken."""
    find_runs(folder)  # a folder that is not there is said at once
    handler = type("Handler", (_Handler,), {"folder": folder, "every": every})
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise ConfigError(f"cannot bind 127.0.0.1:{port}: {error.strerror}; choose another --port") from error  # fmt: skip
    with server:
        console.say(f"http://127.0.0.1:{server.server_port}  the runs in {folder}; Ctrl-C ends it")
        server.serve_forever()


def write(folder: Path, output: Path) -> None:
    """The page as it is now as a file, which may lie in none of the runs; ConfigError for one that does."""
    runs = [run.path for run in find_runs(folder)]
    check_output(output, runs, overwrite=True, is_ours=bool)
    write_file(output, encodable(page(folder)))


def page(folder: Path, *, every: float = 0.0) -> str:
    """The whole page; with `every` it renews its panels after so many seconds."""
    style, script = theme() + asset("page.css") + asset("board.css"), asset("board.js")
    return templates(ASSETS).get_template("board.html").render(
        folder=str(folder), panels=panels(folder), every=every,
        style=Markup(style), script=Markup(script),
        style_hash=hashed(style), script_hash=hashed(script),
    )  # fmt: skip


def panels(folder: Path) -> Markup:
    """What changes on the page: the table of runs, the curves, the samples."""
    try:
        runs = find_runs(folder)
    except FinetuneError as error:  # a file that is being written; the next look finds it whole
        return Markup('<p class="note">{}</p>').format(error)
    found = [(run, read_status(run.path)) for run in runs]
    template = templates(ASSETS).get_template("board_panels.html")
    return Markup(
        template.render(
            rows=[_row(number, run, status) for number, (run, status) in enumerate(found)],
            charts=[chart for chart in _charts(runs) if chart[1]],
            samples=_samples(runs),
        )
    )


def _charts(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """A panel for each curve, and one for each score of the evaluations in training."""
    charts = []
    for key, title in CURVES.items():
        series = [_series(run, number, key) for number, run in enumerate(runs)]
        if key == "loss":
            series += [_series(run, number, "eval_loss", "line") for number, run in enumerate(runs)]  # fmt: skip
        charts.append((title, lines(series, title=title)))
    scores = dict.fromkeys(name for run in runs for name in run.scored if name != "loss")
    for name in scores:
        series = [_series(run, number, f"eval_{name}", "line") for number, run in enumerate(runs)]
        charts.append((name, lines(series, title=name)))
    return charts


def _series(run: Run, number: int, key: str, style: str = "thin") -> Series:
    scale = 1e4 if key == "learning_rate" else 1.0
    points = [Point(step, scale * value) for step, value in run.curve(key)]
    return Series(run.path.name, _colour(number), points, style)


def _colour(number: int) -> int:
    return number % NUM_COLOURS + 1


def _row(number: int, run: Run, status: Status) -> dict[str, Any]:
    return {
        "colour": _colour(number),
        "name": str(run.path),
        "state": status.state,
        "facts": status.rows()[1:],
    }


def _samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The first replies of each run's last evaluation, beside their references."""
    found = []
    for number, run in enumerate(runs):
        step, file = max(run.predictions.items(), default=(0, None))
        if file is not None and file.stat().st_size <= LARGEST_FILE:
            rows = list(_rows(file))
            if rows:
                found.append({"colour": _colour(number), "name": run.path.name, "step": step, "rows": rows})  # fmt: skip
    return found


def _rows(file: Path) -> list[dict[str, str]]:
    """A few replies of a file of predictions; a row that is no reply is passed over."""
    shown = []
    with file.open(encoding="utf-8", errors="replace") as stream:
        for line in islice(stream, NUM_SAMPLES):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, Mapping):
                shown.append({key: _short(row.get(key)) for key in ("prompt", "reference", "prediction")})  # fmt: skip
    return shown


def _short(value: Any) -> str:
    """The end of a long prompt, the beginning of anything else, is not needed to see what comes out."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_TEXT else f"… {text[-LONGEST_TEXT:]}"


class _Handler(BaseHTTPRequestHandler):
    """Answers GET / with the page and GET /panels with what changes; nobody but this machine."""

    folder: Path
    every: float

    def do_GET(self) -> None:
        """The page, or its panels."""
        if self.headers.get("Host", "").rpartition(":")[0] not in HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN)  # a page of another site that leads here
        elif self.path == "/":
            self._send(page(self.folder, every=self.every))
        elif self.path == "/panels":
            self._send(str(panels(self.folder)))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, text: str) -> None:
        body = encodable(text).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a look every few seconds is no news."""
