"""The tokenizer that AutoTokenizer gives for the published layout: fast, and without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerFast

from finetune.artifacts.names import SENTENCEPIECE, TOKENIZER
from finetune.data.chat.tokenizer import BUILT_IN_TEMPLATE, tokenizer_file


class ChatGLM4Tokenizer(PreTrainedTokenizerFast):
    """GLM-4's tokenizer under its published class name, from tokenizer.json or tokenizer.model."""

    vocab_files_names: ClassVar[dict[str, str]] = {
        "tokenizer_file": TOKENIZER,
        "vocab_file": SENTENCEPIECE,
    }
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

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
