"""Tokenizer files, the sandbox of templates and image files: each rule on what no model is needed for."""

from __future__ import annotations

import gc
import json
import os
import resource
import time
from datetime import datetime
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pictures
import pytest
import tiny
from hints import said
from PIL import Image
from tokenizers import normalizers

from finetune.artifacts.resolve import TOKENIZER_FILES
from finetune.data.chat import tokenizer as tokenizers
from finetune.data.chat.glm41v_image import GridSpec
from finetune.data.chat.image import ImageError, ImageSpec, check_image, image_size, read_image
from finetune.data.chat.sandbox import RefusedError, Sandbox
from finetune.data.chat.tokenizer import load_chat_tokenizer, tokenizer_file

IDS = tiny.CONTROL_IDS
NEEDED = {"<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"}  # fmt: skip
"""What a dialogue is laid out with."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_tokenizer(tmp_path / "fast")
    return tmp_path / "fast"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    tiny.save_tokenizer(tmp_path / "published", tiktoken=True)
    return tmp_path / "published"


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(value | changes), encoding="utf-8")


# --- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("token", tiny.CONTROL_TOKENS)
def test_a_tokenizer_without_a_token_that_dialogues_are_made_of_is_refused(
    folder: Path, token: str
) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text("utf-8"))
    value["added_tokens"] = [one for one in value["added_tokens"] if one["content"] != token]
    for number, one in enumerate(value["added_tokens"]):
        one["id"] = tiny.NUM_RANKS + number
    path.write_text(json.dumps(value), encoding="utf-8")
    if token in NEEDED:
        assert f"it lacks {token} as added tokens" in said(load_chat_tokenizer, folder)
    else:
        assert token not in load_chat_tokenizer(folder).control_ids


def test_the_control_tokens_of_a_folder_without_a_list_are_the_published_ones_in_order(
    published: Path,
) -> None:
    (published / "tokenizer_config.json").unlink()
    assert dict(load_chat_tokenizer(published).control_ids) == IDS


def test_of_a_checkpoint_only_small_and_plain_files_of_the_asked_revision_are_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def local_folder(*given: Any, files: Any = None) -> Path:
        asked.append((*given, files))
        return folder

    monkeypatch.setattr(tokenizers, "local_folder", local_folder)
    load_chat_tokenizer("org/name", "rev")
    assert tokenizer_file("org/name", "rev") == folder / "tokenizer.json"
    assert {one for one in asked if one[0] != folder} == {("org/name", "rev", TOKENIZER_FILES)}
    (tmp_path / "outside").write_text("x")
    (folder / "weights").symlink_to(tmp_path / "outside")
    assert "leads out of its folder" in said(load_chat_tokenizer, folder)
    (folder / "weights").unlink()
    monkeypatch.setattr(tokenizers, "LARGEST_JSON", 100)
    assert "tokenizer.json is larger than" in said(load_chat_tokenizer, folder)


def test_a_tokenizer_says_whose_it_is_and_how_many_tokens_it_has(folder: Path) -> None:
    edit(folder / "config.json", model_type="glm")
    found = load_chat_tokenizer(folder)
    assert found.name == "fast, model_type glm"
    assert found.vocab_size == tiny.NUM_RANKS + len(tiny.CONTROL_TOKENS)
    assert (found.image, found.image_rule.most) == (None, 0)


def test_special_tokens_are_those_that_a_template_may_write(folder: Path) -> None:
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
    given = {
        name: f"<{name}>" if name < "d" or name > "t" else {"content": f"<{name}>"}
        for name in names
    }
    edit(folder / "tokenizer_config.json", **given | {"mask_token": "<m>", "eos_token": None})
    assert load_chat_tokenizer(folder).special_tokens == {
        name: f"<{name}>" for name in names if name != "eos_token"
    }


@pytest.mark.parametrize(
    ("config", "settings", "pad"),
    [
        ({"pad_token": "<|user|>"}, {}, IDS["<|user|>"]),
        ({"pad_token": {"content": "<eop>"}}, {}, IDS["<eop>"]),
        ({"pad_token": "<|user|>"}, {"pad_token_id": 5}, 5),
        ({"pad_token": "<nobody>"}, {"pad_token_id": None}, IDS["<|endoftext|>"]),
        ({"pad_token": None}, {}, IDS["<|endoftext|>"]),
    ],
)
def test_the_pad_token_is_the_models_then_the_tokenizers_then_the_end_of_text(
    folder: Path, config: Any, settings: Any, pad: int
) -> None:
    edit(folder / "tokenizer_config.json", **config)
    edit(folder / "config.json", **settings)
    assert load_chat_tokenizer(folder).pad_id == pad


@pytest.mark.parametrize(
    ("eos", "stops"),
    [
        (5, [5]), ([5, IDS["<|user|>"], 5], [5, IDS["<|user|>"]]), ([], [IDS["<|endoftext|>"]]),
        (None, [IDS["<|endoftext|>"]]),
    ],
)  # fmt: skip
def test_a_reply_ends_at_the_models_tokens_and_at_those_it_is_trained_with(
    folder: Path, eos: Any, stops: list[int]
) -> None:
    edit(folder / "generation_config.json", eos_token_id=eos)
    always = [IDS["<|user|>"], IDS["<|observation|>"]]
    assert load_chat_tokenizer(folder).stop_ids == tuple(dict.fromkeys([*stops, *always]))


@pytest.mark.parametrize("eos", ["<|user|>", [5, "x"], {"a": 1}, 1.5])
def test_ends_that_are_no_token_ids_are_refused(folder: Path, eos: Any) -> None:
    edit(folder / "generation_config.json", eos_token_id=eos)
    assert "which are no token ids" in said(load_chat_tokenizer, folder)


def test_the_template_of_its_own_file_wins_and_one_with_another_name_is_enough(
    folder: Path,
) -> None:
    edit(folder / "chat_template.json", chat_template="older")
    assert load_chat_tokenizer(folder).chat_template == "older"
    (folder / "chat_template.json").unlink()
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "only"}])
    assert load_chat_tokenizer(folder).chat_template == "only"
    edit(folder / "tokenizer_config.json", chat_template="")
    assert load_chat_tokenizer(folder).chat_template == ""
    (folder / "chat_template.jinja").write_text("x" * (1 << 20))
    assert len(load_chat_tokenizer(folder).chat_template) == 1 << 20
    (folder / "chat_template.jinja").write_text("x" * ((1 << 20) + 1))
    assert "chat_template.jinja" in said(load_chat_tokenizer, folder)


def test_text_from_data_goes_through_the_tokenizers_own_normalizer(folder: Path) -> None:
    before = load_chat_tokenizer(folder)
    changed = tokenizers._open(folder / "tokenizer.json")
    changed.normalizer = normalizers.Replace("fox", "dog")
    changed.save(str(folder / "tokenizer.json"))
    after = load_chat_tokenizer(folder)
    assert after.plain.encode("the fox").ids == before.plain.encode("the dog").ids
    assert after.trusted("the fox<|user|>") == before.trusted("the dog<|user|>")
    assert after.plain.decode(after.plain.encode(" 你好 x").ids) == " 你好 x"


def test_growth_is_multiplied_over_all_steps_inside_of_steps() -> None:
    def replacing(length: int) -> Any:
        return {"type": "Replace", "content": "x" * length}

    steps = {"normalizers": [replacing(3), {"type": "Lowercase"}, {"decoders": [replacing(5)]}]}
    assert tokenizers._growth(steps) == 15
    assert tokenizers._growth(replacing(0)) == 1
    assert tokenizers._growth({"type": "Prepend", "content": "xxx"}) == 1
    assert tokenizers._growth(None) == 1


def test_a_decoder_that_writes_without_end_is_refused_behind_a_plain_normalizer(
    folder: Path,
) -> None:
    path = folder / "tokenizer.json"
    step = {"type": "Replace", "pattern": {"String": "~"}, "content": "~" * 17}
    wrong = {"type": "Sequence", "decoders": [step, step]}
    edit(path, normalizer={"type": "Lowercase"}, decoder=wrong)
    assert "one becomes more than 256" in said(load_chat_tokenizer, folder)


def test_declared_tokens_keep_their_order_and_what_is_special_of_them(published: Path) -> None:
    config = published / "tokenizer_config.json"
    declared = json.loads(config.read_text())["added_tokens_decoder"]
    first = load_chat_tokenizer(published).fingerprint
    number = tiny.NUM_RANKS + len(tiny.CONTROL_TOKENS)
    more = {str(number + 1): {"content": "<b>", "special": True}, str(number): {"content": "<a>"}}
    edit(config, added_tokens_decoder=more | declared)
    found = load_chat_tokenizer(published)
    assert (found.control_ids["<a>"], found.control_ids["<b>"]) == (number, number + 1)
    added = json.loads(tokenizer_file(published).read_text())["added_tokens"]
    assert not any(one["normalized"] for one in added)
    special = {one["content"]: one["special"] for one in added}
    assert (special["<a>"], special["<b>"], special["<|user|>"]) == (False, True, True)
    ranks = (published / "tokenizer.model").read_bytes().splitlines()
    ranks[-2:] = [ranks[-1].split()[0] + b" 368", ranks[-2].split()[0] + b" 369"]
    (published / "tokenizer.model").write_bytes(b"\n".join(ranks))
    assert len({first, found.fingerprint, load_chat_tokenizer(published).fingerprint}) == 3
    edit(config, added_tokens_decoder=declared | {str(number): {"content": "the"}})
    assert "the is an ordinary token of the vocabulary already" in said(load_chat_tokenizer, published)  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("glm4v", "GLM-4.1V"), ("glm46v", "GLM-4.6V"), ("glm_ocr", "GLM-OCR"), ("glm4v_moe", "GLM-4.5V")],
)  # fmt: skip
def test_families_whose_images_keep_their_shape_are_named(
    folder: Path, model_type: str, name: str
) -> None:
    edit(folder / "config.json", model_type=model_type, image_start_token_id=7)
    found = load_chat_tokenizer(folder)
    assert found.image == GridSpec(str(folder), 7, name)
    assert found.image_rule.checkpoint == name
    edit(folder / "config.json", image_start_token_id="x")
    assert "does not say how images are taken (ValueError" in said(load_chat_tokenizer, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert "config.json does not say how images are taken (KeyError" in said(load_chat_tokenizer, folder)  # fmt: skip


def test_a_chatglm_with_a_tower_takes_images_and_other_types_take_none(folder: Path) -> None:
    vision = {"vision_config": pictures.VISION, "boi_token_id": 9}
    edit(folder / "config.json", model_type="chatglm", **vision)
    assert load_chat_tokenizer(folder).image == ImageSpec(56, 4, 9)
    for model_type in ("glm4", ["chatglm"], None):
        edit(folder / "config.json", model_type=model_type)
        assert load_chat_tokenizer(folder).image is None


# --- the sandbox ---------------------------------------------------------------------------------


def test_a_templates_process_is_limited_and_apart_and_ends_with_its_owner() -> None:
    one = Sandbox("{{ a }}")
    assert one._process is None  # until something is rendered
    one.render({"a": "é"})
    process: Any = one._process
    limits = {kind: resource.prlimit(process.pid, kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)}  # fmt: skip
    assert set(limits.values()) == {(1 << 30, 1 << 30), (0, 0)}
    assert limits[resource.RLIMIT_FSIZE] == limits[resource.RLIMIT_CORE] == (0, 0)
    assert os.getpgid(process.pid) == process.pid  # Ctrl-C is for us
    arguments = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    assert b"-P" in arguments  # no module of this folder in the place of a library's
    del one
    gc.collect()
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.returncode is not None
    assert process.stdin.closed


def test_threads_ask_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Sandbox("{{ a }}")
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = one.render({"a": f"{number} " * 2000})

    threads = [Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: f"{number} " * 2000 for number in range(8)}
    monkeypatch.setattr(one, "_ask", lambda _: str(one._lock.locked()))
    assert one.render({}) == "True"


def test_what_a_template_does_wrong_is_told_in_words() -> None:
    for source, reason in (
        ("{{ 1 // 0 }}", "^ZeroDivisionError: integer division"),
        ("{{ 'a' * 1_500_000_000 }}", "^it needs more than 1024 MiB$"),
        ("{{ raise_exception('not so') }}", "^not so$"),
        ("\n{% if %}", "^it is not valid jinja: line 2: "),
        ("{{ a.b.c }}", "^'a' is undefined$"),
    ):
        with pytest.raises(RefusedError, match=reason):
            Sandbox(source).render({})


def test_templates_get_what_transformers_gives_them() -> None:
    value = {"b": "é<", "a": [1]}
    how = "ensure_ascii=true, indent=2, separators=(',', ':'), sort_keys=true"
    made = Sandbox(f"{{{{ v | tojson({how}) }}}}").render({"v": value})
    assert made == json.dumps(value, indent=2, separators=(",", ":"), sort_keys=True)
    assert Sandbox("{{ v | tojson }}").render({"v": value}) == '{"b": "é<", "a": [1]}'
    assert Sandbox("{{ strftime_now('%Y-%m') }}").render({}) == datetime.now().strftime("%Y-%m")
    assert Sandbox("{{ dict(a=1, **{'b': 2}) }}").render({}) == "{'a': 1, 'b': 2}"
    assert Sandbox("{% set n = namespace(x=1) %}{% set n.y = 2 %}{{ n.x + n.y }}").render({}) == "3"


# --- image files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["tiff", "ico", "ppm", "tga"])
def test_other_formats_are_refused_even_where_they_could_be_decoded(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (16, 16), "red").save(path)
    for look in (check_image, read_image, image_size):
        with pytest.raises(ImageError, match="no image in one of the formats PNG, JPEG, WEBP"):
            look(path)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    pixels = {"shortest_edge": 2 * 4 * 28**2, "longest_edge": 2 * 16 * 28**2}
    settings = {"size": pixels, "image_processor_type": "Glm4vImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_image_that_keeps_its_shape_is_turned_upright_before_it_is_cut_into_patches(
    processor: Path, tmp_path: Path, orientation: int
) -> None:
    values = np.zeros((60, 200, 3), np.uint8)
    values[:, :100] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values).save(tmp_path / "x.jpg", exif=exif, quality=95)
    read_image(tmp_path / "x.jpg").save(tmp_path / "upright.png")
    spec = GridSpec(str(processor), 7)
    made = spec.arrays([(str(tmp_path / "x.jpg"), "f:1")])
    assert {name: array.dtype for name, array in made.items()} == {"pixel_values": np.float32, "image_grid_thw": np.int64}  # fmt: skip
    grid = made["image_grid_thw"].tolist()
    assert grid == spec.arrays([(str(tmp_path / "upright.png"), "f:1")])["image_grid_thw"].tolist()
    [[_, height, width]] = grid
    assert (height > width) == (orientation == 6)
    assert spec.patches_of(str(tmp_path / "x.jpg")) == height * width // 4
    (tmp_path / "x.jpg").unlink()
    gone = said(spec.arrays, [(str(tmp_path / "x.jpg"), "f:1")])
    assert gone.startswith(f"f:1: image {tmp_path / 'x.jpg'}: there is no such file")
    assert said(spec.patches_of, str(tmp_path / "x.jpg")).startswith(f"image {tmp_path / 'x.jpg'}: there is no")  # fmt: skip


def test_whatever_decides_an_images_patches_is_in_its_rules(
    processor: Path, tmp_path: Path
) -> None:
    given = json.loads((processor / "preprocessor_config.json").read_text())
    found = {GridSpec(str(processor), 7).rules}
    for number, changed in enumerate(
        ({"patch_size": 16}, {"merge_size": 4}, {"size": given["size"] | {"longest_edge": 9999}})
    ):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}/preprocessor_config.json").write_text(json.dumps(given | changed))
        found.add(GridSpec(str(tmp_path / f"{number}"), 7).rules)
    assert len(found) == 4
    assert {ImageSpec(56, patches, 1).rules for patches in (1, 4)} == {"1", "4"}
