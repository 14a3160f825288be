"""What long rows are planned to take, and what is said where they cannot be shared out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs

from finetune.config.load import load_mapping, settled
from finetune.errors import ConfigError
from finetune.training.run_data import plan_of

ROOT = Path(__file__).resolve().parent.parent


def test_a_million_tokens_fit_eight_gpus_of_40_gb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench"))
    import long_rows

    (tmp_path / "config.json").write_text(json.dumps(long_rows.SIZES))
    found = long_rows.planned(tmp_path, 1_048_576, 8, offload=True)
    assert found["gpu_gb"] < 39  # of the 131,072 tokens that each has; 70 were asked for
    assert found["host_gb"] == 42.9  # 40 layers x 4,096 numbers of 2 bytes x 131,072 tokens


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
