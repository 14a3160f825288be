"""The processor that AutoProcessor gives for GLM-4V: dialogues with pictures to the model's inputs.

Ids and pixels are those of training: one image in front of the first question, its three published
tokens spread to boi, P placeholders and eoi.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import AutoTokenizer, BaseImageProcessor, BatchFeature, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images

from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import read_json_if_there
from finetune.artifacts.resolve import TOKENIZER_FILES, local_folder
from finetune.data.chat.image import image_spec, pixels_of, rgb_of

BEGIN, PLACEHOLDER, END = "<|begin_of_image|>", "<|endoftext|>", "<|end_of_image|>"
_PICTURES = ("image", "url", "path", "base64")
"""Keys of a part of a message that hold its picture."""


class ChatGLM4VImageProcessor(BaseImageProcessor):
    """Pictures to pixels, bit for bit as in training."""

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(self, image_size: int = 1120, patch_size: int = 14, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.patch_size = patch_size

    @classmethod
    def of_checkpoint(cls, path: str | Path, revision: str | None = None) -> Any:
        """The one that a checkpoint's config.json describes; None where it takes no images."""
        folder = local_folder(path, revision, files=TOKENIZER_FILES)
        config = read_json_if_there(folder / MODEL_CONFIG)
        if config.get("model_type") != "chatglm" or image_spec(config) is None:
            return None
        vision = config["vision_config"]
        return cls(vision["image_size"], vision["patch_size"])

    @property
    def patches(self) -> int:
        """Placeholders between boi and eoi."""
        return int((self.image_size // self.patch_size // 2) ** 2)

    def preprocess(
        self, images: Any, *_: Any, return_tensors: str | None = None, **__: Any
    ) -> BatchFeature:
        """Return `pixel_values` [N, 3, size, size] of PIL images, arrays, tensors, paths or addresses."""
        found = make_flat_list_of_images(self.fetch_images(images))
        rows = [
            pixels_of(rgb_of(image if hasattr(image, "convert") else to_pil_image(image)), size)
            for size in [self.image_size]
            for image in found
        ]
        return BatchFeature({"pixel_values": np.stack(rows)}, tensor_type=return_tensors)


class ChatGLM4VProcessor(ProcessorMixin):
    """GLM-4V's tokenizer and its image processor."""

    image_token = f"{BEGIN}{PLACEHOLDER}{END}"

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(image_processor, tokenizer, chat_template=template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Return the processor of a GLM-4V checkpoint, or the tokenizer of one that sees nothing.

        transformers' AutoProcessor gives a tokenizer for text models too.
        """
        kwargs.pop("trust_remote_code", None)  # no code of the folder is run
        place, revision = pretrained_model_name_or_path, kwargs.get("revision")
        if read_json_if_there(Path(place) / "processor_config.json"):  # one that was saved
            return super().from_pretrained(place, **kwargs)
        if ChatGLM4VImageProcessor.of_checkpoint(place, revision) is None:
            kwargs.pop("_from_auto", None)
            return AutoTokenizer.from_pretrained(place, **kwargs)
        return super().from_pretrained(place, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, place: Any, processor_dict: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        saved = dict((processor_dict or {}).get("image_processor") or {})
        saved.pop("image_processor_type", None)
        images = (
            ChatGLM4VImageProcessor(**saved)
            if saved
            else ChatGLM4VImageProcessor.of_checkpoint(place, kwargs.get("revision"))
        )
        return [images, AutoTokenizer.from_pretrained(place, **kwargs)]

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
        """Return the text of an image's span."""
        return f"{BEGIN}{PLACEHOLDER * self.image_processor.patches}{END}"

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: Any) -> None:
        """Refuse a span that was cut; its pixels would belong nowhere."""
        ids = [BEGIN, END]
        numbers = self.tokenizer.convert_tokens_to_ids(ids)
        for words, row in zip(text, text_inputs["input_ids"], strict=True):
            row = list(row)
            if any(words.count(t) != row.count(n) for t, n in zip(ids, numbers, strict=True)):
                raise ValueError(
                    "an image's tokens were cut off; give a larger max_length, or truncation=False"
                )

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what transformers' method does, for messages in the published form too.

        That is `{"role": "user", "image": PIL image, "content": text}`; a list of parts, with
        images among them, says the same.
        """
        dialogues, is_batched = self._normalize_conversations(conversation)
        written = [[with_image_token(message) for message in dialogue] for dialogue in dialogues]
        images = [[image for _, found in dialogue for image in found] for dialogue in written]
        if any(len(found) > 1 for found in images):
            raise ValueError("GLM-4V takes one image in a conversation; leave the others out")
        texts = [[message for message, _ in dialogue] for dialogue in written]
        options = dict(kwargs.pop("processor_kwargs", None) or {})
        if any(images):
            options["images"] = images if is_batched else images[0]
        return super().apply_chat_template(
            texts if is_batched else texts[0], *args, processor_kwargs=options, **kwargs
        )


def shows_image(conversation: Any) -> bool:
    """Whether a message of a conversation, or of several, has a picture."""
    if isinstance(conversation, Mapping):
        return bool(with_image_token(conversation)[1])
    is_list = isinstance(conversation, Sequence) and not isinstance(conversation, str)
    return is_list and any(shows_image(one) for one in conversation)


def with_image_token(message: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Return a message whose content is text with the image's token in front, and its pictures."""
    content, pictures = message.get("content"), []
    if message.get("image") is not None:
        pictures.append(message["image"])
    if isinstance(content, list):
        shown = [part for part in content if part.get("type") in ("image", "image_url")]
        pictures += [_picture(part) for part in shown]
        content = "".join(str(part["text"]) for part in content if "text" in part)
    if not pictures:
        return dict(message) | ({} if content is None else {"content": content}), []
    plain = {key: value for key, value in message.items() if key != "image"}
    return plain | {"content": ChatGLM4VProcessor.image_token + (content or "")}, pictures


def _picture(part: Mapping[str, Any]) -> Any:
    """The picture of a part of a message, or where it lies."""
    if "image_url" in part:
        address = part["image_url"]
        return address["url"] if isinstance(address, Mapping) else address
    found = [part[key] for key in _PICTURES if part.get(key) is not None]
    if not found:
        raise ValueError("a part of type image holds no image, url, path or base64")
    return found[0]
