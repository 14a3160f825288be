"""What ZeRO-3 is told to hold at a time; `training.deepspeed` configures it and `planning.plan` counts it."""

from __future__ import annotations

SUB_GROUP = 100_000_000
"""Weights that one turn of the optimizer updates."""
LIVE_WEIGHTS = 600_000_000
"""Weights that are kept gathered from all processes at most."""
