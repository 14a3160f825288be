"""Tokenizer files of a checkpoint, in either published layout -> one ChatTokenizer.

A folder brings `tokenizer.json` (-hf and 0414 checkpoints) or a tiktoken file `tokenizer.model`
(glm-4-9b-chat and the like), which is converted once and cached. No code of the folder is run.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from finetune.artifacts.names import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    MODEL_CONFIG,
    OLDER_CHAT_TEMPLATE,
    SENTENCEPIECE,
    TOKENIZER,
    TOKENIZER_CONFIG,
)
from finetune.artifacts.plain_files import (
    LARGEST_JSON,
    check_folder,
    check_plain,
    read_json_if_there,
)
from finetune.artifacts.resolve import TOKENIZER_FILES, local_folder
from finetune.data.chat.glm41v_image import GridSpec
from finetune.data.chat.image import TakesImages, image_spec
from finetune.data.dialogue.images import ImageRule
from finetune.errors import DataError, ModelError
from finetune.storage.cache import default_root, private_folder
from finetune.storage.files import write_file

logger = logging.getLogger(__name__)

# The 14 control tokens of GLM-4, in the order of their ids after the ranks of tokenizer.model.
CONTROL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
    "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
NEEDED_TOKENS = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>",
)  # fmt: skip

BUILT_IN_TEMPLATE = Path(__file__).parent / "templates" / "glm4_chat.jinja"
MOST_GROWTH = 256
LARGEST_TEMPLATE = 1 << 20
"""Bytes; published ones have up to twenty thousand."""
"""The layout of glm-4-9b-chat, for checkpoints that bring no template."""

CONVERSION_VERSION = 1
"""Raised whenever the conversion of tokenizer.model gives another file."""


@dataclass(frozen=True)
class ChatTokenizer:
    """Everything about a checkpoint's tokens that laying out a dialogue needs."""

    backend: Tokenizer
    """Turns control strings into control ids; for text that we or the template wrote."""
    plain: Tokenizer
    """Knows no control string: whatever is typed is ordinary text; for text from data."""
    chat_template: str
    special_tokens: Mapping[str, str]
    """`eos_token`, `pad_token` and the like, which templates may write."""
    control_ids: Mapping[str, int]
    """Every added token of the checkpoint by its text."""
    stop_ids: tuple[int, ...]
    """Ids at which a generated reply ends."""
    pad_id: int
    vocab_size: int
    fingerprint: str
    """SHA-256 of the tokenizer's bytes and the template's text."""
    image: TakesImages | None = None
    """How the checkpoint takes images, if it does."""
    name: str = "a text model"
    """Which checkpoint it is, as messages name it."""

    @property
    def image_rule(self) -> ImageRule:
        """How many images a dialogue may show, and who shows them."""
        return self.image.rule if self.image else ImageRule(self.name, most=0)

    def trusted(self, text: str) -> list[int]:
        """Ids of text that the checkpoint's template wrote, its control strings matched."""
        with explain_panic():
            return list(self.backend.encode(text, add_special_tokens=False).ids)

    def split(self, text: str) -> list[str]:
        """Text that the checkpoint's template wrote, cut where control strings begin and end."""
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        pattern = f"({'|'.join(map(re.escape, longest_first))})"
        return [part for part in re.split(pattern, text) if part]


def load_chat_tokenizer(folder: str | Path, revision: str | None = None) -> ChatTokenizer:
    """The tokenizer and chat template of a folder or hub id; ModelError when it has none.

    Args:
        folder: A checkpoint folder (it may be read-only) or a hub id.
        revision: The hub revision when `folder` is a hub id.
    """
    place = local_folder(folder, revision, files=TOKENIZER_FILES)
    check_folder(place)
    config = read_json_if_there(place / TOKENIZER_CONFIG)
    backend = _open(tokenizer_file(place))
    control_ids = {token.content: number for number, token in _added_tokens(backend).items()}
    missing = [token for token in NEEDED_TOKENS if token not in control_ids]
    if missing:
        raise ModelError(
            f"{place}: not a GLM-4 tokenizer, it lacks {', '.join(missing)} as added tokens; "
            "use a GLM-4, GLM-4V or GLM-Z1 checkpoint"
        )
    settings = read_json_if_there(place / MODEL_CONFIG) | read_json_if_there(
        place / GENERATION_CONFIG
    )
    template = _chat_template(place, config)
    return ChatTokenizer(
        backend=backend,
        plain=_without_added_tokens(backend),
        chat_template=template,
        special_tokens=_special_tokens(config),
        control_ids=control_ids,
        stop_ids=_stop_ids(settings, control_ids),
        pad_id=_pad_id(settings, config, control_ids),
        vocab_size=backend.get_vocab_size(),
        fingerprint=_digest(_source_bytes(place), template.encode()),
        image=_image_spec(place),
        name=f"{Path(str(folder)).name}, model_type {settings.get('model_type')}",
    )


