"""What frozen towers make of images, kept on disk: by which keys, by whom, whole, and in which format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_seeing_parts import image_of, pixels

from finetune.errors import DataError
from finetune.models.load import load_model
from finetune.models.vision import feature_cache
from finetune.models.vision.feature_cache import FeatureFiles, vision_cache


@pytest.fixture
def seeing(tmp_path: Path) -> Any:
    return load_model(pictures.save_model(tmp_path / "glm4v"))


@pytest.fixture
def grid(tmp_path: Path) -> Any:
    return load_model(pictures.save_grid_model(tmp_path / "grid"))


class Images:
    """What reads images; each has as many pixels as GLM-4V takes."""

    size = pictures.SIZE

    def __init__(self, rules: str = "1") -> None:
        self.rules = rules
        self.read: list[str] = []

    def arrays(self, images: Any) -> dict[str, Any]:
        self.read.append(Path(images[0][0]).name)
        return {"pixel_values": pixels().numpy()}


@pytest.fixture
def made(seeing: Any, tmp_path: Path) -> Any:
    """Makes the features of three images, in a process of so many."""
    seeing.requires_grad_(False)
    names = [str(tmp_path / f"{letter}.png") for letter in "abc"]
    for name in names:
        Path(name).write_bytes(name.encode())

    def make(spec: Any, **changes: Any) -> FeatureFiles:
        told: dict[str, Any] = {"base": "x", "dtype": torch.float32, "autocast": False, "root": tmp_path / "cache"}  # fmt: skip
        return vision_cache(seeing, names, spec, **told | changes)

    return make


def test_features_are_kept_by_the_size_and_rules_of_images(made: Any) -> None:
    spec, larger, other = Images(), Images(), Images("2")
    larger.size = 2 * pictures.SIZE
    for one in (spec, larger, other):
        made(one)
        assert sorted(one.read) == ["a.png", "b.png", "c.png"]
    again = Images()
    made(again)
    assert again.read == []


def test_what_a_process_that_died_left_is_swept_and_a_file_of_something_else_made_anew(
    made: Any, tmp_path: Path
) -> None:
    files = made(Images())
    (place,) = {file.parent for file in files.files.values()}
    from finetune.storage import files as storage

    left = place / f"{storage.STAGING}left"
    left.write_text("half")
    first = next(iter(files.files.values()))
    save_file({"other": torch.ones(1)}, first)
    with pytest.raises(DataError, match="holds no rows; start again"):
        files([next(iter(files.files))])
    spec = Images()
    made(spec)
    assert spec.read == ["a.png"]
    assert not left.exists()
    assert load_file(first).keys() == {"rows"}


def test_features_are_whole_or_not_there_and_the_tower_is_whole_while_it_looks(
    made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inside: list[str] = []

    @contextmanager
    def noted(tower: Any) -> Iterator[None]:
        inside.append(type(tower).__name__)
        yield
        inside.append("done")

    def half(held: Any, place: Path) -> None:
        Path(place).write_bytes(b"half")
        inside.append("written")
        raise OSError("no room")

    monkeypatch.setattr(feature_cache, "_whole", noted)
    monkeypatch.setattr(feature_cache, "save_file", half)
    with pytest.raises(OSError, match="no room"):
        made(Images())
    assert inside == ["VisionModel", "written"]
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_processes_share_the_work_and_look_before_any_of_them_writes(
    made: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr(feature_cache, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(feature_cache, "reduce_max", lambda _: done.append("all have looked"))
    real = feature_cache._write
    monkeypatch.setattr(feature_cache, "_write", lambda *given: done.append("written") or real(*given))  # fmt: skip
    looks = feature_cache._is_whole
    monkeypatch.setattr(feature_cache, "_is_whole", lambda file: done.append("looked") or looks(file))  # fmt: skip
    spec = Images()
    with pytest.raises(Exception, match="does not see"):
        made(spec)  # the other process is not there
    assert done == ["looked"] * 3 + ["all have looked"] + ["written"] * 2
    assert len(spec.read) == 2
    assert "computing 3 of 3 images" in capsys.readouterr().out
    monkeypatch.setattr(feature_cache, "rank_and_world", lambda: (0, 1))
    made(spec)
    assert "computing 1 of 3 images" in capsys.readouterr().out
    made(spec)
    assert "computing" not in capsys.readouterr().out
    assert sorted(set(spec.read)) == ["a.png", "b.png", "c.png"]


def test_features_are_computed_as_the_run_would_and_kept_in_its_format(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast: list[bool] = []
    real = feature_cache._rows
    monkeypatch.setattr(feature_cache, "_rows", lambda *given: cast.append(torch.is_autocast_enabled("cpu")) or real(*given))  # fmt: skip
    for autocast in (True, False):
        files = made(Images(), autocast=autocast, dtype=torch.bfloat16, base=str(autocast))
        assert {load_file(file)["rows"].dtype for file in files.files.values()} == {torch.bfloat16}
    assert cast == [True] * 3 + [False] * 3


def test_a_tower_that_is_dealt_out_is_gathered_while_it_looks(
    seeing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    held: list[Any] = []

    @contextmanager
    def gathered(weights: Any) -> Iterator[None]:
        held.append(len(weights))
        yield
        held.append("let go")

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", gathered)
    tower = seeing.transformer.vision
    with feature_cache._whole(tower):
        assert held == []
    for weight in list(tower.parameters())[:2]:
        weight.ds_id = 0
    with feature_cache._whole(tower):
        assert held == [2]
    assert held == [2, "let go"]


def test_of_images_that_keep_their_shape_the_shape_is_kept_too(grid: Any, tmp_path: Path) -> None:
    grid.requires_grad_(False)
    grid.get_input_embeddings().requires_grad_(True)  # the text may learn
    ids, shown = image_of(grid)

    class Grids(Images):
        def arrays(self, images: Any) -> dict[str, Any]:
            return {name: tensor.numpy() for name, tensor in shown.items()}

    (tmp_path / "a.png").write_bytes(b"a")
    names = [str(tmp_path / "a.png")]
    files = vision_cache(grid, names, Grids(), base="x", dtype=torch.float32, autocast=False, root=tmp_path)  # type: ignore[arg-type]  # fmt: skip
    assert load_file(files.files[names[0]]).keys() == {"rows", "image_grid_thw"}
    given = files(names * 2)
    assert given["image_grid_thw"].tolist() == [[1, 2, 2]] * 2
    assert given["image_features"].shape == (2, 32)
    with torch.no_grad():
        kept = grid(input_ids=ids, **files(names)).logits
        torch.testing.assert_close(kept, grid(input_ids=ids, **shown).logits)
