"""What a frozen tower makes of images, kept on disk: for which model, which format, by which process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pictures
import pytest
import torch

from finetune.errors import ConfigError, DataError
from finetune.models.load import load_model
from finetune.models.vision import feature_cache
from finetune.models.vision.feature_cache import FeatureFiles, vision_cache


class Images:
    """As many pixels as an image of GLM-4V has."""

    size, rules = pictures.SIZE, 1

    def __init__(self) -> None:
        self.read: list[str] = []

    def arrays(self, images: Any) -> dict[str, Any]:
        self.read.append(images[0][0])
        return {"pixel_values": torch.full((1, 3, self.size, self.size), 0.5).numpy()}


def test_features_are_made_once_for_each_image_checkpoint_and_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(pictures.save_model(tmp_path / "model"))
    images = [str(tmp_path / name) for name in ("a.png", "b.png", "same.png")]
    for path, content in zip(images, (b"a", b"b", b"a"), strict=True):
        Path(path).write_bytes(content)
    spec = Images()

    def made(base: str = "x", dtype: torch.dtype = torch.float32, root: str = "cache") -> FeatureFiles:  # fmt: skip
        for weight in model.parameters():
            weight.requires_grad_(False)
        return vision_cache(model, images, spec, base=base, dtype=dtype, autocast=False, root=tmp_path / root)  # type: ignore[arg-type]  # fmt: skip

    files = made()
    assert len(spec.read) == 2  # two of them are the same picture
    assert files(images)["image_features"].shape[0] == 3
    made()
    assert len(spec.read) == 2
    made(base="y")
    narrow = made(dtype=torch.bfloat16)
    assert len(spec.read) == 6
    assert narrow(images)["image_features"].dtype is torch.bfloat16
    torn = next(iter(files.files.values()))
    torn.write_bytes(torn.read_bytes()[:-3])
    with pytest.raises(DataError, match="cannot be read"):
        files(images)
    made()
    assert len(spec.read) == 7  # the torn one is made anew
    files(images)
    next(model.transformer.vision.parameters()).requires_grad_(True)
    with pytest.raises(ConfigError, match="the tower is trained"):
        feature_cache._frozen_tower(model)


def test_a_process_that_does_not_see_what_another_wrote_says_where_to_put_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(pictures.save_model(tmp_path / "model")).requires_grad_(False)
    (tmp_path / "a.png").write_bytes(b"a")
    monkeypatch.setattr(feature_cache, "rank_and_world", lambda: (1, 2))
    with pytest.raises(ConfigError, match=r"process 1 does not see .* put data\.cache_dir where"):
        vision_cache(model, [str(tmp_path / "a.png")], Images(), base="x", dtype=torch.float32, autocast=False, root=tmp_path)  # type: ignore[arg-type]  # fmt: skip


def test_text_alone_forgets_the_places_of_images_that_were_shown_before(tmp_path: Path) -> None:
    model: Any = load_model(pictures.save_grid_model(tmp_path / "model"))
    ids = torch.tensor([[10, 40, 41, 60]])
    with torch.no_grad():
        alone = model(ids).logits
        model.model.rope_deltas = torch.tensor([[-7]])
        assert torch.equal(model(ids).logits, alone)
    assert model.model.rope_deltas is None


@pytest.mark.parametrize(
    ("trained", "grad", "dealt", "runs"),
    [(True, True, False, True), (True, False, False, False), (False, True, False, False), (False, False, True, True)],
)  # fmt: skip
def test_an_encoder_runs_without_images_where_another_process_may_have_some(
    trained: bool, grad: bool, dealt: bool, runs: bool, tmp_path: Path
) -> None:
    model: Any = load_model(pictures.save_grid_model(tmp_path / "model")).requires_grad_(trained)
    if dealt:
        next(model.model.visual.parameters()).ds_id = 0
    with torch.set_grad_enabled(grad):
        assert model.model._others_may_look() is runs
