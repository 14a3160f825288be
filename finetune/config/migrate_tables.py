"""Options of other programs -> ours: one table per program, an entry per option.

An entry is the name of our option, or `Option(…)` with how its value changes and what differs in
meaning, or `Nothing(why)`. Names are from the programs' own documentation: the original GLM-4 demo,
LLaMA-Factory 0.9, ms-swift 4, axolotl 0.13 and TRL 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.extras import NAMED_OPTIMIZERS


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Option:
    """Our option for one of theirs."""

    to: str
    """Dotted name; `method.rank`."""
    value: Callable[[Any], Any] = _same
    """Their value -> ours; None leaves the option out."""
    note: str = ""
    """What differs in meaning."""


@dataclass(frozen=True)
class Nothing:
    """There is no such option here, and why."""

    why: str


Table = Mapping[str, str | Option | Nothing]

_DERIVED = Nothing("not needed: it follows from the checkpoint")
_OWN_TEMPLATE = Nothing("not needed: the checkpoint's own chat template is used and checked")
_COMMAND = Nothing("not needed: the command decides that")
_WORKERS = Nothing("not needed: tokenising takes seconds in one process")
_CACHE = Nothing("not needed: prepared data is found by its content")
_OUTPUT = Nothing("a run directory is never overwritten; it is resumed, or give another one")


def number(value: Any) -> Any:
    """A number that YAML 1.1 wrote as text, such as `1e-4`."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _share(value: Any) -> Any:
    """A share of the rows as ours says it; None for a number of rows."""
    share = number(value)
    is_share = isinstance(share, float) and 0 < share < 1
    return f"{100 * share:g}%" if is_share else None


HELD_OUT = Option(
    "data.validation", _share, "whole groups are held out; a number of rows is a file of its own"
)


def _dtype(value: Any) -> Any:
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    return names.get(str(value), str(value).removeprefix("torch."))


def _if_true(answer: Any) -> Callable[[Any], Any]:
    return lambda value: (
        answer if value not in (False, None, "false", "False", "none", "no") else None
    )