def tokenizer_file(folder: str | Path, revision: str | None = None) -> Path:
    """Path of the checkpoint's `tokenizer.json`: its own, or the one converted from tokenizer.model."""
    place = local_folder(folder, revision, files=TOKENIZER_FILES)
    if (place / TOKENIZER).is_file():
        return place / TOKENIZER
    model = place / SENTENCEPIECE
    if not model.is_file():
        raise ModelError(
            f"{place}: no tokenizer.json and no tokenizer.model; copy the tokenizer files of the "
            "base checkpoint into this folder"
        )
    added = _declared_tokens(read_json_if_there(place / TOKENIZER_CONFIG))
    key = _digest(model.read_bytes(), repr((added, CONVERSION_VERSION)).encode())
    return _kept(key) or _keep(key, _convert(model, added).to_str())


def _grids(place: Path, config: Mapping[str, Any]) -> TakesImages:
    names = {"glm4v": "GLM-4.1V", "glm46v": "GLM-4.6V", "glm_ocr": "GLM-OCR"}
    return GridSpec(
        str(place), int(config["image_start_token_id"]), names.get(config["model_type"], "GLM-4.5V")
    )


_IMAGES: dict[str, Callable[[Path, Mapping[str, Any]], TakesImages | None]] = {
    "chatglm": lambda _, config: image_spec(config),
    **dict.fromkeys(("glm4v", "glm46v", "glm_ocr", "glm4v_moe"), _grids),
}
"""How each family takes images, by `model_type`; a family that is not here takes none."""


def _image_spec(place: Path) -> TakesImages | None:
    config = read_json_if_there(place / MODEL_CONFIG)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _IMAGES:
        return None
    try:
        return _IMAGES[kind](place, config)
    except (KeyError, TypeError, ValueError) as error:  # a key that is missing, or no number
        raise ModelError(f"{place / MODEL_CONFIG} does not say how images are taken ({type(error).__name__}: {error}); use the config.json that belongs to these weights") from error  # fmt: skip


def _open(path: Path) -> Tokenizer:
    check_plain(path, largest=LARGEST_JSON)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ModelError(
            f"{path}: not a tokenizer.json that can be read: {error}; copy it again"
        ) from error
    parts = [one for one in (tokenizer.normalizer, tokenizer.decoder) if one is not None]
    if any(_growth(json.loads(one.__getstate__())) > MOST_GROWTH for one in parts):
        raise ModelError(f"{path} replaces characters by texts, over and over: one becomes more than {MOST_GROWTH}; use the tokenizer of the base")  # fmt: skip
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _growth(part: Any) -> int:
    """How many times longer a normalizer or a decoder can make a text, about."""
    if not isinstance(part, dict):
        return 1
    steps = part.get("normalizers") or part.get("decoders") or []
    own = len(str(part.get("content", ""))) if part.get("type") == "Replace" else 1
    growth: int = math.prod([max(1, own), *map(_growth, steps)])
    return growth


@contextmanager
def explain_panic() -> Iterator[None]:
    """ModelError where the tokenizer's Rust code panics over a text, which is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"{TOKENIZER} holds a pattern that takes its library without end ({error}); "
            "use the tokenizer of the base"
        ) from error


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same model without any added token, special or not; it shares the vocabulary in memory."""
    plain = Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        plain.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        plain.pre_tokenizer = tokenizer.pre_tokenizer
    if tokenizer.decoder is not None:
        plain.decoder = tokenizer.decoder
    return plain


def _added_tokens(tokenizer: Tokenizer) -> dict[int, AddedToken]:
    return dict(tokenizer.get_added_tokens_decoder())


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
    values = {name: config.get(name) for name in names}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _stop_ids(settings: Mapping[str, Any], control_ids: Mapping[str, int]) -> tuple[int, ...]:
    """The checkpoint's eos ids, and always the two control tokens that trained replies end with."""
    eos = settings.get("eos_token_id")
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(number, int) for number in listed):
        raise ModelError(
            f"eos_token_id is {eos!r:.80}, which are no token ids; use the config of the base"
        )
    if not listed:
        listed = [control_ids["<|endoftext|>"]]
    needed = [control_ids["<|user|>"], control_ids["<|observation|>"]]
    return tuple(dict.fromkeys([*map(int, listed), *needed]))


