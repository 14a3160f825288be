"""A checkout of this project that is run through its command line, and the inputs of those runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

STEPS = 20
ENVIRONMENT = {
    # Sums in one order: one thread, and no GPU, whose kernels may add in any.
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"kind": "lora", "rank": 4}, "learning_rate": 1e-2},
    "prefix": {
        "method": {"kind": "ptuning_v2", "num_virtual_tokens": 5}, "learning_rate": 3e-2,
    },
    "full": {"method": {"kind": "full"}, "learning_rate": 1e-3},
}  # fmt: skip
RUNS = (
    *(method + stage for method in METHODS for stage in ("", ".stage0", ".stage2")),
    "packing", "images", "quickstart",
)  # fmt: skip
"""Names of training runs; without a stage there is no DeepSpeed."""


class NoResultError(Exception):
    """A command failed, or what it wrote does not hold what is compared."""


@dataclass(frozen=True)
class Inputs:
    """What both checkouts read; each made once, when it is asked for."""

    folder: Path

    @cache  # noqa: B019  # there is one, and it lives as long as the program
    def model(self, kind: str) -> Path:
        """A tiny random model: `text`, `images`, or the `quickstart`'s."""
        folder = self.folder / f"model-{kind}"
        if kind == "quickstart":
            script = ROOT / "scripts/fixtures/quickstart_model.py"
            execute([sys.executable, str(script), str(folder), "--tiny"], self.folder, {})
        elif kind == "images":
            import pictures

            pictures.save_model(folder)
        else:
            import tiny

            tiny.save_model(folder)
        return folder

    @cache  # noqa: B019
    def rows(self, kind: str) -> dict[str, list[str]]:
        """Files to train on and to validate with: `text` or `images`."""
        folder = self.folder / f"data-{kind}"
        folder.mkdir()
        if kind == "images":
            import pictures

            return {
                "train": [str(pictures.write_dialogues(folder / "train", 60))],
                "validation": [str(pictures.write_dialogues(folder / "validation", 8, seed=1))],
            }
        import runs

        made = {
            "train": runs.write_dialogues(folder / "made.jsonl", 60, weights=True),
            "validation": runs.write_dialogues(folder / "made_heldout.jsonl", 8, seed=1),
        }
        # With tools, system prompts and several turns; a copy, so that both read the same path.
        desk = {"train": "train.jsonl", "validation": "heldout.jsonl"}
        for name in desk.values():
            shutil.copy(ROOT / "data/support_desk" / name, folder)
        return {use: [str(made[use]), str(folder / name)] for use, name in desk.items()}

    @cache  # noqa: B019
    def replies(self) -> Path:
        """Replies made elsewhere, for `finetune evaluate --predictions`."""
        call, other = 'get_weather\n{"city": "北京"}', 'get_weather\n{"city":"上海", "day": 1}'
        pairs = [
            ("the quick brown fox", "the quick red fox jumps"),
            ("这件衣服的版型很好，面料舒适。", "这件衣服的面料很舒适，版型也很好。"),
            ("", "an answer"), ("an answer", "an answer"), (call, call), (other, call),
            ("again and again and again and again and again", "once, and then again"),
            ("连衣裙 with a belt", "连衣裙 with a long belt"),
        ]  # fmt: skip
        path = self.folder / "replies.jsonl"
        rows = ({"prompt": "Q", "predict": reply, "label": reference} for reply, reference in pairs)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    @cache  # noqa: B019
    def z1_tokenizer(self) -> Path:
        """The published tokenizer with the template of GLM-Z1-9B-0414."""
        folder = self.folder / "z1-tokenizer"
        shutil.copytree(assets() / "assets/glm-4-9b-chat", folder)
        template = (assets() / "assets/glm-z1-9b-0414/chat_template.jinja").read_text("utf-8")
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        (folder / "tokenizer_config.json").unlink()  # the copy of a read-only file is read-only
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config | {"chat_template": template}), encoding="utf-8"
        )
        return folder


