"""Files of a hub's repository one by one: the commit behind a name, what it holds, one file fetched.

ModelScope's API has no answer to "which commit is this branch", but names for every file the commit
that changed it last. The newest of these is a commit with the same files, which is checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

Hub = Literal["huggingface", "modelscope"]
Content = Literal["model", "dataset"]

COMMIT = re.compile(r"[0-9a-f]{40}")


class Listing(NamedTuple):
    """The files of a repository at one commit."""

    commit: str | None
    """None where ModelScope does not tell it."""
    sizes: Mapping[str, int]
    """Bytes of every file by its path in the repository."""


def listing(hub: Hub, name: str, content: Content, revision: str | None) -> Listing:
    """What `owner/name` holds at a revision, by default the newest; errors are the libraries' own."""
    if hub == "modelscope":
        commit = modelscope_commit(name, content, revision)
        entries = _modelscope_entries(name, content, commit or revision or "master")
        return Listing(commit, {path: int(entry["Size"]) for path, entry in entries.items()})
    from huggingface_hub import HfApi

    info = HfApi().repo_info(name, repo_type=content, revision=revision)
    files = HfApi().list_repo_tree(name, repo_type=content, revision=info.sha, recursive=True)
    return Listing(info.sha, {f.path: f.size for f in files if hasattr(f, "size")})


def fetch_file(
    hub: Hub, name: str, content: Content, revision: str | None, path: str, folder: Path
) -> Path:
    """One file of a repository, under `folder`; what is there already is not fetched again."""
    if hub == "modelscope":
        api = _modelscope_api(name, content)
        return Path(api.download_file(name, content, path, revision=revision, local_dir=folder))
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, path, repo_type=content, revision=revision, local_dir=folder))


def modelscope_commit(name: str, content: Content, revision: str | None) -> str | None:
    """The commit with the files that a branch or tag holds now; None if there is none to be found."""
    if revision and COMMIT.fullmatch(revision):
        return revision
    entries = _modelscope_entries(name, content, revision or "master")
    newest = max((entry.get("CommittedDate") or 0 for entry in entries.values()), default=0)
    candidates = {
        str(entry.get("Revision"))
        for entry in entries.values()
        if (entry.get("CommittedDate") or 0) == newest
    }
    for commit in sorted(filter(COMMIT.fullmatch, candidates)):
        there = _modelscope_entries(name, content, commit)
        if all(_same(entry, there.get(path)) for path, entry in entries.items()):
            return commit
    return None


def _same(entry: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    return other is not None and all(entry.get(k) == other.get(k) for k in ("Size", "Sha256"))


def _modelscope_entries(name: str, content: Content, revision: str) -> dict[str, dict[str, Any]]:
    """The files of a repository by path, as ModelScope's API describes them."""
    legacy = _modelscope_api(name, content).legacy
    if content == "dataset":
        found = legacy.list_dataset_files_paginated(name, revision=revision)
    else:
        found = legacy.list_repo_files(name, content, revision=revision, recursive=True)
    return {str(e.get("Path") or e["Name"]): e for e in found if e.get("Type") != "tree"}


def _modelscope_api(name: str, content: Content) -> Any:
    """The API of the site that has the repository: $MODELSCOPE_ENDPOINT, or one of the two public ones."""
    from modelscope_hub.api import HubApi

    return HubApi(endpoint=HubApi().resolve_endpoint_for_read(name, repo_type=content))
