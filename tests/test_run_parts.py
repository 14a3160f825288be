"""What one part of a run hands to the next: options of a model, batches, scores, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_measuring import measure, validating
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from finetune.config.forgetting import KeepSection
from finetune.config.schema import (
    DataSection,
    EvaluationSection,
    FullMethod,
    LoraMethod,
    ModelSection,
    PTuningV2Method,
    TrainingSection,
)
from finetune.distributed.map_batches import EvaluationStoppedError
from finetune.errors import ConfigError, NonFiniteError
from finetune.training import checkpointing, prepare_model
from finetune.training.loading import batches
from finetune.training.measuring import choosing, keeping, validation
from finetune.training.measuring.choosing import CHOICES
from finetune.training.measuring.keeping import CALLS, LOSS, KeptData

# --- the model ----------------------------------------------------------------------------------------


class Prepared:
    """`prepare_model` with every neighbour replaced by one that notes what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        self.asked: dict[str, Any] = {}
        self.order: list[str] = []
        self.model = nn.Linear(2, 2)
        self.moved: list[Any] = []
        monkeypatch.setattr(self.model, "to", lambda place: self.moved.append(place), raising=False)
        answers = {
            "refuse_unused": None, "check_trackers": None, "local_folder": Path("folder"),
            "read_json": {"hidden_size": 64}, "number_format": torch.bfloat16,
            "training_arguments": SimpleNamespace(bf16=False, fp16=False),
            "model_fingerprint": "print", "load_model": self.model,
        } | changes  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(prepare_model, name, self._noting(name, answer))
        family = SimpleNamespace(
            sees_images=lambda config: "images", part=lambda name: f"part of {name}"
        )
        monkeypatch.setattr(prepare_model, "family_of", lambda config: family)
        for name in ("prepare_libraries", "deepspeed_config", "join"):
            monkeypatch.setattr(prepare_model.zero, name, self._noting(name, {"zero": 1}))
        for name, answer in (("attach", self.model), ("rate_scale", None)):
            monkeypatch.setattr(prepare_model.methods, name, self._noting(name, answer))

    def _noting(self, name: str, answer: Any) -> Any:
        def noted(*given: Any, **named: Any) -> Any:
            self.order.append(name)
            self.asked[name] = given, named
            return answer

        return noted

    def ready(self, method: Any, *, deepspeed: Any = None, **model: Any) -> Any:
        section = ModelSection(**{"path": "org/name", "revision": "main"} | model)
        training = TrainingSection(
            output_dir="x", report_to=["tensorboard"], learning_rates={"vision": 0.5}
        )
        data: Any = SimpleNamespace(first_tokens=lambda count: list(range(count)))
        return prepare_model.prepare_model(
            section, method, training, deepspeed, data, loader_workers=3
        )


def test_every_option_of_a_model_reaches_what_opens_attaches_and_trains_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Prepared(monkeypatch)
    one = bench.ready(
        FullMethod(), attention="eager", kernels="torch", freeze=["embedding"], dtype="bfloat16"
    )
    asked = bench.asked
    assert asked["local_folder"] == (("org/name", "main"), {})
    assert asked["number_format"] == (("bfloat16",), {"sees_images": "images"})
    assert asked["load_model"] == ((Path("folder"),), {
        "dtype": "float32", "attention": "eager", "quantization": None, "kernels": "torch",
    })  # fmt: skip
    assert asked["attach"][1] == {"freeze": ["embedding"], "start_ids": []}
    assert asked["training_arguments"][1]["loader_workers"] == 3
    assert asked["check_trackers"] == ((["tensorboard"],), {})
    assert (one.base.path, one.base.revision, one.base.fingerprint) == ("org/name", "main", "print")
    assert one.rates.by_name == {"part of vision": 0.5}
    assert one.rates.base == TrainingSection(output_dir="x").learning_rate
    # What a user has to mend is told before a model is opened; the devices come first of all.
    assert bench.order[:2] == ["refuse_unused", "check_trackers"]
    assert not {"prepare_libraries", "join"} & set(bench.order)
    other = Prepared(monkeypatch)
    other.ready(LoraMethod(), quantization="nf4", dtype="bfloat16")
    assert other.asked["load_model"][1]["quantization"] == "nf4"
    assert other.asked["load_model"][1]["dtype"] == "bfloat16"