@dataclass(frozen=True)
class Checkout:
    """A checkout, and the folder that its commands write to."""

    name: str
    folder: Path
    work: Path
    inputs: Inputs

    def run(self, *words: str | Path) -> str:
        """The standard output of a command of this checkout's `finetune`."""
        settings = {"PYTHONPATH": str(self.folder), "FINETUNE_CACHE": str(self.work / "cache")}
        program = str(self.folder / "finetune.py")  # its folder comes first in sys.path
        return execute([sys.executable, program, *map(str, words)], self.work, settings)

    @cache  # noqa: B019
    def trained(self, name: str) -> Path:
        """The run directory of one of `RUNS`, which is trained when it is asked for first."""
        run_dir = self.work / f"run-{name}"
        if run_dir.exists():  # a second try would resume it
            raise NoResultError(f"the run {name} failed before")
        if name == "quickstart":
            self.run("train", self.folder / "configs/quickstart.yaml", *self._quickstart(run_dir))
        else:
            config = self.work / f"{name}.yaml"
            settings = run_settings(name, self.inputs)
            settings["training"]["output_dir"] = run_dir.name
            config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
            self.run("train", config)
        return run_dir

    def _quickstart(self, run_dir: Path) -> list[str]:
        """What is other than in configs/quickstart.yaml."""
        desk = self.folder / "data/support_desk"
        return [
            f"model.path={self.inputs.model('quickstart')}", f"data.train={desk / 'train.jsonl'}",
            f"data.validation={desk / 'heldout.jsonl'}", "data.max_length=1024",
            f"training.output_dir={run_dir.name}", f"training.max_steps={STEPS}",
            "training.num_epochs=null", "training.log_every_steps=1",
            "training.warmup_steps=0",  # a008844's began at a rate of 0
            "evaluation.max_samples=12", "evaluation.max_new_tokens=16",
        ]  # fmt: skip


def run_settings(name: str, inputs: Inputs) -> dict[str, Any]:
    """The config of one of `RUNS`, but the quickstart's, as plain values."""
    method, _, stage = name.partition(".stage")
    kind = "images" if name == "images" else "text"
    options = METHODS.get(method, METHODS["lora"])
    settings: dict[str, Any] = {
        "model": {"path": str(inputs.model(kind))},
        "data": {**inputs.rows(kind), "max_length": 512, "packing": name == "packing"},
        "method": options["method"],
        "training": {
            "max_steps": STEPS, "batch_size": 2, "gradient_accumulation_steps": 2,
            "learning_rate": options["learning_rate"], "log_every_steps": 1, "report_to": [],
            "warmup_steps": 0,  # a008844's began at a rate of 0
        },
        "evaluation": {
            "at_start": True, "max_new_tokens": 12, "max_samples": 24, "batch_size": 8,
        },
    }  # fmt: skip
    if stage:
        settings["deepspeed"] = {"zero_stage": int(stage)}
    return settings


def assets() -> Path:
    """The folder of `GLM4_ASSETS`.

    Raises:
        NoResultError: it is not named.
    """
    if not os.environ.get("GLM4_ASSETS"):
        raise NoResultError("GLM4_ASSETS is not set: no published tokenizer, no golden dialogues")
    return Path(os.environ["GLM4_ASSETS"]).resolve()


def execute(words: list[str], folder: Path, settings: dict[str, str]) -> str:
    """The standard output of a command.

    Raises:
        NoResultError: its exit code is not 0; with the end of what it said.
    """
    environment = {**os.environ, **ENVIRONMENT, **settings}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
        raise NoResultError(f"{' '.join(words)}\nended with exit code {done.returncode}:\n{said}")
    return done.stdout


@contextmanager
def commit_folder(commit: str, folder: Path) -> Iterator[Path]:
    """A git worktree of `commit` at `folder`, removed at the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    execute([*git, "add", "--detach", str(folder), commit], ROOT, {})
    try:
        yield folder
    finally:
        execute([*git, "remove", "--force", str(folder)], ROOT, {})
