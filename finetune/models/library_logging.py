"""Libraries say only what a user can act on, and only in one process."""

from __future__ import annotations

import logging
import os
import warnings

from finetune import console
from finetune.distributed import device


def quiet_libraries() -> None:
    """Turn down what transformers, PEFT, accelerate and DeepSpeed report about themselves."""
    # Both are read when DeepSpeed is imported, which accelerate does even for a run without it.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    if not device.has_accelerator():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # the hub's too, but 19 GB need one
    if console.is_rank0() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        enable_progress_bars()
    level = logging.WARNING if console.is_rank0() else logging.ERROR
    for name in ("peft", "torch.distributed", "datasets"):
        logging.getLogger(name).setLevel(level)
    # accelerate warns of an accumulation mismatch that is the Trainer's way of doing it.
    for name in ("DeepSpeed", "deepspeed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Names that peft and accelerate still use and transformers 5.23 or torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|torch|peft")
    if not console.is_rank0():
        warnings.filterwarnings("ignore")
