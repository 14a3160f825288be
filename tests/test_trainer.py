"""Laws 7 and 8 on tiny models, and what a run leaves on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from finetune.errors import CheckpointError, NonFiniteError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_dialogues(tmp_path_factory.mktemp("data") / "train.jsonl", 21)


@pytest.fixture(scope="module")
def weighted_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return runs.write_dialogues(folder / "weighted.jsonl", 21, weights=True)


def adapter_hash(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / "adapter_model.safetensors").read_bytes()).hexdigest()


def same_weights(one: Path, other: Path, tolerance: float) -> bool:
    left, right = runs.weights(one), runs.weights(other)
    assert left.keys() == right.keys()
    return all(torch.allclose(left[k], right[k], rtol=0, atol=tolerance) for k in left)


# --- law 7 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_and_batch_size_train_the_same_weights(
    tiny_chatglm: Path, data: Path, weighted_data: Path, tmp_path: Path, weighted: bool
) -> None:
    # 21 examples in global batches of 8: the third step of an epoch holds 5 examples.
    for name, batch_size, accumulation in (("small", 1, 8), ("large", 8, 1)):
        runs.run_here(
            runs.config(
                tiny_chatglm, weighted_data if weighted else data, tmp_path / name,
                method__dropout=0.0, training__batch_size=batch_size, training__max_steps=4,
                training__gradient_accumulation_steps=accumulation,
            )
        )  # fmt: skip
    small, large = (runs.history(tmp_path / name) for name in ("small", "large"))
    assert small == pytest.approx(large, abs=2e-6)
    assert same_weights(tmp_path / "small/checkpoint-4", tmp_path / "large/checkpoint-4", 1e-4)
