"""Law 7 and the data order on tiny models: the global mean, what a checkpoint holds, the options."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from closeness import SMOOTH_STEPS, assert_trained_alike, loss_rounding
from transformers import AutoConfig

from finetune.errors import ConfigError
from finetune.training.trainer import FineTuner


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_dialogues(tmp_path_factory.mktemp("data") / "train.jsonl", 21)


@pytest.fixture(scope="module")
def weighted_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return runs.write_dialogues(folder / "weighted.jsonl", 21, weights=True)


# --- law 7 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_and_batch_size_train_the_same_weights(
    tiny_chatglm: Path, data: Path, weighted_data: Path, tmp_path: Path, weighted: bool
) -> None:
    # 21 examples in global batches of 8: the third step of an epoch holds 5 examples.
    for name, batch_size, accumulation in (("small", 1, 8), ("large", 8, 1)):
        runs.run_here(
            runs.config(
                tiny_chatglm, weighted_data if weighted else data, tmp_path / name,
                method__dropout=0.0, training__batch_size=batch_size, training__max_steps=4,
                training__gradient_accumulation_steps=accumulation, **SMOOTH_STEPS,
            )
        )  # fmt: skip
    assert_trained_alike(tmp_path / "small", tmp_path / "large")


POISON = """
import os
from finetune.training import trainer
original = trainer.FineTuner.compute_loss
def poisoned(self, *args, **kwargs):
    loss = original(self, *args, **kwargs)
    if "poisoned" in self.args.output_dir and os.environ["RANK"] == "1" and self.state.global_step == 1:
        self._losses[-1] = self._losses[-1] * float("nan")
    return loss
