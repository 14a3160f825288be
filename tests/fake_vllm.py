"""vLLM, as far as the backend uses it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from finetune.data.chat.template import ChatTemplate
from finetune.generation import generate as generation


class FakeVllm(ModuleType):
    """What `finetune.generation.backends.vllm` uses of vLLM, answered by our own generation."""

    def __init__(self, model: Any, template: ChatTemplate) -> None:
        super().__init__("vllm")
        self.lora = SimpleNamespace(request=SimpleNamespace(LoRARequest=lambda *words: words))
        self.SamplingParams = SimpleNamespace
        self.opened: dict[str, Any] = {}
        self.requests: list[Any] = []
        self.ended = 0
        """How often its processes were ended."""

        def generate(asked: Any, sampling: Any, *, use_tqdm: bool, lora_request: Any) -> list[Any]:
            assert (sampling.temperature, sampling.detokenize) == (0, False)
            assert sampling.stop_token_ids == list(template.stop_ids)
            self.requests.append(lora_request)
            replies = generation.generate(
                model, template, [one["prompt_token_ids"] for one in asked],
                max_new_tokens=sampling.max_tokens, batch_size=len(asked),
            )  # fmt: skip
            return [SimpleNamespace(outputs=[self._output(reply, template)]) for reply in replies]

        def open_model(**options: Any) -> Any:
            self.opened = options
            core = SimpleNamespace(shutdown=self._end)
            engine = SimpleNamespace(engine_core=core)
            return SimpleNamespace(generate=generate, llm_engine=engine)

        self.LLM = open_model

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand where vLLM is imported from."""
        monkeypatch.setitem(sys.modules, "vllm", self)
        monkeypatch.setitem(sys.modules, "vllm.lora", self.lora)
        monkeypatch.setitem(sys.modules, "vllm.lora.request", self.lora.request)

    def _end(self) -> None:
        self.ended += 1

    def _output(self, reply: generation.Reply, template: ChatTemplate) -> Any:
        stop = [template.stop_ids[1]] if reply.stopped else []
        reason = "stop" if reply.stopped else "length"
        return SimpleNamespace(token_ids=[*reply.ids, *stop], finish_reason=reason)