def test_deepspeed_hears_of_the_machine_first_and_joins_before_a_model_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepare_model, "rank_and_world", lambda: (1, 4))
    bench = Prepared(monkeypatch)
    one = bench.ready(FullMethod(), deepspeed="section")
    places = [bench.order.index(name) for name in ("prepare_libraries", "deepspeed_config", "training_arguments", "join", "load_model")]  # fmt: skip
    assert places == sorted(places)
    section, setting = bench.asked["deepspeed_config"][0]
    assert section == "section"
    assert (setting.num_processes, setting.hidden_size, setting.precision) == (4, 64, "bf16")
    assert bench.asked["training_arguments"][1]["deepspeed"] == one.deepspeed == {"zero": 1}
    assert bench.asked["load_model"][1]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("method", "accelerated", "moves"),
    [(PTuningV2Method(), True, True), (PTuningV2Method(), False, False), (LoraMethod(), True, False)],
)  # fmt: skip
def test_a_prefix_starts_from_as_many_tokens_as_it_has_on_the_device(
    method: Any, accelerated: bool, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Prepared(monkeypatch)
    monkeypatch.setattr(prepare_model, "has_accelerator", lambda: accelerated)
    monkeypatch.setattr(prepare_model, "local_device", lambda: "card")
    bench.ready(method)
    assert bench.moved == (["card"] if moves else [])
    assert bench.asked["attach"][1]["start_ids"] == list(range(method.num_start_tokens))


# --- the batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("sharing", [None, 4])
def test_batches_are_made_with_kept_features_and_rows_that_can_be_shared_out(
    cached: bool, sharing: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(batches, "vision_cache", lambda *given, **named: asked.append((given, named)) or "features")  # fmt: skip
    monkeypatch.setattr(batches, "Collator", lambda *given, **named: (given, named))
    monkeypatch.setattr(batches, "default_root", lambda: Path("root"))
    train = SimpleNamespace(
        images=lambda: ["a.png"], lengths=[1], location=lambda index: f"row {index}"
    )
    template = SimpleNamespace(pad_id=7, image="look")
    data: Any = SimpleNamespace(template=template, train=train, items="items", plan="plan", stream=None)  # fmt: skip
    prepared: Any = SimpleNamespace(
        model="model", base=SimpleNamespace(fingerprint="print"), dtype="bf16", casts=True,
        split=SimpleNamespace(parts=sharing) if sharing else None,
    )  # fmt: skip
    for folder, root in ((None, "root"), ("kept", "kept")):
        section = DataSection(train="x", cache_image_features=cached, cache_dir=folder)
        found: Any = batches.training_data(data, prepared, section, None)
        assert found.collate == (
            (7,),
            {"image": "look", "features": "features" if cached else None, "pad_to_multiple_of": sharing},
        )  # fmt: skip
        assert (found.items, found.plan, found.lengths) == ("items", "plan", [1])
        assert found.location(3) == "row 3"
        if cached:
            assert asked.pop() == (
                ("model", ["a.png"], "look"),
                {"root": Path(root), "base": "print", "dtype": "bf16", "autocast": True},
            )
    template.image = None  # a text model with rows of images is refused elsewhere
    batches.training_data(data, prepared, section, None)
    assert asked == []


# --- what is measured -----------------------------------------------------------------------------------


def test_what_is_kept_is_measured_in_one_table_of_loss_calls_and_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    losses = SimpleNamespace(losses=np.array([3.0, 1.0]), weights=np.array([1.0, 3.0]))
    monkeypatch.setattr(
        keeping,
        "validation_loss",
        lambda *given, **named: asked.append((given[1], named)) or losses,
    )
    said = [SimpleNamespace(scores={"tool_call_accuracy": score}, location=place) for score, place in ((100.0, "a"), (0.0, "b"))]  # fmt: skip
    monkeypatch.setattr(
        keeping, "evaluate_model",
        lambda model, prompts, **named: asked.append((prompts, named)) or SimpleNamespace(predictions=said),
    )  # fmt: skip
    scores = {
        "mmlu": SimpleNamespace(ids=[1], measure=lambda name: measure(5.0, name=name)),
        "empty": SimpleNamespace(ids=[], measure=lambda name: pytest.fail("nothing was asked")),
    }
    monkeypatch.setattr(
        keeping, "ask", lambda model, template, tasks, asking: asked.append((tasks, asking.batch_size)) or scores
    )  # fmt: skip
    template: Any = SimpleNamespace(pad_id=0, image=None)
    evaluation = EvaluationSection(max_new_tokens=6, batch_size=5)
    section = KeepSection(data="x", tasks=["mmlu", "empty"])
    one = KeptData(section, template, [1, 2], ("p",), 3, evaluation)  # type: ignore[arg-type]
    stop = lambda: False  # noqa: E731
    found = one.measures(None, stop)
    assert list(found) == [LOSS, CALLS, "mmlu"]
    means = {name: float(m.scores(m.units.sum(axis=0, keepdims=True))[0][0]) for name, m in found.items()}  # fmt: skip
    assert means == {LOSS: 1.0, CALLS: 50.0, "mmlu": 5.0}  # of four tokens, two dialogues
    assert asked == [
        ([1, 2], {"batch_size": 3, "should_stop": stop}),
        (("p",), {"max_new_tokens": 6, "batch_size": 5, "should_stop": stop}),
        (["mmlu", "empty"], 5),
    ]
    none = KeptData(KeepSection(data="x"), template, None, (), 3, evaluation)
    scores.clear()
    assert none.measures(None, None) == {}


def test_a_score_of_replies_is_what_the_choice_is_made_by_where_it_is_the_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []
    choice = SimpleNamespace(chosen=lambda step, measures: bool(chosen.append(measures)))
    general = SimpleNamespace(measures=lambda model, stop: {LOSS: measure(2.0, name=LOSS)})
    section = SimpleNamespace(best_metric="bleu-4", max_new_tokens=5, batch_size=3)
    counts = {name: (0.0,) * one.width for name, one in validation.ReplyTable()._counts}
    replies = [SimpleNamespace(location=f"a:{n}", scores={"rouge-l": 10.0 * n}, counts=counts) for n in (1, 2)]  # fmt: skip
    result = SimpleNamespace(scores={"bleu-4": 7.0}, predictions=replies)
    monkeypatch.setattr(validation, "evaluate_model", lambda *_, **__: result)
    monkeypatch.setattr(validation, "write_predictions", lambda path, rows: None)
    one = validating(
        monkeypatch, tmp_path, section=section, prompts=("a",), kept=general, chooser=choice
    )
    found = one.scores(None, 2)
    assert found is not None
    assert found["chosen"] == 0.0
    (measures,) = chosen
    assert list(measures) == ["bleu-4", LOSS]
    assert "rouge-l" in measures["bleu-4"].names  # the table of replies, one row a dialogue
    assert len(measures["bleu-4"].units) == 2


def test_what_is_kept_is_told_where_the_metric_alone_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    general = SimpleNamespace(measures=lambda model, stop: {LOSS: measure(2.0, 4.0, name=LOSS)})
    assert validating(monkeypatch, tmp_path, kept=general).scores(None, 2) == {
        "loss": 1.5,
        LOSS: 3.0,
    }


def test_replies_stop_for_a_signal_as_the_loss_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = SimpleNamespace(best_metric="loss", max_new_tokens=5, batch_size=3)
    one = validating(monkeypatch, tmp_path, section=section, prompts=("a",))

    def stopped(*_: Any, should_stop: Any, **__: Any) -> Any:
        assert not should_stop()
        one.stop.local_signal = 15
        assert should_stop()
        raise EvaluationStoppedError("stopped")

    monkeypatch.setattr(validation, "evaluate_model", stopped)
    assert one.scores(None, 2) is None


def noted(run_dir: Path, *rows: tuple[int, bool, float]) -> None:
    """Choices of these steps: whether one was made, and by which p."""
    lines = [
        {"step": step, "p": p, "chosen": chosen, "criteria": [
            {"metric": "loss", "difference": -0.5, "p": p, "margin": None, "low": None, "high": None}
        ]}
        for step, chosen, p in rows
    ]  # fmt: skip
    (run_dir / CHOICES).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_newest_choice_concludes_a_run_or_else_why_its_newest_checkpoint_is_none(
    tmp_path: Path,
) -> None:
    assert choosing.conclusion(tmp_path) == ""
    noted(tmp_path, (2, True, 0.001), (4, True, 0.002), (6, False, 0.9))
    said = choosing.conclusion(tmp_path)
    assert said.startswith("checkpoint-4 is the newest that learned without forgetting: ")
    assert "p = 0.002" in said
    noted(tmp_path, (2, False, 0.8), (4, False, 0.9))
    said = choosing.conclusion(tmp_path)
    assert said.startswith("no checkpoint of 2 learned without forgetting")
    assert "the newest (step 4): " in said
    assert "p = 0.900" in said
    noted(tmp_path, (2, False, 0.001))  # it passes alone, and was one of too many
    assert choosing.conclusion(tmp_path).endswith("too many checkpoints were tried for its p")


def full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_predictions_and_choices_and_not_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = SimpleNamespace(scores={"bleu-4": 7.0}, predictions=())
    monkeypatch.setattr(validation, "evaluate_model", lambda *_, **__: result)
    monkeypatch.setattr(validation, "write_predictions", full)
    section = SimpleNamespace(best_metric="loss", max_new_tokens=5, batch_size=3)
    one = validating(monkeypatch, tmp_path, section=section, prompts=("a",))
    assert one.scores(None, 2) == {"loss": 1.5, "bleu-4": 7.0}
    assert "predictions" in (told := capsys.readouterr().err)
    assert "their scores are kept" in told
    monkeypatch.setattr(choosing, "whole_binary", full)
    monkeypatch.setattr(choosing.journal, "append", full)
    monkeypatch.setattr(choosing.forgetting, "qualifies", lambda criteria, earlier: True)
    chooser = choosing.Chooser(tmp_path, keeping.KeptData(KeepSection(), None, None, (), 1, None))  # type: ignore[arg-type]
    assert not chooser.chosen(0, {"loss": measure(3.0, 2.0, 4.0)})
    assert chooser.chosen(2, {"loss": measure(1.0, 1.5, 2.0)})
    assert "the choice itself is kept in the checkpoint" in capsys.readouterr().err


# --- checkpoints ------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_in_another_process_end_this_one_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(checkpointing, "any_rank", lambda flag: told.append(flag) or True)
    with pytest.raises(NonFiniteError):
        checkpointing.check_weights([torch.ones(2)], 3)
    assert told == [False]


def test_a_state_holds_that_of_callbacks_that_have_one() -> None:
    class Patient(TrainerCallback, ExportableState):
        def state(self) -> dict[str, Any]:
            return {"args": {"patience": 3}, "attributes": {}}

    control = SimpleNamespace()
    handler = SimpleNamespace(callbacks=[TrainerCallback(), Patient()])
    trainer = SimpleNamespace(
        callback_handler=handler, control=control, state=TrainerState(global_step=2)
    )
    text = checkpointing._state_text(trainer)
    assert TrainerState(**json.loads(text)).stateful_callbacks == {
        "Patient": {"args": {"patience": 3}, "attributes": {}}
    }
    assert text.endswith("\n")


def test_a_tracker_that_is_missing_is_told_before_anything_is_opened() -> None:
    section = TrainingSection.model_construct(report_to=["no_such_tracker"], output_dir="x")
    data: Any = None
    with pytest.raises(ConfigError, match="pip install no_such_tracker"):
        prepare_model.prepare_model(
            ModelSection(path="nowhere"), LoraMethod(), section, None, data, loader_workers=0
        )
