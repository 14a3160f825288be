"""Streams in several processes under DeepSpeed, of rows with images, from a hub: as one process has them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import download_hubs
import numpy as np
import pictures
import pytest
import runs
from PIL import Image

from finetune.data.dialogue.conversation import RowError
from finetune.data.dialogue.formats import to_conversation
from finetune.data.reading.images import ImageFiles, ImagePolicy


def a_picture(colour: str) -> bytes:
    """A PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (20, 10), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 dialogues in three files: in two of them each row brings its picture's bytes."""
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("shards") / "data"
    folder.mkdir()
    colours = pictures.COLOURS
    for shard in range(2):
        rows = [
            {
                "image": {"bytes": a_picture(colours[n % 6]), "path": None},
                "question": "what is this " * (1 + n % 4),
                "answer": f"{colours[n % 6]} {n % 3}",
            }
            for n in range(12 * shard, 12 * shard + 12)
        ]
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{shard}.parquet")
    lines = [json.dumps({"question": f"order {n}", "answer": f"fox {n}"}) + "\n" for n in range(12)]
    (folder / "2.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def steps_of(run_dir: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(r["loss"], r["grad_norm"]) for r in lines if "loss" in r]


def test_a_stream_of_images_from_a_hub_trains_in_two_processes_and_under_zero_as_files_do_in_one(
    shards: Path, tmp_path: Path
) -> None:
    model = pictures.save_model(tmp_path / "model")

    def settings(name: str, source: str, **more: Any) -> dict[str, Any]:
        return runs.config(
            model, Path("-"), tmp_path / name, data__train=source, data__streaming=True, data__shuffle_buffer=17,
            data__max_length=64, data__cache_dir=str(tmp_path / "cache"), method__dropout=0.0,
            training__max_steps=4, training__lr_schedule="constant", training__learning_rate=1e-3, **more,
        )  # fmt: skip

    address = "hf://owner/name/data/*"
    part = settings("part", address, deepspeed__zero_stage=2)
    part["training"] = part["training"] | {"max_steps": 2}
    several = [
        settings("plain", address, data__loader_workers=1),
        settings("zero", address, deepspeed__zero_stage=2),
        part,
        settings("part", address, deepspeed__zero_stage=2),
    ]
    files = {f"data/{path.name}": path.read_bytes() for path in shards.iterdir()}
    with download_hubs.downloads(files) as there:
        done = runs.run_command(
            several, tmp_path, processes=2,
            environment={
                "HF_ENDPOINT": there.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"
            },
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs.run_here(settings("alone", str(shards), training__gradient_accumulation_steps=2))
    expected = np.array(steps_of(tmp_path / "alone"))
    assert len(expected) == 4
    for name in ("plain", "zero"):
        assert np.abs(np.array(steps_of(tmp_path / name)) - expected).max() < 1e-3, name
    assert steps_of(tmp_path / "part") == steps_of(tmp_path / "zero")


def test_an_image_beside_a_shard_of_a_hub_is_refused_with_the_way_out(tmp_path: Path) -> None:
    policy = ImagePolicy(check=True, file_alone=True)
    row = {"question": "what is this", "answer": "red", "image": "images/red.png"}
    with pytest.raises(RowError, match=r"only the rows are fetched.*data\.image_root"):
        ImageFiles(policy).placed(to_conversation(row), tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/red.png").write_bytes(a_picture("red"))
    rooted = ImageFiles(replace(policy, root=str(tmp_path)))
    placed = rooted.placed(to_conversation(row), Path("elsewhere"))
    assert placed.images[0] == str(tmp_path / "images/red.png")
