"""The config.json of GLM-4 in the published layout, read and written key for key."""

from __future__ import annotations

import copy
import json
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from finetune.errors import ModelError

# Every GLM-4 config says these; ChatGLM-6B, ChatGLM2 and others say something else or nothing.
_REQUIRED: dict[str, bool] = {
    "original_rope": True,
    "rmsnorm": True,
    "post_layer_norm": True,
    "multi_query_attention": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
}
# What a config may say, as long as it switches nothing on.
_REFUSED_WHEN_SET = ("fp32_residual_connection", "quantization_bit", "pre_seq_len")
_CHATGLM3_VOCABULARY = 65024
_READ_BY_PEFT = ("num_key_value_heads", "head_dim")
_ADVICE = (
    "supported are GLM-4-9B, GLM-4-9B-Chat, LongWriter-glm4-9b and GLM-4V-9B in this layout "
    "(model_type chatglm), the -hf conversions (glm) and the 0414 models (glm4)"
)


class ChatGLMVisionConfig(PreTrainedConfig):
    """The sizes of GLM-4V's tower under their published names; the defaults are GLM-4V-9B's."""

    model_type = "chatglm_vision"
    base_config_key = "vision_config"
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}

    hidden_size: int = 1792
    num_hidden_layers: int = 63
    num_heads: int = 16
    intermediate_size: int = 15360
    layer_norm_eps: float = 1e-06
    hidden_act: str = "gelu"
    dropout_prob: float | int = 0.0
    in_channels: int = 3
    patch_size: int = 14
    image_size: int = 1120
    num_positions: int = 6401
    scaling_factor: float | int = 8

    def __getitem__(self, key: str) -> Any:
        """Return a value by its name, as the published code reads it."""
        return getattr(self, key)

    def to_dict(self) -> dict[str, Any]:
        """Return what describes the tower, and nothing of what transformers keeps beside it."""
        values: dict[str, Any] = super().to_dict()
        beside = PreTrainedConfig.__dataclass_fields__.keys() | {"model_type", "output_attentions"}
        beside -= {"transformers_version"}  # the config around this one takes it out itself
        kept = (key for key in values if key not in beside and not key.startswith("_"))
        return {key: values[key] for key in kept}


