"""A model folder or hub id -> a model: the only place that knows the checkpoint families."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, initialization
from transformers.utils import is_flash_attn_2_available

from finetune.artifacts.model_config import read_model_config
from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import check_folder, read_json
from finetune.artifacts.resolve import is_adapter, local_folder
from finetune.artifacts.weights import tensors
from finetune.errors import ModelError, is_out_of_memory
from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from finetune.models.glm41v import Glm4vForConditionalGeneration
from finetune.models.loss import SupervisedHead, SupervisedLoss
from finetune.models.packed_attention import DOCUMENT_SDPA
from finetune.models.quantization import check_widths, four_bits


class GlmForCausalLM(SupervisedLoss, transformers.GlmForCausalLM):
    """transformers' model with the loss over supervised tokens; keeps the name that it saves."""

    looks_at_positions = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.__class__ = SupervisedHead


class Glm4ForCausalLM(SupervisedLoss, transformers.Glm4ForCausalLM):
    """transformers' model with the loss over supervised tokens; keeps the name that it saves."""

    looks_at_positions = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.__class__ = SupervisedHead


_CLASSES: dict[str, tuple[Any, Any]] = {
    "chatglm": (ChatGLMConfig, ChatGLMForConditionalGeneration),
    "glm": (transformers.GlmConfig, GlmForCausalLM),
    "glm4": (transformers.Glm4Config, Glm4ForCausalLM),
    "glm4v": (transformers.Glm4vConfig, Glm4vForConditionalGeneration),
}
_SPLIT_LAYERS = (
    r"model\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_up_proj|down_proj))"
)
_LORA_TARGETS = {
    "chatglm": (
        r"transformer\.encoder\.layers\.\d+\."
        r"(self_attention\.(query_key_value|dense)|mlp\.(dense_h_to_4h|dense_4h_to_h))"
    ),
    "glm": _SPLIT_LAYERS,
    "glm4": _SPLIT_LAYERS,
    "glm4v": _SPLIT_LAYERS.replace("model", r"model\.language_model", 1),
}
_SUPPORTED = (
    "supported are chatglm (GLM-4-9B, GLM-4-9B-Chat, its long versions and GLM-4V-9B as first published), "
    "glm (the -hf conversions), glm4 (GLM-4-0414, GLM-Z1) and glm4v (GLM-4.1V)"
)


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attention: str = "auto",
    quantization: str | None = None,
) -> PreTrainedModel:
    """Return the model of a folder or hub id, in eval mode; with labels it returns only a loss.

    No code of the folder is run and only safetensors are read, straight into place.

    Args:
        path: A checkpoint folder, or a hub id like org/name.
        revision: The hub revision when `path` is a hub id.
        dtype: bfloat16, float16, float32, or auto: bfloat16 on a GPU that has it, else float32.
        attention: sdpa, eager, flash_attention_2, or auto: transformers' own choice.
        quantization: nf4 holds the text's linear layers in 4 bits while they are loaded.

    Raises:
        ModelError: The folder is no such checkpoint, or this machine cannot run what is asked for.
    """
    folder = local_folder(path, revision)
    check_folder(folder)
    config_class, model_class = _CLASSES[family(_read_config(folder))]
    implementation = _attention(attention)
    extra = four_bits(_dtype(dtype)) if quantization == "nf4" else {}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its load report is checked below, not only shown
    try:
        config = config_class.from_pretrained(folder)
        _check_size(folder, config)
        model, report = model_class.from_pretrained(
            folder,
            config=config,
            dtype=_dtype(dtype),
            attn_implementation=implementation,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **extra,
        )
    except Exception as error:  # whatever a config of others makes the libraries raise
        if isinstance(error, ModelError) or is_out_of_memory(error):
            raise
        raise ModelError(f"{folder} cannot be loaded ({type(error).__name__}: {error})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    _check_complete(folder, report)
    check_finite(model, folder)
    for name, buffer in list(model.named_buffers()):
        # What is loaded is a view of the mapped file. Whoever replaces the weights (DeepSpeed, a GPU)
        # lets go of it, but for a small table that nobody replaces gigabytes would stay mapped.
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.clone())
    if quantization:
        check_widths(model)
    text = model.config.get_text_config()
    if text._attn_implementation == "sdpa":
        text._attn_implementation = DOCUMENT_SDPA
    return model.eval()


