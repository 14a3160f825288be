"""What an evaluation folder keeps of things that lie elsewhere: pictures of prompts, records of runs.

A page is made of the folder alone: whoever wrote the folder cannot make it show other files of the
machine on which the page is made. So `evaluate` and `compare` copy what the page needs into it.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from finetune.artifacts.names import RUN_CONFIG, RUN_DATA, RUN_METRICS
from finetune.data.chat.image import ImageError, opened_image
from finetune.errors import DataError
from finetune.storage.files import whole_binary

RUN_FILES = (RUN_CONFIG, RUN_METRICS, RUN_DATA)
PICTURE_SIDE = 384
"""Pictures are scaled down to this many pixels."""
PICTURE_BYTES = 24_000_000
"""Room for pictures; those after it are named instead of shown."""


def inside(folder: Path, name: str) -> Path:
    """The regular file of that name in `folder`, links followed.

    Raises:
        DataError: It is not there, lies outside, or is a pipe, a device or the like.
    """
    try:
        path = (folder / name).resolve()
        if path.is_relative_to(folder.resolve()) and path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, links in a circle
        pass
    raise DataError(f"{folder} holds no file {name[:200]!r}; evaluate again")


def run_copy(folder: Path, run: str) -> Path | None:
    """Where `folder` keeps the records of a run; None when it keeps none."""
    copy = folder / _run(run)
    if not (copy / RUN_CONFIG).exists():
        return None
    for name in RUN_FILES:
        if (copy / name).is_symlink() or (copy / name).exists():
            inside(folder, f"{_run(run)}/{name}")
    return copy


def keep_run(folder: Path, run: str) -> None:
    """Copies a run's configuration, history and counts into `folder`; nothing when they are gone."""
    for name in RUN_FILES:
        if (Path(run) / name).is_file():
            (folder / _run(run)).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(run) / name, folder / _run(run) / name)


def keep_pictures(folder: Path, images: Iterable[str]) -> None:
    """Keeps small copies of images in `folder`, each once, while there is room."""
    room = PICTURE_BYTES
    for image in dict.fromkeys(images):
        try:
            data = _small(image)
        except ImageError:
            continue  # the page says that it has no copy
        room -= len(data)
        if room < 0:
            return
        with whole_binary(folder / _picture(image)) as file:
            file.write(data)


def picture(folder: Path, image: str) -> bytes:
    """The small copy of an image, a WebP file.

    Raises:
        DataError: The folder keeps none, or keeps something else under its name.
    """
    path = inside(folder, _picture(image))
    data = path.read_bytes() if path.stat().st_size <= PICTURE_BYTES else b""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as opened:
            if max(opened.size) <= PICTURE_SIDE:
                opened.load()
                return data
    except Exception as error:  # decoders raise anything on damaged files
        raise DataError(f"{path} is no picture: {error}") from error
    raise DataError(f"{path} is larger than {PICTURE_SIDE} pixels")


def _small(image: str) -> bytes:
    with opened_image(image) as found:
        small = found.convert("RGB")
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def _picture(image: str) -> str:
    return f"pictures/{_digest(image)}.webp"


def _run(run: str) -> str:
    return f"runs/{_digest(run)}"


def _digest(name: str) -> str:
    return sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
