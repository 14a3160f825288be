"""How often experts are chosen: what is counted, read and said, and the bias that decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch
from torch import nn

from finetune.models.load import load_model
from finetune.models.moe.routing import ExpertUse, balances, expert_use, figures


def test_nothing_is_counted_before_counting_begins_or_of_another_number_of_tokens() -> None:
    use = ExpertUse([1], 3)
    use.add(0, torch.tensor([[0, 1]]))
    assert use.read() == [0.0] * 3
    with use.counting(torch.tensor([[True, False, False]])):  # of the text, beside rows of an image
        use.add(0, torch.tensor([[0], [2]]))
    assert use.read() == [1.0, 0.0, 1.0]
    with pytest.raises(ZeroDivisionError), use.counting(None):
        raise ZeroDivisionError
    use.add(0, torch.tensor([[0, 1]]))
    assert use.read() == [0.0] * 3


def test_a_log_line_has_the_balance_of_each_layer_and_the_worst_of_all() -> None:
    use = ExpertUse([3, 5, 7], 2)
    with use.counting(None):
        for place, chosen in enumerate(([0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0])):
            use.add(place, torch.tensor([chosen]).T)
    said = figures(use, lambda numbers: [2 * number for number in numbers])
    assert (said["experts_share_3"], said["experts_share_5"], said["experts_share_7"]) == (0.75, 0.5, 1.0)  # fmt: skip
    assert said["experts_entropy_5"] == pytest.approx(1.0)
    assert said["experts_entropy_3"] == pytest.approx(0.8113, abs=1e-4)
    assert said["experts_entropy_7"] == pytest.approx(0.0)
    assert said["experts_largest_share"] == 1.0
    assert said["experts_lowest_entropy"] == pytest.approx(0.0)
    assert len(said) == 8
    assert figures(None, list) == {}
    assert figures(use, list) == {}  # nothing since
    totals: list[Any] = []
    figures(use, lambda numbers: totals.append(numbers) or [4.0, 0.0, 0.0, 0.0, 2.0, 2.0])
    assert totals == [[0.0] * 6], "of a process that has none, the others' count"
    (only,) = balances([4], [6.0])
    assert (only.largest_share, only.entropy) == (1.0, 1.0)


def test_counts_are_found_under_any_wrapper_and_of_mixtures_alone(tiny_glm: Path) -> None:
    inner = nn.Module()
    inner.expert_use = ExpertUse([1], 2)  # type: ignore[assignment]
    outer = nn.Sequential(nn.Linear(1, 1), nn.Sequential(inner))
    assert expert_use(outer) is inner.expert_use
    assert expert_use(load_model(tiny_glm)) is None


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_the_bias_of_a_router_goes_where_that_goes_and_stays_wide(
    place: str, tmp_path: Path
) -> None:
    model = load_model(mixtures.save_model(tmp_path / "model", "glm4_moe"))
    router: Any = model.get_submodule("model.layers.1.mlp.gate")
    before = router.e_score_correction_bias.clone()
    router.to(place, torch.bfloat16)
    bias = router.e_score_correction_bias
    assert (bias.device.type, bias.dtype) == (place, torch.float32)
    assert place == "meta" or torch.equal(bias, before)
    assert (router.weight.device.type, router.weight.dtype) == (place, torch.bfloat16)