def _listed(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _targets(value: Any) -> Any:
    names = _listed(value)
    return "all-linear" if names in (["all"], ["all-linear"], "all-linear") else names


def _schedule(value: Any) -> Any:
    return {"cosine_with_min_lr": "cosine", "constant_with_warmup": "constant"}.get(value, value)


def _trackers(value: Any) -> Any:
    names = [value] if isinstance(value, str) else list(value or [])
    known = ("tensorboard", "wandb", "swanlab", "mlflow")
    return [name for name in names if name in known]


def _attention(value: Any) -> Any:
    return {"fa2": "flash_attention_2", "flash_attn": "flash_attention_2", "disabled": "eager"}.get(
        value, value
    )


def _optimizer(value: Any) -> dict[str, Any] | None:
    """Ours where it has a name here, else transformers' own."""
    if value in ("adamw_torch", "adamw_torch_fused", "adamw_hf"):
        return None
    ours = NAMED_OPTIMIZERS.get(value)
    return {"extra.optim": value} if ours is None else {"optimizer": ours}


OPTIMIZER = Option("training", _optimizer, "AdamW, torch's fused one, is the default")
ATTENTION = Option("model.attention", _attention)
FLASH = Option("model.attention", _if_true("flash_attention_2"))
FOUR_BITS = Option("model.quantization", _if_true("nf4"), "4 bits, nf4")
CHECKPOINTING = Option("training.activation_checkpointing", _if_true(True))

TRAINING_ARGUMENTS: Table = {
    "output_dir": "training.output_dir",
    "overwrite_output_dir": _OUTPUT,
    "max_steps": Option("training.max_steps", lambda value: value if value > 0 else None),
    "num_train_epochs": Option("training.num_epochs", number),
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "learning_rate": Option("training.learning_rate", number),
    "lr_scheduler_type": Option("training.lr_schedule", _schedule),
    "warmup_steps": Option("training.warmup_steps", number),
    "warmup_ratio": Option("training.warmup_steps", number, "below 1 it is a share of all steps"),
    "weight_decay": Option("training.weight_decay", number),
    "optim": OPTIMIZER,
    "max_grad_norm": Option("training.max_grad_norm", number),
    "gradient_checkpointing": CHECKPOINTING,
    "gradient_checkpointing_kwargs": Nothing("not needed: recomputation is always non-reentrant"),
    "seed": "training.seed",
    "data_seed": Nothing("one seed decides both: training.seed"),
    "logging_steps": Option("training.log_every_steps", lambda value: max(int(value), 1)),
    "logging_strategy": Nothing("training.log_every_steps counts steps"),
    "save_steps": Option("training.save_every_steps", lambda value: int(value) if value >= 1 else None),
    "save_strategy": Nothing("training.save_every_steps counts steps; one is always written at the end"),
    "save_total_limit": "training.keep_checkpoints",
    "save_only_model": Option("training.save", _if_true("weights")),
    "resume_from_checkpoint": Nothing("training.resume is auto: the same command goes on"),
    "report_to": Option("training.report_to", _trackers),
    "ddp_timeout": Option("training.process_timeout_minutes", lambda value: min(number(value) / 60, 1440), "minutes here"),
    "deepspeed": Option("deepspeed", lambda value: zero(value)),
    "bf16": Option("model.dtype", _if_true("bfloat16")),
    "fp16": Option("model.dtype", _if_true("float16")),
    "dataloader_num_workers": "data.loader_workers",
    "dataloader_pin_memory": Nothing("not needed: it follows from the device"),
    "group_by_length": "data.group_by_length",
    "evaluation_strategy": Nothing("evaluation.every_steps counts steps; without it one at the end"),
    "eval_strategy": Nothing("evaluation.every_steps counts steps; without it one at the end"),
    "eval_steps": Option("evaluation.every_steps", lambda value: int(value) if value >= 1 else None),
    "eval_on_start": "evaluation.at_start",
    "metric_for_best_model": Option("evaluation.best_metric", lambda value: "loss" if "loss" in str(value) else str(value).removeprefix("eval_")),
    "greater_is_better": Nothing("every score knows its direction"),
    "load_best_model_at_end": Nothing("the best checkpoint is kept and noted in best.json"),
    "predict_with_generate": "evaluation.generate",
    "remove_unused_columns": Nothing("columns are read by meaning; data check names those that are not"),
    "do_train": _COMMAND,
    "do_eval": Option("evaluation.generate", lambda value: None, "held-out data decides: data.validation"),
    "debug": Nothing("finetune --debug shows tracebacks"),
    "generation_config": Nothing("the length of replies is evaluation.max_new_tokens; they are the most likely ones"),
    "push_to_hub": Nothing("finetune push uploads a finished folder"),
}  # fmt: skip
"""transformers.TrainingArguments, which most programs pass on; others of its fields go to `training.extra`."""


def zero(value: Any) -> Any:
    """ms-swift's `zero2`, or the path of a DeepSpeed JSON."""
    if isinstance(value, str) and value.startswith("zero") and value[4:5].isdigit():
        section: dict[str, Any] = {"zero_stage": int(value[4])}
        if "offload" in value:
            section["offload_optimizer"] = "cpu"
        return section
    return {"config": value} if value and isinstance(value, str) else None


LORA: Table = {
    "r": "method.rank",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_alpha": Option("method.alpha", number),
    "lora_dropout": Option("method.dropout", number),
    "lora_target": Option("method.target_modules", _targets),
    "lora_target_modules": Option("method.target_modules", _targets),
    "target_modules": Option("method.target_modules", _targets),
    "use_rslora": "method.use_rslora",
    "use_dora": "method.use_dora",
    "loraplus_lr_ratio": Option("method.lora_plus_ratio", number),
    "lorap_lr_ratio": Option("method.lora_plus_ratio", number),
}

DEMO: Table = {
    "data_config.train_file": "data.train",
    "data_config.val_file": "data.validation",
    "data_config.test_file": Nothing("after training: finetune evaluate RUN --data FILE"),
    "data_config.num_proc": _WORKERS,
    "combine": Option("data.train_on", lambda value: "last_reply" if value else "every_reply"),
    "freezeV": Option("model.freeze", _if_true(["vision"])),
    "max_input_length": Option("data.max_length", _same, "tokens of prompt and reply together, plus the stop"),
    "max_output_length": Option("evaluation.max_new_tokens"),
    "swanlab": Option("training.report_to", lambda value: ["swanlab"] if value and value != "disabled" else None),
    "peft_config.peft_type": Option("method.kind", lambda value: "ptuning_v2" if "PREFIX" in str(value).upper() else "lora"),
    "peft_config.task_type": _DERIVED,
    "peft_config.num_virtual_tokens": "method.num_virtual_tokens",
    "peft_config.num_attention_heads": _DERIVED,
    "peft_config.token_dim": _DERIVED,
    "peft_config.num_layers": _DERIVED,
    "peft_config.inference_mode": Nothing("not needed: training trains"),
    "generation_config": Option("evaluation.max_new_tokens", lambda value: value.get("max_new_tokens")),
}  # fmt: skip
"""The original GLM-4 demo: sections `data_config`, `training_args` and `peft_config`."""

LLAMA_FACTORY: Table = {
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "trust_remote_code": Nothing("not needed: no code of a checkpoint is ever run"),
    "infer_dtype": Option("model.dtype", _dtype),
    "stage": Nothing("not needed: dialogues are trained by their replies (sft), rows of text as text (pt)"),
    "finetuning_type": Option("method.kind", lambda value: {"lora": "lora", "full": "full", "oft": "lora"}.get(value)),
    "dataset": Option("data.train", _listed),
    "eval_dataset": Option("data.validation", _listed),
    "dataset_dir": Nothing("paths of data are written out"),
    "media_dir": "data.image_root",
    "template": _OWN_TEMPLATE,
    "cutoff_len": "data.max_length",
    "max_samples": Nothing("rows of a data set: max_rows of a source in data.train; replies that are scored: evaluation.max_samples"),
    "mask_history": Option("data.train_on", lambda value: "last_reply" if value else None),
    "train_on_prompt": Nothing("prompts never carry loss"),
    "packing": "data.packing",
    "neat_packing": Option("data.packing", _if_true(True), "documents of a row never see each other"),
    "preprocessing_num_workers": _WORKERS,
    "overwrite_cache": _CACHE,
    "tokenized_path": _CACHE,
    "val_size": HELD_OUT,
    "quantization_bit": FOUR_BITS,
    "quantization_method": Nothing("nf4 by bitsandbytes is the only one"),
    "double_quantization": Nothing("always on"),
    "flash_attn": ATTENTION,
    "freeze_vision_tower": Option("model.freeze", _if_true(["vision"])),
    "freeze_multi_modal_projector": Nothing("vision names the encoder and its projector: model.freeze"),
    "plot_loss": Nothing("finetune report draws it"),
    "adapter_name_or_path": Option("model.adapter", note="trained further; its method and options must be those of method"),
    "export_dir": Nothing("the --output of `finetune merge`"),
    "export_size": Nothing("files of a merged model are as large as its base's"),
    "export_device": Nothing("not needed: merging holds a few weights at a time, on the CPU"),
    "export_legacy_format": Nothing("weights are always written as safetensors"),
    "export_quantization_bit": Nothing("a merged model keeps the base's number format; docs/export.md names quantizers"),
    "infer_backend": Nothing("finetune predict --backend vllm; chat and serve run the model themselves"),
    "pure_bf16": Option("model.dtype", _if_true("bfloat16")),
    "ray_run_name": Nothing("Ray is not used"),
    "do_predict": Nothing("a command of its own: finetune predict, finetune evaluate"),
    "export_hub_model_id": Nothing("finetune push uploads a finished folder"),
    "use_galore": Nothing("not here; training.optimizer and training.extra.optim name what is"),
    "rope_scaling": Nothing("the checkpoint's config says its positions"),
    "enable_liger_kernel": Nothing("not needed: fused kernels are used where they give torch's numbers: model.kernels"),
    "max_new_tokens": "evaluation.max_new_tokens",
    "additional_target": Nothing("embeddings are not trained beside LoRA"),
}  # fmt: skip

SWIFT: Table = {
    "model": "model.path",
    "model_revision": "model.revision",
    "model_type": _DERIVED,
    "template": _OWN_TEMPLATE,
    "train_type": Option("method.kind", lambda value: {"lora": "lora", "full": "full"}.get(value)),
    "tuner_type": Option("method.kind", lambda value: {"lora": "lora", "full": "full"}.get(value)),
    "dataset": Option("data.train", _listed, "rows after # are not limited here"),
    "val_dataset": Option("data.validation", _listed),
    "split_dataset_ratio": HELD_OUT,
    "torch_dtype": Option("model.dtype", _dtype),
    "max_length": "data.max_length",
    "truncation_strategy": Nothing("data.on_too_long: whole turns go, never a part of a message"),
    "loss_scale": Option("data.train_on", lambda value: "last_reply" if "last_round" in str(value) else None),
    "system": Nothing("a system message stands in the data"),
    "agent_template": _OWN_TEMPLATE,
    "packing": "data.packing",
    "attn_impl": ATTENTION,
    "quant_bits": FOUR_BITS,
    "quant_method": Nothing("nf4 by bitsandbytes is the only one"),
    "freeze_vit": Option("model.freeze", _if_true(["vision"])),
    "freeze_aligner": Nothing("vision names the encoder and its projector: model.freeze"),
    "dataset_num_proc": _WORKERS,
    "load_from_cache_file": _CACHE,
    "adapters": Nothing("a run goes on from its own checkpoints; merge an adapter first to tune on from it"),
    "model_author": Nothing("write it into the data"),
    "model_name": Nothing("write it into the data"),
    "use_hf": Nothing("give a folder, or a hub id"),
}  # fmt: skip

AXOLOTL: Table = {
    "base_model": "model.path",
    "revision_of_model": "model.revision",
    "model_type": _DERIVED,
    "tokenizer_type": _DERIVED,
    "trust_remote_code": Nothing("not needed: no code of a checkpoint is ever run"),
    "chat_template": _OWN_TEMPLATE,
    "adapter": Option("method.kind", lambda value: "lora" if value in ("lora", "qlora") else None),
    "load_in_4bit": FOUR_BITS,
    "load_in_8bit": Nothing("4 bits only: model.quantization: nf4"),
    "datasets": Option("data.train", lambda value: [item["path"] for item in value]),
    "test_datasets": Option("data.validation", lambda value: [item["path"] for item in value]),
    "dataset_prepared_path": "data.cache_dir",
    "val_set_size": HELD_OUT,
    "sequence_len": "data.max_length",
    "sample_packing": "data.packing",
    "eval_sample_packing": Nothing("held-out dialogues are scored one by one"),
    "pad_to_sequence_len": Nothing("rows are padded to the longest of their batch"),
    "train_on_inputs": Nothing("prompts never carry loss"),
    "lora_target_linear": Option("method.target_modules", _if_true("all-linear")),
    "micro_batch_size": "training.batch_size",
    "eval_batch_size": "evaluation.batch_size",
    "num_epochs": Option("training.num_epochs", number),
    "optimizer": OPTIMIZER,
    "lr_scheduler": Option("training.lr_schedule", _schedule),
    "flash_attention": FLASH,
    "sdp_attention": Option("model.attention", _if_true("sdpa")),
    "evals_per_epoch": Nothing("evaluation.every_steps counts steps"),
    "saves_per_epoch": Nothing("training.save_every_steps counts steps"),
    "wandb_project": Option("training.report_to", _if_true(["wandb"]), "its project by WANDB_PROJECT"),
    "tf32": Option("training.extra.tf32"),
    "special_tokens": _DERIVED,
    "strict": Nothing("always on"),
}  # fmt: skip

TRL: Table = {
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "trust_remote_code": Nothing("not needed: no code of a checkpoint is ever run"),
    "dataset_name": Option("data.train", _same, "a file or folder here"),
    "dataset_train_split": Nothing("name the files of the split"),
    "dataset_test_split": Option("data.validation", lambda value: None, "name its files"),
    "use_peft": Option("method.kind", lambda value: "lora" if value else "full"),
    "load_in_4bit": FOUR_BITS,
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "packing": "data.packing",
    "attn_implementation": ATTENTION,
    "torch_dtype": Option("model.dtype", _dtype),
    "dtype": Option("model.dtype", _dtype),
    "assistant_only_loss": Nothing("always so"),
    "completion_only_loss": Nothing("always so"),
    "dataset_num_proc": _WORKERS,
    "chat_template_path": _OWN_TEMPLATE,
    "eos_token": _OWN_TEMPLATE,
}  # fmt: skip
