"""Six secrets in the environment, and in what a user typed: in nothing that is written or said."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.reliability.frame import Case, in_fork
from tests.reliability.places import command, dialogues_file, glm_folder, shared, write_config

SECRETS = {
    "HF_TOKEN": "hf_CANARYaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "WANDB_API_KEY": "canarywandb0123456789012345678901234567",
    "OPENAI_API_KEY": "sk-CANARY-openai-0123456789",
    "AWS_SECRET_ACCESS_KEY": "CANARYaws/0123456789+abcdefghijklmnopqrs",
    "MLFLOW_TRACKING_PASSWORD": "CANARY-mlflow-password",
    "FINETUNE_API_KEY": "CANARY-endpoint-key-0123456789",
}
# Where to look -> what to look at below the folder in which everything was done.
SINKS = {
    "the log": "*.log",
    "the saved config": "run/config.yaml",
    "the run directory": "run/*",
    "the checkpoint": "run/checkpoint-*/**/*",
    "experiment trackers": "run/**/*tfevents*",
    "the merged model and its card": "merged/**/*",
    "the replies": "replies.jsonl*",
    "the scores and the report": "scores/**/*",
    "the token cache": "cache/**/*",
    "crash reports": "crash*.txt",
}


def _everything(folder: Path) -> str:
    """Train, evaluate, predict, merge, and crash with a traceback, with the secrets around."""
    import runs

    os.environ |= SECRETS
    changes = {
        "training__max_steps": 1,
        "training__report_to": ["tensorboard"],
        "data__validation": str(dialogues_file()),
        "data__cache_dir": str(folder / "cache"),
        "evaluation__max_samples": 2,
    }
    settings = runs.config(glm_folder(), dialogues_file(), folder / "run", **changes)
    (folder / "x.yaml").write_text(json.dumps(settings))
    (folder / "ask.jsonl").write_text('{"prompt": "the quick"}\n')
    saved = folder / "run/checkpoint-1"
    words: dict[str, list[object]] = {
        "train": ["train", folder / "x.yaml"],
        "show": ["train", folder / "x.yaml", "--show-config"],
        "evaluate": ["evaluate", saved, "--data", dialogues_file(), "--output", folder / "scores", "--max-samples", 2, "--max-new-tokens", 2],
        "predict": ["predict", saved, "--data", folder / "ask.jsonl", "--output", folder / "replies.jsonl", "--max-new-tokens", 1],
        "merge": ["merge", saved, "--output", folder / "merged", "--no-check"],
    }  # fmt: skip
    for name, line in words.items():
        code, said = command(*line)
        assert code == 0, (name, said[-1500:])
        (folder / f"{name}.log").write_text(said)
    _crash(folder)
    return ""


def _crash(folder: Path) -> None:
    """A mistake of the user's under --debug, and a fault of ours with its traceback."""
    from finetune.training import prepare_model

    _, said = command("--debug", "train", folder / "nowhere.yaml")
    assert "Traceback" in said
    (folder / "crash-debug.txt").write_text(said)

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of ours")

    prepare_model.prepare_model = failing  # type: ignore[assignment]
    settings = json.loads((folder / "x.yaml").read_text())
    settings["training"]["output_dir"] = str(folder / "crashed")
    (folder / "y.yaml").write_text(json.dumps(settings))
    code, said = command("train", folder / "y.yaml")
    assert (code, "a fault of ours" in said) == (1, True), said[-800:]
    (folder / "crash-fault.txt").write_text(said)


def is_absent(name: str, pattern: str, folder: Path) -> None:
    """No file of the sink has the secret; there are files to look at."""
    location = shared("secrets")
    files = [path for path in location.glob(pattern) if path.is_file()]
    assert files, f"nothing matches {pattern}"
    secret = SECRETS[name].encode()
    assert [str(path) for path in files if secret in path.read_bytes()] == []


TYPED = {
    "a hub token under extra": ("training.extra.hub_token={}", 2),
    "a key that is no option": ("training.wandb_api_key={}", 2),
    "a key of the top level": ("api_key={}", 2),
    "a secret where a number belongs": ("training.max_steps=x{}", 2),
    "a password in an address": ("data.train=https://user:{}@example.org/a.jsonl", 2),
    "a password in the model's address": ("model.path=https://user:{}@example.org/o/m", 2),
}
NOT_HIDDEN = (
    "a secret where a number belongs",
)  # a value is shown where the value is what is wrong


def is_not_echoed(override: str, code: int, folder: Path) -> None:
    """The message names the key and not what it holds."""
    secret = SECRETS["HF_TOKEN"]
    write_config(folder, dialogues_file())
    ended, said = command("train", folder / "x.yaml", override.format(secret))
    assert ended == code, (ended, said[-500:])
    assert secret not in said, said[-500:]


def cases() -> Iterator[Case]:
    """Every secret in every sink."""
    glm_folder()
    dialogues_file()
    home = shared("secrets")
    home.mkdir()
    answer = in_fork(lambda _: _everything(home), seconds=200)
    assert answer == "", answer
    for name in SECRETS:
        for sink, pattern in SINKS.items():
            yield Case(f"secrets: {name} in {sink}", partial(is_absent, name, pattern))
    for what, (override, code) in TYPED.items():
        if what not in NOT_HIDDEN:
            yield Case(f"secrets: {what}, in the message", partial(is_not_echoed, override, code))
