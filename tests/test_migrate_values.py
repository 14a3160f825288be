"""What every option of another program becomes: one table, their values and ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config.migrate import PROGRAMS, Migration, Program, _flat, _take
from finetune.config.migrate_sources import read_register
from finetune.config.migrate_tables import Nothing

BY_NAME = {program.name: program for program in PROGRAMS}

# Their option and value -> ours, as YAML; nothing: it is left out.
OF_ALL = """\
output_dir: out -> training.output_dir: out
max_steps: 5 -> training.max_steps: 5
max_steps: 0 ->
max_steps: -1 ->
num_train_epochs: 2 -> training.num_epochs: 2
num_train_epochs: '1e0' -> training.num_epochs: 1.0
per_device_train_batch_size: 3 -> training.batch_size: 3
per_device_eval_batch_size: 3 -> evaluation.batch_size: 3
gradient_accumulation_steps: 3 -> training.gradient_accumulation_steps: 3
learning_rate: '1e-4' -> training.learning_rate: 1.0e-4
lr_scheduler_type: constant_with_warmup -> training.lr_schedule: constant
lr_scheduler_type: cosine_with_min_lr -> training.lr_schedule: cosine
lr_scheduler_type: linear -> training.lr_schedule: linear
warmup_steps: 7 -> training.warmup_steps: 7
warmup_ratio: '0.1' -> training.warmup_steps: 0.1
weight_decay: '0.1' -> training.weight_decay: 0.1
optim: adamw_torch ->
optim: adamw_torch_fused ->
optim: adamw_hf ->
optim: adamw_bnb_8bit -> training.optimizer: adamw_8bit
optim: adamw_8bit -> training.optimizer: adamw_8bit
optim: paged_adamw_32bit -> training.optimizer: paged_adamw
optim: paged_adamw_8bit -> training.optimizer: paged_adamw_8bit
optim: muon -> training.optimizer: muon
optim: sgd -> training.extra.optim: sgd
max_grad_norm: '0.5' -> training.max_grad_norm: 0.5
gradient_checkpointing: true -> training.activation_checkpointing: true
gradient_checkpointing: false ->
seed: 3 -> training.seed: 3
logging_steps: 7 -> training.log_every_steps: 7
logging_steps: 0.2 -> training.log_every_steps: 1
save_steps: 7 -> training.save_every_steps: 7
save_steps: 1 -> training.save_every_steps: 1
save_steps: 0.2 ->
save_total_limit: 2 -> training.keep_checkpoints: 2
save_only_model: true -> training.save: weights
save_only_model: false ->
report_to: wandb -> training.report_to: [wandb]
report_to: [tensorboard, swanlab, mlflow, comet_ml] -> training.report_to: [tensorboard, swanlab, mlflow]
report_to: none ->
ddp_timeout: 1800 -> training.process_timeout_minutes: 30.0
ddp_timeout: 180000000 -> training.process_timeout_minutes: 1440
deepspeed: z.json -> deepspeed.config: z.json
deepspeed: ds_z3.json -> deepspeed.config: ds_z3.json
deepspeed: zero2 -> deepspeed.zero_stage: 2
deepspeed: zero3_offload -> {deepspeed.zero_stage: 3, deepspeed.offload_optimizer: cpu}
deepspeed: null ->
bf16: true -> model.dtype: bfloat16
bf16: 'false' ->
fp16: true -> model.dtype: float16
dataloader_num_workers: 2 -> data.loader_workers: 2
group_by_length: true -> data.group_by_length: true
eval_steps: 7 -> evaluation.every_steps: 7
eval_steps: 1 -> evaluation.every_steps: 1
eval_steps: 0.2 ->
eval_on_start: true -> evaluation.at_start: true
metric_for_best_model: eval_loss -> evaluation.best_metric: loss
metric_for_best_model: eval_bleu-4 -> evaluation.best_metric: bleu-4
predict_with_generate: true -> evaluation.generate: true
do_eval: true ->
r: 4 -> method.rank: 4
lora_r: 4 -> method.rank: 4
lora_rank: 4 -> method.rank: 4
lora_alpha: '16' -> method.alpha: 16.0
lora_dropout: '0.1' -> method.dropout: 0.1
lora_target: all -> method.target_modules: all-linear
lora_target: 'q_proj, v_proj' -> method.target_modules: [q_proj, v_proj]
lora_target_modules: [q_proj] -> method.target_modules: [q_proj]
target_modules: all-linear -> method.target_modules: all-linear
use_rslora: true -> method.use_rslora: true
use_dora: true -> method.use_dora: true
loraplus_lr_ratio: '16' -> method.lora_plus_ratio: 16.0
lorap_lr_ratio: 16 -> method.lora_plus_ratio: 16
"""

OF_ONE = {
    "the original GLM-4 demo": """\