def shape_of(path: str | Path, num_layers: int | None = None) -> PreTrainedModel:
    """Return the model of a folder's config.json with weights that nobody has set.

    Made under `planning.counting` it has shapes only. With `num_layers` it is that deep.
    """
    folder = local_folder(path)
    config_class, model_class = _CLASSES[family(_read_config(folder))]
    config = config_class.from_pretrained(folder)
    text = config.get_text_config()
    if num_layers is not None:
        text.num_hidden_layers = num_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:num_layers]
    text._attn_implementation = DOCUMENT_SDPA
    with initialization.no_init_weights():
        model: PreTrainedModel = model_class(config)
    return model


def num_layers(folder: Path) -> int:
    """Return the number of the text's layers that a folder's config.json names."""
    config_class = _CLASSES[family(_read_config(folder))][0]
    return int(config_class.from_pretrained(folder).get_text_config().num_hidden_layers)


def family(config: Any) -> str:
    """Return chatglm, glm, glm4 or glm4v for a config (an object or config.json's dict)."""
    name = config.get("model_type") if isinstance(config, dict) else config.model_type
    if name not in _CLASSES:
        raise ModelError(f"model_type {name!r} is not supported; {_SUPPORTED}")
    return str(name)


def lora_targets(family: str) -> str:
    """Return the regex over full module names of the text layers that LoRA adapts by default."""
    if family not in _LORA_TARGETS:
        raise ModelError(f"no LoRA targets for {family!r}; {_SUPPORTED}")
    return _LORA_TARGETS[family]


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / MODEL_CONFIG).is_file():
        if is_adapter(folder):
            raise ModelError(
                f"{folder} is an adapter, not a model; give the base it was trained on"
            )
        raise ModelError(f"{folder} has no {MODEL_CONFIG}; give the folder of a checkpoint")
    config = read_json(folder / MODEL_CONFIG)
    family(config)
    if config.get("model_type") in _CLASSES and config.get("quantization_config"):
        raise ModelError(f"{folder} is quantised; give the unquantised checkpoint")
    return read_model_config(folder)


def _check_size(folder: Path, config: Any) -> None:
    """Refuse a config that asks for far more numbers than the folder has, before they are allocated."""
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2 * (text.num_attention_heads + text.num_key_value_heads) * head
    asked = text.num_hidden_layers * text.hidden_size * (attention + 3 * text.intermediate_size)
    asked += text.vocab_size * text.hidden_size
    if isinstance(vision, dict):
        wide = vision["hidden_size"] * (4 * vision["hidden_size"] + 2 * vision["intermediate_size"])
        asked += vision["num_hidden_layers"] * wide
    elif vision is not None:
        asked += (
            vision.depth
            * vision.hidden_size
            * (4 * vision.hidden_size + 3 * vision.out_hidden_size)
        )
    held = sum(math.prod(tensor.shape) for tensor in tensors(folder).values())
    if asked > 2 * held + 1_000_000:
        raise ModelError(
            f"{folder}: its {MODEL_CONFIG} asks for about {asked:,} numbers and its weights hold "
            f"{held:,}; copy the checkpoint again, or use the config.json that belongs to it"
        )


def check_finite(model: torch.nn.Module, folder: Path) -> None:
    """Refuse weights that hold a NaN or an infinity; they are read once, and nothing is copied.

    Raises:
        ModelError: Names the first weights.
    """
    broken = [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point()
        and weight.numel()
        and not weight.is_meta
        and not bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all())
    ]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ModelError(
            f"{folder}: {', '.join(broken[:3])}{more} holds numbers that are not finite (NaN or "
            "infinity), so every reply would be noise; copy the checkpoint again, or use an earlier one"
        )


def _dtype(name: str) -> torch.dtype:
    if name == "auto":
        capable = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if capable else torch.float32
    kinds = {
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
    }
    if name not in kinds:
        raise ModelError(f"model.dtype is {name!r}; choose auto, {', '.join(kinds)}")
    return kinds[name]


def _attention(name: str) -> str | None:
    if name == "auto":
        return None
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise ModelError(
            "model.attention is flash_attention_2, but the package flash-attn or its GPU is not "
            "there; install flash-attn, or choose model.attention: sdpa"
        )
    return name


def _check_complete(folder: Path, report: dict[str, Any]) -> None:
    """Refuse weights that are missing, misshapen or left over: parts of the model would be random."""
    kinds = {
        "missing_keys": "missing",
        "mismatched_keys": "of another shape",
        "unexpected_keys": "unknown",
    }
    problems = []
    for kind, text in kinds.items():
        found = report.get(kind) or ()
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in found)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{text}: {', '.join(names[:3])}{more}")
    if problems:
        raise ModelError(
            f"{folder}: its weights do not fit its config; {'; '.join(problems)}. "
            "Copy the checkpoint again, or use the config.json that belongs to it"
        )
