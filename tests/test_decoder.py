"""How one token is chosen: penalties, cuts and draws."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.errors import ModelError
from finetune.generation.decoder import Decoder, Decoding, DecodingRow, Request, Sampler, token_at
from finetune.models import cache_columns


def test_numbers_that_are_none_name_themselves() -> None:
    sampler = Sampler(Decoding(1, temperature=1e-5))
    assert sampler.draw(torch.tensor([1.0, 3.0, 2.0])) == 1
    with pytest.raises(ModelError, match="not finite"):
        sampler.draw(torch.tensor([1.0, float("nan")]))


def test_penalties_lower_what_has_come_already() -> None:
    logits = torch.tensor([2.0, -1.0, 1.5, 0.5])

    def lowered(**how: Any) -> list[float]:
        row = DecodingRow(Request([3], Decoding(9, **how)))
        row.ids = [0, 0, 1]
        return [round(x, 3) for x in row._penalised(logits).tolist()]

    assert lowered(presence_penalty=0.5) == [1.5, -1.5, 1.5, 0.5]
    assert lowered(frequency_penalty=0.5) == [1.0, -1.5, 1.5, 0.5]
    assert lowered(repetition_penalty=2.0) == [1.0, -2.0, 1.5, 0.25]  # the prompt's token too
    row = DecodingRow(Request([3], Decoding(9, frequency_penalty=0.5)))
    row.ids = [0, 0]
    assert row._choose(logits, 0) == 2


def test_only_the_likeliest_are_drawn_from() -> None:
    logits = torch.tensor([5.0, 4.9, 4.8, 0.0]).log_softmax(0)

    def drawn(**how: Any) -> set[int]:
        sampler = Sampler(Decoding(9, temperature=2.0, seed=1, **how))
        return {sampler.draw(logits) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.6) == {0, 1}
    assert drawn(min_p=0.2) == {0, 1, 2}
    assert Decoding(9, temperature=1.0, top_k=1).is_greedy


def test_a_part_of_all_probabilities_is_a_token() -> None:
    chances = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    parts = {0.0: 1, 0.249: 1, 0.25: 3, 0.749: 3, 0.75: 4, 1 - 2**-53: 4}
    assert {part: token_at(chances, part) for part in parts} == parts
    drawn = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(
        torch.tensor([token_at(chances, x) for x in drawn.tolist()]), minlength=6
    )
    assert counts.tolist() == pytest.approx([0, 1000, 0, 2000, 1000, 0], abs=120)


def test_a_reply_without_a_seed_is_drawn_anew_each_time_and_one_with_a_seed_is_not() -> None:
    logits = torch.zeros(1000)

    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(Decoding(9, temperature=1.0, seed=seed))
        return [sampler.draw(logits) for _ in range(20)]

    assert drawn(None) != drawn(None)
    assert drawn(3) == drawn(3) != drawn(4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 1}])
def test_logits_that_are_no_numbers_end_their_row_alone(value: float, how: dict[str, Any]) -> None:
    rows = [DecodingRow(Request([3], Decoding(9, **how))) for _ in range(2)]
    logits = torch.zeros(2, 5)
    logits[1] = value
    Decoder._append(SimpleNamespace(_stop_ids=frozenset()), rows, logits)  # type: ignore[arg-type]
    assert rows[0].error is None
    assert "not finite numbers" in str(rows[1].error)


def test_buffers_of_keys_and_values_hold_all_columns_and_little_more() -> None:
    layer = cache_columns.CacheColumns()
    parts = [torch.randn(1, 2, count, 4) for count in (3, 1, 70, 1, 200, 1, 1)]
    for number in range(len(parts)):
        keys, values = layer.update(parts[number], -parts[number])
        whole = torch.cat(parts[: number + 1], dim=2)
        assert torch.equal(keys, whole)
        assert torch.equal(values, -whole)
        assert layer._key_buffer.shape[2] - whole.shape[2] <= cache_columns._HEADROOM
        assert layer._value_buffer.shape == layer._key_buffer.shape
