"""Images that stand in rows: bytes in Parquet, data URLs, parts beside a column, paths under a root."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pictures
import pyarrow as pa
import pytest
import tiny
from PIL import Image
from pyarrow import parquet
from row_parts import REPLY, reason

from finetune.data.chat.image import ImageSpec, read_image
from finetune.data.dialogue.formats import to_conversation
from finetune.data.preview.report import check, show, tokens
from finetune.data.reading.images import ImagePolicy
from finetune.data.reading.sources import Reading, SourceSpec, read_conversations
from finetune.errors import DataError

USER = {"role": "user", "content": "<image>\nWhich colour?"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def red(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture(scope="module")
def glm4v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glm4v")
    tiny.save_tokenizer(folder)
    config = {
        "model_type": "chatglm",
        "vision_config": pictures.VISION,
        "boi_token_id": pictures.BOI,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write(path: Path, *rows: dict[str, Any]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shown_by(path: Path) -> tuple[str, str]:
    """The first question of a file and its image."""
    reading = Reading(images=ImagePolicy(check=True))
    first = next(read_conversations([SourceSpec(str(path))], reading)).messages[0]
    (image,) = first.images
    (text,) = ImageSpec(56, 4, 0).laid(first, first.content)[1:]
    return text, image.path


def test_bytes_in_parquet_are_read_in_a_list_and_in_a_column(
    tmp_path: Path, red: Path, cache: Path
) -> None:
    image = {"bytes": red.read_bytes(), "path": None}
    listed = write(tmp_path / "a.parquet", {"messages": [USER, REPLY], "images": [image]})
    column = {"image": {**image, "path": "x.png"}, "question": "Which colour?", "answer": "red"}
    single = write(tmp_path / "b.parquet", column)
    assert shown_by(listed) == shown_by(single)
    text, path = shown_by(single)
    assert text == "Which colour?"
    assert Path(path).is_relative_to(cache)
    assert read_image(path).getpixel((3, 3)) == (255, 0, 0)
    report = check([str(listed), str(single)])
    assert (report.num_bad, [s.images for s in report.sources]) == (0, [1, 1])


def test_a_path_beside_no_bytes_and_a_data_url_are_read(tmp_path: Path, red: Path) -> None:
    url = f"data:image/png;base64,{base64.b64encode(red.read_bytes()).decode()}"
    for image in ({"bytes": None, "path": "red.png"}, url, {"url": url}):
        file = write(tmp_path / "a.jsonl", {"messages": [USER, REPLY], "images": [image]})
        text, path = shown_by(file)
        assert (text, read_image(path).size) == ("Which colour?", (64, 64))
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Q"}]
    file = write(tmp_path / "a.jsonl", {"messages": [{**USER, "content": parts}, REPLY]})
    assert read_image(shown_by(file)[1]).size == (64, 64)


def test_a_part_that_only_says_image_takes_it_from_the_column(tmp_path: Path, red: Path) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Which colour?"}]
    row = {"messages": [{"role": "user", "content": parts}, REPLY]}
    assert shown_by(write(tmp_path / "a.jsonl", row | {"images": ["red.png"]})) == (
        "Which colour?",
        str(red),
    )
    with pytest.raises(ValueError, match=r"message 1: has a part of type 'image', but neither it"):
        to_conversation(row)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({"bytes": None}, "images is neither a path nor the bytes of an image"),
        (7, "images is neither a path nor the bytes of an image"),
        ("data:image/png,abc", "images is a data URL, but not data:image/…;base64,…"),
        ("ftp://x/y.png", "images 'ftp://x/y.png' is a URL"),
    ],
)
def test_an_image_that_cannot_be_opened_has_its_reason(image: Any, expected: str) -> None:
    assert reason(USER, REPLY, images=[image]).startswith(expected)


def test_bytes_that_are_no_image_are_a_bad_row(tmp_path: Path) -> None:
    rows = [{"messages": [USER, REPLY], "images": [url]} for url in (
        "data:image/png;base64,AAAA", "data:image/png;base64,%"
    )]  # fmt: skip
    report = check(str(write(tmp_path / "a.jsonl", *rows)))
    assert report.num_bad == 2
    assert "it is no image in one of the formats" in report.bad_rows[0].reason
    assert "holds no base64" in report.bad_rows[1].reason


def test_absolute_paths_are_read_under_a_root_by_every_command(
    tmp_path: Path, red: Path, glm4v: Path
) -> None:
    (tmp_path / "rows").mkdir()
    row = {"messages": [USER, REPLY], "images": [str(red)]}
    file = str(write(tmp_path / "rows" / "a.jsonl", row))
    assert "set data.image_root (--image-root) to a folder" in check(file).bad_rows[0].reason
    root = str(tmp_path)
    assert check(file, image_root=root).num_bad == 0
    assert show(file, model=glm4v, image_root=root).num_supervised == 3 + len("A") - 1
    (line,) = tokens(file, glm4v, image_root=root)
    assert pictures.BOI in line["input_ids"]


def test_a_file_with_only_bad_rows_is_shown_with_the_reasons(tmp_path: Path, glm4v: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"messages": [REPLY]}, {"messages": []})
    with pytest.raises(DataError) as raised:
        show(str(file), model=glm4v)
    assert f"{file} holds no dialogue. 2 of 2 rows cannot be used" in str(raised.value)
    assert "a.jsonl:1: message 1 is 'assistant'" in str(raised.value)


def test_a_pointer_of_git_lfs_says_how_to_get_the_data(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
    for name in ("a.parquet", "a.jsonl"):
        (tmp_path / name).write_text(pointer)
        (bad,) = check(str(tmp_path / name)).bad_rows
        assert "it is a Git LFS pointer, not the data" in bad.reason


def test_a_clone_of_a_hub_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs")
    (tmp_path / "dataset_infos.json").write_text("{}")
    row = {"messages": [{"role": "user", "content": "Q"}, REPLY]}
    write(tmp_path / "data" / "train-00000-of-00001.parquet", row)
    (source,) = check(str(tmp_path)).sources
    assert (source.rows, source.bad_rows) == (1, 0)


def test_a_folder_with_several_splits_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    row = {"messages": [{"role": "user", "content": "Q"}, REPLY]}
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        write(tmp_path / "data" / f"{name}.parquet", row)
    check(str(tmp_path))
    assert "holds files of several splits (test, train) and all are read" in capsys.readouterr().err
    check(str(tmp_path / "data" / "train-*"))
    assert "splits" not in capsys.readouterr().err


def test_a_folder_of_llamafactory_says_what_to_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "dataset_info.json").write_text(
        '{"mine": {"file_name": "a.json"}, "far": {"hf_hub_url": "x/y"}}'
    )
    with pytest.raises(DataError) as raised:
        check(str(tmp_path))
    assert "names mine (a.json), far; name the files that you mean" in str(raised.value)
