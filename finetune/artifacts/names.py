"""The file names of models, adapters, checkpoints and runs: each is written down here and nowhere else."""

from __future__ import annotations

from finetune.storage.manifest import MANIFEST as MANIFEST

# A model
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CARD = "README.md"

# Its tokenizer
TOKENIZER = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
OLDER_CHAT_TEMPLATE = "chat_template.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"

# An adapter, as PEFT names it
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# What we write beside them
BASE_RECORD = "finetune.json"
"""The base that an adapter or a fully tuned model was trained from."""
PREFIX_ENCODER = "prefix_encoder.safetensors"
PREFIX_UNITS = "prefix_units.safetensors"

# A checkpoint of training
TRAINER_STATE = "trainer_state.json"
RUN_RECORD = "run.json"
"""The options, versions and data of the run that saved the checkpoint."""
STREAM = "stream.json"
"""Where the stream of training rows is (`data.streaming`)."""

# A run directory
RUN_CONFIG = "config.yaml"
RUN_DATA = "data.json"
RUN_METRICS = "metrics.jsonl"
BEST = "best.json"
UNTUNED = "untuned.npz"
"""What the untuned model scored, which every evaluation is compared with."""

# An evaluation
EVALUATION = "evaluation.json"
