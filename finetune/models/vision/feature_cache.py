"""What a frozen tower makes of images, computed once per image and kept on disk.

A file holds one image's rows in the tower's number format, and what else the model is told about the
image, under the hash of its bytes, in a folder of its own for every checkpoint and number format. The
rows of GLM-4V are [P + 2, D] (boi, patches, eoi), those of images that keep their shape [P, D].
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune import console
from finetune.data.chat.image import TakesImages
from finetune.distributed.device import local_device
from finetune.distributed.processes import fail_together, rank_and_world, reduce_max
from finetune.errors import ConfigError, DataError
from finetune.models.chatglm.vision import VisionModel
from finetune.models.vision.grids import GridModel
from finetune.storage.cache import key_of
from finetune.storage.files import file_digest, staged_file, sweep

ROWS = "rows"


@dataclass(frozen=True)
class FeatureFiles:
    """Image features, memory-mapped from the cache."""

    files: Mapping[str, Path]
    """By the image's path."""

    def __call__(self, images: Sequence[str]) -> dict[str, Tensor]:
        """Return what the model is given of `images`, in that order, in the place of their pixels.

        `image_features` are [N, P + 2, D] of GLM-4V, else [patches of all, D], and `image_grid_thw`
        [N, 3] then too.

        Raises:
            DataError: A file has gone or been damaged since the start.
        """
        held = [self._held(self.files[image]) for image in images]
        given = {name: torch.cat([one[name] for one in held]) for name in held[0] if name != ROWS}
        join = torch.cat if given else torch.stack
        return given | {"image_features": join([one[ROWS] for one in held])}

    def _held(self, file: Path) -> dict[str, Tensor]:
        try:
            held: dict[str, Tensor] = load_file(file)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{file} cannot be read ({error}); start again, it is made anew"
            ) from error
        if ROWS not in held:
            raise DataError(f"{file} holds no {ROWS}; start again, it is made anew")
        return held


def vision_cache(
    model: nn.Module,
    images: Sequence[str],
    spec: TakesImages,
    *,
    base: str,
    dtype: torch.dtype,
    autocast: bool,
    root: Path,
) -> FeatureFiles:
    """The rows of `images`; what is missing is computed, shared by the processes.

    Every process must call it with the same images.

    Args:
        model: holds the frozen tower.
        images: paths, each once.
        spec: how the checkpoint takes images.
        base: the fingerprint of the checkpoint.
        dtype: of the rows.
        autocast: whether the tower computes under autocast to `dtype`, as it would in training.
        root: the cache.

    Raises:
        ConfigError: The tower is trained.
    """
    tower = _frozen_tower(model)
    kind = {"base": base, "dtype": str(dtype), "size": spec.size, "rules": spec.rules}
    folder = root / "features" / key_of(kind)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    files = {image: folder / f"{file_digest(Path(image))}.safetensors" for image in images}
    wanted = {file: image for image, file in files.items()}
    rank, world = rank_and_world()
    missing = [file for file in sorted(wanted) if not _is_whole(file)]
    reduce_max([0])  # nobody writes before everybody has looked
    mine = missing[rank::world]
    if missing:
        console.say(f"vision features: computing {len(missing):,} of {len(wanted):,} images")
    cast = torch.autocast(local_device().type, dtype=dtype, enabled=autocast)
    with _whole(_seeing(tower)), cast, fail_together():
        for file in mine:
            arrays = spec.arrays([(wanted[file], "vision features")])
            inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
            with torch.no_grad():
                rows = _rows(tower, {k: tensor.to(local_device()) for k, tensor in inputs.items()})
            kept = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
            _write(file, kept | {ROWS: rows.to(dtype).cpu().contiguous()})
    with fail_together():
        if unseen := [file for file in missing if not file.is_file()]:
            raise ConfigError(
                f"data.cache_image_features: process {rank} does not see {unseen[0]}, which "
                "another one wrote; put data.cache_dir where all machines see it"
            )
    return FeatureFiles(files)


def _frozen_tower(model: nn.Module) -> nn.Module:
    """GLM-4V's tower, or the model around another family's, whose text is not looked at."""
    kinds = (VisionModel, GridModel)
    found = next(part for part in model.modules() if isinstance(part, kinds))
    if any(weight.requires_grad for weight in _seeing(found).parameters()):
        raise ConfigError(
            "data.cache_image_features: the tower is trained, so its features change; add "
            "model.freeze: [vision], or leave the option out"
        )
    return found


def _seeing(tower: nn.Module) -> nn.Module:
    return tower.get_submodule("visual") if isinstance(tower, GridModel) else tower


def _rows(tower: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the rows of one image."""
    if isinstance(tower, GridModel):
        model: Any = tower
        seen = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        grid_rows: Tensor = seen.pooler_output[0]
        return grid_rows
    rows: Tensor = tower.features(inputs["pixel_values"])[0]
    return rows


@contextlib.contextmanager
def _whole(tower: nn.Module) -> Iterator[None]:
    """The tower's weights are whole and on each process's device; ZeRO-3 holds them in parts."""
    sharded = [weight for weight in tower.parameters() if hasattr(weight, "ds_id")]
    if not sharded:
        tower.to(local_device())
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def _is_whole(file: Path) -> bool:
    try:
        return ROWS in load_file(file)
    except (OSError, SafetensorError):
        return False


def _write(file: Path, held: dict[str, Tensor]) -> None:
    """The file, whole or not at all."""
    with staged_file(file) as part:
        save_file(held, part)
