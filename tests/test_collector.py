"""The collector of reference cycles: off while libraries are imported, past them while a run goes on."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import runs
from transformers import TrainerCallback

from finetune import collector
from finetune.config.schema import RunConfig
from finetune.training.run import train


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_nothing_is_collected_while_libraries_are_imported_and_cycles_are_found_afterwards() -> (
    None
):
    with collector.importing():
        assert not gc.isenabled()
        lost = weakref.ref(Cycle())
        assert lost() is not None
    assert gc.isenabled()
    gc.collect()
    assert lost() is None


def test_what_was_imported_counts_as_old_at_once() -> None:
    with collector.importing():
        made = Cycle()
    young = [one for number in (0, 1) for one in gc.get_objects(generation=number)]
    assert not any(one is made for one in young)
    assert any(one is made for one in gc.get_objects(generation=2))


def test_a_failed_import_turns_the_collector_on_again() -> None:
    with pytest.raises(ImportError), collector.importing():
        raise ImportError
    assert gc.isenabled()


def test_who_has_turned_the_collector_off_finds_it_off() -> None:
    gc.disable()
    try:
        with collector.importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_passed_over_is_looked_at_again_after_an_error() -> None:
    def run() -> None:
        with collector.passing_over_the_old():
            assert gc.get_freeze_count() > 1000
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run()
    assert gc.get_freeze_count() == 0


class Looks(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.frozen, self.enabled = gc.get_freeze_count(), gc.isenabled()


def test_a_run_passes_over_what_was_imported_and_never_asks_for_deepspeed(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "accelerate.utils.other.is_deepspeed_available",
        lambda: pytest.fail("accelerate imports DeepSpeed here"),
    )
    data = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    config = runs.config(tiny_glm, data, tmp_path / "run", training__max_steps=1)
    looks = Looks()
    before = gc.get_freeze_count()
    train(RunConfig.model_validate(config), callbacks=[looks])
    assert looks.enabled
    assert looks.frozen > 100_000  # torch and transformers alone
    assert gc.get_freeze_count() <= before
