"""Tokenizer files of either layout become one tokenizer, for which typed control strings are text."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from dialogues import dialogue
from tokenizers import normalizers, pre_tokenizers, processors

from finetune.data.chat import tokenizer as tokenizer_module
from finetune.data.chat.jinja import JinjaTemplate
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import CONTROL_TOKENS, load_chat_tokenizer, tokenizer_file
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.errors import ModelError


@pytest.fixture
def fast_folder(tmp_path: Path) -> Path:
    """A folder with tokenizer.json."""
    tiny.save_tokenizer(tmp_path / "fast")
    return tmp_path / "fast"


@pytest.fixture
def tiktoken_folder(tmp_path: Path) -> Path:
    """A folder as published: tokenizer.model and its config."""
    tiny.save_tokenizer(tmp_path / "published", tiktoken=True)
    return tmp_path / "published"


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    value = {key: item for key, item in value.items() if item is not None}
    path.write_text(json.dumps(value), encoding="utf-8")


def add_tokens(folder: Path, *tokens: tuple[str, bool]) -> None:
    """Give tokenizer.json more added tokens: (text, special)."""
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    for text, special in tokens:
        like = value["added_tokens"][-1]
        value["added_tokens"].append(
            like | {"id": like["id"] + 1, "content": text, "special": special}
        )
    path.write_text(json.dumps(value), encoding="utf-8")


def test_published_token_ids_are_reproduced(glm4_assets: Path) -> None:
    tokenizer = load_chat_tokenizer(glm4_assets / "assets" / "glm-4-9b-chat")
    golden = json.loads((glm4_assets / "golden" / "published_token_ids.json").read_text("utf-8"))
    texts = [row for row in golden if row["kind"] == "encode_ordinary"]
    assert len(texts) == 2
    for row in texts:
        assert tokenizer.plain.encode(row["text"], add_special_tokens=False).ids == row["ids"]


def test_the_published_control_tokens_follow_the_ranks_in_order(glm4_assets: Path) -> None:
    tokenizer = load_chat_tokenizer(glm4_assets / "assets" / "glm-4-9b-chat")
    expected = {token: 151329 + place for place, token in enumerate(CONTROL_TOKENS)}
    assert dict(tokenizer.control_ids) == expected
    assert tokenizer.stop_ids == (151329, 151336, 151338)
    assert tokenizer.pad_id == 151329
    assert tokenizer.vocab_size == 151343


def test_converted_ids_agree_with_tiktoken_on_mixed_scripts(glm4_assets: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken, the oracle, is not installed")
    model = glm4_assets / "assets" / "glm-4-9b-chat" / "tokenizer.model"
    ranks = tokenizer_module._read_ranks(model)
    oracle = tiktoken.Encoding("glm4", pat_str=tiny.SPLIT, mergeable_ranks=ranks, special_tokens={})
    tokenizer = load_chat_tokenizer(model.parent)
    rng = random.Random(7)
    alphabets = (
        "abcXYZ 'll I'm", "你好，世界。的一是", "0123456789.", " \n\t\r", "😀🦙👩‍💻", "<|user|>[gMASK]",
        "привет мир", "مرحبا", "한국어 日本語", "\u0301\u200b\ufeff", "{}[]\":,_-/\\`",
    )  # fmt: skip
    texts = [
        "".join(
            "".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 8)))
            for _ in range(rng.randint(1, 12))
        )
        for _ in range(1000)
    ]
    ours = [e.ids for e in tokenizer.plain.encode_batch_fast(texts, add_special_tokens=False)]
    assert ours == [oracle.encode_ordinary(text) for text in texts]


def test_both_layouts_of_one_vocabulary_give_the_same_ids(
    fast_folder: Path, tiktoken_folder: Path
) -> None:
    fast, converted = load_chat_tokenizer(fast_folder), load_chat_tokenizer(tiktoken_folder)
    assert dict(fast.control_ids) == dict(converted.control_ids) == tiny.CONTROL_IDS
    for text in (*tiny.CORPUS, "  \n\n 'LL <|user|> 😀"):
        assert fast.plain.encode(text).ids == converted.plain.encode(text).ids


def test_typed_control_strings_are_text_also_those_that_are_not_special(fast_folder: Path) -> None:
    add_tokens(fast_folder, ("<think>", False), ("<|begin_of_box|>", True))
    tokenizer = load_chat_tokenizer(fast_folder)
    for text in tokenizer.control_ids:
        typed = tokenizer.plain.encode(f"a{text}b", add_special_tokens=False).ids
        assert not set(typed) & set(tokenizer.control_ids.values()), text
        assert tokenizer.plain.decode(typed, skip_special_tokens=False) == f"a{text}b"
        assert tokenizer.control_ids[text] in tokenizer.backend.encode(f"a{text}b").ids


def test_padding_and_truncation_settings_of_the_file_are_ignored(fast_folder: Path) -> None:
    tokenizer = tokenizer_module._open(fast_folder / "tokenizer.json")
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(fast_folder / "tokenizer.json"))
    loaded = load_chat_tokenizer(fast_folder)
    for each in (loaded.backend, loaded.plain):
        assert 3 < len(each.encode("the quick brown fox").ids) < 64


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("post_processor", processors.TemplateProcessing("[gMASK] $A <|user|>", special_tokens=[(text, tiny.CONTROL_IDS[text]) for text in ("[gMASK]", "<|user|>")])),
        ("normalizer", normalizers.Replace("fox", "<|user|>")),
        ("normalizer", normalizers.Prepend("<|assistant|>")),
        ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Split("fox", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)])),
    ],
    ids=["a post-processor", "a word replaced", "a text in front", "a space in front"],
)  # fmt: skip
def test_no_part_of_a_tokenizer_file_writes_control_tokens_into_text(
    fast_folder: Path, name: str, part: object
) -> None:
    before = ChatTemplate(load_chat_tokenizer(fast_folder))
    tokenizer = tokenizer_module._open(fast_folder / "tokenizer.json")
    setattr(tokenizer, name, part)
    tokenizer.save(str(fast_folder / "tokenizer.json"))
    after = ChatTemplate(load_chat_tokenizer(fast_folder))
    said = dialogue(("user", "the quick fox"), ("reply", "a fox jumps"), ("user", "fox"))
    controls = set(before.tokenizer.control_ids.values())

    def written(template: ChatTemplate) -> list[int]:
        return [one for one in template.prompt(said, 3) if one in controls]

    assert written(after) == written(before)
    if name == "post_processor":
        assert after.prompt(said, 3) == before.prompt(said, 3)


def test_only_tokenizer_model_and_config_are_enough_in_a_read_only_folder(
    tiktoken_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiktoken_folder / "tokenizer_config.json").unlink()
    (tiktoken_folder / "config.json").write_text(json.dumps({"eos_token_id": tiny.EOS_IDS}))
    before = sorted(tiktoken_folder.iterdir())
    tiktoken_folder.chmod(0o555)
    (tmp_path / "file").write_text("in the way of a cache")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    tokenizer = load_chat_tokenizer(tiktoken_folder)
    assert tokenizer.stop_ids == tuple(tiny.EOS_IDS)
    assert "item['tools']" in tokenizer.chat_template  # the built-in one
    assert tokenizer_file(tiktoken_folder).is_relative_to(tmp_path / "tmp")
    tiktoken_folder.chmod(0o755)
    assert sorted(tiktoken_folder.iterdir()) == before


def test_a_machine_without_a_home_directory_converts_too(
    tiktoken_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FINETUNE_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert tokenizer_file(tiktoken_folder).is_relative_to(tmp_path)


def test_a_temporary_folder_that_others_can_write_to_is_not_read(
    tiktoken_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way of a cache")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for folder in tokenizer_module._cache_folders():
        folder.exists() and folder.chmod(0o777)
    with pytest.raises(ModelError, match="set FINETUNE_CACHE"):
        tokenizer_file(tiktoken_folder)


def test_conversion_happens_once_and_again_when_the_kept_file_is_damaged(
    tiktoken_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    conversions = []
    convert = tokenizer_module._convert
    monkeypatch.setattr(
        tokenizer_module, "_convert", lambda *args: (conversions.append(1), convert(*args))[1]
    )
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(tokenizer_file, [tiktoken_folder] * 4))
    assert len(paths) == 1
    assert [path.name for path in (tmp_path / "cache" / "tokenizers").iterdir()] == [
        next(iter(paths)).name
    ]
    conversions.clear()
    tokenizer_file(tiktoken_folder)
    assert not conversions
    whole = next(iter(paths)).read_bytes()
    next(iter(paths)).write_bytes(whole[:-10] + b"0" * 10)
    assert tokenizer_file(tiktoken_folder).read_bytes() == whole
    assert conversions == [1]


def test_other_added_tokens_of_the_config_are_respected(tiktoken_folder: Path) -> None:
    config = json.loads((tiktoken_folder / "tokenizer_config.json").read_text("utf-8"))
    next_id = tiny.NUM_RANKS + len(tiny.CONTROL_TOKENS)
    declared = config["added_tokens_decoder"] | {
        str(next_id): {"content": "<|extra|>", "special": False}
    }
    edit(tiktoken_folder / "tokenizer_config.json", added_tokens_decoder=declared)
    assert load_chat_tokenizer(tiktoken_folder).control_ids["<|extra|>"] == next_id
    declared[str(next_id + 5)] = declared.pop(str(next_id))
    edit(tiktoken_folder / "tokenizer_config.json", added_tokens_decoder=declared)
    with pytest.raises(ModelError, match="do not belong together"):
        load_chat_tokenizer(tiktoken_folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\n\x0e\n\x05<unk>\x15\x00", "not a tiktoken file"),  # sentencepiece, as in ChatGLM3
        (b"IQ== 0\nIg== 2\n", "ranks are not 0..1"),
        (b"", "ranks are not"),
    ],
)
def test_another_kind_of_tokenizer_model_is_refused(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        load_chat_tokenizer(tmp_path)


def test_the_chat_template_is_found_wherever_checkpoints_keep_it(fast_folder: Path) -> None:
    config = fast_folder / "tokenizer_config.json"
    assert load_chat_tokenizer(fast_folder).chat_template == tiny.CHAT_TEMPLATE
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "named"}]
    edit(config, chat_template=named)
    assert load_chat_tokenizer(fast_folder).chat_template == "named"
    edit(config, chat_template=[{"name": "a", "template": "1"}, {"name": "b", "template": "2"}])
    with pytest.raises(ModelError, match="none of them 'default'"):
        load_chat_tokenizer(fast_folder)
    edit(config, chat_template=None)
    assert "# 可用工具" in load_chat_tokenizer(fast_folder).chat_template
    (fast_folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert load_chat_tokenizer(fast_folder).chat_template == "json"
    (fast_folder / "chat_template.jinja").write_text("jinja\n", encoding="utf-8")
    assert load_chat_tokenizer(fast_folder).chat_template == "jinja\n"


def test_the_built_in_template_writes_what_the_published_one_does(glm4_assets: Path) -> None:
    folder = glm4_assets / "assets" / "glm-4-9b-chat"
    published = JinjaTemplate(load_chat_tokenizer(folder).chat_template, {})
    ours = JinjaTemplate(tokenizer_module.BUILT_IN_TEMPLATE.read_text(encoding="utf-8"), {})
    with (glm4_assets / "golden" / "chat_template.jsonl").open(encoding="utf-8") as rows:
        for row in rows:
            messages = json.loads(row)["messages"]
            for prompt in (False, True):
                text = published.render(messages, add_generation_prompt=prompt)
                assert ours.render(messages, add_generation_prompt=prompt) == text


def test_stop_and_pad_ids_come_from_the_checkpoint_and_hold_every_trained_stop(
    fast_folder: Path,
) -> None:
    ids = tiny.CONTROL_IDS
    always = (ids["<|user|>"], ids["<|observation|>"])
    bare = load_chat_tokenizer(fast_folder)
    assert (bare.stop_ids, bare.pad_id) == ((ids["<|endoftext|>"], *always), tiny.PAD_ID)
    (fast_folder / "config.json").write_text('{"eos_token_id": 5, "pad_token_id": 6}')
    (fast_folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    stated = load_chat_tokenizer(fast_folder)
    assert (stated.stop_ids, stated.pad_id) == ((7, 8, *always), 6)


def test_the_fingerprint_follows_tokenizer_and_template_and_nothing_else(
    fast_folder: Path, tmp_path: Path
) -> None:
    first = load_chat_tokenizer(fast_folder).fingerprint
    shutil.copytree(fast_folder, tmp_path / "copy")
    edit(tmp_path / "copy" / "tokenizer_config.json", model_max_length=7)
    assert load_chat_tokenizer(tmp_path / "copy").fingerprint == first
    edit(tmp_path / "copy" / "tokenizer_config.json", chat_template=tiny.CHAT_TEMPLATE + " ")
    other_template = load_chat_tokenizer(tmp_path / "copy").fingerprint
    add_tokens(fast_folder, ("<|extra|>", True))
    assert len({first, other_template, load_chat_tokenizer(fast_folder).fingerprint}) == 3


def test_what_is_no_tokenizer_is_refused_with_what_to_do(tmp_path: Path, fast_folder: Path) -> None:
    with pytest.raises(ModelError, match="no such checkpoint folder"):
        load_chat_tokenizer(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"cannot be fetched from huggingface"):
        load_chat_tokenizer("some-org/not-cached")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no tokenizer\.json and no tokenizer\.model"):
        load_chat_tokenizer(tmp_path / "empty")
    value = json.loads((fast_folder / "tokenizer.json").read_text("utf-8"))
    value["added_tokens"] = value["added_tokens"][:3]
    (fast_folder / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(ModelError, match=r"not a GLM-4 tokenizer, it lacks <sop>"):
        load_chat_tokenizer(fast_folder)
    (fast_folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="can be read"):
        load_chat_tokenizer(fast_folder)


def test_a_folder_with_tokenizer_json_needs_neither_torch_nor_transformers(
    fast_folder: Path,
) -> None:
    program = (
        "import sys; from finetune.data.chat.template import ChatTemplate; "
        "from finetune.data.chat.tokenizer import load_chat_tokenizer; "
        f"ChatTemplate(load_chat_tokenizer({str(fast_folder)!r})); "
        "heavy = {'torch', 'transformers', 'datasets', 'huggingface_hub'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kind", ["pre_tokenizer", "normalizer"])
def test_a_pattern_without_end_in_a_tokenizer_is_an_error_in_words(
    tmp_path: Path, kind: str
) -> None:
    tiny.save_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    pattern = {"Regex": "(a|aa)+$"}
    settings["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
            settings["pre_tokenizer"],
        ],
    }
    if kind == "normalizer":
        settings["normalizer"] = {"type": "Replace", "pattern": pattern, "content": "b"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    template = ChatTemplate(load_chat_tokenizer(tmp_path))
    talk = Conversation((Message("user", "a" * 60 + "c"),))
    with pytest.raises(ModelError, match="takes its library without end"):
        template.prompts([(talk, 1)])
