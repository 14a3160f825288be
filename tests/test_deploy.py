"""Files for containers and clusters: what they name exists, and their commands are ours."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from finetune.cli.commands import app
from finetune.config.load import load_config

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text(encoding="utf-8"))
SKY = yaml.safe_load((ROOT / "deploy/skypilot.yaml").read_text(encoding="utf-8"))


def check(words: list[str]) -> None:
    """A command of ours with options that it has; its configuration loads."""
    command: Any = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
    for word in words[1:]:
        if word.startswith("configs/"):
            load_config(ROOT / word, [w for w in words if re.match(r"[a-z]+\\.[a-z_]+=", w)])


def test_what_the_image_copies_is_there() -> None:
    copied = [
        words.split()[:-1] for words in re.findall(r"^COPY (.*)$", DOCKERFILE, flags=re.MULTILINE)
    ]
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists(), name
    assert 'ENTRYPOINT ["finetune"]' in DOCKERFILE
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not {name for names in copied for name in names} & set(ignored)


@pytest.mark.parametrize("name", ["train", "serve"])
def test_the_commands_of_compose_are_ours(name: str) -> None:
    service = COMPOSE["services"][name]
    assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    check(service["command"])


def test_nothing_is_open_to_other_machines() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert "--api-key-file" in COMPOSE["services"]["serve"]["command"]


def test_the_cloud_job_runs_ours() -> None:
    program, *words = shlex.split(SKY["run"])
    assert program == "finetune"
    check(words)
