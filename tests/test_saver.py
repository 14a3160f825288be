"""The saver of a run: when it writes, what it notes as the best, what it deletes, what it says."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.trainer_callback import TrainerControl, TrainerState

from finetune.artifacts import checkpoint
from finetune.config.schema import TrainingSection
from finetune.errors import CheckpointError, DataError, NonFiniteError, SpaceError
from finetune.storage import folders
from finetune.training import checkpointing
from finetune.training.checkpointing import Saver, check_weights, explain_load_errors
from finetune.training.snapshot import Snapshot


class Bench:
    """A saver whose weights are a number, and the trainer of a run."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.run_dir = run_dir
        self.snapshots: list[dict[str, Any]] = []
        self.written: list[str] = []
        self.broken: Exception | None = None
        training = TrainingSection(**{"output_dir": str(run_dir), "keep_checkpoints": 1} | options)
        base: Any = None
        self.saver = Saver(run_dir, "config", {"format": 1}, base, "loss", training)
        self.trainer: Any = SimpleNamespace(
            state=TrainerState(max_steps=9), control=TrainerControl(), trained_weights=[],
            callback_handler=SimpleNamespace(callbacks=[]), data=SimpleNamespace(feed=None),
        )  # fmt: skip
        monkeypatch.setattr(checkpointing, "take", self._take)
        monkeypatch.setattr(Saver, "save_weights", self._write)

    def _take(self, trainer: Any, texts: Any, *, resumable: bool, copied: bool) -> Snapshot:
        self.snapshots.append({"resumable": resumable, "copied": copied, "texts": set(texts)})
        state = TrainerState(**vars(trainer.state))
        last = state.global_step >= state.max_steps
        return Snapshot(state, last, None, dict, {}, texts)  # type: ignore[arg-type]

    def _write(self, snapshot: Any, folder: Path) -> None:
        if self.broken is not None:
            raise self.broken
        self.written.append(folder.name.removeprefix(".staging-"))
        (folder / "weights").write_text(str(snapshot.state.global_step))

    def at(self, step: int, best: int | None = None, value: float = 1.0) -> Any:
        self.trainer.state.global_step = step
        self.trainer.state.best_global_step, self.trainer.state.best_metric = best, value
        return self.trainer

    def lies(self) -> list[str]:
        return sorted(path.name for path in self.run_dir.iterdir() if path.is_dir())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_newer_checkpoints_take_the_place_of_older_ones_but_the_best_stays(bench: Bench) -> None:
    bench.saver.save(bench.at(2, best=2))
    bench.saver.save(bench.at(4, best=2))
    bench.saver.save(bench.at(6, best=2))
    assert bench.lies() == ["checkpoint-2", "checkpoint-6"]
    assert checkpoint.best(bench.run_dir) == bench.run_dir / "checkpoint-2"
    bench.saver.save(bench.at(8, best=8, value=0.5))
    assert bench.lies() == ["checkpoint-8"]
    noted = json.loads((bench.run_dir / "best.json").read_text())
    assert noted == {"checkpoint": "checkpoint-8", "metric": "loss", "value": 0.5}


def test_the_best_on_disk_stays_while_the_run_compares_anew(bench: Bench) -> None:
    bench.saver.save(bench.at(2, best=2))
    bench.saver.save(bench.at(4, best=None))  # what the scores compare has changed
    assert bench.lies() == ["checkpoint-2", "checkpoint-4"]


def test_the_best_of_a_step_whose_note_the_disk_refused_is_noted_and_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.checkpoint, "set_best", full)
        bench.saver.save(bench.at(2, best=2))
    assert "the next save tries again" in capsys.readouterr().err
    assert checkpoint.best(bench.run_dir) is None
    bench.saver.save(bench.at(4, best=2))
    assert checkpoint.best(bench.run_dir) == bench.run_dir / "checkpoint-2"


def test_a_checkpoint_of_a_step_that_is_whole_is_not_written_again_and_a_torn_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    bench.saver.save(bench.at(2))
    again = Bench(tmp_path, monkeypatch)  # the run was started anew
    again.saver.save(again.at(2))
    assert again.written == []
    (tmp_path / "checkpoint-2/weights").write_text("x")
    torn = Bench(tmp_path, monkeypatch)
    torn.saver.save(torn.at(2))
    assert torn.written == ["checkpoint-2"]
    assert folders.verify(tmp_path / "checkpoint-2") == []


