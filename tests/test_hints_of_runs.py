"""One table: what goes wrong in a run -> the options that the message tells to set."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_resume
import torch
from hints import options, said, unsaid
from test_device import Card, put_in
from test_measuring import validating
from test_trainer_parts import guarded, tuner
from test_watchdog import watching
from torch import nn
from transformers import Trainer

from finetune import methods
from finetune.config.schema import (
    DeepSpeedSection,
    LoraMethod,
    ModelSection,
    PTuningV2Method,
    TrainingSection,
)
from finetune.distributed import device
from finetune.training import adapter_start, arguments, checkpointing, resume, run_data
from finetune.training.adapter_start import start_from_adapter
from finetune.training.arguments import Precision, Rates, training_arguments
from finetune.training.callbacks.on_end import told_at_the_end
from finetune.training.callbacks.progress import ProgressCallback
from finetune.training.deepspeed import gathered
from finetune.training.deepspeed.zero import Setting, deepspeed_config
from finetune.training.loading import prepare_data

NAN = float("nan")


def within(context: AbstractContextManager[Any], error: BaseException | None = None) -> None:
    with context:
        if error is not None:
            raise error


def of_options(patch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Options that do not go together with the machine, with each other or with what is trained."""
    section = TrainingSection(output_dir="x", report_to=[])
    with patch.context() as alone:
        alone.setattr(arguments, "rank_and_world", lambda: (0, 4))
        precision = Precision("no", "fp32", torch.float32)
        yield said(training_arguments, section, deepspeed=None, loader_workers=0, precision=precision), "--nproc_per_node"  # fmt: skip
    yield said(arguments.check_trackers, ["no_such_one"]), "training.report_to"
    yield said(Rates(1.0, {"tower": 0.5, "(": 1.0}).check, ["a"]), "training.learning_rates"
    with patch.context() as crowded:
        put_in(crowded, "cuda", Card(count=2))
        crowded.setenv("LOCAL_RANK", "2")
        yield said(device.select), "--nproc_per_node"
    held: Any = type("Held", (list,), {"shared_with": lambda self, train: ["a:1"]})
    yield said(run_data.check_overlap, None, held([1]), 0.0), "data.max_overlap"


def of_adapters(patch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """`model.adapter` and the run."""

    def start(method: Any, *, apart: bool = False, **saved: Any) -> str:
        model = nn.Linear(2, 2)
        if apart:
            model.weight.ds_id = 0  # type: ignore[attr-defined]
        found = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "use_dora": False}  # fmt: skip
        with patch.context() as near:
            near.setattr(adapter_start, "find_source", lambda path: (path, []))
            near.setattr(adapter_start, "adapter_config", lambda folder: found | saved)
            near.setattr(methods, "restore", lambda *_: None)
            section = ModelSection(path="base", adapter="there")
            one: Any = SimpleNamespace(model=model, method=method, section=section)
            return said(start_from_adapter, one, resumed=False)

    lora = LoraMethod(rank=4, alpha=8)
    yield start(lora, apart=True), "model.adapter"
    yield start(PTuningV2Method()), "model.adapter method.kind"
    yield start(lora, r=8), "model.adapter"


def of_deepspeed(folder: Path) -> Iterator[tuple[str, str]]:
    """A JSON file of the user's, which is `deepspeed.config`."""

    def told(text: str, **section: Any) -> str:
        (folder / "ds.json").write_text(text, encoding="utf-8")
        asked = DeepSpeedSection(config=str(folder / "ds.json"), **section)
        setting = Setting(TrainingSection(output_dir="x"), 2, 64, "bf16")
        return said(deepspeed_config, asked, setting)

    for text, named in (
        ("[]", ""), ("{", ""), ('{"bf16": 1}', ""),
        ('{"amp": {"enabled": true}}', "model.dtype"),
        ('{"fp16": {"enabled": true}}', "model.dtype"),
        ('{"scheduler": {}}', "training.lr_schedule"),
        ('{"train_micro_batch_size_per_gpu": 9}', "training.batch_size"),
        ('{"gradient_accumulation_steps": 9}', "training.gradient_accumulation_steps"),
        ('{"gradient_clipping": 9}', "training.max_grad_norm"),
    ):  # fmt: skip
        yield told(text), f"deepspeed.config {named}"
    stage_3 = '{"zero_optimization": {"stage": 3}}'
    yield told(stage_3, zero_stage=2), "deepspeed.config deepspeed.zero_stage"
    for ours, theirs in (("offload_optimizer", "offload_optimizer"), ("offload_parameters", "offload_param")):  # fmt: skip
        text = json.dumps({"zero_optimization": {"stage": 3, theirs: {"device": "cpu"}}})
        yield told(text, zero_stage=3, **{ours: "none"}), f"deepspeed.config deepspeed.{ours}"


