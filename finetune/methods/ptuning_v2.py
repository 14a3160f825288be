"""P-Tuning v2: trained keys and values in front of every layer's own (Liu et al. 2021, arXiv:2110.07602).

The prefix belongs to the attention, not to the cache: each attention layer asks its own `Prefix`
for keys and values at the moment it attends. So recomputation under activation checkpointing sees
the same keys, the cache holds real tokens only, ZeRO-3 gathers a layer's prefix with that layer,
and masks of any kind (causal, padded, packed) only gain open columns on the left.

Shapes: N virtual tokens, L layers, H key/value heads, D head size, T new tokens, S keys.

Start values. Zero keys and values are not the base model: N keys of score 0 take part of every
softmax and pull the output towards zero; and N equal tokens have equal gradients, so they would stay
one token for ever. A prefix starts as the keys and values of the first tokens of the training data
(`prefix_start`); without such a text as noise. docs/methods.md has the measurements and rates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.glm.modeling_glm import eager_attention_forward

from finetune import console
from finetune.artifacts import hub
from finetune.artifacts.adapter import PREFIX_TENSOR, check_config
from finetune.artifacts.base_record import BaseRecord, check_base
from finetune.artifacts.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX_ENCODER, PREFIX_UNITS
from finetune.artifacts.weights import FLOATS, adapter_file, read_shard
from finetune.config.schema import PTuningV2Method
from finetune.errors import ConfigError, ModelError
from finetune.methods import prefix_init
from finetune.methods.tensor_file import save_config, save_tensors
from finetune.models.families import family_of
from finetune.models.packed_attention import DOCUMENT_SDPA, grouped_sdpa, in_documents
from finetune.models.sequence_parallel import Split

UNIT = ".prefix.unit"
START_STD = 0.2
IMPLEMENTATIONS = {
    "sdpa": "document_prefix_sdpa",
    DOCUMENT_SDPA: "document_prefix_sdpa",
    "eager": "prefix_eager",
}


class PrefixEncoder(nn.Module):
    """The shared half of the reparameterisation: one hidden state per virtual token.

    PEFT's `PrefixEncoder` with its last layer cut into one piece per attention layer.
    """

    def __init__(self, num_virtual_tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_virtual_tokens, width)
        self.transform = nn.Linear(width, hidden)

    def forward(self) -> Tensor:
        """[N, hidden]."""
        tokens = torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)
        return torch.tanh(self.transform(self.embedding(tokens)))


class Prefix(nn.Module):
    """Keys and values of one layer, each vector trained in a unit of about its own size.

    Adam moves a number by about the learning rate, whatever it is. Keys may be of size 2 where values
    are of size 0.05, and those of the first token, which takes the attention that nothing else wants,
    are the smallest of all: one step for all of them leaves the keys where they are or breaks the rest.
    Units are powers of two, so numbers go to PEFT's form and back without rounding.
    """

    unit: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        size = start.square().mean(-1, keepdim=True).sqrt() * 2**0.5
        nearest = size / torch.frexp(size).mantissa / 2
        self.register_buffer("unit", torch.where(size > 0, nearest, 1.0))  # [2, H, N, 1]
        self.key_value = nn.Parameter(start / self.unit)

    def forward(self) -> Tensor:
        """[2, H, N, D]."""
        return self.key_value * self.unit


class EncodedPrefix(nn.Module):
    """Keys and values of one layer, read off the shared encoder."""

    def __init__(self, encoder: PrefixEncoder, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.shape = (2, num_heads, head_dim)
        self.output = nn.Linear(encoder.transform.out_features, 2 * num_heads * head_dim)
        self._encoder = [encoder]  # in a list: the model registers it once, not every layer

    def forward(self) -> Tensor:
        """[2, H, N, D]."""
        flat: Tensor = self.output(self._encoder[0]())
        return flat.view(-1, *self.shape).permute(1, 2, 0, 3)


def attach(
    model: PreTrainedModel, section: PTuningV2Method, *, start_ids: Sequence[int] = (), **_: object
) -> PreTrainedModel:
    """The model with a fresh prefix in every attention layer, everything else frozen.

    Args:
        model: The base.
        section: The options.
        start_ids: The text that a prefix without projection starts from, one token for each of its
            own; of any other length it starts from noise.

    Raises:
        ConfigError: The attention implementation cannot take a prefix.
    """
    model.requires_grad_(False)
    heads, head_dim = _key_value_shape(model)
    fits = len(start_ids) == section.num_virtual_tokens and not section.prefix_projection
    starts = prefix_init.activations(model, start_ids) if fits else []
    encoder = None
    if section.prefix_projection:
        width = heads * head_dim
        hidden = section.encoder_hidden_size or width
        encoder = PrefixEncoder(section.num_virtual_tokens, width, hidden)
        model.add_module("prefix_encoder", encoder.to(model.device))
    for number, layer in enumerate(_attention_layers(model).values()):
        prefix: nn.Module
        if encoder is None:
            noise = torch.randn(2, heads, section.num_virtual_tokens, head_dim) * START_STD
            prefix = Prefix(starts[number] if fits else noise)
        else:
            prefix = EncodedPrefix(encoder, heads, head_dim)
        layer.add_module("prefix", prefix.to(model.device))
    _use_prefix(model, section.num_virtual_tokens)
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether `model` carries a prefix."""
    return any(isinstance(module, Prefix | EncodedPrefix) for module in model.modules())


