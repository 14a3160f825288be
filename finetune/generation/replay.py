"""A base model and prompts -> what it replies to them, kept, to be trained on beside a run's own data.

A model that learns only new dialogues forgets what it did well before. Its own replies to general
prompts and prompts with tools, mixed into the training data, hold it there. They are generated once for
a model and kept in the cache, in a process of its own, whose memory is free again before training:

    <cache>/replay/<key>/train.jsonl       four fifths of the replies
                         held_out.jsonl    the rest, by which is measured what is forgotten
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from finetune import console
from finetune.artifacts.resolve import is_folder, local_folder
from finetune.artifacts.weights import model_fingerprint
from finetune.config.forgetting import ReplaySection
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.reading.files import BadRow, expand, read_rows
from finetune.errors import DataError, ModelError
from finetune.storage.cache import default_root, key_of, open_or_build
from finetune.storage.files import file_digest, json_line, whole_file
from finetune.storage.outputs import check_output

PROMPTS = Path(__file__).with_name("replay_prompts.jsonl")
"""Ours, made by scripts/fixtures/make_replay_prompts.py."""
TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"
FORMAT = 1
"""Version of what is kept."""
ONE_IN = 5
"""Replies of which one is held out."""
_ALONE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


class ReplayFiles(NamedTuple):
    """The base model's replies."""

    train: Path
    held_out: Path
    replies: int
    cut: int
    """Replies that were left out because they did not end, or are empty."""


def replay_of(
    section: ReplaySection, model: str, revision: str | None, cache_dir: str | None = None
) -> ReplayFiles:
    """The replies of a base model to the section's prompts, generated unless they are kept already.

    Args:
        section: which prompts, and how long a reply may be.
        model: a folder or a hub id.
        revision: the hub revision.
        cache_dir: where they are kept, by default in the cache's usual place.

    Raises:
        DataError: There is no prompt, or no reply that ended.
        ModelError: The model cannot be opened.
    """
    folder = local_folder(model, revision)
    prompts = [file for path in _listed(section.prompts) for file in expand(path)]
    key = {
        "format": FORMAT,
        "model": model_fingerprint(folder) if is_folder(model) else [model, revision],
        "prompts": [file_digest(file) for file in prompts],
        "longest": section.max_new_tokens,
    }
    root = (Path(cache_dir) if cache_dir else default_root()) / "replay"

    def build(stage: Path) -> Mapping[str, Any]:
        return _build(stage, folder, prompts, section.max_new_tokens)

    entry = open_or_build(root, key_of(key), build)
    facts = entry.facts
    return ReplayFiles(entry.folder / TRAIN, entry.folder / HELD_OUT, facts["replies"], facts["cut"])  # fmt: skip


def _listed(prompts: str | list[str] | None) -> list[str]:
    if prompts is None:
        return [str(PROMPTS)]
    return [prompts] if isinstance(prompts, str) else prompts


def _build(stage: Path, model: Path, prompts: list[Path], max_new_tokens: int) -> dict[str, int]:
    """Writes both files; returns how many replies there are, and how many were left out."""
    rows = list(_rows(prompts, ChatTemplate(load_chat_tokenizer(str(model)))))
    if not rows:
        raise DataError(
            f"data.replay: {', '.join(map(str, prompts))} hold no prompts; give a file that does"
        )
    console.say(f"data.replay: {model} answers {len(rows)} prompts, once")
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place) / "prompts.jsonl", Path(place) / "replies.jsonl"
        with whole_file(asked) as file:
            file.writelines(map(json_line, rows))
        _predict(model, asked, answered, max_new_tokens)
        kept = [row for line in answered.read_text("utf-8").splitlines() if (row := _kept(json.loads(line)))]  # fmt: skip
    if not kept:
        raise DataError(
            f"data.replay: none of {len(rows)} replies of {model} ended within {max_new_tokens} tokens; "
            "use a chat model, or raise data.replay.max_new_tokens"
        )
    if 2 * len(kept) < len(rows):
        console.warn(
            f"data.replay: only {len(kept)} of {len(rows)} replies of {model} ended and say something; it hardly "
            "answers in its chat layout, and so little will not keep what it knows"
        )
    held_out = [_is_held_out(row) for row in kept]
    for name, wanted in ((TRAIN, False), (HELD_OUT, True)):
        with whole_file(stage / name) as file:
            file.writelines(json_line(row) for row, held in zip(kept, held_out, strict=True) if held is wanted)  # fmt: skip
    return {"replies": len(kept), "cut": len(rows) - len(kept)}


def _rows(files: list[Path], template: ChatTemplate) -> Iterator[dict[str, Any]]:
    """The prompts; those with tools only for a checkpoint that has a place for them."""
    for file in files:
        for row in read_rows(file):
            if isinstance(row, BadRow):
                raise DataError(f"{row.location}: {row.reason}")
            if template.takes_tools or not row.value.get("tools"):
                yield row.value


def _predict(model: Path, prompts: Path, output: Path, max_new_tokens: int) -> None:
    """Lets a process of its own generate the replies, on this process's first device."""
    command = [
        sys.executable, "-m", "finetune", "predict", str(model), "--data", str(prompts),
        "--output", str(output), "--max-new-tokens", str(max_new_tokens),
    ]  # fmt: skip
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    alone = {name: value for name, value in os.environ.items() if name not in _ALONE}
    done = subprocess.run(
        command, env={**alone, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True, check=False
    )  # fmt: skip
    if done.returncode:
        raise ModelError(
            f"data.replay: {model} could not answer the prompts; correct this, or leave data.replay out:\n{done.stderr.strip()[-2000:]}"
        )


def _kept(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A dialogue to learn; None when its reply did not end or says nothing."""
    reply = row["messages"][-1]
    if not row["stopped"] or not str(reply["content"]).strip():
        return None
    return {name: row[name] for name in ("messages", "tools") if name in row}


def _is_held_out(row: Mapping[str, Any]) -> bool:
    """Whether a dialogue is held out, told by its prompt, so that every model holds out the same."""
    text = json.dumps(row["messages"][0], sort_keys=True, ensure_ascii=False)
    return int(sha256(text.encode()).hexdigest(), 16) % ONE_IN == 0


def check_replay_output(
    section: ReplaySection, model: str, output: Path, *, overwrite: bool
) -> None:
    """ConfigError unless the replies may be written to `output`: over nothing that they are made of."""
    read = [file for path in _listed(section.prompts) for file in expand(path)]
    read += [default_root(), *([Path(model)] if is_folder(model) else [])]
    check_output(output, read, overwrite=overwrite, is_ours=lambda _: False)


def write_replay(files: ReplayFiles, output: Path) -> None:
    """Copies the replies, held-out ones last, to one file."""
    with whole_file(output) as file:
        for part in (files.train, files.held_out):
            with part.open(encoding="utf-8") as lines:
                shutil.copyfileobj(lines, file)
