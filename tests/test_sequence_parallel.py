"""Rows whose tokens are shared out over processes: the loss and the gradients of one process.

A process is a thread with a model of its own, and what they exchange goes through a list. Models are
float64, so that what is left of a difference is no rounding. Real processes: tests/test_split_runs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from finetune import methods
from finetune.config.schema import FullMethod, LoraMethod, PTuningV2Method
from finetune.errors import ConfigError
from finetune.models import tiled_mlp
from finetune.models.load import load_model
from finetune.models.loss import for_model, supervised_loss
from finetune.models.sequence_parallel import Split, check_heads

CPU = torch.device("cpu")
METHODS: dict[str, Any] = {
    "lora": LoraMethod(rank=4, dropout=0.0),
    "full": FullMethod(),
    "prefix": PTuningV2Method(num_virtual_tokens=3),
    "projected prefix": PTuningV2Method(num_virtual_tokens=3, prefix_projection=True),
}


def splits(parts: int) -> list[Split]:
    """One for each thread, that exchange through a list."""
    barrier, table = Barrier(parts, timeout=60), [[None] * parts for _ in range(parts)]

    def exchange(part: int) -> Callable[[Tensor], Tensor]:
        def with_all(sent: Tensor) -> Tensor:
            table[part] = list(sent.clone())
            barrier.wait()
            got = torch.stack([table[other][part] for other in range(parts)])
            barrier.wait()
            return got

        return with_all

    return [Split(parts, part, exchange(part)) for part in range(parts)]


def model_of(folder: Path, method: str, *, recomputed: bool) -> torch.nn.Module:
    """A model in which what is trained weighs enough to be noticed."""
    torch.manual_seed(0)
    model = methods.attach(load_model(folder), METHODS[method])
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.requires_grad and method != "full":
            weight.data.normal_(0, 1 if "key_value" in name else 0.05, generator=generator)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if recomputed:
        inner.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def batch_of(rows: int, tokens: int, *, packed: bool) -> dict[str, Tensor]:
    """Rows whose last four tokens are padding; packed, a document ends on a border between parts."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 370, (rows, tokens), generator=generator)
    labels = ids.masked_fill(torch.rand(rows, tokens, generator=generator) < 0.4, -100)
    labels[:, -4:] = -100
    batch = {"input_ids": ids, "labels": labels, "loss_weights": torch.rand(rows, tokens, generator=generator)}  # fmt: skip
    if packed:
        sizes = (5, tokens // 2 - 5, tokens // 2 - 9, 5, 4)
        positions = torch.cat([torch.arange(size) for size in sizes])
        batch["position_ids"] = positions.expand_as(ids)
    return batch


def trained(model: torch.nn.Module, batch: dict[str, Tensor], split: Split | None = None) -> dict[str, Tensor]:  # fmt: skip
    """The loss under the name `loss`, and the gradients."""
    given = for_model(batch, CPU, split)
    of_loss = {name: given.pop(name) for name in ("labels", "loss_weights", "supervised")}

    def head_loss(head: Any, hidden: Tensor) -> Tensor:
        return supervised_loss(head, hidden, **of_loss, num_items=7.0)

    loss = model(**given, head_loss=head_loss, use_cache=False).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}  # fmt: skip
    return {"loss": loss.detach(), **gradients}


def in_parts(models: list[torch.nn.Module], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`trained` of the parts, summed."""
    with ThreadPoolExecutor(len(models)) as threads:
        each = list(threads.map(trained, models, [batch] * len(models), splits(len(models))))
    names = set().union(*each)
    return {name: sum(one[name] for one in each if name in one) for name in names}


@pytest.mark.parametrize(
    ("family", "method"),
    [("chatglm", "lora"), ("chatglm", "full"), ("chatglm", "prefix"), ("glm", "lora"),
     ("glm", "projected prefix"), ("glm4", "lora"), ("glm4", "full")],
)  # fmt: skip
def test_parts_give_the_loss_and_the_gradients_of_a_whole_row(
    family: str, method: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    for packed in (False, True):
        batch = batch_of(2, 32, packed=packed)
        models = [model_of(folder, method, recomputed=packed).double() for _ in range(5)]
        whole = trained(models.pop(), batch)
        for parts in (2, 4):
            found = in_parts(models[:parts], batch)
            assert found.keys() == whole.keys()
            for name, gradient in whole.items():  # the loss itself is added up in float32
                largest = max(1.0, float(gradient.abs().max()))
                torch.testing.assert_close(found[name], gradient, rtol=0, atol=3e-7 * largest)
            for model in models:
                model.zero_grad()


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["chatglm", "glm4"])
def test_a_tiled_mlp_gives_the_same_loss_and_gradients(
    family: str,
    method: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, batch = request.getfixturevalue(f"tiny_{family}"), batch_of(2, 32, packed=False)
    whole = trained(model_of(folder, method, recomputed=True), batch)
    rows: list[int] = []
    original = tiled_mlp.down_projected

    def noted(both: Tensor, down: Any) -> Tensor:
        rows.append(len(both))
        return original(both, down)

    monkeypatch.setattr(tiled_mlp, "down_projected", noted)
    monkeypatch.setattr(tiled_mlp, "ABOVE", 20)
    monkeypatch.setattr(tiled_mlp, "TILE", 20)
    tiled = trained(model_of(folder, method, recomputed=True), batch)
    assert max(rows) == 20
    for name, gradient in whole.items():
        torch.testing.assert_close(tiled[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_number_that_no_head_count_allows_is_refused_with_those_that_fit() -> None:
    for parts in (2, 4, 8, 16, 32):
        check_heads(parts, 32, 2)
    with pytest.raises(ConfigError, match="2, 4, 8, 16, 32 processes only"):
        check_heads(3, 32, 2)
    with pytest.raises(ConfigError, match="2, 4, 8, 12, 16, 24, 48 processes only"):
        check_heads(5, 48, 4)
