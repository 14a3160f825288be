"""Which layout a checkpoint's own template has, told by what it does."""

from __future__ import annotations

from finetune.data.chat.jinja import JinjaTemplate, describe
from finetune.data.chat.layouts.glm4 import Glm4Layout
from finetune.data.chat.layouts.layout import Layout
from finetune.data.chat.tokenizer import ChatTokenizer


def layout_of(tokenizer: ChatTokenizer, jinja: JinjaTemplate) -> Layout:
    """The layout of the tokenizer's template; DataError when it is none of ours."""
    return Glm4Layout(tokenizer, jinja, describe(jinja))
