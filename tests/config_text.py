"""The shortest configuration, and what becomes of a text as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.load import load_config
from finetune.errors import ConfigError

MINIMAL = """\
model:
  path: some/model
data:
  train: train.jsonl
method:
  kind: lora
training:
  output_dir: runs/x
"""

# What is added to MINIMAL, and what is said.
UNKNOWN_KEYS = [
    ("  learning_rat: 1\n", "did you mean learning_rate?"),
    ("  max_length: 1\n", "the option is data.max_length"),
    ("  logging_steps: 1\n", "the option is training.log_every_steps"),
    ("  lora_alpha: 1\n", "the option is method.alpha"),
    ("  qqqq: 1\n", "it has output_dir, max_steps,"),
    ("<<: {max_steps: 1}\n", "x.yaml:9: <<: unknown key in the top level"),
    ("trainin: {}\n", "did you mean training?"),
]  # fmt: skip

# What is added to MINIMAL, and what is said.
WRONG_KINDS = [
    ("  batch_size: '2'\n", "must be a whole number, got '2'; write 2, without quotes"),
    ("  max_steps: 10_000\n", "write 10000"),
    ("  batch_size: true\n", "must be a whole number, got true"),
    ("  batch_size: 1.0\n", "must be a whole number, got 1.0"),
    ("  learning_rate: .nan\n", "must be a finite number"),
    ("  learning_rate: .inf\n", "must be a finite number"),
    ("  learning_rate: 0\n", "must be greater than 0, got 0"),
    ("  packing: yes\n", "unknown key in training; the option is data.packing"),
    ("  activation_checkpointing: yes\n", "must be true or false, got 'yes'"),
    ("  resume: 1\n", "must be text, got 1; put it in quotes if it is meant"),
    ("  report_to: wandb\n", "must be a list, got 'wandb'"),
    ("  report_to: [wandbb]\n", "training.report_to[0]: must be one of tensorboard, wandb"),
    ("  extra: []\n", "must be a mapping, got a list"),
    ("deepspeed:\n  zero_stage: 4\n", "must be one of 0, 1, 2, 3; got 4"),
    ("  max_steps: 99999999999999999999999999999x\n", "must be a whole number"),
]  # fmt: skip

# What stands for MINIMAL's data.train, and what is said.
WRONG_SOURCES = [
    ("5", "data.train: must be text or a list, got 5"),
    ("{path: a}", "data.train: must be text or a list, got a mapping"),
    ("[5]", "data.train[0]: must be text or a mapping, got 5"),
    (
        "[a, {path: b, wieght: 2}]",
        "data.train[1].wieght: unknown key in data.train[1]; did you",
    ),
    ("[a, {weight: 2}]", "data.train[1].path: is required: A file, a glob or a folder"),
    ("[{path: b, weight: 0}]", "data.train[0].weight: must be greater than 0, got 0"),
    ("[{path: b, format: openia}]", "data.train[0].format: must be one of auto, messages,"),
]  # fmt: skip

# A whole file, and what is said.
SURPRISES = [
    (MINIMAL + "x: &a 1\n", "x.yaml:9: x: `&a` is refused"),
    (MINIMAL + "x: *a\n", "x.yaml:9: x: `*a` is refused"),
    (MINIMAL + "x: !!python/object/apply:os.system [ls]\n", "tag `!!python/object/apply:os.sy"),
    (MINIMAL + "x: !!str 5\n", "tag `!!str` is refused"),
    (MINIMAL + "---\nmodel: 1\n", "x.yaml:9: a second document begins here"),
    ("[" * 50_000, "x.yaml:1: [0][0]"),
    ("a: {" * 10_000, "nested deeper than 16 levels"),
    ("", "is empty; a configuration is a mapping"),
    ("# only a comment\n", "is empty"),
    ("- a\n- b\n", "holds a list; a configuration is a mapping"),
    ("hello", "holds text"),
    ("{}", "4 problems"),
    (MINIMAL.encode() + b"x: \xff\n", "x.yaml:9: byte 0xff is not UTF-8"),
    (MINIMAL.encode("utf-16"), "is not UTF-8"),
    (MINIMAL + "x: \x07\n", "x.yaml:9: character 0x0007 is not allowed"),
    (MINIMAL + 'x: "\\ud800"\n', "x.yaml:9: x: holds a NUL or half a surrogate pair"),
    (MINIMAL + 'x: "a\\0b"\n', "holds a NUL"),
    (MINIMAL + "\tx: 1\n", "indent with spaces, not tabs"),
    (MINIMAL + "x: a: b\n", "put text that holds `: ` in quotes"),
    (MINIMAL + "x: [1, 2\n", "not valid YAML"),
    (MINIMAL + "? [1, 2]\n: 3\n", "x.yaml:9: a key must be plain text"),
    ("a: " + "x" * (1 << 20), "is larger than"),
]  # fmt: skip

# What is added to MINIMAL, the key that is named, and what is said.
CONTRADICTIONS = [
    ("deepspeed:\n  zero_stage: 2\n  offload_parameters: cpu\n",
     "x.yaml:11: deepspeed.offload_parameters", "needs deepspeed.zero_stage 3, got 2"),
    ("deepspeed:\n  offload_parameters: cpu\n", "offload_parameters", "zero_stage 3, got 2"),
    ("deepspeed:\n  zero_stage: 0\n  offload_optimizer: cpu\n", "offload_optimizer", "1 or more"),
    ("deepspeed:\n  config: ds.json\n  zero_stage: 2\n", "deepspeed.zero_stage",
     "contradicts deepspeed.config"),
    ("evaluation:\n  best_metric: bleu-4\n", "x.yaml:10: evaluation.best_metric",
     "needs held-out dialogues: give data.validation"),
    ("evaluation:\n  best_metric: rouge-l\n  generate: false\n", "evaluation.best_metric",
     "needs generated replies, but evaluation.generate is false"),
    ("evaluation:\n  patience: 2\n", "evaluation.patience", "give evaluation.every_steps"),
    ("  warmup_steps: 1.5\n", "training.warmup_steps", "must be whole from 1 on"),
    ("  extra: {optmi: x}\n", "x.yaml:9: training.extra.optmi", "did you mean optim?"),
    ("  extra: {bf16: true}\n", "training.extra.bf16", "is set by model.dtype"),
    ("  extra: {fsdp: full_shard}\n", "training.extra.fsdp", "the section deepspeed"),
    ("  extra: {hub_token: x}\n", "training.extra.hub_token", "a token must not land in"),
]  # fmt: skip


def write(content: str | bytes) -> Path:
    """Writes a text (or bytes) as x.yaml into the working directory, and gives its path."""
    path = Path("x.yaml")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(content: str | bytes, *overrides: str) -> str:
    """The message with which a text and overrides are refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(content), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)
