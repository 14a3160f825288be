"""A model folder or hub id -> a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, initialization
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from finetune import console
from finetune.artifacts.model_config import read_model_config
from finetune.artifacts.names import MODEL_CONFIG
from finetune.artifacts.plain_files import check_folder, read_json
from finetune.artifacts.resolve import is_adapter, local_folder
from finetune.distributed import device as devices
from finetune.errors import ConfigError, ModelError, is_out_of_memory
from finetune.models import wide_residual
from finetune.models.families import Family, family_of
from finetune.models.kernels import check, stock_layers
from finetune.models.model_size import check_size
from finetune.models.number_format import number_format
from finetune.models.packed_attention import DOCUMENT_SDPA
from finetune.models.quantization import check_widths, four_bits, take_over

_told: set[torch.device] = set()


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attention: str = "auto",
    quantization: str | None = None,
    kernels: str = "auto",
    device_map: str | None = None,
) -> PreTrainedModel:
    """Return the model of a folder or hub id, in eval mode; with labels it returns only a loss.

    No code of the folder is run and only safetensors are read, straight into place.

    Args:
        path: A checkpoint folder, or a hub id like org/name.
        revision: The hub revision when `path` is a hub id.
        dtype: bfloat16, float16, float32, or auto: see `number_format`.
        attention: sdpa, eager, flash_attention_2, flash_attention_3, or auto: transformers' own choice.
        quantization: nf4 holds the text's linear layers in 4 bits while they are loaded.
        kernels: auto uses fused kernels that are right on this GPU, torch none.
        device_map: auto shares the layers out over all accelerators of this machine (accelerate).

    Raises:
        ModelError: The folder is no such checkpoint, or this machine cannot run what is asked for.
    """
    folder = local_folder(path, revision)
    check_folder(folder)
    family = family_of(_read_config(folder))
    config_class, model_class = family.config_class, family.model_class
    implementation = _attention(attention)
    wanted = number_format(dtype, sees_images=family.sees_images(read_json(folder / MODEL_CONFIG)))
    check_mixture(family, wanted, quantization)
    extra = four_bits(wanted, family.unquantized) if quantization == "nf4" else {}
    extra |= {"device_map": device_map} if device_map else {}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its load report is checked below, not only shown
    try:
        config = config_class.from_pretrained(folder)
        check_size(folder, config)
        for part in (config, config.get_text_config()):  # what it says of outputs is not for us
            part.return_dict, part.output_attentions, part.output_hidden_states = True, False, False
        model, report = model_class.from_pretrained(
            folder,
            config=config,
            dtype=wanted,
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
        raise ModelError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error}); copy the checkpoint again"
        ) from error
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
        take_over(model)
    stock_layers.use_in(model)
    if wanted is torch.float16:
        wide_residual.use_in(model, first_layer(model, family))
    _choose_kernels(model, kernels, wanted)
    text = model.config.get_text_config()
    if text._attn_implementation == "sdpa":
        text._attn_implementation = DOCUMENT_SDPA
    elif str(text._attn_implementation).startswith("flash"):
        _check_flash(text, wanted)
    return model.eval()


def _check_flash(text: Any, dtype: torch.dtype) -> None:
    """Take torch's own attention where flash-attn is wrong on this GPU, or does not run."""
    name = text._attn_implementation
    if problem := check.flash_problem(name, torch.device(devices.kind()), dtype):
        console.warn(f"model.attention {name} is not used here, but sdpa: {problem}")
        text._attn_implementation = DOCUMENT_SDPA


def _choose_kernels(model: PreTrainedModel, setting: str, dtype: torch.dtype) -> None:
    """Check the kernels on this process's GPU; which of them stay out is said once."""
    if setting != "torch":
        stock_layers.use_products_in(model)
    device = torch.device(devices.kind())
    refused = check.choose(setting, device, dtype).refused
    if refused and device not in _told:
        _told.add(device)
        for name, reason in refused.items():
            console.warn(f"the fused kernel {name} is not used here: {reason}")


def shape_of(path: str | Path, num_layers: int | None = None) -> PreTrainedModel:
    """Return the model of a folder's config.json with weights that nobody has set.

    Made under `planning.counting` it has shapes only. With `num_layers` it is that deep.
    """
    folder = local_folder(path)
    family = family_of(read_json(folder / MODEL_CONFIG))
    config = family.config_class.from_pretrained(folder)
    text = config.get_text_config()
    if num_layers is not None:
        text.num_hidden_layers = num_layers
    text._attn_implementation = DOCUMENT_SDPA
    with initialization.no_init_weights():
        model: PreTrainedModel = family.model_class(config)
    stock_layers.use_in(model)
    if torch.get_default_dtype() is torch.float16:
        wide_residual.use_in(model, first_layer(model, family))
    return model


def check_mixture(family: Family, dtype: torch.dtype, quantization: str | None) -> None:
    """Refuse what a mixture of experts is not computed in.

    Raises:
        ModelError: It is one, and float16 or 4 bits are asked for.
    """
    if family.experts is None:
        return
    if quantization:
        raise ModelError(
            f"model.quantization: {quantization} holds linear layers in 4 bits, but nearly all weights of "
            f"{family.model_type} are experts, which are fused into tensors that are no layers and would "
            "stay as they are; leave model.quantization out, and shard with deepspeed.zero_stage: 3"
        )
    if dtype is torch.float16:
        raise ModelError(
            f"{family.model_type} is not computed in float16, whose range sums of experts may leave; "
            "use model.dtype: bfloat16 on a GPU that has it, or float32"
        )


def text_config(folder: Path) -> Any:
    """Return the sizes of the text that a folder's config.json names."""
    config_class = family_of(read_json(folder / MODEL_CONFIG)).config_class
    return config_class.from_pretrained(folder).get_text_config()


def num_heads(folder: Path) -> tuple[int, int]:
    """Return the number of the text's attention heads, and of those of keys and values.

    Raises:
        ConfigError: The checkpoint sees images, whose spans no row may be cut in.
    """
    config = read_json(folder / MODEL_CONFIG)
    if family_of(config).sees_images(config):
        raise ConfigError(
            f"training.sequence_parallel cuts rows of text, and {folder} sees images; leave it out"
        )
    text = text_config(folder)
    return int(text.num_attention_heads), int(text.num_key_value_heads)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / MODEL_CONFIG).is_file():
        if is_adapter(folder):
            raise ModelError(
                f"{folder} is an adapter, not a model; give the base it was trained on"
            )
        raise ModelError(f"{folder} has no {MODEL_CONFIG}; give the folder of a checkpoint")
    config = read_json(folder / MODEL_CONFIG)
    family_of(config)
    if config.get("quantization_config"):
        raise ModelError(f"{folder} is quantised; give the unquantised checkpoint")
    return read_model_config(folder)


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


def first_layer(model: torch.nn.Module, family: Family) -> torch.nn.Module:
    """Return the first layer of the model's text."""
    attention = re.compile(family.attention)
    name = next(name for name, _ in model.named_modules() if attention.fullmatch(name))
    return model.get_submodule(name.rpartition(".")[0])


def _attention(name: str) -> str | None:
    if name == "auto":
        return None
    needs = {
        "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
        "flash_attention_3": ("flash-attn-3", is_flash_attn_3_available),
    }
    package, is_there = needs.get(name, ("", lambda: True))
    if not is_there():
        raise ModelError(
            f"model.attention is {name}, but the package {package} or its GPU is not "
            f"there; install {package}, or choose model.attention: sdpa"
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