def _pad_id(
    settings: Mapping[str, Any], config: Mapping[str, Any], control_ids: Mapping[str, int]
) -> int:
    if isinstance(settings.get("pad_token_id"), int):
        return int(settings["pad_token_id"])
    name = _special_tokens(config).get("pad_token", "<|endoftext|>")
    return control_ids.get(name, control_ids["<|endoftext|>"])


def _chat_template(place: Path, config: Mapping[str, Any]) -> str:
    """The checkpoint's own template, where transformers looks for it; else the built-in one."""
    if (file := place / CHAT_TEMPLATE).is_file():
        check_plain(file, largest=LARGEST_TEMPLATE)
        return file.read_text(encoding="utf-8")
    stored = read_json_if_there(place / OLDER_CHAT_TEMPLATE).get("chat_template")
    stored = config.get("chat_template") if stored is None else stored
    if stored is None:
        return BUILT_IN_TEMPLATE.read_text(encoding="utf-8")
    if isinstance(stored, str):
        return stored
    named = {item["name"]: item["template"] for item in stored}
    if "default" in named:
        return str(named["default"])
    if len(named) == 1:
        return str(next(iter(named.values())))
    raise ModelError(
        f"{place}: tokenizer_config.json names the chat templates {', '.join(named)} and none of them "
        "'default'; name the one for chat 'default' or put it into chat_template.jinja"
    )


# --- tokenizer.model ---------------------------------------------------------------------------


def _declared_tokens(config: Mapping[str, Any]) -> tuple[tuple[int | None, str, bool], ...]:
    """(id, text, special) of the added tokens that tokenizer_config.json declares, or GLM-4's 14."""
    declared = config.get("added_tokens_decoder")
    if not declared:
        return tuple((None, token, True) for token in CONTROL_TOKENS)
    ordered = sorted((int(number), token) for number, token in declared.items())
    return tuple((n, token["content"], bool(token.get("special"))) for n, token in ordered)


def _convert(model: Path, added: Iterable[tuple[int | None, str, bool]]) -> Tokenizer:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    logger.info("converting %s once, which takes about 10 s", model)
    ranks = _read_ranks(model)
    converter = TikTokenConverter(str(model))
    converter.load_tiktoken_bpe = lambda _path: ranks  # its own reader needs the tiktoken package
    tokenizer: Tokenizer = converter.converted()
    for place, (number, text, special) in enumerate(added):
        expected = len(ranks) + place
        if number is not None and number != expected:
            raise ModelError(
                f"{model}: tokenizer_config.json gives {text} the id {number}, but after "
                f"{len(ranks)} ranks it is number {expected}; the two files do not belong together; copy both from the checkpoint"
            )
        token = AddedToken(text, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(text) != expected:
            raise ModelError(
                f"{model}: {text} is an ordinary token of the vocabulary already; use the tokenizer files of the checkpoint"
            )
    return tokenizer


def _read_ranks(model: Path) -> dict[bytes, int]:
    try:
        pairs = [line.split() for line in model.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise ModelError(
            f"{model}: not a tiktoken file of base64 ranks ({error}); ChatGLM2 and ChatGLM3 "
            "checkpoints are not supported; use a GLM-4 checkpoint"
        ) from error
    if sorted(ranks.values()) != list(range(len(pairs))) or not ranks:
        raise ModelError(
            f"{model}: its {len(pairs)} ranks are not 0..{len(pairs) - 1}, each once; copy tokenizer.model again"
        )
    return ranks


# --- files -------------------------------------------------------------------------------------


def _cache_folders() -> Iterator[Path]:
    """Where converted tokenizers are kept: the cache, else a private folder for temporary files."""
    with suppress(DataError):
        yield default_root() / "tokenizers"
    with suppress(DataError):
        yield private_folder("the cache cannot be written")


def _kept(key: str) -> Path | None:
    """The converted tokenizer of this key; its name holds its content's digest, which is checked."""
    for folder in _cache_folders():
        for path in folder.glob(f"{key}-*.json") if folder.is_dir() else ():
            if path.stem == f"{key}-{_digest(path.read_bytes())[:16]}":
                return path
    return None


def _keep(key: str, text: str) -> Path:
    name = f"{key}-{_digest(text.encode())[:16]}.json"
    for folder in _cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / name, text)
        except OSError as error:
            logger.warning("%s: cannot keep the converted tokenizer here (%s)", folder, error)
        else:
            return folder / name
    raise ModelError(
        "there is no folder to keep the converted tokenizer in; set FINETUNE_CACHE to one that you "
        "can write to"
    )


def _source_bytes(place: Path) -> bytes:
    own = place / TOKENIZER
    if own.is_file():
        return own.read_bytes()
    added = _declared_tokens(read_json_if_there(place / TOKENIZER_CONFIG))
    return (place / SENTENCEPIECE).read_bytes() + repr(added).encode()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
