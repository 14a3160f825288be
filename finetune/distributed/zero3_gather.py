"""Weights that ZeRO-3 holds in parts, made whole in the memory of the process that writes them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def gather(model: nn.Module, names: Sequence[str], *, leader: bool) -> dict[str, Tensor]:
    """The tensors `names` of the model's state: of the leader's model, empty in other processes.

    Every process must call it with the same names. Sharded weights are gathered one at a time: no
    process but the leader ever holds more than one of them, and the leader those that were asked
    for. Weights that are whole already are not copied.
    """
    parameters = dict(model.named_parameters())
    state = model.state_dict() if leader else {}
    found = {}
    for name in names:
        parameter = parameters.get(name)
        if parameter is not None and hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                if leader:
                    found[name] = parameter.detach().cpu().clone()
        elif leader:
            found[name] = state[name].detach()
    return found