trainer.FineTuner.compute_loss = poisoned
"""


@pytest.mark.slow
def test_two_processes_train_the_same_weights_as_one_and_fail_together(
    tiny_chatglm: Path, weighted_data: Path, tmp_path: Path
) -> None:
    common = {
        "method__dropout": 0.0, "training__max_steps": 4, "data__validation": str(weighted_data),
        "evaluation__generate": False, "evaluation__at_start": True, "training__save_every_steps": 1,
        **SMOOTH_STEPS,
    }  # fmt: skip
    one, two, poisoned = (
        runs.config(
            tiny_chatglm, weighted_data, tmp_path / name, training__batch_size=size, **common
        )
        for name, size in (("one", 8), ("two", 4), ("poisoned", 4))
    )
    runs.run_here(one)
    begun = time.monotonic()
    done = runs.run_command([two, poisoned], tmp_path, processes=2, script=POISON)
    assert_trained_alike(tmp_path / "one", tmp_path / "two")
    validation = [runs.history(tmp_path / name, "eval_loss") for name in ("one", "two")]
    off = loss_rounding(AutoConfig.from_pretrained(tiny_chatglm), 256)
    assert validation[0] == pytest.approx(validation[1], abs=off)
    # What only process 1 finds not finite ends both with exit code 4, and not by a timeout.
    assert time.monotonic() - begun < 240
    assert done.returncode == 1  # torchrun's own, whatever its workers say
    assert "exitcode  : 4" in done.stderr  # in torchrun's summary
    assert done.stderr.count("error: the loss of step 2 is not a finite number") == 1
    assert "in poisoned" not in done.stderr  # no traceback of ours
    assert [path.name for path in (tmp_path / "poisoned").glob("checkpoint-*")] == ["checkpoint-1"]


def test_the_loss_of_a_step_is_the_weighted_mean_over_its_supervised_tokens(
    tiny_glm: Path, weighted_data: Path, tmp_path: Path
) -> None:
    from finetune.config.schema import RunConfig
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer
    from finetune.data.examples.collate import Collator
    from finetune.models.load import load_model
    from finetune.training.loading.prepare_data import load_run_data

    settings = runs.config(
        tiny_glm, weighted_data, tmp_path / "run", method__dropout=0.0, training__max_steps=1,
        training__gradient_accumulation_steps=4,
    )  # fmt: skip
    runs.run_here(settings)
    template = ChatTemplate(load_chat_tokenizer(tiny_glm))
    config = RunConfig.model_validate(settings)
    prepared = load_run_data(config.data, config.training, config.model)
    # By hand: the fresh adapter changes nothing, so plain logits of the base give the first loss.
    model = load_model(tiny_glm)
    total = weight = 0.0
    for index in next(prepared.plan.steps(0)):
        batch = Collator(template.pad_id)([prepared.train[int(index)]])
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[0, :-1].double()
        labels = batch["labels"][0, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits, labels, reduction="none", ignore_index=-100
        )
        weights = batch["loss_weights"][0, 1:].double()
        total, weight = total + float((losses * weights).sum()), weight + float(weights.sum())
    off = loss_rounding(model.config, 256)
    assert runs.history(tmp_path / "run") == pytest.approx([total / weight], abs=off)


@pytest.mark.parametrize("family", ["chatglm", "glm4"])
def test_packed_rows_and_single_examples_give_the_same_loss_on_the_same_tokens(
    request: pytest.FixtureRequest, data: Path, tmp_path: Path, family: str
) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    # One global batch that holds everything: the token sets are the same.
    single = runs.config(
        model, data, tmp_path / "single", method__dropout=0.0, training__max_steps=2,
        training__batch_size=21, **SMOOTH_STEPS,
    )  # fmt: skip
    packed = runs.config(
        model, data, tmp_path / "packed", method__dropout=0.0, training__max_steps=2,
        training__batch_size=21, data__packing=True, **SMOOTH_STEPS,
    )  # fmt: skip
    runs.run_here(single)
    runs.run_here(packed)
    assert_trained_alike(tmp_path / "single", tmp_path / "packed")


# --- what a checkpoint holds -----------------------------------------------------------------------


def test_a_checkpoint_holds_no_pickle_that_needs_trust(
    tiny_chatglm: Path, data: Path, tmp_path: Path
) -> None:
    runs.run_here(runs.config(tiny_chatglm, data, tmp_path / "run", training__max_steps=1))
    folder = tmp_path / "run/checkpoint-1"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "adapter_model.safetensors", "adapter_config.json", "finetune.json", "optimizer.pt",
        "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.yaml", "run.json",
        "manifest.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    with torch.serialization.safe_globals(
        [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    ):
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize(
    ("metric", "values"),
    [("loss", [9.0, 5.0, 4.0, 4.5, 4.4, 3.0]), ("bleu-4", [1.0, 5.0, 6.0, 5.5, 5.6, 7.0])],
)
def test_the_best_checkpoint_is_kept_and_patience_ends_a_run(
    tiny_chatglm: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metric: str,
    values: list[float],
) -> None:
    from finetune.training.measuring.validation import Validation

    monkeypatch.setattr(Validation, "scores", lambda self, model, step: {metric: values[step]})
    summary = runs.run_here(
        runs.config(
            tiny_chatglm, data, tmp_path / "run", data__validation=str(data),
            evaluation__every_steps=1, evaluation__at_start=True, evaluation__generate=metric != "loss",
            evaluation__best_metric=metric, evaluation__patience=2, training__save_every_steps=1, training__keep_checkpoints=1,
        )
    )  # fmt: skip
    assert summary["steps"] == 4
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]
    assert summary["best_checkpoint"] == str(tmp_path / "run/checkpoint-2")
    assert summary["scores_before"] == {metric: values[0]}
    assert summary["scores"] == {metric: values[4]}


# --- options -------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_named_with_its_package(
    tiny_chatglm: Path, data: Path, tmp_path: Path
) -> None:
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__report_to=["tensorboard", "swanlab"]
    )
    with pytest.raises(ConfigError, match="pip install swanlab"):
        runs.run_here(settings)


def test_an_extra_field_reaches_the_optimizer(
    tiny_chatglm: Path, data: Path, tmp_path: Path
) -> None:
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=1,
        training__extra={"adam_beta2": 0.95},
    )  # fmt: skip
    runs.run_here(settings)
    state = torch.load(tmp_path / "run/checkpoint-1/optimizer.pt", weights_only=True)
    assert {group["betas"] for group in state["param_groups"]} == {(0.9, 0.95)}


def test_metrics_and_tensorboard_logs_lie_in_the_run_directory(
    tiny_chatglm: Path, data: Path, tmp_path: Path
) -> None:
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=2,
        training__report_to=["tensorboard"],
    )  # fmt: skip
    runs.run_here(settings)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["step"] == 1
    assert {"loss", "learning_rate", "grad_norm", "supervised_tokens_per_second", "padding"} <= set(
        first
    )
    assert list((tmp_path / "run/logs").glob("events.out.tfevents*"))


def test_a_disk_too_full_for_tensorboard_ends_its_curves_and_not_the_run(
    tiny_chatglm: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(self: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", full)
    settings = runs.config(
        tiny_chatglm, data, tmp_path / "run", training__max_steps=2,
        training__report_to=["tensorboard"],
    )  # fmt: skip
    assert runs.run_here(settings)["steps"] == 2
    assert "its curves end here" in "".join(capsys.readouterr())
    assert (tmp_path / "run/checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("kind", "deepspeed", "seen"),
    [("NO", None, 2), ("MULTI_CPU", {"x": 1}, 2), ("MULTI_CPU", None, 1)],
)
def test_processes_that_would_train_apart_are_refused(
    kind: str, deepspeed: Any, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from accelerate.utils import DistributedType

    from finetune.training import arguments as settings

    monkeypatch.setattr(settings, "rank_and_world", lambda: (0, 2))
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], num_processes=seen)
    arguments: Any = SimpleNamespace(deepspeed=deepspeed)
    with pytest.raises(ConfigError, match="start with torchrun"):
        settings.check_distribution(accelerator, arguments)


def test_all_layers_are_in_training_mode_from_the_first_step_on(
    tiny_glm: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else none is recomputed: a fresh adapter says that it is in training mode, its base is not."""
    seen: list[bool] = []
    original = FineTuner.compute_loss

    def watched(self: Any, model: Any, *rest: Any, **more: Any) -> Any:
        seen.append(all(module.training for module in model.modules()))
        return original(self, model, *rest, **more)

    monkeypatch.setattr(FineTuner, "compute_loss", watched)
    runs.run_here(runs.config(tiny_glm, data, tmp_path / "run", training__max_steps=2))
    assert seen == [True, True]
