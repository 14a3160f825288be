"""Image files to pixel values: the published preprocessing, every format, no surprises."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data.chat.image import (
    MAX_PIXELS,
    ImageError,
    ImageSpec,
    check_image,
    image_size,
    image_spec,
    pixels,
    read_image,
)


@pytest.fixture
def picture() -> Image.Image:
    """Left half red, right half blue, 40 x 20."""
    values = np.zeros((20, 40, 3), np.uint8)
    values[:, :20, 0] = values[:, 20:, 2] = 255
    return Image.fromarray(values)


def test_pixel_values_are_the_published_ones_bit_for_bit(glm4_assets: Path, tmp_path: Path) -> None:
    golden = np.load(glm4_assets / "golden/glm4v/preproc.npz")
    Image.fromarray(golden["image"]).save(tmp_path / "x.png")
    ours = pixels(tmp_path / "x.png", 1120)
    assert ours.shape == (3, 1120, 1120)
    assert ours.dtype == np.float32
    assert np.array_equal(ours[:, ::40, ::40], golden["pixel_values_1120_sub40"])
    assert np.array_equal(ours[:, :16, :16], golden["corner"])
    # Sums over rows and columns, in an order of the library's own: as tests/closeness.py derives it.
    atol = 3 * np.finfo(np.float32).eps * (2 * 1120) ** 0.5
    assert np.allclose(ours.mean((1, 2)), golden["mean"], rtol=0, atol=atol)
    assert np.allclose(ours.std((1, 2)), golden["std"], rtol=0, atol=atol)


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "webp", "jpg"])
def test_every_format_shows_the_same_picture(
    picture: Image.Image, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"x.{suffix}"
    picture.save(path, **({"lossless": True} if suffix == "webp" else {}))
    check_image(path)
    seen = np.asarray(read_image(path)).astype(int)
    assert np.abs(seen - np.asarray(picture)).max() <= (0 if suffix != "jpg" else 130)
    assert seen[10, 5].tolist() == pytest.approx([255, 0, 0], abs=5)
    assert seen[10, 35].tolist() == pytest.approx([0, 0, 255], abs=5)


def test_the_first_frame_of_an_animation_is_shown(picture: Image.Image, tmp_path: Path) -> None:
    other = Image.new("RGB", picture.size, "green")
    picture.save(tmp_path / "x.gif", save_all=True, append_images=[other])
    assert read_image(tmp_path / "x.gif").getpixel((5, 10)) == (255, 0, 0)


def test_exif_turns_a_photograph_upright(picture: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.save(tmp_path / "x.jpg", exif=exif, quality=95)
    upright = read_image(tmp_path / "x.jpg")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 200  # red, once left, is on top


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_photograph_is_that_of_the_upright_one(
    picture: Image.Image, tmp_path: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "x.jpg", exif=exif)
    assert image_size(tmp_path / "x.jpg") == read_image(tmp_path / "x.jpg").size
    assert image_size(tmp_path / "x.jpg") == ((20, 40) if orientation >= 5 else (40, 20))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "x.png", transparency=0)
    else:
        image = Image.new(mode, (2, 1), (0,) * len(mode))
        image.putpixel((1, 0), (9,) * (len(mode) - 1) + (255,))
        image.save(tmp_path / "x.png")
    seen = read_image(tmp_path / "x.png")
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    assert seen.getpixel((1, 0)) == (9, 9, 9)


def test_half_transparent_red_becomes_pink(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 127, 127)


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    seen = np.asarray(read_image(tmp_path / "x.png"))
    assert seen[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_black_and_one_bit_are_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=95)
    assert read_image(tmp_path / "x.jpg").getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=6)
    Image.new("1", (2, 2), 1).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (30_000, 30_000), (2**31 - 1, 9)])
def test_a_pixel_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, width: int, height: int
) -> None:
    assert width * height > MAX_PIXELS
    (tmp_path / "x.png").write_bytes(bomb(width, height))
    for look in (check_image, read_image):
        with pytest.raises(ImageError, match="more than 89,478,485"):
            look(tmp_path / "x.png")


def test_what_is_no_whole_image_is_refused_with_its_reason(
    picture: Image.Image, tmp_path: Path
) -> None:
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(whole, "JPEG")
    cases = {
        "cut.jpg": (whole.getvalue()[: len(whole.getvalue()) // 2], "cannot be decoded"),
        "text.png": (b"not an image", "no image in one of the formats"),
        "empty.png": (b"", "no image in one of the formats"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image in one of"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=reason):
            check_image(tmp_path / name)
    picture.save(tmp_path / "x.png")
    damaged = bytearray((tmp_path / "x.png").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "x.png").write_bytes(bytes(damaged))
    with pytest.raises(ImageError, match="cannot be decoded"):
        check_image(tmp_path / "x.png")
    with pytest.raises(ImageError, match="no such file"):
        check_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="not a file"):
        check_image(tmp_path)


def test_a_checkpoint_says_how_it_takes_images() -> None:
    vision = {"image_size": 1120, "patch_size": 14}
    spec = image_spec({"model_type": "chatglm", "vision_config": vision, "boi_token_id": 7})
    assert spec == ImageSpec(size=1120, patches=1600, begin_id=7)
    assert spec.tokens == 1602
    assert image_spec({"model_type": "chatglm"}) is None


def test_every_patch_of_an_image_has_the_position_of_the_first() -> None:
    ids = np.array([5, 5, 1, 0, 0, 0, 0, 2, 7], np.int32)
    assert ImageSpec(56, 4, 1).positions(ids).tolist() == [0, 1, 2, 3, 3, 3, 3, 4, 5]