data_config.train_file: a.jsonl -> data.train: a.jsonl
data_config.val_file: a.jsonl -> data.validation: a.jsonl
combine: true -> data.train_on: last_reply
combine: false -> data.train_on: every_reply
freezeV: true -> model.freeze: [vision]
max_input_length: 9 -> data.max_length: 9
max_output_length: 9 -> evaluation.max_new_tokens: 9
swanlab: local -> training.report_to: [swanlab]
swanlab: disabled ->
peft_config.peft_type: LORA -> method.kind: lora
peft_config.peft_type: PREFIX_TUNING -> method.kind: ptuning_v2
peft_config.num_virtual_tokens: 8 -> method.num_virtual_tokens: 8
generation_config: {max_new_tokens: 8} -> evaluation.max_new_tokens: 8
""",
    "LLaMA-Factory": """\
model_name_or_path: m -> model.path: m
model_revision: v1 -> model.revision: v1
infer_dtype: fp16 -> model.dtype: float16
infer_dtype: bf16 -> model.dtype: bfloat16
infer_dtype: fp32 -> model.dtype: float32
infer_dtype: auto -> model.dtype: auto
finetuning_type: lora -> method.kind: lora
finetuning_type: full -> method.kind: full
finetuning_type: oft -> method.kind: lora
finetuning_type: freeze ->
dataset: 'a, b' -> data.train: [a, b]
eval_dataset: a -> data.validation: [a]
media_dir: pictures -> data.image_root: pictures
cutoff_len: 9 -> data.max_length: 9
mask_history: true -> data.train_on: last_reply
mask_history: false ->
packing: true -> data.packing: true
neat_packing: true -> data.packing: true
val_size: 0.1 -> data.validation: 10%
val_size: '0.005' -> data.validation: 0.5%
val_size: 100 ->
val_size: 1.0 ->
quantization_bit: 4 -> model.quantization: nf4
flash_attn: fa2 -> model.attention: flash_attention_2
flash_attn: disabled -> model.attention: eager
flash_attn: sdpa -> model.attention: sdpa
freeze_vision_tower: true -> model.freeze: [vision]
adapter_name_or_path: a -> model.adapter: a
pure_bf16: true -> model.dtype: bfloat16
max_new_tokens: 8 -> evaluation.max_new_tokens: 8
""",
    "ms-swift": """\
model: m -> model.path: m
model_revision: v1 -> model.revision: v1
train_type: full -> method.kind: full
train_type: lora -> method.kind: lora
tuner_type: full -> method.kind: full
tuner_type: lora -> method.kind: lora
dataset: a.jsonl -> data.train: [a.jsonl]
val_dataset: a.jsonl -> data.validation: [a.jsonl]
split_dataset_ratio: 0.1 -> data.validation: 10%
torch_dtype: bfloat16 -> model.dtype: bfloat16
max_length: 9 -> data.max_length: 9
loss_scale: last_round -> data.train_on: last_reply
loss_scale: default ->
packing: true -> data.packing: true
attn_impl: flash_attn -> model.attention: flash_attention_2
quant_bits: 4 -> model.quantization: nf4
freeze_vit: true -> model.freeze: [vision]
""",
    "axolotl": """\
