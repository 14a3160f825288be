"""What long rows are planned to take, and what is said where they cannot be shared out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
import torch

from finetune.config.load import load_mapping, settled
from finetune.config.schema import LoraMethod
from finetune.errors import ConfigError
from finetune.planning.roofline import Ceilings
from finetune.planning.step import Shape, count_layers
from finetune.planning.subjects import on_the_host, own, shared_out, states_per_token
from finetune.training.run_data import plan_of

ROOT = Path(__file__).resolve().parent.parent


def test_a_million_tokens_fit_eight_gpus_of_40_gb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench"))
    import long_rows

    (tmp_path / "config.json").write_text(json.dumps(long_rows.SIZES))
    lora = LoraMethod(rank=16, dropout=0.0)
    part = on_the_host(shared_out(own(tmp_path, lora, checkpointing=True), 8))
    # What layers start from is elsewhere, so two layers take as much as forty.
    cost = count_layers(part, Shape(1, 1_048_576 // 8), Ceilings(), 2)
    assert cost.working < 15e9  # beside 19 GB of weights
    assert states_per_token(tmp_path, torch.bfloat16) == 40 * 4096 * 2


def config(model: Path, folder: Path, **changes: object) -> dict:
    return runs.config(model, folder, folder / "run", **changes)


def test_processes_that_share_rows_count_once_for_the_global_batch(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    tree = config(
        tiny_glm, tmp_path, training__sequence_parallel=4, training__tokens_per_step=2048,
        data__packing=True,
    )  # fmt: skip
    del tree["training"]["gradient_accumulation_steps"]
    found = settled(load_mapping(tree).config)
    # 2 groups with 2 rows of 256 tokens at a time: 1,024 of 2,048.
    assert found.training.gradient_accumulation_steps == 2
    assert plan_of([10] * 20, found.data, found.training).global_batch == 8


def test_other_numbers_of_processes_are_refused_with_what_to_start(
    tiny_glm: Path, tmp_path: Path
) -> None:
    found = load_mapping(config(tiny_glm, tmp_path, training__sequence_parallel=4)).config
    with pytest.raises(ConfigError, match="the number of processes, 6, is not a multiple of it: start 4"):  # fmt: skip
        settled(found, 6)
    assert settled(found, 8) == found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__attention": "eager"}, "runs with model.attention auto or sdpa, got eager"),
        ({"training__offload_activations": True}, "set training.activation_checkpointing to true"),
    ],
)
def test_what_long_rows_need_is_said_with_the_configuration(
    tiny_glm: Path, tmp_path: Path, changes: dict, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_mapping(config(tiny_glm, tmp_path, training__sequence_parallel=2, **changes))
