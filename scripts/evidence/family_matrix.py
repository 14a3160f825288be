"""Every family x method x ZeRO stage: trained in two processes, resumed, evaluated, merged, served.

    python scripts/evidence/family_matrix.py docs/models.json [--families glm4v] [--methods lora] [--stages 0 3]
    python scripts/docs/models_page.py        # docs/models.md of it

Tiny random models; those that see images get dialogues of text, of one picture and, where the family
takes several, of three pictures in two turns. A step of a cell is well when

    train     two processes have the losses of one without DeepSpeed, within 2e-5
    resume    going on from the second of four steps ends in the same bytes
    evaluate  the checkpoint gives the replies that the run's own evaluation gave
    merge     transformers' own class gives the merged folder the logits of the adapter, within 1e-4
    serve     the endpoint says what `predict` says, and so does `chat`

The file keeps what other runs wrote of other cells. Two processes of one core each: about 20 seconds a cell.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import cells
from cells import Cell

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.0},
    "ptuning_v2": {"kind": "ptuning_v2", "num_virtual_tokens": 5},
    "full": {"kind": "full"},
}
RATES = {"lora": 1e-2, "ptuning_v2": 3e-2, "full": 1e-3}
STEPS = ("train", "resume", "evaluate", "merge", "serve")
LAST, HALF = 4, 2
REFUSED = "refused: "


@dataclass(frozen=True)
class Place:
    """A cell of the table, and where it works."""

    family: str
    method: str
    stage: str
    model: Path
    data: Path
    changes: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """Of its run."""
        return f"{self.family}-{self.method}-{self.stage}"

    def run(self, name: str, processes: int) -> Cell:
        """A run of it under `name`; the same global batch in every one."""
        import runs

        settings = runs.config(
            self.model, self.data, self.folder / name, training__max_steps=LAST,
            training__batch_size=4 // processes, training__save_every_steps=HALF,
            training__learning_rate=RATES[self.method], data__validation=str(self.data),
            training__extra={"adam_epsilon": 0.01}, evaluation__max_samples=4,
            **self.changes,
        ) | {"method": METHODS[self.method]}  # fmt: skip
        if processes > 1:
            settings["deepspeed"] = {"zero_stage": int(self.stage)}
        return Cell(name, settings, processes)


def trained(place: Place, plain: Path) -> str:
    """What is wrong with the run in two processes; `plain` is that of one."""
    import runs

    if problem := ran(place.run(place.name, 2), place.folder):
        return problem
    pairs = zip(runs.history(place.folder / place.name), runs.history(plain), strict=True)
    apart = max(abs(one - other) for one, other in pairs)
    return "" if apart < 2e-5 else f"losses {apart:.1e} apart"


def ran(cell: Cell, folder: Path) -> str:
    """What went wrong in a run; what it was refused with begins with `REFUSED`."""
    problem = cells.run(cell, folder, timeout=300)
    if "ended with 2:" not in problem:
        return problem
    text = (folder / f"{cell.name}.0.log").read_text(encoding="utf-8")
    said = next(line for line in reversed(text.splitlines()) if line.strip())
    return REFUSED + said.removeprefix("error: ").strip()


def resumed(place: Place) -> str:
    """What is not equal in a run that goes on from half of it."""
    import runs

    whole, name = place.folder / place.name, f"{place.name}-again"
    part = place.folder / name
    shutil.copytree(whole / f"checkpoint-{HALF}", part / f"checkpoint-{HALF}")
    if problem := ran(place.run(name, 2), place.folder):
        return problem
    if runs.history(part)[-1] != runs.history(whole)[-1]:
        return "other losses"
    files = sorted((whole / f"checkpoint-{LAST}").glob("*.safetensors"))
    last = part / f"checkpoint-{LAST}"
    same = files and all(file.read_bytes() == (last / file.name).read_bytes() for file in files)
    return "" if same else "other weights"


def command(*words: str) -> None:
    """One finetune command, in this process; SystemExit where it does not end well."""
    from finetune.cli import main

    try:
        main(words)
    except SystemExit as end:
        if end.code:
            raise


def evaluated(place: Place) -> str:
    """How the replies of `finetune evaluate` differ from those of the run."""
    run_dir = place.folder / place.name
    out = place.folder / f"{place.name}-evaluated"
    command("evaluate", str(run_dir / f"checkpoint-{LAST}"), "--output", str(out))
    pair = [replies(out / "predictions.jsonl"), replies(run_dir / f"predictions-{LAST}.jsonl")]
    return "" if pair[0] == pair[1] else "other replies than the run's"


def replies(file: Path) -> list[str]:
    """The predictions of a file."""
    return [json.loads(line)["prediction"] for line in file.read_text("utf-8").splitlines()]


def predicted(file: Path) -> list[dict[str, Any]]:
    """The replies that `finetune predict` wrote, as messages."""
    return [json.loads(line)["messages"][-1] for line in file.read_text("utf-8").splitlines()]


def merged(place: Place) -> str:
    """How the merged folder, in transformers' own class, differs from the adapter."""
    import torch
    import transformers

    from finetune.artifacts.plain_files import read_json
    from finetune.generation.load import open_model

    checkpoint = place.folder / place.name / f"checkpoint-{LAST}"
    out = place.folder / f"{place.name}-merged"
    command("merge", str(checkpoint), "--output", str(out))
    (architecture,) = read_json(out / "config.json")["architectures"]
    own = getattr(transformers, architecture, None)
    ours = open_model(checkpoint)
    theirs = open_model(out).model if own is None else own.from_pretrained(out).eval()
    ids = torch.arange(1, 60)[None]
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    shown = _shown(ours)
    with torch.no_grad():
        apart = float((ours.model(**given).logits - theirs(**given).logits).abs().max())
        if shown and own is not None:
            kinds = (shown["input_ids"] == ours.model.config.image_token_id).int()
            seen = theirs(**shown, mm_token_type_ids=kinds).logits
            apart = max(apart, float((ours.model(**shown).logits - seen).abs().max()))
    return "" if apart < 1e-4 else f"logits {apart:.1e} apart"


