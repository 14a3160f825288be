"""Which base a tuned folder belongs to: written beside an adapter, checked when it is opened."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune.artifacts.names import ADAPTER_CONFIG, BASE_RECORD
from finetune.artifacts.plain_files import read_json, read_json_if_there
from finetune.artifacts.weights import model_fingerprint
from finetune.errors import ModelError
from finetune.storage.hashed import hashed_text


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """The checkpoint that was tuned."""

    path: str
    revision: str | None
    fingerprint: str

    def write(self, folder: Path, *, method: str) -> None:
        """Write `finetune.json` into `folder`."""
        record = {"format": 1, "method": method, "base": asdict(self)}
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        hashed_text(folder / BASE_RECORD, text)


def read_base_record(folder: Path) -> BaseRecord | None:
    """The record of `folder`, or None when another program wrote the folder.

    Raises:
        ModelError: The file is there but is not a record.
    """
    path = folder / BASE_RECORD
    if not path.exists():
        return None
    try:
        base = read_json(path)["base"]
        if not isinstance(base["path"], str) or not isinstance(base["fingerprint"], str):
            raise TypeError("path and fingerprint are texts")
        return BaseRecord(**base)
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is damaged ({error}); copy the adapter folder again from where it was trained"
        ) from error


def recorded_base(folder: Path) -> tuple[str | None, str | None]:
    """Path and fingerprint of the base of an adapter or a fully tuned model; None where not noted."""
    record = read_base_record(folder)
    named = read_json_if_there(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    path = str(named) if named else record.path if record else None
    return path, record.fingerprint if record else None


def check_base(folder: Path, base: Path, *, force: bool = False) -> list[str]:
    """Refuse a base that is not the one `folder` was trained on; returns what a user is to be told.

    Args:
        folder: An adapter.
        base: The folder of the base at hand.
        force: Only say that they differ.

    Raises:
        ModelError: The fingerprints differ and `force` is not set.
    """
    record = read_base_record(folder)
    if record is None:
        return [f"{folder} does not say which base it belongs to; only shapes were compared"]
    found = model_fingerprint(base)
    if found == record.fingerprint:
        return []
    revision = f" at {record.revision}" if record.revision else ""
    text = (
        f"{folder} was trained on {record.path}{revision} (fingerprint {record.fingerprint[:16]}), "
        f"but {base} has fingerprint {found[:16]}: its weights or its config differ"
    )
    if not force:
        raise ModelError(
            f"{text}. Give its own base with --base; only `finetune merge --force` takes another"
        )
    return [f"{text}; merged all the same (--force)"]
