"""What a frozen tower makes of images, computed once per image and kept on disk.

A file holds one image's rows [P + 2, D] (boi, patches, eoi) in the tower's number format, under the
hash of the image's bytes, in a folder of its own for every checkpoint and number format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune import console
from finetune.data.chat.image import shown
from finetune.distributed.device import local_device
from finetune.distributed.processes import fail_together, rank_and_world, reduce_max
from finetune.errors import ConfigError, DataError
from finetune.models.chatglm.vision import VisionModel
from finetune.storage.cache import key_of
from finetune.storage.files import file_digest, staged_file, sweep

ROWS = "rows"


@dataclass(frozen=True)
class FeatureFiles:
    """Image features, memory-mapped from the cache."""

    files: Mapping[str, Path]
    """By the image's path."""

    def __call__(self, images: Sequence[str]) -> Tensor:
        """Return [N, P + 2, D]; DataError when a file has gone or been damaged since the start."""
        return torch.stack([self._rows(self.files[image]) for image in images])

    def _rows(self, file: Path) -> Tensor:
        try:
            rows: Tensor = load_file(file)[ROWS]
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(
                f"{file} cannot be read ({error}); start again, it is made anew"
            ) from error
        return rows


def vision_cache(
    model: nn.Module,
    images: Sequence[str],
    size: int,
    *,
    base: str,
    dtype: torch.dtype,
    autocast: bool,
    root: Path,
) -> FeatureFiles:
    """The rows of `images` [size x size]; what is missing is computed, shared by the processes.

    Every process must call it with the same images.

    Args:
        model: holds the frozen tower.
        images: paths, each once.
        size: pixels of a side.
        base: the fingerprint of the checkpoint.
        dtype: of the rows.
        autocast: whether the tower computes under autocast to `dtype`, as it would in training.
        root: the cache.

    Raises:
        ConfigError: There is no tower, or it is trained.
    """
    tower = _frozen_tower(model)
    kind = {"base": base, "dtype": str(dtype), "size": size}
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
    with _whole(tower), cast, fail_together():
        for file in mine:
            pixels = torch.from_numpy(shown(wanted[file], size, "vision features"))
            with torch.no_grad():
                rows = tower.features(pixels[None].to(local_device()))[0]
            _write(file, rows.to(dtype).cpu().contiguous())
    with fail_together():
        if unseen := [file for file in missing if not file.is_file()]:
            raise ConfigError(
                f"data.cache_image_features: process {rank} does not see {unseen[0]}, which "
                "another one wrote; put data.cache_dir where all machines see it"
            )
    return FeatureFiles(files)


def _frozen_tower(model: nn.Module) -> VisionModel:
    tower = next((part for part in model.modules() if isinstance(part, VisionModel)), None)
    if tower is None:
        raise ConfigError(
            "data.cache_image_features: this checkpoint is no GLM-4V; leave the option out"
        )
    if tower.is_trained:
        raise ConfigError(
            "data.cache_image_features: the tower is trained, so its features change; add "
            "model.freeze: [vision], or leave the option out"
        )
    return tower


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


def _write(file: Path, rows: Tensor) -> None:
    """The file, whole or not at all."""
    with staged_file(file) as part:
        save_file({ROWS: rows}, part)