def test_a_damaged_checkpoint_that_this_run_has_not_sealed_deletes_no_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    bench.saver.save(bench.at(2))
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-4")
    weights = tmp_path / "checkpoint-4/weights"
    sealed = weights.stat()
    weights.write_text("x")  # by the disk itself: nothing but the content tells
    os.utime(weights, ns=(sealed.st_atime_ns, sealed.st_mtime_ns))
    bench.saver._rotate(tmp_path / "checkpoint-4")
    assert bench.lies() == ["checkpoint-2", "checkpoint-4"]
    assert "older checkpoints are kept: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "step", "raises"),
    [("continue", 2, False), ("stop", 2, True), ("continue", 9, True), ("stop", 9, True)],
)
def test_a_full_disk_ends_the_run_where_it_was_told_to_or_nothing_could_be_saved_later(
    option: str, step: int, raises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bench = Bench(tmp_path, monkeypatch, on_full_disk=option)
    bench.broken = OSError(errno.ENOSPC, "No space left on device")
    if raises:
        with pytest.raises(SpaceError):
            bench.saver.save(bench.at(step))
    else:
        bench.saver.save(bench.at(step, best=step))
        assert "Training goes on; the next save is tried as planned" in capsys.readouterr().err
    assert bench.lies() == []
    assert not (tmp_path / "best.json").exists()
    bench.broken = None
    bench.saver.save(bench.at(step))
    assert bench.lies() == [f"checkpoint-{step}"]


@pytest.mark.parametrize("save", ["resumable", "weights"])
def test_a_save_is_resumable_or_weights_alone_by_its_name_and_what_it_holds(
    save: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, save=save)
    bench.saver.save(bench.at(2))
    bench.saver.save_only_weights(bench.at(4))
    resumable = save == "resumable"
    first = "checkpoint-2" if resumable else "weights-2"
    assert bench.written == [first, "weights-4"]
    common = {"trainer_state.json", "config.yaml"}
    assert [one["texts"] for one in bench.snapshots] == [
        common | ({"run.json"} if resumable else set()), common,
    ]  # fmt: skip
    assert [one["resumable"] for one in bench.snapshots] == [resumable, False]


def test_where_a_stream_is_lies_in_what_can_be_resumed_only(bench: Bench) -> None:
    position = SimpleNamespace(as_json=lambda: {"steps": 2})
    bench.trainer.data.feed = SimpleNamespace(position=position)
    bench.saver.save(bench.at(2))
    bench.saver.save_only_weights(bench.at(2))
    assert ["stream.json" in one["texts"] for one in bench.snapshots] == [True, False]
    assert json.loads((bench.run_dir / "checkpoint-2/stream.json").read_text()) == {"steps": 2}


def test_a_save_beside_training_waits_for_the_one_before_and_its_error_comes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, async_save=True)
    may_end = threading.Event()

    def slowly(self: Saver, snapshot: Snapshot, folder: Path) -> None:
        may_end.wait(60)
        bench._write(snapshot, folder)

    monkeypatch.setattr(Saver, "save_weights", slowly)
    bench.saver.save(bench.at(2))
    assert bench.lies() in ([], [".staging-checkpoint-2"])
    assert bench.snapshots[0]["copied"]
    may_end.set()
    bench.saver.save(bench.at(4))
    assert "checkpoint-2" in bench.written
    bench.saver.finish()
    assert bench.lies() == ["checkpoint-4"]
    bench.broken = ValueError("broken")
    bench.saver.save(bench.at(6))
    with pytest.raises(ValueError, match="broken"):
        bench.saver.save(bench.at(8))
    bench.saver.finish()  # told once


def test_weights_that_are_not_finite_are_refused_before_an_older_checkpoint_is_touched(
    bench: Bench,
) -> None:
    bench.saver.save(bench.at(2))
    bench.trainer.trained_weights = [torch.tensor([1.0, float("nan")])]
    for save in (bench.saver.save, bench.saver.save_only_weights):
        with pytest.raises(NonFiniteError, match="the weights after step 4"):
            save(bench.at(4))
    assert bench.lies() == ["checkpoint-2"]


def test_of_weights_that_are_dealt_out_the_part_of_this_process_is_looked_at() -> None:
    weight = nn.Parameter(torch.empty(0))
    weight.ds_tensor = torch.ones(3)  # type: ignore[attr-defined]
    check_weights([weight], 3)
    weight.ds_tensor[1] = float("inf")  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteError):
        check_weights([weight], 3)


def test_one_kind_of_weights_does_not_hide_what_is_wrong_with_another() -> None:
    fine = [torch.ones(2), torch.ones(3)]
    for broken in (torch.tensor([float("nan")]), torch.tensor([float("inf")]).bfloat16()):
        for tensors in ([*fine, broken], [broken, *fine]):
            with pytest.raises(NonFiniteError):
                check_weights(tensors, 3)


# --- scores of an evaluation that was made up for ----------------------------------------------------


@pytest.mark.parametrize(("last", "kept"), [(2, True), (1, True), (4, False)])
def test_scores_after_the_last_step_go_into_the_checkpoint_that_was_resumed(
    bench: Bench, last: int, kept: bool
) -> None:
    bench.saver.save(bench.at(2))
    bench.at(2, best=2).state.log_history.append({"step": 2, "eval_loss": 1.0})
    bench.trainer.state.max_steps = last
    bench.saver.save_scores(bench.trainer)
    folder = bench.run_dir / "checkpoint-2"
    assert ("eval_loss" in (folder / "trainer_state.json").read_text()) is kept
    assert folders.verify(folder) == []
    assert checkpoint.best(bench.run_dir) == folder


