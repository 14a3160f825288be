"""Which layout a checkpoint's own template has, told by what it does."""

from __future__ import annotations

from finetune.data.chat.jinja import JinjaTemplate, describe
from finetune.data.chat.layouts.glm4 import Glm4Layout
from finetune.data.chat.layouts.glm45 import Glm45Layout
from finetune.data.chat.layouts.layout import Layout
from finetune.data.chat.layouts.tag_form import is_tagged, read_form
from finetune.data.chat.tokenizer import ChatTokenizer


def layout_of(tokenizer: ChatTokenizer, jinja: JinjaTemplate) -> Layout:
    """The layout of the tokenizer's template; DataError when it is none of ours."""
    if is_tagged(jinja):
        return Glm45Layout(tokenizer, read_form(jinja))
    return Glm4Layout(tokenizer, jinja, describe(jinja))
