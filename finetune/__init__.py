"""Fine-tuning for the GLM-4 family: dialogues in, checkpoints that anybody can open out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.api import evaluate, load, render, train

__all__ = ["evaluate", "load", "render", "train"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """The four functions of `finetune.api`, imported when they are asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    from finetune import api

    return getattr(api, name)