def test_a_checkpoint_that_lies_elsewhere_gets_no_scores(bench: Bench) -> None:
    bench.saver.save_scores(bench.at(2, best=2))
    assert list(bench.run_dir.iterdir()) == []


# --- what opening a checkpoint may raise --------------------------------------------------------------


def opened(error: Exception, folder: str | None = "checkpoint-2", *, begun: bool = False) -> None:
    with explain_load_errors(folder, begun=lambda: begun):
        raise error


def test_what_libraries_raise_while_a_checkpoint_is_opened_names_it() -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is whole .* \(KeyError: 'x'\); its"):
        opened(KeyError("x"))
    with pytest.raises(CheckpointError, match=r"\(ValueError: \); its"):
        opened(ValueError())
    with pytest.raises(CheckpointError) as caught:
        opened(ValueError("a" * 300 + "\nsecond line"))
    assert "a" * 200 + ");" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "folder", "begun"),
    [
        (ValueError("of a fresh run"), None, False),
        (ValueError("of a step"), "checkpoint-2", True),
        (DataError("a user's"), "checkpoint-2", False),
        (OSError(errno.ENOSPC, "No space left on device"), "checkpoint-2", False),
        (OSError(errno.EIO, "Input/output error"), "checkpoint-2", False),
        (MemoryError(), "checkpoint-2", False),
        (RuntimeError("[gloo] Connection closed by peer"), "checkpoint-2", False),
        (torch.OutOfMemoryError("CUDA out of memory"), "checkpoint-2", False),
    ],
)
def test_errors_that_are_not_the_checkpoints_stay_what_they_are(
    error: Exception, folder: str | None, begun: bool
) -> None:
    with pytest.raises(type(error)) as caught:
        opened(error, folder, begun=begun)
    assert caught.value is error


# --- what a resume compares ---------------------------------------------------------------------------


def recorded(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    def example(name: str) -> Any:
        return SimpleNamespace(fingerprint=f"of {name}")

    monkeypatch.setattr(checkpointing, "rank_and_world", lambda: (1, 4))
    data: Any = SimpleNamespace(
        template=example("template"), train=example("train"),
        plan=SimpleNamespace(global_batch=24, batch_size=2),
        validation=changes.get("validation"), kept=changes.get("kept"),
    )  # fmt: skip
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    prepared: Any = SimpleNamespace(
        base=example("base"), dtype=torch.bfloat16, deepspeed=changes.get("deepspeed"), model=model
    )
    return checkpointing.run_record({"model": {"path": "x"}}, data, prepared)


def test_a_record_holds_every_fact_and_the_versions_of_what_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = recorded(monkeypatch)
    facts = found["facts"]
    assert {key: facts[key] for key in facts if key != "trainable"} == {
        "model": "of base", "template": "of template", "data": "of train", "global_batch": 24,
        "dtype": "bfloat16", "deepspeed": "none",
    }  # fmt: skip
    assert facts["trainable"].startswith("1 tensors, ")
    versions = {"torch", "transformers", "peft", "accelerate", "finetune"}
    assert found["versions"].keys() == versions
    other = SimpleNamespace(fingerprint="of others")
    zero = {"zero_optimization": {"stage": 2}}
    more = recorded(monkeypatch, validation=other, kept=other, deepspeed=zero)
    assert {"validation": "of others", "general": "of others", "processes": 4}.items() <= more["facts"].items()  # fmt: skip
    assert more["facts"]["deepspeed"].startswith("ZeRO-2, ")
    assert more["versions"].keys() == versions | {"deepspeed"}


def test_deepspeed_settings_that_the_training_section_owns_are_not_compared_twice() -> None:
    plain = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    owned = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4, "gradient_clipping": 0.5,
    }  # fmt: skip
    said = checkpointing._sharding(plain)
    for key, value in owned.items():
        assert checkpointing._sharding(plain | {key: value}) == said
    assert checkpointing._sharding(plain | {"communication_data_type": "fp32"}) != said
    changed = {"zero_optimization": {"stage": 2, "overlap_comm": False}}
    assert checkpointing._sharding(changed) != said
    assert checkpointing._sharding({"zero_optimization": {}}).startswith("ZeRO-0, ")


def test_the_trained_weights_are_told_apart_by_name_shape_and_number_whoever_holds_them() -> None:
    def shapes(**parts: nn.Module) -> str:
        return checkpointing.trainable_shapes(nn.ModuleDict(parts))

    said = shapes(a=nn.Linear(2, 3, bias=False))
    assert said.startswith("1 tensors, ")
    assert shapes(b=nn.Linear(2, 3, bias=False)) != said
    assert shapes(a=nn.Linear(3, 2, bias=False)) != said
    assert shapes(a=nn.Linear(2, 3)) != said
    frozen = nn.Linear(2, 3)
    frozen.bias.requires_grad_(False)
    assert shapes(a=frozen) == said
    dealt = nn.Linear(2, 3, bias=False)
    dealt.weight.ds_shape = dealt.weight.shape  # type: ignore[attr-defined]
    dealt.weight.data = torch.empty(0)
    assert shapes(a=dealt) == said
