"""Repositories of Hugging Face and ModelScope -> folders here, through the hubs' own libraries.

    hf://owner/name[@revision][/files]   Hugging Face; a mirror by HF_ENDPOINT
    ms://owner/name[@revision][/files]   ModelScope; another site by MODELSCOPE_ENDPOINT
    owner/name                           a model of the hub that $FINETUNE_HUB (or --hub) names, by
                                         default Hugging Face

What is fetched lies in the library's own cache; what is there is not fetched again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, get_args

from finetune import console
from finetune.artifacts import remote_files
from finetune.artifacts.remote_files import COMMIT, Content, Hub, Listing
from finetune.errors import ConfigError, DataError, FinetuneError, ModelError

CHOICE = "FINETUNE_HUB"
"""The environment variable that names the hub of a plain `owner/name`."""
_SCHEMES: dict[str, Hub] = {"hf": "huggingface", "ms": "modelscope"}
_ADDRESS = re.compile(
    r"(?P<scheme>hf|ms):/{1,2}(?:datasets/|models/)?(?P<name>\w[\w.-]*/\w[\w.-]*)"
    r"(?:@(?P<revision>[\w.-]+))?(?:/(?P<files>.+))?"
)
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""`owner/name`."""

fetched: dict[str, str] = {}
"""Addresses that this process fetched -> the commit that they stood for, or the revision asked for."""


class Repository(NamedTuple):
    """A repository of a hub."""

    hub: Hub
    name: str
    """`owner/name`."""
    revision: str | None = None
    files: str = ""
    """A path or pattern of some of its files; empty for all that are of use."""


def repository(address: str | Path) -> Repository | None:
    """What an address names; None when it is none, such as a path.

    Raises:
        ConfigError: $FINETUNE_HUB is no hub.
    """
    text = str(address)
    if match := _ADDRESS.fullmatch(text):
        hub = _SCHEMES[match["scheme"]]
        return Repository(hub, match["name"], match["revision"], match["files"] or "")
    return Repository(_chosen(), text) if NAME.fullmatch(text) else None


def _chosen() -> Hub:
    hubs: tuple[Hub, ...] = get_args(Hub)
    named = os.environ.get(CHOICE) or hubs[0]
    for hub in hubs:
        if named == hub:
            return hub
    raise ConfigError(f"${CHOICE} (--hub) is {named!r}; it is one of {', '.join(hubs)}")


def known_to_peft(path: str) -> str:
    """`owner/name` of an address of Hugging Face, where PEFT looks names up; others as they are."""
    match = _ADDRESS.fullmatch(path)
    return match["name"] if match and match["scheme"] == "hf" else path


def how_to_get(found: Repository, content: Content) -> str:
    """The commands that download a repository from either hub, for an error message."""
    is_data = content == "dataset"
    hf = f"hf download {found.name}{' --repo-type dataset' if is_data else ''} --local-dir FOLDER"
    ms = f"modelscope download --{content} {found.name} --local_dir FOLDER"
    return (
        f"check the name, set HF_ENDPOINT to a mirror, or download it elsewhere and give the folder:\n  {hf}\n  {ms}   "
        "(pip install modelscope)"
    )


def fetch(
    address: str, content: Content, files: Sequence[str], revision: str | None = None
) -> Path:
    """The folder of a repository here, downloaded where it is not there yet; once per process.

    Args:
        address: What `repository` reads.
        content: What the repository holds.
        files: Patterns of the files that are fetched.
        revision: A branch, tag or commit, where the address says none.

    Raises:
        ModelError, DataError: It cannot be fetched; the text says how else to get it.
    """
    found = repository(address)
    assert found is not None, address
    found = found._replace(revision=found.revision or revision)
    return _fetched(found, content, tuple(files))


@lru_cache(maxsize=64)
def _fetched(found: Repository, content: Content, files: tuple[str, ...]) -> Path:
    with _explained(found, content):
        folder = _DOWNLOADS[found.hub](found, content, list(files))
    commit = commit_of(folder) or found.revision or "the newest"
    _note(found, content, commit, str(folder))
    return folder


@lru_cache(maxsize=64)
def listed(found: Repository) -> Listing:
    """The files of a data set at the commit that its name stands for now, which is noted.

    Raises:
        DataError: The hub does not answer, or has no such data set.
    """
    with _explained(found, "dataset"):
        there = remote_files.listing(found.hub, found.name, "dataset", found.revision)
    _note(found, "dataset", there.commit or found.revision or "the newest", "read file by file")
    return there


def fetch_file(found: Repository, path: str, folder: Path) -> Path:
    """One file of a data set, under `folder`; DataError when it cannot be fetched."""
    with _explained(found, "dataset"):
        return remote_files.fetch_file(
            found.hub, found.name, "dataset", found.revision, path, folder
        )


def _note(found: Repository, content: Content, commit: str, location: str) -> None:
    said = f"{found.hub}:{found.name}"
    if fetched.get(said) != commit:
        fetched[said] = commit
        console.say(f"{content} {found.name} of {found.hub}, revision {commit}: {location}")


@contextmanager
def _explained(found: Repository, content: Content) -> Iterator[None]:
    """The errors of the hubs' libraries, with how else to get the repository."""
    kind: type[FinetuneError] = ModelError if content == "model" else DataError
    shown = f"{found.name}" + (f" at {found.revision}" if found.revision else "")
    try:
        yield
    except ImportError:
        raise kind(
            f'{shown}: ModelScope needs its library: pip install "glm4-finetune[modelscope]"; or '
            + how_to_get(found, content)
        ) from None
    # The libraries raise errors of many kinds, those of networks and of refused names among them.
    except Exception as error:
        if found.name.startswith("runs/"):  # what a command of ours writes, not a name of a hub
            raise kind(
                f"{shown}: no such folder here; `bash scripts/quickstart.sh` makes the quickstart's model, "
                "training makes its runs; do that first, or correct the path"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise kind(
            f"{shown}: no such folder here, and it cannot be fetched from {found.hub} "
            f"({type(error).__name__}: {reason}); {how_to_get(found, content)}"
        ) from error


def commit_of(folder: Path) -> str | None:
    """The commit that a fetched folder holds, where the hub's library names folders by them."""
    return folder.name if COMMIT.fullmatch(folder.name) else None


def _from_huggingface(found: Repository, content: Content, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # heavy, and only needed for a hub's address

    return Path(
        snapshot_download(
            found.name, repo_type=content, revision=found.revision, allow_patterns=files
        )
    )


def _from_modelscope(found: Repository, content: Content, files: list[str]) -> Path:
    from modelscope import dataset_snapshot_download, snapshot_download

    commit = remote_files.modelscope_commit(found.name, content, found.revision)
    found = found._replace(revision=commit or found.revision)
    download = snapshot_download if content == "model" else dataset_snapshot_download
    return Path(download(found.name, revision=found.revision, allow_patterns=files))


_DOWNLOADS = {"huggingface": _from_huggingface, "modelscope": _from_modelscope}
