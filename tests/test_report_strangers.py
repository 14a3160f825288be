"""A folder that somebody else wrote: its page shows nothing but what lies in the folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import evaluations
import pytest
from PIL import Image

from finetune.evaluation import schema

SECRET = "a secret of this machine"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    return evaluations.write_evaluation(tmp_path / "out", samples=4, images=[picture])


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "evaluation.json"
    found = json.loads(file.read_text("utf-8"))
    change(found)
    file.write_text(json.dumps(found), "utf-8")


def rows_changed(folder: Path, **fields: Any) -> None:
    for file in (folder / "predictions").iterdir():
        rows = [json.loads(line) | fields for line in file.read_text("utf-8").splitlines()]
        for number, row in enumerate(rows):
            row["message"] = number
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def report(folder: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = command_line.exit_code("report", str(folder))
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said
    return code, said


def page(folder: Path) -> str:
    return (folder / "report.html").read_text("utf-8")


def test_a_picture_that_the_folder_keeps_is_shown_when_its_original_is_gone(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder.parent / "picture.png").unlink()
    assert report(folder, capfd)[0] == 0
    assert "data:image/webp;base64," in page(folder)


@pytest.mark.parametrize(
    "name",
    ["{}/private.png", "../private.png", "pictures/../../private.png", "a\0b.png", "x" * 300, "/dev/zero"],
)  # fmt: skip
def test_a_row_cannot_bring_another_image_of_this_disk_into_the_page(
    folder: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8), "blue").save(folder.parent / "private.png")
    rows_changed(folder, images=[name.format(folder.parent)])
    assert report(folder, capfd)[0] == 0
    assert "data:image/" not in page(folder)
    assert "this folder keeps no picture of it" in page(folder)


def _as_link(file: Path) -> None:
    outside = file.parents[2] / "outside"
    shutil.copyfile(file, outside)
    file.unlink()
    file.symlink_to(outside)


def _as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _as_large_picture(file: Path) -> None:
    Image.new("RGB", (13_000, 13_000)).save(file, "WEBP", lossless=True, quality=0, method=0)


def _as_tiff(file: Path) -> None:
    Image.new("RGB", (8, 8)).save(file, "TIFF")


@pytest.mark.parametrize("spoil", [_as_link, _as_pipe, _as_large_picture, _as_tiff])
def test_a_kept_picture_is_a_small_regular_webp_file_or_not_shown(
    folder: Path, spoil: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    [kept] = (folder / "pictures").iterdir()
    spoil(kept)
    assert report(folder, capfd)[0] == 0
    assert "data:image/" not in page(folder)


@pytest.mark.parametrize("name", ["../private.jsonl", "{}/private.jsonl", "link", "pipe", "a\0b", "x" * 300, "."])  # fmt: skip
def test_predictions_lie_in_the_folder_or_are_refused(
    folder: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    private = folder.parent / "private.jsonl"
    private.write_text(json.dumps({"where": "a", "message": 1, "prediction": SECRET}) + "\n")
    (folder / "link").symlink_to(private)
    os.mkfifo(folder / "pipe")
    place = name.format(folder.parent)
    changed(folder, lambda found: [one.update(predictions=place) for one in found["targets"]])
    code, said = report(folder, capfd)
    assert code == 2
    assert "holds no file" in said
    assert not (folder / "report.html").exists()


def test_the_records_of_a_run_are_those_that_the_folder_keeps(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = evaluations.write_run(folder.parent / "private")
    (run / "config.yaml").write_text(f"model: {{path: '{SECRET}'}}\n")
    changed(folder, lambda found: [one.update(run=str(run)) for one in found["targets"][1:]])
    code, said = report(folder, capfd)
    assert code == 0
    assert "keeps no records" in said
    assert SECRET not in page(folder)
    place = folder / "runs" / schema._digest(str(run))
    place.mkdir()
    (place / "config.yaml").symlink_to(run / "config.yaml")
    assert report(folder, capfd)[0] == 2


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("evaluation.json", "[" * 100_000),
        ("evaluation.json", '{"format": 1, "targets": [{"name": "a", "path": "b", "kind": "base", "predictions": "p", "scores": {"loss": {"value": 1, "n": 1e400}}}]}'),
        ("data.json", '{"train": 5}'),
        ("data.json", '{"train": {"fingerprint": "x", "lengths": {"edges": [1, 1], "numbers": [3]}}}'),
        ("data.json", "[" * 100_000),
        ("config.yaml", "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
    ],
)  # fmt: skip
def test_what_is_not_as_it_is_written_is_refused_in_words(
    folder: Path, file: str, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    place = folder if file == "evaluation.json" else next((folder / "runs").iterdir())
    (place / file).write_text(text, "utf-8")
    code, said = report(folder, capfd)
    assert code == 2
    assert file in said


def test_numbers_that_nothing_measured_are_left_out_of_the_curves(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    history = next((folder / "runs").iterdir()) / "metrics.jsonl"
    history.write_text('{"step": 1, "loss": NaN}\n{"step": 1e999, "loss": 1}\n{"step": 2, "loss": 1e308}\n')  # fmt: skip
    changed(folder, lambda found: found["targets"][0]["scores"]["rouge-l"].update(value=1e308))
    assert report(folder, capfd)[0] == 0
