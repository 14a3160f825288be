"""Which base is loaded, what is put on it and taken off, and the settings of generation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.config.schema import DataSection, EvaluationSection
from finetune.errors import ConfigError
from finetune.generation import load
from finetune.generation.settings import GREEDY, Placement, Sampling, Settings

# --- bases and adapters ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "placed", "bits"), [(None, None, None), ("nf4", None, "nf4"), (None, "nf4", "nf4"), ("nf4", "nf4", "nf4")]
)  # fmt: skip
def test_a_base_is_shared_where_all_that_decides_it_is_the_same(
    monkeypatch: pytest.MonkeyPatch, saved: Any, placed: Any, bits: Any
) -> None:
    said = {"a": Settings(DataSection(train=[]), EvaluationSection(), dtype="float32", quantization=saved, attention="eager", kernels="torch")}  # fmt: skip
    said["b"] = replace(said["a"], dtype="bfloat16")
    monkeypatch.setattr(load, "settings_of", lambda target: said[str(target)])
    monkeypatch.setattr(load, "model_base", lambda target, base: ("weights", base))
    models = load.Models(Placement(quantization=placed))
    assert models.key("a", base="x") == (("weights", "x"), "float32", "eager", bits, "torch")
    assert models.key("a", like="b")[1] == "bfloat16", (
        "in the number format of what it stands beside"
    )


class Opened:
    """What `Models` opens with, in the place of weights."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        import finetune.models.load as weights
        from finetune.distributed import device

        self.done: list[str] = []
        code = SimpleNamespace(load_adapter=self.put_on, detach=self.take_off)
        patch.setattr(weights, "load_model", self.load)
        patch.setattr(device, "local_device", lambda: "here")
        patch.setattr(load, "open_template", lambda *_, **__: "template")
        patch.setattr(load, "is_adapter", lambda target: str(target).startswith("adapter"))
        patch.setattr(load, "adapter_config", lambda _: {})
        patch.setattr(load, "of_adapter", lambda *_: SimpleNamespace(code=code))
        patch.setattr(load, "model_base", lambda target, base: SimpleNamespace(path=base or "base", revision=None))  # fmt: skip
        patch.setattr(load.Models, "key", self.key)
        self.kept: dict[str, Any] = {}

    def key(self, target: str, *, base: str | None, like: str | None) -> tuple[Any, ...]:
        path = base or "base"
        weights = self.kept.setdefault(path, SimpleNamespace(path=path, revision=None))
        return weights, like or "auto", None, None, None

    def load(self, path: str, **options: Any) -> Any:
        self.done.append(f"load {path} {options['dtype']} {options['device_map']}")
        return SimpleNamespace(name=path, to=lambda where: self.done.append(f"to {where}") or f"{path} {where}")  # type: ignore[func-returns-value]  # fmt: skip

    def put_on(self, base: Any, folder: Path) -> Any:
        self.done.append(f"put {folder} on {base}")
        return SimpleNamespace(to=lambda where: f"{folder} {where}")

    def take_off(self, adapted: Any) -> Any:
        self.done.append(f"take {adapted} off")
        return "bare"


def test_an_adapter_is_taken_off_before_the_next_is_put_on_the_same_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = Opened(monkeypatch)
    models = load.Models()
    assert models.open("adapter1").model == "adapter1 here"
    second = models.open("adapter2")
    whole = models.open("whole")
    assert (second.kind, second.base, whole.kind, whole.model) == ("adapter", "base", "model", "bare")  # fmt: skip
    assert opened.done == [
        "load base auto None", "to here", "put adapter1 on base here", "take adapter1 here off",
        "put adapter2 on bare", "take adapter2 here off",
    ]  # fmt: skip
    opened.done.clear()
    models.open("whole", like="checkpoint")
    models.open("adapter3", base="other")
    assert [one for one in opened.done if one.startswith("load")] == ["load base checkpoint None", "load other auto None"]  # fmt: skip


def test_a_base_that_is_not_wanted_any_more_is_gone_before_the_next_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import finetune.models.load as weights

    opened = Opened(monkeypatch)
    models, held = load.Models(), list[Any]()
    monkeypatch.setattr(weights, "load_model", lambda *a, **k: held.append(models._base) or opened.load(*a, **k))  # fmt: skip
    models.open("one", base="one")
    models.open("two", base="two")
    assert held == [None, None]


def test_a_model_that_is_shared_out_stays_where_it_was_put(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened(monkeypatch)
    shared = Placement(device_map="auto")
    load.Models(shared).open("whole")
    assert opened.done == ["load base auto auto"]
    monkeypatch.setattr(load.launcher, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="leave torchrun out"):
        load.Models(shared).open("whole")
    with pytest.raises(ConfigError, match="--device-map auto is for one model"):
        load.open_side_by_side({"a": "a", "b": "b"}, placement=shared)


# --- settings ----------------------------------------------------------------------------------

RANGES = {
    "temperature": (0.0, 1e9), "top_p": (0.0, 1.0), "top_k": (0, 10**6), "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0), "repetition_penalty": (0.01, 10.0),
}  # fmt: skip


@pytest.mark.parametrize("name", RANGES)
def test_every_setting_has_a_range_with_both_ends(name: str) -> None:
    for value in RANGES[name]:
        Sampling(**{name: value})
    low, high = RANGES[name]
    beyond = [low - 0.001, *([high + 0.001] if high <= 10 else [])]
    for value in (*beyond, float("nan")):
        with pytest.raises(ConfigError, match=f"{name} is {value}; it must be "):
            Sampling(**{name: value})


def test_what_is_not_the_default_is_asked_of_a_server_by_name() -> None:
    assert GREEDY.by_request_field == {}
    assert Sampling(top_k=3, temperature=0.5).by_request_field == {"temperature": 0.5, "top_k": 3}