class ChatGLMConfig(PreTrainedConfig):
    """The published keys under their published names; transformers' names are aliases of them."""

    model_type = "chatglm"
    # What transformers' Trainer does not take for predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "last_hidden_state"]
    # q, k and v lie in one matrix, gate and up in another: shards are gathered before they are split.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "encoder.layers.*.self_attention.query_key_value": "colwise_gather_output",
        "encoder.layers.*.self_attention.dense": "rowwise_split_input",
        "encoder.layers.*.mlp.dense_h_to_4h": "colwise_gather_output",
        "encoder.layers.*.mlp.dense_4h_to_h": "rowwise_split_input",
    }
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "num_key_value_heads": "multi_query_group_num",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layernorm_epsilon",
    }

    num_layers: int = 40
    padded_vocab_size: int = 151552
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    seq_length: int = 131072
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    layernorm_epsilon: float = 1.5625e-07
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    fp32_residual_connection: bool = False
    original_rope: bool = True
    rope_ratio: float | int = 1
    rope_parameters: dict[str, Any] | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    vision_config: dict[str, Any] | ChatGLMVisionConfig | None = None
    boi_token_id: int | None = None
    eoi_token_id: int | None = None

    @property
    def image_patches(self) -> int:
        """Tokens that an image takes between its boi and eoi: 1600 in GLM-4V-9B, 0 without vision."""
        if not isinstance(self.vision_config, ChatGLMVisionConfig):
            return 0
        side = int(self.vision_config.image_size // self.vision_config.patch_size // 2)
        return side * side

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse what is not GLM-4, by name."""
        published = {name: getattr(self, name) for name in type(self).__dataclass_fields__}
        problems = _problems(published | kwargs)
        if problems:
            raise ModelError(_refusal(str(kwargs.get("name_or_path") or "this config"), problems))
        if isinstance(self.vision_config, dict):
            self.vision_config = ChatGLMVisionConfig(**self.vision_config)
        kwargs["partial_rotary_factor"] = self.partial_rotary_factor
        super().__post_init__(**kwargs)

    @property
    def sub_configs(self) -> dict[str, type]:
        """Return the kinds of the configs inside this one, which take over what is set here."""
        inside = isinstance(self.vision_config, ChatGLMVisionConfig)
        return {"vision_config": ChatGLMVisionConfig} if inside else {}

    @property
    def partial_rotary_factor(self) -> float:
        """Return the part of a head that is turned; of every GLM-4 the first half."""
        return 0.5

    @property
    def default_theta(self) -> float:
        """Return the base of the angles, which transformers takes where nothing else is said."""
        return 10000.0 * self.rope_ratio

    @property
    def scales_positions(self) -> bool:
        """Whether `rope_parameters` ask for linear, dynamic, yarn or another scaling."""
        return bool((self.rope_parameters or {}).get("rope_type", "default") != "default")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of a parsed config.json; every key it has is kept for saving."""
        missing = [f"`{key}` is missing" for key in _REQUIRED if key not in config_dict]
        if missing:
            location = str(
                kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "config"
            )
            raise ModelError(_refusal(location, missing + _problems(config_dict)))
        published = copy.deepcopy(config_dict)
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config._published = published
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return all values, under every name under which the source file had them.

        And what PEFT sizes a prefix by, which it reads here and nowhere else.
        """
        values: dict[str, Any] = super().to_dict()
        published: dict[str, Any] = values.pop("_published", {})
        for alias, name in self.attribute_map.items():
            if alias in published or alias in _READ_BY_PEFT:
                values[alias] = values[name]
        if not self.scales_positions and "rope_parameters" not in published:
            values.pop("rope_parameters", None)  # rope_ratio says it
        if "torch_dtype" in published:
            values["torch_dtype"] = values.pop("dtype", None) or published["torch_dtype"]
        for key in ("attn_implementation", "architectures", "transformers_version"):
            if key in published:
                values[key] = published[key]
        return values

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the text of config.json: published keys first, in their order."""
        published: dict[str, Any] = getattr(self, "_published", {})
        if not published:
            return str(super().to_json_string(use_diff=use_diff))
        now = self.to_dict()
        if isinstance(self.vision_config, ChatGLMVisionConfig):
            now["vision_config"] = _in_order(now["vision_config"], published.get("vision_config"))
        defaults = type(self)().to_dict()
        added = {key for key, value in now.items() if value != defaults.get(key, not value)}
        if "_name_or_path" in published:
            now["_name_or_path"] = published["_name_or_path"]  # not where it lay here
        ordered = {key: now.get(key, value) for key, value in published.items()}
        added |= {"tie_word_embeddings"}  # vLLM's ChatGLM does not open a config without it
        # Where it lay here concerns nobody else, and an alias says nothing new.
        added -= published.keys() | {"_name_or_path"} | self.attribute_map.keys()
        ordered.update({key: now[key] for key in sorted(added)})
        return json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what a config.json without a published one as its model holds."""
        values: dict[str, Any] = super().to_diff_dict()
        if isinstance(self.vision_config, ChatGLMVisionConfig):
            values["vision_config"] = _in_order(self.vision_config.to_dict(), None)
        return {key: values[key] for key in values if key not in self.attribute_map}


def _in_order(vision: dict[str, Any], published: dict[str, Any] | None) -> dict[str, Any]:
    """Return the tower's values in the order of the source file, then what it did not say."""
    defaults = ChatGLMVisionConfig().to_dict() if published else {}
    ordered = {key: vision[key] for key in published or {} if key in vision}
    more = (key for key, value in vision.items() if value != defaults.get(key, not value))
    return ordered | {key: vision[key] for key in more if key != "transformers_version"}


def _problems(values: dict[str, Any]) -> list[str]:
    """Return what in these config values is not GLM-4, one line each."""
    found = [
        f"`{key}` is {json.dumps(values[key])}, needed is {json.dumps(needed)}"
        for key, needed in _REQUIRED.items()
        if key in values and values[key] is not needed
    ]
    found += [f"`{key}` is set" for key in _REFUSED_WHEN_SET if values.get(key)]
    if values.get("tie_word_embeddings"):
        found.append("`tie_word_embeddings` is true, but the output layer has weights of its own")
    if values.get("padded_vocab_size") == _CHATGLM3_VOCABULARY:
        found.append(f"`padded_vocab_size` is {_CHATGLM3_VOCABULARY}: this is ChatGLM2 or ChatGLM3")
    names = f"{values.get('_name_or_path', '')} {values.get('name_or_path', '')}".lower()
    if "cogagent" in names or any(key.startswith("cross_") for key in values):
        found.append("this is CogAgent")
    if values.get("vision_config") is not None:
        found += _vision_problems(values)
    layers, alias = values.get("num_layers"), values.get("num_hidden_layers")
    if layers and alias and layers != alias:
        found.append(f"`num_layers` is {layers} but `num_hidden_layers` is {alias}")
    return found


def _vision_problems(values: dict[str, Any]) -> list[str]:
    """Return what in these config values is not GLM-4V's vision, one line each."""
    vision = values["vision_config"]
    if isinstance(vision, ChatGLMVisionConfig):
        vision = vision.to_dict()
    needed = (
        *("hidden_size", "num_hidden_layers", "num_heads", "intermediate_size", "layer_norm_eps"),
        *("patch_size", "image_size", "in_channels", "num_positions", "scaling_factor"),
    )
    missing = [key for key in needed if not isinstance(vision.get(key), int | float)]
    found = [f"`vision_config.{key}` is missing" for key in missing]
    found += [
        f"`{key}` is missing" for key in ("boi_token_id", "eoi_token_id") if values.get(key) is None
    ]
    if vision.get("hidden_act", "gelu") != "gelu":
        found.append(f"`vision_config.hidden_act` is {vision['hidden_act']!r}, needed is 'gelu'")
    if not missing:
        size, patch = vision["image_size"], vision["patch_size"]
        if size % (2 * patch) or vision["num_positions"] != (size // patch) ** 2 + 1:
            found.append(
                f"`vision_config`: {vision['num_positions']} positions do not fit an image of "
                f"{size} pixels in patches of {patch}"
            )
    return found


def _refusal(location: str, problems: list[str]) -> str:
    return f"{location}: not a GLM-4 model: {'; '.join(problems)}. What to do: {_ADVICE}."