def _shown(opened: Any) -> dict[str, Any]:
    """Inputs with two images, for a model whose images keep their shape."""
    import pictures
    import torch

    token = getattr(opened.model.config, "image_token_id", None)
    if token is None:
        return {}
    ids = [
        1,
        pictures.BOI,
        *[token] * 4,
        pictures.EOI,
        7,
        pictures.BOI,
        *[token] * 6,
        pictures.EOI,
        5,
    ]
    pixels = torch.linspace(-2, 2, (16 + 24) * 3 * 2 * 14 * 14).view(40, -1)
    grid = torch.tensor([[1, 4, 4], [1, 4, 6]])
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "image_grid_thw": grid}


def served(place: Place) -> str:
    """How the endpoint and `chat` differ from `predict`."""
    import serving

    from finetune.chat.terminal import Session, Terminal, Voice
    from finetune.generation.load import open_model

    checkpoint = str(place.folder / place.name / f"checkpoint-{LAST}")
    out = place.folder / f"{place.name}-predicted.jsonl"
    command("predict", checkpoint, "--data", str(place.data), "--output", str(out), "--max-new-tokens", "6")  # fmt: skip
    rows = [json.loads(line)["messages"] for line in place.data.read_text("utf-8").splitlines()]
    asked = {"max_tokens": 6, "temperature": 0.0}
    opened, problems = open_model(checkpoint), []
    with serving.served(opened) as server:
        for row, last in zip(rows[:3], predicted(out), strict=False):
            messages = [_as_openai(message, place.data.parent) for message in row[:-1]]
            answer = server.client.chat.completions.create(model="tiny", messages=messages, **asked)
            said = answer.choices[0].message
            if not last.get("metadata") and (said.content or "").strip() != last["content"].strip():
                problems.append("the endpoint's reply is not predict's")
    screen = io.StringIO()
    lines = io.StringIO("hello there\n/quit\n")
    Session(Voice(opened.model, opened.template, 6), Terminal(lines, screen), "").run()
    if not screen.getvalue().strip():
        problems.append("chat says nothing")
    return "; ".join(dict.fromkeys(problems))


