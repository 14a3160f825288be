"""Numbers that are no numbers and memory that runs out: said with what to look at, before anything is lost."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.reliability.frame import Case
from tests.reliability.places import shared

Break = Callable[[], None]


@cache
def _model() -> Path:
    import tiny

    return tiny.save_model(shared("trained"), "glm")


@cache
def _data() -> Path:
    import runs

    return runs.write_dialogues(shared("train.jsonl"), 12)


def _train(folder: Path, **changes: Any) -> tuple[int, str]:
    """Exit code and message of `finetune train` in this process."""
    import contextlib
    import io

    import runs

    from finetune.cli import main

    options = {name: value for name, value in changes.items() if "__" in name}
    sections = {name: value for name, value in changes.items() if "__" not in name}
    run_dir = folder / "run"
    settings = runs.config(_model(), _data(), run_dir, training__save_every_steps=1, **options)
    settings |= sections
    (folder / "x.yaml").write_text(json.dumps(settings))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main(["train", str(folder / "x.yaml")])
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()
    raise AssertionError("main returned")


def _saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run").glob("checkpoint-*"))


# --- numbers -------------------------------------------------------------------------------------


def _at_step(step: int, change: Callable[[Any, Any], Any]) -> Break:
    """Change the loss of a step of FineTuner as `change(trainer, loss)` says."""

    def breaks() -> None:
        from finetune.training.trainer import FineTuner

        original = FineTuner.compute_loss

        def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            loss = original(self, *args, **kwargs)
            return change(self, loss) if self.state.global_step == step - 1 else loss

        FineTuner.compute_loss = compute_loss  # type: ignore[method-assign]

    return breaks


def _loss_becomes(value: float) -> Callable[[Any, Any], Any]:
    def change(trainer: Any, loss: Any) -> Any:
        trainer._losses[-1] = trainer._losses[-1] * value
        return loss * value

    return change


def _gradient_becomes(value: float) -> Callable[[Any, Any], Any]:
    def change(trainer: Any, loss: Any) -> Any:
        loss.register_hook(lambda gradient: gradient * value)
        return loss

    return change


def no_number(what: str, breaks: Break, changes: dict[str, Any], folder: Path) -> None:
    """Exit 4 before step 3 is learned, its examples named; the checkpoints before it are whole."""
    from finetune.storage import folders

    breaks()
    code, said = _train(folder, **changes)
    assert code == 4, (code, said)
    assert f"the {what} of step 3 is not a finite number" in said
    assert "Traceback" not in said
    batch = 12 if "data__packing" in changes else 2
    examples = batch * changes.get("training__gradient_accumulation_steps", 1)
    named = len(re.findall(rf"{re.escape(str(_data()))}:\d+", said))
    assert 1 <= named <= examples, said
    assert _saved(folder) == ["checkpoint-1", "checkpoint-2"]
    for name in _saved(folder):
        assert folders.verify(folder / "run" / name) == []
    _are_finite(folder / "run/checkpoint-2")


def _are_finite(saved: Path) -> None:
    import torch
    from safetensors.torch import load_file

    for file in saved.glob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())


def weights_without_numbers(value: float, changes: dict[str, Any], folder: Path) -> None:
    """A base with one weight that is no number: refused by its name before the first step."""
    import tiny
    from safetensors.torch import load_file, save_file

    model = tiny.save_model(folder / "broken", "glm")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, said = _train(folder, model__path=str(model), **changes)
    assert code == 2, (code, said)
    assert "model.norm.weight holds numbers that are not finite" in said
    assert _saved(folder) == []


def goes_on_from_before(folder: Path) -> None:
    """After exit 4 the same command goes on from the last checkpoint and ends as an unbroken run."""
    import runs

    from finetune.training.trainer import FineTuner

    original = FineTuner.compute_loss
    no_number("loss", _at_step(3, _loss_becomes(float("nan"))), {}, folder)
    FineTuner.compute_loss = original  # type: ignore[method-assign]
    (folder / "whole").mkdir()
    assert _train(folder)[0] == _train(folder / "whole")[0] == 0
    hashes = {runs.adapter_hash(folder / location / "run", 6) for location in ("", "whole")}
    assert len(hashes) == 1


def numbers() -> Iterator[Case]:
    """Loss and gradient, every kind of value, every method and sharding."""
    nan, infinite = float("nan"), float("inf")
    full = {"method": {"kind": "full"}}
    prefix = {"method": {"kind": "ptuning_v2", "num_virtual_tokens": 4}}
    ways: dict[str, dict[str, Any]] = {
        "lora": {},
        "full": full,
        "prefix": prefix,
        "accumulation": {"training__gradient_accumulation_steps": 2},
        "packing": {"data__packing": True},
        "no clipping": {"training__max_grad_norm": 0.0},
        "ZeRO-0": {"deepspeed": {"zero_stage": 0}},
        "ZeRO-2": {"deepspeed": {"zero_stage": 2}},
        "ZeRO-3, full": {"deepspeed": {"zero_stage": 3}, **full},
    }
    values = {"nan": nan, "inf": infinite, "-inf": -infinite}
    for way, changes in ways.items():
        for name, value in values.items() if way == "lora" else [("nan", nan)]:
            breaks = _at_step(3, _loss_becomes(value))
            yield Case(f"numbers: loss {name}, {way}", partial(no_number, "loss", breaks, changes))
            if way.startswith("ZeRO") or way == "packing":
                continue
            breaks = _at_step(3, _gradient_becomes(value))
            run = partial(no_number, "gradient", breaks, changes)
            yield Case(f"numbers: gradient {name}, {way}", run)
    for name, value in values.items():
        run = partial(weights_without_numbers, value, {})
        yield Case(f"numbers: {name} in the base's weights", run)
    yield Case("numbers: nan in the weights, full", partial(weights_without_numbers, nan, full))
    yield Case("numbers: the same command goes on", goes_on_from_before)


# --- memory --------------------------------------------------------------------------------------


def _raises(error: Callable[[], BaseException], location: str) -> Break:
    """Let the third call of a part of the run end with an error."""

    def breaks() -> None:
        from finetune.training import checkpointing, prepare_model, trainer
        from finetune.training.measuring import validation

        homes: dict[str, tuple[Any, str]] = {
            "loading the model": (prepare_model, "prepare_model"),
            "a step": (trainer.FineTuner, "compute_loss"),
            "the optimizer": (trainer.FineTuner, "create_optimizer"),
            "evaluation": (validation.Validation, "scores"),
            "saving": (checkpointing.Saver, "_save"),
        }
        home, name = homes[location]
        original = getattr(home, name)
        calls = iter(range(100))

        def called(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == (2 if location in ("a step", "saving") else 0):
                raise error()
            return original(*args, **kwargs)

        setattr(home, name, called)

    return breaks


def _torch_error() -> BaseException:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "torch.OutOfMemoryError": _torch_error,
    "MemoryError": MemoryError,
    "the CPU allocator": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "CUDA": lambda: RuntimeError("CUDA error: out of memory"),
    "cuBLAS": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"
    ),
    "C++": lambda: RuntimeError("std::bad_alloc"),
    "mmap": lambda: OSError(12, "Cannot allocate memory"),
}


def _explained(code: int, said: str, *knobs: str) -> None:
    assert code == 5, (code, said)
    assert "Traceback" not in said, said
    peak = re.search(r"The most this process has used is (\d+\.\d+) GB", said)
    assert peak, said
    assert float(peak[1]) > 0.1
    for knob in knobs:
        assert knob in said, (knob, said)


def no_memory(breaks: Break, folder: Path) -> None:
    """Exit 5, the options that need less, the measured peak; what was saved is whole."""
    from finetune.storage import folders

    breaks()
    code, said = _train(folder, data__validation=str(_data()), evaluation__every_steps=3)
    _explained(
        code, said, "training.batch_size=1 training.gradient_accumulation_steps=2",
        "training.activation_checkpointing=true", "data.max_length (now 256; the longest example",
        "evaluation.batch_size (now 64)",
    )  # fmt: skip
    for name in _saved(folder):
        assert folders.verify(folder / "run" / name) == []


def a_real_limit(folder: Path) -> None:
    """The process may have 200 MB more than it has: a batch that is too large for that ends so."""
    import runs

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    rows = runs.write_dialogues(folder / "many.jsonl", 600)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))

    limit()
    code, said = _train(folder, data__train=str(rows), training__batch_size=512)
    _explained(code, said, "training.batch_size=1 training.gradient_accumulation_steps=512")
    assert _saved(folder) == []


def knobs_that_are_turned(folder: Path) -> None:
    """What a run has already is not proposed again."""
    _raises(MemoryError, "a step")()
    changes: dict[str, Any] = {
        "training__batch_size": 1,
        "training__activation_checkpointing": True,
        "model__dtype": "bfloat16",
    }
    code, said = _train(folder, **changes)
    _explained(code, said, "deepspeed.zero_stage=2", "model.quantization=nf4")
    for knob in ("training.batch_size", "activation_checkpointing", "model.dtype", "evaluation."):
        assert knob not in said.replace("gradient_", ""), (knob, said)


def other_commands(folder: Path) -> None:
    """`finetune predict` out of memory: exit 5 and what its own options can do."""
    import contextlib
    import io

    from finetune.cli import main
    from finetune.generation import predict

    def predicting(*_: Any, **__: Any) -> None:
        raise _torch_error()

    predict.predict = predicting  # type: ignore[assignment]
    said = io.StringIO()
    words = [
        "predict",
        str(_model()),
        "--data",
        str(_data()),
        "--output",
        str(folder / "out.jsonl"),
    ]
    with contextlib.redirect_stderr(said):
        try:
            main(words)
        except SystemExit as end:
            _explained(int(end.code or 0), said.getvalue(), "--batch-size", "--max-new-tokens")


def memory() -> Iterator[Case]:
    """Every library's words for it, every part of a run, and a limit that is real."""
    for name, error in ERRORS.items():
        yield Case(f"memory: {name} in a step", partial(no_memory, _raises(error, "a step")))
    for location in ("loading the model", "the optimizer", "evaluation", "saving"):
        yield Case(f"memory: in {location}", partial(no_memory, _raises(MemoryError, location)))
    yield Case("memory: a limit of the process", a_real_limit)
    yield Case("memory: only knobs that are not turned yet", knobs_that_are_turned)
    yield Case("memory: other commands", other_commands)


def cases() -> Iterator[Case]:
    """Both; what they share is imported and made here."""
    import cells

    cells.warm_up(_model())
    _data()
    import finetune.training.deepspeed.sharded_engine
    import finetune.training.trainer  # noqa: F401

    yield from numbers()
    yield from memory()
