"""What a configuration leaves to the number of processes."""

from __future__ import annotations

from finetune.config.schema import RunConfig


def settled(config: RunConfig, world: int) -> RunConfig:
    """The configuration with `training.tokens_per_step` said as forward passes a step.

    4 processes that each take one row of 4,096 tokens at a time need 4 passes for 65,536.
    """
    training = config.training
    if training.tokens_per_step is None:
        return config
    at_once = training.batch_size * config.data.max_length * world
    passes = max(1, round(training.tokens_per_step / at_once))
    changes = {"gradient_accumulation_steps": passes, "tokens_per_step": None}
    return config.model_copy(update={"training": training.model_copy(update=changes)})
