"""The greedy replies of `generate`, from vLLM: prompt ids in, reply ids out.

vLLM is imported when it is asked for and not before; it lives in an environment of its own, see
docs/serving.md.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune import launcher
from finetune.artifacts.adapter import read_lora
from finetune.artifacts.model_config import read_model_config
from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import read_json
from finetune.artifacts.resolve import (
    TOKENIZER_FILES,
    adapter_config,
    is_adapter,
    is_folder,
    local_folder,
    model_base,
)
from finetune.data.chat.image import ImagePrompt
from finetune.data.chat.template import ChatTemplate
from finetune.errors import ConfigError, DataError, ModelError
from finetune.generation.generate import POSITIONS, Reply, Row, Window
from finetune.generation.settings import settings_of
from finetune.methods import of_adapter

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` may be."""


def context_of(target: str | Path, base: str | None) -> int | None:
    """Positions that the model was made for, by its config.json."""
    weights = model_base(target, base)
    folder = local_folder(weights.path, weights.revision, files=TOKENIZER_FILES)
    is_here = is_folder(weights.path)  # of a hub id only the small files are
    values = read_model_config(folder) if is_here else read_json(folder / MODEL_CONFIG)
    return next((found for name in POSITIONS if isinstance(found := values.get(name), int)), None)


class VllmGenerator:
    """Answers prompts as `generate.Generator` would."""

    def __init__(
        self,
        target: str | Path,
        template: ChatTemplate,
        *,
        base: str | None,
        max_length: int,
        max_new_tokens: int,
    ) -> None:
        """Opens the model.

        Args:
            target: a base or merged model, or a LoRA adapter.
            template: gives the stop ids.
            base: the adapter's base where its own record is out of date.
            max_length: tokens of the longest prompt and its reply together.
            max_new_tokens: a reply that is cut here has not stopped.

        Raises:
            ConfigError: vLLM is not installed, or torchrun started several processes.
            ModelError: vLLM cannot open such an adapter.
        """
        vllm = _import_vllm()
        _free_device()
        weights = model_base(target, base)
        options: dict[str, Any] = {}
        self._request = None
        if is_adapter(target):
            options = {"enable_lora": True, "max_lora_rank": _rank(Path(target))}
            self._request = vllm.lora.request.LoRARequest("adapter", 1, str(Path(target).resolve()))
        self._model = vllm.LLM(
            model=weights.path,
            revision=weights.revision,
            dtype=number_format(target),
            max_model_len=max_length,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            **options,
        )
        self._sampling = vllm.SamplingParams(
            temperature=0,
            max_tokens=max_new_tokens,
            stop_token_ids=list(template.stop_ids),
            detokenize=False,
        )

    def replies(
        self,
        windows: Iterable[Window],
        *,
        note: Callable[[int, list[Row]], object] = lambda *_: None,
        total: int | None = None,
    ) -> Iterator[list[Reply]]:
        """The replies to each window's prompts, in their order; vLLM makes batches of its own."""
        for window in windows:
            if any(isinstance(prompt, ImagePrompt) for prompt in window.prompts):
                raise DataError(
                    "images go with --backend transformers, not with vllm; leave them out, or choose that"
                )
            asked = [{"prompt_token_ids": [int(i) for i in prompt]} for prompt in window.prompts]
            outputs = self._model.generate(
                asked, self._sampling, use_tqdm=False, lora_request=self._request
            )
            yield [_reply(place, output.outputs[0]) for place, output in enumerate(outputs)]

    def close(self) -> None:
        """Ends vLLM's processes: the next one needs their memory, and Python waits for them when it ends."""
        self._model.llm_engine.engine_core.shutdown()


def _reply(index: int, output: Any) -> Reply:
    """VLLM's ids without the stop, which it keeps as their last."""
    stopped = output.finish_reason == "stop"
    return Reply(index, tuple(output.token_ids)[: -1 if stopped else None], stopped)


def _import_vllm() -> Any:
    if launcher.world_size() > 1:
        raise ConfigError("--backend vllm starts its own processes: leave torchrun out")
    try:
        import vllm
        import vllm.lora.request
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ConfigError(
            f"--backend vllm needs vLLM, which {sys.executable} does not have; make it an "
            "environment of its own, as docs/serving.md says under 'Batch inference with vLLM'"
        ) from error
    return vllm


def _free_device() -> None:
    """Gives back what a model that is gone held on the accelerator: vLLM looks at what is free."""
    from finetune.distributed import device

    gc.collect()
    device.give_back_unused()


def _rank(adapter: Path) -> int:
    """The least of vLLM's ranks that holds this adapter's."""
    config = adapter_config(adapter)
    kind, rank = config.get("peft_type"), config.get("r")
    if (
        not of_adapter(kind, adapter).served_by_vllm
        or not isinstance(rank, int)
        or rank > LORA_RANKS[-1]
    ):
        raise ModelError(
            f"{adapter} is a {kind} adapter of rank {rank}, which vLLM does not open; "
            "use --backend transformers, or merge it if it is LoRA"
        )
    read_lora(adapter)  # says what is wrong with it better than vLLM
    return next(allowed for allowed in LORA_RANKS if allowed >= rank)


def number_format(target: str | Path) -> str:
    """The number format that `open_model` would take; vLLM's own `auto` is another."""
    from finetune.distributed.device import has_native_bf16

    if (saved := settings_of(target).dtype) != "auto":
        return saved
    # Its layers add up in the model's own format, which float16 is too narrow for.
    return "bfloat16" if has_native_bf16() else "float32"