def _as_openai(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A message of a row with its pictures as data URLs."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if message.get("image"):
        parts = [{"type": "image", "image": message["image"]}, *parts]
    if message["role"] == "assistant":
        return {"role": "assistant", "content": content}
    return {"role": message["role"], "content": [_part(part, folder) for part in parts]}


def _part(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    data = base64.b64encode((folder / part["image"]).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def in_a_fork(place: Place, step: str, check: Callable[[Place], str]) -> str:
    """What a check says in a process of its own; what it was refused with begins with `REFUSED`."""
    answer = place.folder / f"{place.name}-{step}.txt"

    def program(_: Path) -> None:
        try:
            said = check(place)
        except AssertionError as error:
            said = f"AssertionError: {error}"
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
        answer.write_text(said, encoding="utf-8")

    problem = ran(Cell(f"{place.name}-{step}", {}, program=program), place.folder)
    return problem or answer.read_text(encoding="utf-8")


def measure(place: Place, plain: Path) -> dict[str, str]:
    """What is wrong with every step of a cell; empty where it is well."""
    found = {"train": trained(place, plain)}
    if found["train"].startswith(REFUSED) or not (place.folder / place.name / f"checkpoint-{LAST}").is_dir():  # fmt: skip
        return found
    found["resume"] = resumed(place)
    checks = {"evaluate": evaluated, "merge": merged, "serve": served}
    return found | {step: in_a_fork(place, step, check) for step, check in checks.items()}


def places(options: argparse.Namespace, folder: Path) -> Iterator[tuple[Place, Path]]:
    """The cells, each with the run in one process without DeepSpeed that it is compared with."""
    for number, family in enumerate(options.families):
        at = folder / family
        at.mkdir(parents=True)
        model, data, changes = cells.subject(family, at, 12)
        methods, stages = options.methods, options.stages
        if options.one:
            methods = [methods[number % len(methods)]]
            stages = [stages[(number + number // 3) % len(stages)]]
        for method in methods:
            first = Place(family, method, "none", model, data, changes, at)
            ran(first.run(first.name, 1), at)
            for stage in stages:
                yield Place(family, method, stage, model, data, changes, at), at / first.name
        shutil.rmtree(at)


def versions() -> dict[str, str]:
    """Of what the cells ran with."""
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "deepspeed")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def main() -> int:
    """Add the cells to the file; 1 when one is neither well nor refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a JSON file, made or added to")
    parser.add_argument("--families", nargs="+", choices=cells.FAMILIES, default=list(cells.FAMILIES))  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--stages", nargs="+", choices=("0", "2", "3"), default=["0", "2", "3"])
    parser.add_argument("--one", action="store_true", help="one cell for each family, in turn")
    options = parser.parse_args()
    held = json.loads(options.file.read_text("utf-8")) if options.file.is_file() else {"cells": {}}
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["FINETUNE_CACHE"] = str(folder / "cache")
        cells.import_libraries()
        import serving  # noqa: F401

        import finetune.generation.load
        import finetune.serving.serve  # noqa: F401

        for place, plain in places(options, folder):
            found = measure(place, plain)
            said = held["cells"].setdefault(place.family, {}).setdefault(place.method, {})
            said[place.stage] = {step: text.replace(str(folder), "") for step, text in found.items()}  # fmt: skip
            bad += any(text and not text.startswith(REFUSED) for text in found.values())
            print(f"{place.name}: {said[place.stage]}", flush=True)
            held["versions"] = versions()
            options.file.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
