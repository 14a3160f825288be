"""Models: importing this makes transformers' Auto classes open GLM-4 in the published layout.

After it, `AutoConfig`, `AutoModelForCausalLM`, `AutoModelForImageTextToText` and `AutoProcessor` (GLM-4V)
and `AutoTokenizer.from_pretrained(folder)` use the classes here; code in the folder (`auto_map`) is not run.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from finetune.models.processor import ChatGLM4VProcessor
from finetune.models.tokenizer import ChatGLM4Tokenizer

AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
AutoModel.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(ChatGLMConfig, ChatGLM4VProcessor, exist_ok=True)
AutoTokenizer.register(ChatGLMConfig, tokenizer_class=ChatGLM4Tokenizer, exist_ok=True)
