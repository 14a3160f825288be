"""What merge and export wrote, or an adapter's own files, on the Hugging Face hub: only when asked, and private.

Never sent: optimizer and random states, records of the run, anything that its manifest does not
vouch for. The token is huggingface_hub's affair (HF_TOKEN or a login); it is never printed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
)

from finetune import console
from finetune.artifacts.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    MODEL_CARD,
    MODEL_CONFIG,
    TRAINER_STATE,
)
from finetune.artifacts.resolve import (
    adapter_config,
    find_source,
    is_adapter,
    is_hub_id,
    is_hub_name,
)
from finetune.errors import CheckpointError, ConfigError
from finetune.export import card
from finetune.storage.manifest import verify

_STATES = ("optimizer.pt", "scheduler.pt", "rng_state*", "global_step*", TRAINER_STATE)


@dataclass(frozen=True)
class PushReport:
    """What was sent, or would be."""

    repo: str
    source: Path
    files: Mapping[str, int]
    """Bytes by name."""
    private: bool
    address: str | None
    """Of the commit; None when nothing was sent."""
    notes: tuple[str, ...] = ()


def push(
    source: Path, repo: str, *, send: bool, public: bool = False, base: str | None = None
) -> PushReport:
    """Upload what ``source`` means as one commit to the model repository ``repo``.

    Args:
        source: What merge or export wrote, an adapter, or a run (its best or newest good one).
        repo: `owner/name`; made when it is not there.
        send: Whether anything is sent at all; otherwise only looked at.
        public: Allow everybody to read it; without, a repository that is public is refused.
        base: Of an adapter: the hub id of its base, to be named instead of a folder of this machine.
    """
    if not is_hub_name(repo):
        raise ConfigError(f"--repo {repo!r} is not of the form owner/name; write it so")
    folder, notes = find_source(source)
    problems = verify(folder)
    if problems:
        raise CheckpointError(
            f"{folder} is not pushed: {'; '.join(problems)}. Make it again with `finetune merge`"
        )
    texts, files = _adapter(folder, repo, base) if is_adapter(folder) else _model(folder, base)
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in texts.items():
            files[name] = Path(scratch) / name
            files[name].write_text(text, encoding="utf-8")
        address = _send(files, repo, public=public) if send else None
        sizes = {name: files[name].stat().st_size for name in sorted(files)}
    return PushReport(repo, folder, sizes, not public, address, tuple(notes))


def _model(folder: Path, base: str | None) -> tuple[dict[str, str], dict[str, Path]]:
    """A plain checkpoint goes as it is, but for its manifest: the hub keeps hashes of its own."""
    if base is not None:
        raise ConfigError(f"--base does not apply: {folder} is a whole model; leave it out")
    if not (folder / MODEL_CONFIG).is_file():
        raise ConfigError(
            f"{folder} holds neither an adapter nor a model; give a merged model or a checkpoint"
        )
    states = sorted(file.name for pattern in _STATES for file in folder.glob(pattern))
    if states:
        raise ConfigError(
            f"{folder} is a checkpoint of training with {', '.join(states)}, which only resuming "
            f"needs; make a plain one first: finetune merge {folder} --output FOLDER"
        )
    names = [file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST]
    return {}, {file.relative_to(folder).as_posix(): file for file in names}


def _adapter(folder: Path, repo: str, base: str | None) -> tuple[dict[str, str], dict[str, Path]]:
    """The two files that PEFT opens, and a card: nothing else of a checkpoint of training."""
    config = adapter_config(folder)
    named = str(base or config.get("base_model_name_or_path") or "")
    if not is_hub_id(named):
        raise ConfigError(
            f"{folder} names its base as {named or 'nothing'}, which others do not have; "
            "give the hub id of its base: --base THUDM/glm-4-9b-chat"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(
            f"{folder} has no {ADAPTER_WEIGHTS}; only safetensors are pushed, so save it as such"
        )
    text = card.model_card(
        repo.rpartition("/")[2],
        f"An adapter of {named}, opened by PEFT.",
        named,
        [(folder, 1.0)],
        library="peft",
        named=named,
    )
    settings = json.dumps(config | {"base_model_name_or_path": named}, indent=2) + "\n"
    return {ADAPTER_CONFIG: settings, MODEL_CARD: text}, {ADAPTER_WEIGHTS: folder / ADAPTER_WEIGHTS}


def _send(files: Mapping[str, Path], repo: str, *, public: bool) -> str:
    """The address of the one commit that brings all of it."""
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        there = api.model_info(repo)
        if not public and not there.private:
            raise ConfigError(
                f"{repo} is public, so everybody could read what is pushed; choose another --repo, "
                "or say --public. Nothing was sent"
            )
        console.say(f"sending {len(files)} files to {api.endpoint}/{repo} …")
        operations = [CommitOperationAdd(name, file) for name, file in sorted(files.items())]
        done = api.create_commit(repo, operations, commit_message="Upload by glm4-finetune")
    except HfHubHTTPError as error:
        said = error.server_message or str(error).splitlines()[0]
        raise ConfigError(
            _without_token(
                f"{repo}: {api.endpoint} answered: {said}; check the token, its rights and the name"
            )
        ) from None
    except OfflineModeIsEnabled:
        raise ConfigError("HF_HUB_OFFLINE is set; unset it to push") from None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = error.__cause__ or error
        raise ConfigError(
            _without_token(
                f"{repo}: the upload to {api.endpoint} failed ({reason}); the repository is as it "
                "was. Give the same command again: what has arrived is not sent twice"
            )
        ) from None
    return str(done.commit_url)


def _without_token(text: str) -> str:
    """A server may repeat what it was sent."""
    token = get_token()
    return text.replace(token, "…") if token else text