def matched_modules(model: PreTrainedModel) -> dict[str, int]:
    """Layers with a prefix."""
    return {"prefix of keys and values per attention layer": len(_attention_layers(model))}


def save(
    model: PreTrainedModel,
    folder: Path,
    *,
    base: BaseRecord,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a PEFT prefix-tuning adapter, encoder or units folded away; they lie beside it to resume.

    The fold works on the state dict alone, so one rank can do it while the others wait.
    """
    state = {k: v.detach().cpu().float() for k, v in (state_dict or model.state_dict()).items() if _is_trained(k)}  # fmt: skip
    units = {k: v.cpu().float() for k, v in model.named_buffers() if k.endswith(UNIT)}
    if units:
        save_tensors(units, folder / PREFIX_UNITS)
    state |= units
    flat = _fold(state, list(_attention_layers(model)), *_key_value_shape(model))
    save_tensors({PREFIX_TENSOR: flat}, folder / ADAPTER_WEIGHTS)
    if any(name.startswith("prefix_encoder.") for name in state):
        save_tensors(state, folder / PREFIX_ENCODER)
    heads, head_dim = _key_value_shape(model)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=flat.shape[0],
        num_layers=len(_attention_layers(model)),
        token_dim=heads * head_dim,
        num_attention_heads=heads,
        prefix_projection=False,
        inference_mode=True,
        base_model_name_or_path=hub.known_to_peft(base.path),
        revision=base.revision,
    )
    save_config(config, folder)
    base.write(folder, method="ptuning_v2")


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Put saved prefix weights into a model with the same prefix attached.

    Raises:
        ModelError: The file does not fit this prefix.
    """
    expected = {name for name in model.state_dict() if _is_trained(name)}
    if (folder / PREFIX_ENCODER).is_file():
        state = load_file(folder / PREFIX_ENCODER)
    else:
        state = _unfold(model, _flat_weights(folder))
        state |= load_file(folder / PREFIX_UNITS) if (folder / PREFIX_UNITS).is_file() else {}
        state = _in_units(state)
    if set(state) != expected:
        raise ModelError(
            f"{folder} holds another prefix than this run attaches; "
            "use the num_virtual_tokens and prefix_projection it was saved with"
        )
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ModelError(
            f"{folder} does not fit the prefix of this run: {str(error).splitlines()[-1].strip()}. "
            "Use the num_virtual_tokens it was saved with"
        ) from error


def load_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base with the saved prefix of `folder`, ready to generate.

    Raises:
        ModelError: The folder has no prefix in safetensors, or it belongs to another base.
    """
    flat = _flat_weights(folder)
    base = model.config.name_or_path
    if Path(base).is_dir():
        for note in check_base(folder, Path(base)):
            console.say(note)
    heads, head_dim = _key_value_shape(model)
    width = len(_attention_layers(model)) * 2 * heads * head_dim
    if flat.shape[1] != width:
        raise ModelError(
            f"{folder / ADAPTER_WEIGHTS} holds {flat.shape[1]} numbers per virtual token, "
            f"but this base takes {width}; open it on the base it was trained on"
        )
    attach(model, PTuningV2Method(num_virtual_tokens=flat.shape[0]))
    model.load_state_dict(_unfold(model, flat), strict=False)
    return model.requires_grad_(False).eval()


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """The base again, without the prefix that `load_adapter` or `attach` gave it."""
    implementation, shift = model._without_prefix
    model.config.get_text_config()._attn_implementation = implementation
    shift.remove()
    for layer in _attention_layers(model).values():
        del layer.prefix
    if hasattr(model, "prefix_encoder"):
        del model.prefix_encoder
    del model._without_prefix
    return model


def _is_trained(name: str) -> bool:
    return ".prefix." in name or name.startswith("prefix_encoder.")


def _attention_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    attention = re.compile(family_of(model.config).attention)
    return {name: module for name, module in model.named_modules() if attention.fullmatch(name)}


def _key_value_shape(model: PreTrainedModel) -> tuple[int, int]:
    """(H, D)."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, size


def _flat_weights(folder: Path) -> Tensor:
    path = adapter_file(folder)
    stored = {tensor.name: tensor for tensor in read_shard(path).tensors}
    flat = stored.get(PREFIX_TENSOR)
    if flat is None or len(stored) != 1 or flat.dtype not in FLOATS or len(flat.shape) != 2:
        raise ModelError(
            f"{path} holds no saved prefix (one matrix, {PREFIX_TENSOR}, and nothing else); "
            "give a P-Tuning v2 adapter"
        )
    tokens = check_config(folder)["num_virtual_tokens"]
    if tokens != flat.shape[0]:
        raise ModelError(
            f"{folder}: {ADAPTER_CONFIG} says num_virtual_tokens {tokens}, and there are "
            f"{flat.shape[0]} in {ADAPTER_WEIGHTS}; copy the adapter again"
        )
    values: Tensor = load_file(path)[PREFIX_TENSOR]
    if not bool(values.isfinite().all()):
        raise ModelError(f"{path} holds numbers that are not finite; use an earlier checkpoint")
    return values


def _fold(state: Mapping[str, Tensor], layers: list[str], heads: int, head_dim: int) -> Tensor:
    """PEFT's flat form [N, L * 2 * H * D] of the weights in `state`."""
    if "prefix_encoder.embedding.weight" in state:
        at = "prefix_encoder."
        inner = nn.functional.linear(
            state[at + "embedding.weight"], state[at + "transform.weight"], state[at + "transform.bias"]
        ).tanh()  # fmt: skip
        rows = [
            nn.functional.linear(inner, state[f"{name}.prefix.output.weight"], state[f"{name}.prefix.output.bias"])
            for name in layers
        ]  # fmt: skip
    else:
        rows = [
            (state[f"{name}.prefix.key_value"] * state[f"{name}{UNIT}"])
            .permute(2, 0, 1, 3)
            .reshape(-1, 2 * heads * head_dim)
            for name in layers
        ]
    return torch.cat(rows, dim=1).contiguous()


def _unfold(model: PreTrainedModel, flat: Tensor) -> dict[str, Tensor]:
    """State dict of plain prefixes from PEFT's flat form, in units of one."""
    heads, head_dim = _key_value_shape(model)
    layers = _attention_layers(model)
    per_layer = flat.view(flat.shape[0], len(layers), 2, heads, head_dim).permute(1, 2, 3, 0, 4)
    state = {}
    for name, values in zip(layers, per_layer, strict=True):
        state[f"{name}.prefix.key_value"] = values.contiguous()
        state[f"{name}{UNIT}"] = torch.ones(*values.shape[:-1], 1)
    return state


def _in_units(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with every key and value divided by its unit."""
    return {
        name: tensor if name.endswith(UNIT) else tensor / state[name.replace(".prefix.key_value", UNIT)]
        for name, tensor in state.items()
    }  # fmt: skip


def _use_prefix(model: PreTrainedModel, num_virtual_tokens: int) -> None:
    """Route attention through the prefix; real tokens move from positions 0, 1, 2 to N, N + 1, N + 2."""
    config = model.config.get_text_config()
    implementation = IMPLEMENTATIONS.get(config._attn_implementation)
    if implementation is None:
        raise ConfigError(
            f"method.kind: ptuning_v2 does not run with attention {config._attn_implementation!r}; "
            "set model.attention: sdpa"
        )
    before, config._attn_implementation = config._attn_implementation, implementation

    def moved(value: Any) -> Any:
        is_positions = isinstance(value, Tensor) and not value.is_floating_point()
        return value + num_virtual_tokens if is_positions else value

    def shift(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}

    rotary = [
        module
        for name, module in model.named_modules()
        if re.fullmatch(family_of(model.config).rotary, name)
    ]
    if len(rotary) != 1:
        raise ModelError(
            f"expected one rotary embedding in the model, found {len(rotary)}; use a GLM-4 checkpoint"
        )
    model._without_prefix = before, rotary[0].register_forward_pre_hook(shift, with_kwargs=True)


def _open_left(mask: Tensor, num_open: int) -> Tensor:
    """`mask` [B, 1, T, S] (bool or additive) with open columns for the prefix: [B, 1, T, N + S]."""
    columns = mask.new_full((*mask.shape[:-1], num_open), mask.dtype == torch.bool)
    return torch.cat([columns, mask], dim=-1)


def _prefix_of(module: nn.Module) -> Tensor:
    """[2, H, N, D]."""
    states: Tensor = module.get_submodule("prefix")()
    return states


def _with_prefix(attention: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function that attends to the module's prefix first.

    Without a mask it must be causal with the last query seeing the last key, as `grouped_sdpa` is:
    then the prefix is open to all without a word.
    """

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, split: Split | None = None, **kwargs: Any
    ) -> Any:  # fmt: skip
        own = _prefix_of(module)
        states = own if split is None else split.own_groups(own)
        prefix = states.to(key.dtype)[:, None].expand(2, key.shape[0], -1, -1, -1)
        mask = None if attention_mask is None else _open_left(attention_mask, prefix.shape[3])
        keys, values = torch.cat([prefix[0], key], 2), torch.cat([prefix[1], value], 2)
        return attention(module, query, keys, values, mask, **kwargs)

    return attend


_document_prefix = in_documents(_with_prefix(grouped_sdpa), _prefix_of)
AttentionInterface.register("document_prefix_sdpa", _document_prefix)
AttentionInterface.register("prefix_eager", _with_prefix(eager_attention_forward))
AttentionMaskInterface.register("document_prefix_sdpa", sdpa_mask)
AttentionMaskInterface.register("prefix_eager", eager_mask)
