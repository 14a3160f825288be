"""What messages and help texts tell a user to type exists: every `--option` is one of a command."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from finetune.cli.commands import app
from finetune.config.reference import option_keys

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = {
    "hf download and modelscope download": {"--local-dir", "--local_dir", "--repo-type"},
    "torchrun": {"--nnodes", "--nproc_per_node", "--nproc-per-node", "--standalone", "--master",
                 "--rdzv", "--rdzv-endpoint", "--local-addr"},
    "docker": {"--ipc", "--shm-size"},
    "sbatch": {"--signal"},
    "vllm serve": {"--hf-overrides", "--max-lora-rank"},
}  # fmt: skip
"""Options of other programs that are named, too."""


def options_of(command: Any) -> Iterator[str]:
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    for inner in getattr(command, "commands", {}).values():
        yield from options_of(inner)


def named() -> dict[str, set[str]]:
    """Every option that a text of the product names, with the places."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "finetune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for option in re.findall(
                    r"(?<![\w-])--[a-z][a-z0-9_]*(?:-[a-z0-9_]+)*(?![\w(])", node.value
                ):
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    found.setdefault(option, set()).add(place)
    return found


def test_every_option_that_a_text_names_is_one_of_a_command() -> None:
    ours = {"--help", *options_of(typer.main.get_command(app))}
    theirs = set().union(*FOREIGN.values())
    texts = named()
    assert len(texts) > 50
    assert {o: places for o, places in texts.items() if o not in ours | theirs} == {}
    assert theirs <= texts.keys(), "options of other programs that no text names any more"
    assert not theirs & ours


def texts() -> dict[str, set[str]]:
    """Every text of the product, docstrings of modules and classes too, with the places."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "finetune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.setdefault(node.value, set()).add(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_every_key_of_a_configuration_that_a_text_names_is_in_the_schema() -> None:
    keys = set(option_keys())
    named = {
        key: places
        for text, places in texts().items()
        for key in re.findall(r"(?<![\w./-])(?:data|training|model|method|deepspeed|evaluation)\.[a-z]+_[a-z_]+(?![\w./(])", text)
        if " " in text
    }  # fmt: skip
    of_others = {"model.embed_tokens", "training.prepare_model"}  # a weight, a module
    assert len(named) > 30
    assert {key: places for key, places in named.items() if key not in keys | of_others} == {}


def test_every_command_that_a_text_names_is_one() -> None:
    group: Any = typer.main.get_command(app)
    named = {
        words: places
        for text, places in texts().items()
        for words in re.findall(r"`finetune ([a-z]+(?: (?:check|show|tokens|split)\b)?)", text)
    }
    assert len(named) > 10
    unknown = {}
    for words, places in named.items():
        command = group
        for word in words.split():
            command = getattr(command, "commands", {}).get(word)
            if command is None:
                unknown[words] = places
                break
    assert unknown == {}
