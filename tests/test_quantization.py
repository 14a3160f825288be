"""A frozen weight that is made wide when it is multiplied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.models.quantization import FourBits


class Wide(FourBits):
    """One whose weight was wide all along; it counts how often it is asked for."""

    def __init__(self, within: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3), requires_grad=False)
        self.bias = None
        self.asked = 0
        self._recomputed_in = None if within is None else lambda: within

    def wide(self) -> Tensor:
        self.asked += 1
        return self.weight


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_wide_weight_is_kept_for_the_backward_pass_only_where_the_layer_is_recomputed(
    checkpointing: bool, training: bool
) -> None:
    layer = Wide(SimpleNamespace(gradient_checkpointing=checkpointing, training=training))
    rows = torch.ones(4, 3, requires_grad=True)
    layer(rows).sum().backward()
    assert layer.asked == (1 if checkpointing and training else 2)
    assert torch.equal(rows.grad, torch.tensor([[3.0, 5.0, 7.0]]).expand(4, 3))  # type: ignore[arg-type]


def test_outside_of_layers_that_are_recomputed_nothing_is_kept() -> None:
    layer = Wide(None)
    layer(torch.ones(4, 3, requires_grad=True)).sum().backward()
    assert layer.asked == 2
