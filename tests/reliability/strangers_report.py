"""The page of a folder that somebody else wrote shows nothing but what lies in that folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from tests.evaluations import write_evaluation
from tests.reliability.frame import Case
from tests.reliability.places import command

SECRET = "a secret of this machine"
Spoil = Callable[[Path, Path], None]
"""Changes a folder; the second path is a place outside it."""


def stays_inside(spoil: Spoil, codes: tuple[int, ...], folder: Path) -> None:
    """No traceback, no hang, one of the codes, and nothing of the disk in a page."""
    picture = folder / "picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    made = write_evaluation(folder / "out", samples=4, images=[picture])
    outside = folder / "private"
    outside.mkdir()
    (outside / "config.yaml").write_text(f"model: {{path: {SECRET}}}\n")
    (outside / "rows.jsonl").write_text(json.dumps({"where": SECRET, "message": 1}) + "\n")
    Image.new("RGB", (9, 9), "blue").save(outside / "image.webp", "WEBP")
    spoil(made, outside)
    code, said = command("report", made)
    assert "Traceback" not in said, said[-3000:]
    assert code in codes, (code, said[-800:])
    page = made / "report.html"
    text = page.read_text("utf-8") if page.is_file() else ""
    assert SECRET not in text + said, "a file from outside was shown"
    assert text.count("data:image/") <= 1, "another picture was shown"


def _fields(made: Path, **fields: Any) -> None:
    """Sets fields of every target."""
    file = made / "evaluation.json"
    found = json.loads(file.read_text("utf-8"))
    for target in found["targets"][1:]:
        target |= fields
    file.write_text(json.dumps(found), "utf-8")


def predictions_named(name: str, made: Path, outside: Path) -> None:
    _fields(made, predictions=name.format(outside=outside))


def run_named(name: str, made: Path, outside: Path) -> None:
    _fields(made, run=name.format(outside=outside))


def image_named(name: str, made: Path, outside: Path) -> None:
    for file in (made / "predictions").iterdir():
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        for row in rows:
            row["images"] = [name.format(outside=outside)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _kept(made: Path, what: str) -> Path:
    found = {
        "evaluation.json": made,
        "predictions": made / "predictions",
        "picture": made / "pictures",
    }
    if what in ("config.yaml", "metrics.jsonl", "data.json"):
        return next((made / "runs").iterdir()) / what
    return made / what if what == "evaluation.json" else sorted(found[what].iterdir())[0]


def linked(what: str, made: Path, outside: Path) -> None:
    file = _kept(made, what)
    file.unlink()
    targets = {"config.yaml": "config.yaml", "picture": "image.webp"}
    file.symlink_to(outside / targets.get(what, "rows.jsonl"))


def piped(what: str, made: Path, outside: Path) -> None:
    file = _kept(made, what)
    file.unlink()
    os.mkfifo(file)


def device(what: str, made: Path, outside: Path) -> None:
    file = _kept(made, what)
    file.unlink()
    file.symlink_to("/dev/zero")


def text_in(what: str, text: str, made: Path, outside: Path) -> None:
    _kept(made, what).write_text(text, "utf-8")


def picture_of(kind: str, size: int, made: Path, outside: Path) -> None:
    Image.new("RGB", (size, size)).save(_kept(made, "picture"), kind)


def removed(made: Path, outside: Path) -> None:
    shutil.rmtree(made / "predictions")


def _spoils() -> Iterator[tuple[str, Spoil, tuple[int, ...]]]:
    names = ("{outside}/rows.jsonl", "../private/rows.jsonl", "a\0b", "x" * 300, ".", "/dev/zero")
    for name in names:
        yield f"predictions named {name[:30]!r}", partial(predictions_named, name), (2,)
    for name in ("{outside}", "../private", "a\0b", "x" * 5000, "/dev", "/proc/self"):
        yield f"a run named {name[:30]!r}", partial(run_named, name), (0, 2)
    for name in ("{outside}/image.webp", "../private/image.webp", "a\0b", "x" * 300, "/dev/zero"):
        yield f"an image named {name[:30]!r}", partial(image_named, name), (0,)
    for what in ("evaluation.json", "predictions", "config.yaml", "metrics.jsonl", "data.json"):
        for way in (linked, piped, device):
            yield f"{what} {way.__name__}", partial(way, what), (0, 2)
    for way in (linked, piped, device):
        yield f"a picture {way.__name__}", partial(way, "picture"), (0,)
    for kind, size in (("TIFF", 9), ("PPM", 9), ("PNG", 9), ("WEBP", 9000)):
        yield f"a picture as {kind} of {size} pixels", partial(picture_of, kind, size), (0,)
    for what in ("evaluation.json", "data.json", "config.yaml", "metrics.jsonl", "predictions"):
        for text in ("", "[" * 100_000, "\0", "\ud800".encode("utf-8", "replace").decode(), "5"):
            yield f"{what} holds {text[:6]!r}", partial(text_in, what, text), (0, 2)
    yield "no predictions", removed, (2,)


def cases() -> list[Case]:
    """Every way to point outside, and everything that is not as it is written."""
    return [
        Case(f"report: {name}", partial(stays_inside, spoil, codes), seconds=30.0)
        for name, spoil, codes in _spoils()
    ]
