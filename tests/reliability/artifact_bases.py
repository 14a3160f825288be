"""An adapter, a prefix and a checkpoint on a base that is not theirs: refused by every command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.reliability.frame import Case
from tests.reliability.places import command, glm_folder, shared, trained

PREFIX = {"kind": "ptuning_v2", "num_virtual_tokens": 4}
# What another base has in place of the adapter's own: (family, options of tiny.save_model).
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "the same shapes, other values": ("glm", {"seed": 7}),
    "another vocabulary": ("glm", {"vocab_size": 416}),
    "fewer layers": ("glm", {"num_hidden_layers": 1}),
    "more layers": ("glm", {"num_hidden_layers": 3}),
    "another width": ("glm", {"hidden_size": 48}),
    "another config": ("glm", {"rms_norm_eps": 1e-5}),
    "another family": ("glm4", {}),
    "the published layout": ("chatglm", {}),
}


@cache
def other_base(what: str) -> Path:
    """A base that is not the adapter's."""
    import tiny

    family, options = OTHERS[what]
    return tiny.save_model(shared(f"other-{what.replace(' ', '-')}"), family, **options)


def _checkpoint(kind: str) -> Path:
    return trained(kind, **({"method": PREFIX} if kind == "prefix" else {})) / "checkpoint-2"


def predict(adapter: Path, base: Path, folder: Path) -> tuple[int, str]:
    """`finetune predict --base`."""
    (folder / "ask.jsonl").write_text('{"prompt": "the quick"}\n')
    words = ("--data", folder / "ask.jsonl", "--output", folder / "out", "--base", base)
    return command("predict", adapter, *words, "--max-new-tokens", 1)


def merge(adapter: Path, base: Path, folder: Path) -> tuple[int, str]:
    """`finetune merge --base`."""
    return command("merge", adapter, "--output", folder / "out", "--base", base)


def export(adapter: Path, base: Path, folder: Path) -> tuple[int, str]:
    """`finetune export --base`."""
    words = ("--layout", "published", "--output", folder / "out", "--base", base)
    return command("export", adapter, *words)


def resume(adapter: Path, base: Path, folder: Path) -> tuple[int, str]:
    """`finetune train` with `model.path` of the other base and `training.resume` of the checkpoint."""
    settings = json.loads(adapter.parent.with_suffix(".yaml").read_text())
    settings["model"]["path"] = str(base)
    settings["training"] |= {
        "output_dir": str(folder / "run"),
        "resume": str(adapter),
        "max_steps": 3,
    }
    (folder / "x.yaml").write_text(json.dumps(settings))
    return command("train", folder / "x.yaml")


Use = Callable[[Path, Path, Path], tuple[int, str]]
USES: dict[str, tuple[Use, int]] = {
    "predict": (predict, 2),
    "merge": (merge, 2),
    "export": (export, 2),
    "resume": (resume, 3),
}


def is_refused(kind: str, use: Use, code: int, what: str, folder: Path) -> None:
    """The right exit code, a message that names both, nothing written."""
    ended, said = use(_checkpoint(kind), other_base(what), folder)
    assert "Traceback" not in said, said[-1500:]
    assert ended == code, (ended, said[-500:])
    assert not (folder / "out").exists()
    assert not list(folder.glob("run/checkpoint-*"))
    assert not list(folder.glob(".staging-*"))


def its_own_is_taken(use: Use, folder: Path) -> None:
    """A copy of the base under another name is the same base."""
    import shutil

    copy = Path(shutil.copytree(glm_folder(), folder / "moved"))
    ended, said = use(_checkpoint("lora"), copy, folder)
    assert ended == 0, said[-800:]


def forced(what: str, fits: bool, folder: Path) -> None:
    """`--force` merges where shapes fit, and says so; where they do not it is refused all the same."""
    words = ("--output", folder / "out", "--base", other_base(what), "--force", "--no-check")
    ended, said = command("merge", _checkpoint("lora"), *words)
    assert "Traceback" not in said, said[-1500:]
    assert (ended, (folder / "out").exists()) == ((0, True) if fits else (2, False)), said[-500:]
    assert not fits or "merged all the same (--force)" in said


def cases() -> Iterator[Case]:
    """Every kind of adapter by every command on every other base."""
    glm_folder()
    for what in OTHERS:
        other_base(what)
    for kind in ("lora", "prefix"):
        _checkpoint(kind)
        for name, (use, code) in USES.items():
            if kind == "prefix" and name in ("merge", "export"):
                continue  # refused whatever the base
            for what in OTHERS:
                run = partial(is_refused, kind, use, code, what)
                yield Case(f"bases: {kind} on {what}, {name}", run)
    for name in ("predict", "merge"):
        yield Case(f"bases: its own, copied, {name}", partial(its_own_is_taken, USES[name][0]))
    yield Case(
        "bases: other values by force", partial(forced, "the same shapes, other values", True)
    )
    yield Case("bases: fewer layers by force", partial(forced, "fewer layers", False))
    yield Case("bases: another width by force", partial(forced, "another width", False))


def stock_cases() -> Iterator[Case]:
    """The same adapter and bases with PEFT alone: survived when it is refused."""
    glm_folder()
    import runs
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = _checkpoint("lora")
    runs.weights(adapter)

    def opened(what: str, folder: Path) -> str:
        model = AutoModelForCausalLM.from_pretrained(other_base(what))
        try:
            PeftModel.from_pretrained(model, adapter).merge_and_unload()
        except Exception:
            return ""
        return "accepted"

    for what in OTHERS:
        if what != "the published layout":  # which transformers does not open at all
            other_base(what)
            yield Case(f"bases: lora on {what}", partial(opened, what))
