"""Law 7 for every method: however a global batch is cut or packed, the same is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
from closeness import SMOOTH_STEPS, assert_trained_alike

METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"kind": "lora", "rank": 4, "dropout": 0.0}, 1e-2),
    "ptuning_v2": ({"kind": "ptuning_v2", "num_virtual_tokens": 5}, 0.3),
    "projection": (
        {"kind": "ptuning_v2", "num_virtual_tokens": 5, "prefix_projection": True},
        0.1,
    ),
    "full": ({"kind": "full"}, 1e-3),
}
# All 12 dialogues in every step, so that packing sees the same tokens.
CUTS: dict[str, dict[str, Any]] = {
    "whole": {"training__batch_size": 12},
    "one by one": {"training__batch_size": 1, "training__gradient_accumulation_steps": 12},
    "recomputed": {"training__batch_size": 6, "training__gradient_accumulation_steps": 2,
                   "training__activation_checkpointing": True},
    "packed": {"training__batch_size": 12, "data__packing": True},
}  # fmt: skip


@pytest.mark.parametrize("method", list(METHODS))
def test_cutting_recomputing_and_packing_a_batch_change_nothing(
    tiny_chatglm: Path, tmp_path: Path, method: str
) -> None:
    data = runs.write_dialogues(tmp_path / "train.jsonl", 12, weights=True)
    section, rate = METHODS[method]
    for cut, changes in CUTS.items():
        settings = runs.config(
            tiny_chatglm, data, tmp_path / cut, training__max_steps=3, training__warmup_steps=0,
            training__learning_rate=rate, **SMOOTH_STEPS, **changes,
        ) | {"method": section}  # fmt: skip
        runs.run_here(settings)
    for cut in CUTS:
        assert_trained_alike(tmp_path / cut, tmp_path / "whole")
    losses = runs.history(tmp_path / "whole")
    assert losses[2] < losses[0]