def of_numbers(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """What is not finite."""
    yield (
        said(checkpointing.check_weights, [torch.tensor([NAN])], 3),
        "training.learning_rate training.output_dir training.max_grad_norm",
    )
    yield said(guarded, [NAN], 1.0), "training.learning_rate model.dtype"
    yield said(guarded, [1.0], NAN), "training.learning_rate model.dtype"
    with patch.context() as near:
        one = validating(near, folder, loss=NAN)
        yield said(one.scores, None, 2), "training.learning_rate"


def of_processes(patch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Processes that hang or are killed."""
    with patch.context() as near:
        watch = watching(near)
        yield watch._hanging([1]), "training.process_timeout_minutes"

    def train(*_: Any, **__: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed")

    with patch.context() as near:
        near.setattr(Trainer, "train", train)
        saver = SimpleNamespace(training=SimpleNamespace(deterministic=False))
        stop = SimpleNamespace(install=lambda: signal.SIGTERM)
        one = tuner(saver=saver, stop=stop, model_wrapped=nn.Linear(1, 1))
        yield said(one.train), "data.loader_workers"


def of_resuming(folder: Path) -> Iterator[tuple[str, str]]:
    """Checkpoints that cannot be gone on from."""
    yield (
        said(within, checkpointing.explain_load_errors("x", begun=lambda: False), KeyError("x")),
        "training.resume",
    )
    yield said(resume.choose, folder, "nowhere"), "training.resume"
    first = test_resume.save(folder, 1)
    yield said(resume.choose, folder, "never"), "training.output_dir training.resume"  # fmt: skip
    (first / "optimizer.pt").write_bytes(b"x")
    yield said(resume.choose, folder, str(first)), "training.resume"
    weights = folder / "weights-2"
    weights.mkdir()
    yield said(resume.choose, folder, str(weights)), "model.adapter model.path"
    other = folder / "other"
    (other / "weights-2").mkdir(parents=True)
    settings = {**test_resume.CONFIG, "training": {"output_dir": "x", "save": "weights"}}
    yield said(resume.start, other, "auto", test_resume.record(settings)), "training.save:weights training.output_dir"  # fmt: skip
    saved = folder / "saved"
    saved.mkdir()
    test_resume.write(saved, test_resume.record())
    batch = test_resume.record(global_batch=9)
    yield said(resume.check, saved, batch), "training.batch_size training.output_dir"
    (first / "global_step1").mkdir(mode=0o777)
    (first / "global_step1").chmod(0o777)
    yield said(resume.check_owner, folder, "auto"), "--trust-checkpoint"


def warned(
    folder: Path, patch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[tuple[str, str]]:
    """What is said or warned of, and ends nothing."""

    def told() -> str:
        return "".join(capfd.readouterr())

    told()
    within(told_at_the_end("no-such-program", "x"))
    yield told(), "training.on_end"
    within(told_at_the_end("false", "x"))
    yield told(), "training.on_end"
    bar = ProgressCallback()
    bar.throughput._seconds_per_step, bar._silent_seconds = 1.0, 60.0
    bar.say_if_too_often(10)
    yield told(), "evaluation.every_steps evaluation.max_samples"
    with patch.context() as near:
        near.setattr(gathered.device, "free_bytes", lambda: 0)
        near.setattr(gathered.console, "warn_once", gathered.console.warn)
        offload = SimpleNamespace(forward_hooks=[], backward_hooks=[], fwd_pre_hook=None)
        engine = SimpleNamespace(
            module=nn.Linear(1, 1), optimizer=SimpleNamespace(parameter_offload=offload)
        )
        within(gathered.whole_weights(engine))
        yield told(), "evaluation.generate"
    with patch.context() as near:
        files = SimpleNamespace(replies=5, cut=1, train="a", held_out="b")
        near.setattr(prepare_data, "replay_of", lambda *_: files)
        section: Any = SimpleNamespace(replay=SimpleNamespace(weight=0.5), cache_dir=None)
        prepare_data._replay(section, ModelSection(path="x"), None)
        yield told(), "data.replay"
    with_general = test_resume.record(general="rows")
    stage = test_resume.save(folder / "run", 1)
    (stage / "manifest.json").unlink()
    test_resume.write(stage, with_general)
    with patch.context() as near:
        near.setattr(resume, "choose", lambda *_: (stage, []))
        resume.start(folder / "run", "auto", test_resume.record(general="others"))
    yield told(), "evaluation.keep evaluation.patience"


def test_every_text_of_a_run_names_the_options_that_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("scores", "resume", "told"):
        (tmp_path / name).mkdir()
    (tmp_path / "told/run").mkdir()
    texts = [
        *of_options(monkeypatch),
        *of_adapters(monkeypatch),
        *of_deepspeed(tmp_path),
        *of_numbers(tmp_path / "scores", monkeypatch),
        *of_processes(monkeypatch),
        *of_resuming(tmp_path / "resume"),
        *warned(tmp_path / "told", monkeypatch, capfd),
    ]
    wrong = {
        text: (sorted(options(text)), named)
        for text, named in texts
        if options(text) != set(named.split())
    }
    assert wrong == {}
    known = [text for text, _ in texts]
    assert unsaid("training", known) == []
    assert unsaid("distributed", known) == []
