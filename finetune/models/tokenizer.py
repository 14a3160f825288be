"""The tokenizer that AutoTokenizer gives for the published layout: fast, and without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerFast

from finetune.artifacts.names import SENTENCEPIECE, TOKENIZER
from finetune.data.chat.tokenizer import BUILT_IN_TEMPLATE, tokenizer_file
from finetune.models.processor import ChatGLM4VImageProcessor, ChatGLM4VProcessor, shows_image


class ChatGLM4Tokenizer(PreTrainedTokenizerFast):
    """GLM-4's tokenizer under its published class name, from tokenizer.json or tokenizer.model."""

    vocab_files_names: ClassVar[dict[str, str]] = {
        "tokenizer_file": TOKENIZER,
        "vocab_file": SENTENCEPIECE,
    }
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Return what transformers' method does; with pictures, pixels too.

        Raises:
            ValueError: There is a picture, and this tokenizer's checkpoint takes none.
        """
        if not shows_image(conversation):
            return super().apply_chat_template(conversation, **kwargs)
        images = ChatGLM4VImageProcessor.of_checkpoint(self.name_or_path)
        if images is None:
            raise ValueError(
                f"there is a picture in the conversation, and the checkpoint of this tokenizer "
                f"({self.name_or_path}) takes none; use AutoProcessor on the folder of GLM-4V"
            )
        defaults = {"tokenize": True, "return_dict": True}
        return ChatGLM4VProcessor(images, self).apply_chat_template(
            conversation, **defaults | kwargs
        )

    @classmethod
    def convert_to_native_format(
        cls, trust_remote_code: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of `__init__`, with tokenizer.model converted (once, then cached)."""
        source = kwargs.get("tokenizer_file") or kwargs.get("vocab_file")
        if source is not None:
            kwargs["tokenizer_file"] = str(tokenizer_file(Path(source).parent))
        kwargs.pop("auto_map", None)  # a saved tokenizer.json needs no remote code
        if kwargs.get("chat_template") is None:
            kwargs["chat_template"] = BUILT_IN_TEMPLATE.read_text(encoding="utf-8")
        for name in ("eos_token", "pad_token"):
            kwargs.setdefault(name, "<|endoftext|>")
        kwargs["padding_side"] = kwargs.get("padding_side") or "left"
        return kwargs
