"""Images: the same picture in thirty spellings, and what is none; looked at before torch is there."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.reliability.frame import Case
from tests.reliability.places import light, shared, tokenizer_folder, write_config

SIZE = (40, 20)
SIDE = 56


@cache
def _picture() -> Image.Image:
    """Left half red, right half blue."""
    values = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    values[:, : SIZE[0] // 2, 0] = values[:, SIZE[0] // 2 :, 2] = 255
    return Image.fromarray(values)


def _as(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    sink = io.BytesIO()
    (image or _picture()).save(sink, kind, **options)
    return sink.getvalue()


def _turned() -> bytes:
    """Stored on its side, with the EXIF entry that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return _as("PNG", _picture().transpose(Image.Transpose.ROTATE_90), exif=exif)


def _with_alpha() -> Image.Image:
    image = _picture().convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))  # seen through, onto white
    return image


def _on_white() -> Image.Image:
    image = _picture().copy()
    image.putpixel((0, 0), (255, 255, 255))
    return image


def _animated(kind: str) -> bytes:
    return _as(kind, save_all=True, append_images=[Image.new("RGB", SIZE, "green")], lossless=True)


def _wide_grey() -> bytes:
    values = np.zeros((SIZE[1], SIZE[0]), np.uint16)
    values[:, SIZE[0] // 2 :] = 65535
    return _as("PNG", Image.fromarray(values))


def _grey() -> Image.Image:
    values = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    values[:, SIZE[0] // 2 :] = 255
    return Image.fromarray(values)


def benign() -> dict[str, tuple[bytes, Image.Image]]:
    """File name -> its bytes and the picture it shows."""
    red_blue, grey = _picture(), _grey()
    return {
        "plain.png": (_as("PNG"), red_blue),
        "plain.bmp": (_as("BMP"), red_blue),
        "plain.gif": (_as("GIF"), red_blue),
        "plain.webp": (_as("WEBP", lossless=True), red_blue),
        "interlaced.png": (_as("PNG", optimize=True), red_blue),
        "png_named_jpg.jpg": (_as("PNG"), red_blue),
        "png_without_suffix": (_as("PNG"), red_blue),
        "palette.png": (_as("PNG", _picture().quantize(2)), red_blue),
        "palette.gif": (_as("GIF", _picture().quantize(2)), red_blue),
        "opaque_alpha.png": (_as("PNG", _picture().convert("RGBA")), red_blue),
        "alpha.png": (_as("PNG", _with_alpha()), _on_white()),
        "alpha.webp": (_as("WEBP", _with_alpha(), lossless=True, exact=True), _on_white()),
        "exif_turned.png": (_turned(), red_blue),
        "animated.gif": (_animated("GIF"), red_blue),
        "animated.webp": (_animated("WEBP"), red_blue),
        "animated.png": (_animated("PNG"), red_blue),
        "grey.png": (_as("PNG", grey), grey),
        "grey_alpha.png": (_as("PNG", grey.convert("LA")), grey),
        "grey_16_bit.png": (_wide_grey(), grey),
        "one_bit.png": (_as("PNG", grey.convert("1")), grey),
        "bytes_behind_the_end.png": (_as("PNG") + b"<?php nothing ?>", red_blue),
        "colour_profile.png": (_as("PNG", icc_profile=b"no profile at all"), red_blue),
        "1x5000.png": (_as("PNG", Image.new("RGB", (1, 5000), "red")), Image.new("RGB", (1, 5000), "red")),
        "5000x1.png": (_as("PNG", Image.new("RGB", (5000, 1), "red")), Image.new("RGB", (5000, 1), "red")),
        "1x1.png": (_as("PNG", Image.new("RGB", (1, 1), "red")), Image.new("RGB", (1, 1), "red")),
    }  # fmt: skip


def _close() -> dict[str, bytes]:
    """Lossy ones: the same picture but for rounding."""
    return {
        "plain.jpg": _as("JPEG", quality=95, subsampling=0),
        "progressive.jpg": _as("JPEG", quality=95, subsampling=0, progressive=True),
        "cmyk.jpg": _as("JPEG", _picture().convert("CMYK"), quality=95),
        "jpg_named_png.png": _as("JPEG", quality=95, subsampling=0),
    }


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")  # fmt: skip


def _text_bomb() -> bytes:
    """A compressed comment of 100 MB in a small file."""
    comment = b"Comment\0\0" + zlib.compress(b"\0" * 100_000_000, 9)
    whole = _as("PNG")
    return whole[:33] + _chunk(b"zTXt", comment) + whole[33:]


def _flipped() -> bytes:
    whole = bytearray(_as("PNG"))
    whole[whole.index(b"IDAT") + 12] ^= 255
    return bytes(whole)


def bad() -> dict[str, tuple[bytes | None, str]]:
    """File name -> its bytes (None: no file) and part of the reason."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    no_format = "it is no image in one of the formats"
    return {
        "bomb_by_area.png": (_bomb(30_000, 30_000), "more than 89,478,485"),
        "bomb_by_width.png": (_bomb(2**31 - 1, 9), "more than 89,478,485"),
        "bomb_just_over.png": (_bomb(9_460, 9_460), "more than 89,478,485"),
        "bomb_of_text.png": (_text_bomb(), "it cannot be decoded"),
        "cut.jpg": (_as("JPEG", noise)[:1000], "it cannot be decoded"),
        "cut.png": (_as("PNG", noise)[:1000], "it cannot be decoded"),
        "cut.gif": (_as("GIF", noise)[:1500], "it cannot be decoded"),
        "cut.webp": (_as("WEBP", noise)[:300], "it cannot be decoded"),
        "cut_in_the_header.png": (_as("PNG")[:20], "it cannot be decoded"),
        "one_byte_changed.png": (_flipped(), "it cannot be decoded"),
        "no_pixels.png": (_bomb(0, 0), no_format),
        "empty.png": (b"", no_format),
        "text.png": (b"not an image", no_format),
        "vector.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', no_format),
        "svg_named.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', no_format),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", no_format),
        "document.pdf": (b"%PDF-1.7\n", no_format),
        "page.tiff": (_as("TIFF"), no_format),
        "icon.ico": (_as("ICO", sizes=[(16, 16)]), no_format),
        "netpbm.ppm": (_as("PPM"), no_format),
        "gone.png": (None, "there is no such file"),
        "folder.png/": (None, "it is not a file"),
    }  # fmt: skip


@cache
def _seeing_folder() -> Path:
    """A tokenizer folder of a checkpoint that takes images."""
    import tiny

    folder = shared("seeing")
    tiny.save_tokenizer(folder)
    config = {
        "model_type": "chatglm",
        "vision_config": {"image_size": SIDE, "patch_size": 14},
        "boi_token_id": tiny.CONTROL_IDS["<|begin_of_image|>"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _row(name: str) -> str:
    question = {"role": "user", "content": "what?", "image": name}
    return json.dumps({"messages": [question, {"role": "assistant", "content": "A"}]}) + "\n"


def shows(name: str, content: bytes, picture: Image.Image, slack: int, folder: Path) -> None:
    """The file is taken, and gives the pixels of the picture."""
    from finetune.data.chat.image import pixels, read_image

    (folder / name).write_bytes(content)
    (folder / "wanted.png").write_bytes(_as("PNG", picture))
    (folder / "rows.jsonl").write_text(_row(name))
    seen = light().run("data", "tokens", "rows.jsonl", "--model", _seeing_folder(), cwd=folder)
    assert seen.code == 0, seen.err
    seen.cheap()
    ours, wanted = (np.asarray(read_image(folder / n)).astype(int) for n in (name, "wanted.png"))
    assert ours.shape == wanted.shape
    assert np.abs(ours - wanted).mean() <= slack
    if not slack:
        assert np.array_equal(*(pixels(folder / n, SIDE) for n in (name, "wanted.png")))


def is_refused(name: str, content: bytes | None, reason: str, folder: Path) -> None:
    """`finetune train` names the row, the image and the reason, without decoding a bomb."""
    if name.endswith("/"):
        (folder / name).mkdir()
    elif content is not None:
        (folder / name).write_bytes(content)
    (folder / "rows.jsonl").write_text(_row("x.png") + _row(name))
    (folder / "x.png").write_bytes(_as("PNG"))
    write_config(folder, "rows.jsonl", model__path=str(_seeing_folder()))
    said = (f"rows.jsonl:2: image {name.rstrip('/')}: ", reason)
    light().run("train", "x.yaml", cwd=folder).refused(*said)


def a_text_model_refuses_images(folder: Path) -> None:
    """A checkpoint without a tower says so by row, before it loads anything."""
    (folder / "rows.jsonl").write_text(_row("x.png"))
    (folder / "x.png").write_bytes(_as("PNG"))
    write_config(folder, "rows.jsonl", model__path=str(tokenizer_folder()))
    outcome = light().run("train", "x.yaml", cwd=folder)
    outcome.refused(
        "rows.jsonl:1: shows an image, but this checkpoint (", "takes none; use one that does"
    )


def cases() -> Iterator[Case]:
    """Every image."""
    _seeing_folder()
    for name, (content, picture) in benign().items():
        yield Case(f"images: benign {name}", partial(shows, name, content, picture, 0))
    for name, lossy in _close().items():
        yield Case(f"images: benign {name}", partial(shows, name, lossy, _picture(), 12))
    for name, (broken, reason) in bad().items():
        yield Case(f"images: {name}", partial(is_refused, name, broken, reason))
    yield Case("images: one for a text model", a_text_model_refuses_images)
