"""`finetune bench`: speeds by length, of a model as it answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import serving

from finetune.cli import main
from finetune.errors import ConfigError
from finetune.evaluation.tasks.speed import bench, lengths_of


def test_lengths_are_doubled_or_listed() -> None:
    assert lengths_of("1k..8k") == [1024, 2048, 4096, 8192]
    assert lengths_of("1k,3000") == [1024, 3000]
    for text in ("", "0", "many", "1k..", "-4"):
        with pytest.raises(ConfigError, match="--lengths"):
            lengths_of(text)


def test_every_length_that_fits_is_measured_and_others_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(serving.save_talkative(tmp_path / "model"))
    found = bench(model, [16, 64, 10**7], new_tokens=5)
    assert [one["length"] for one in found["lengths"]] == [16, 64]
    for one in found["lengths"]:
        assert min(one["prefill_tokens_per_second"], one["decode_tokens_per_second"]) > 0
        assert one["seconds_to_first"] * one["prefill_tokens_per_second"] == pytest.approx(one["length"])  # fmt: skip
        assert 0.01 < one["memory_gb"] < 100
    assert "10,000,000 tokens and 5 new ones are over the context" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["bench", model, "--lengths", "1k..", "--json"])
    assert end.value.code == 2
    json.dumps(found)