base_model: m -> model.path: m
revision_of_model: v1 -> model.revision: v1
adapter: lora -> method.kind: lora
adapter: qlora -> method.kind: lora
load_in_4bit: true -> model.quantization: nf4
datasets: [{path: a}] -> data.train: [a]
test_datasets: [{path: a}] -> data.validation: [a]
dataset_prepared_path: c -> data.cache_dir: c
val_set_size: 0.1 -> data.validation: 10%
sequence_len: 9 -> data.max_length: 9
sample_packing: true -> data.packing: true
lora_target_linear: true -> method.target_modules: all-linear
micro_batch_size: 2 -> training.batch_size: 2
eval_batch_size: 2 -> evaluation.batch_size: 2
num_epochs: '2' -> training.num_epochs: 2.0
optimizer: paged_adamw_8bit -> training.optimizer: paged_adamw_8bit
lr_scheduler: constant_with_warmup -> training.lr_schedule: constant
flash_attention: true -> model.attention: flash_attention_2
sdp_attention: true -> model.attention: sdpa
wandb_project: p -> training.report_to: [wandb]
tf32: true -> training.extra.tf32: true
""",
    "TRL": """\
model_name_or_path: m -> model.path: m
model_revision: v1 -> model.revision: v1
dataset_name: a -> data.train: a
dataset_test_split: test ->
use_peft: true -> method.kind: lora
use_peft: false -> method.kind: full
load_in_4bit: true -> model.quantization: nf4
max_length: 9 -> data.max_length: 9
max_seq_length: 9 -> data.max_length: 9
packing: true -> data.packing: true
attn_implementation: eager -> model.attention: eager
torch_dtype: torch.float16 -> model.dtype: float16
dtype: bfloat16 -> model.dtype: bfloat16
""",
}


def lines(text: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """(their option, its value, ours) of a table."""
    found = []
    for line in text.splitlines():
        theirs, _, ours = line.partition(" ->")
        [(name, value)] = yaml.safe_load(theirs).items()
        found.append((name, value, yaml.safe_load(ours) or {}))
    return found


def values(program: Program, name: str, value: Any) -> dict[str, Any]:
    """What one option becomes, without what depends on several."""
    for section in reversed(name.split(".")):
        value = {section: value}
    found = Migration(program.name)
    for option, of_it in _flat(value, program):
        _take(found, program, option, of_it)
    return found.values


@pytest.mark.parametrize("name", BY_NAME)
def test_every_option_of_another_program_has_the_value_here_that_means_the_same(
    name: str,
) -> None:
    program = BY_NAME[name]
    own = lines(OF_ONE[name])
    taken = {theirs for theirs, _, _ in own}
    others = [row for row in lines(OF_ALL) if row[0] not in program.table]
    wrong = {
        f"{theirs}: {value}": found
        for theirs, value, ours in [*own, *others]
        if (found := values(program, theirs, value)) != ours
    }
    assert wrong == {}
    told = taken | {theirs for theirs, _, _ in others}
    table = {key for key, entry in program.whole_table.items() if not isinstance(entry, Nothing)}
    assert table - told == set(), "an option without a line here"


def test_a_register_of_the_working_directory_counts_before_one_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("here", "beside"):
        (tmp_path / place / "data").mkdir(parents=True)
        (tmp_path / place / "data/dataset_info.json").write_text(json.dumps({place: {}}))
    monkeypatch.chdir(tmp_path / "here")
    assert list(read_register("data", tmp_path / "beside").entries) == ["here"]


@pytest.mark.parametrize("value", ["none", "no", "disabled", None, False, []])
def test_an_option_that_was_off_is_neither_taken_nor_missed(value: Any) -> None:
    found = Migration("x")
    program = BY_NAME["LLaMA-Factory"]
    for option in ("report_to", "save_only_model"):
        _take(found, program, option, value)
    assert found.left == {}
    assert "training.report_to" not in found.values
