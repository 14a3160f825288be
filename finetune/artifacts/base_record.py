"""Which base a tuned folder belongs to: written beside an adapter, checked when it is opened."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune.errors import ModelError

RECORD_NAME = "finetune.json"


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
        (folder / RECORD_NAME).write_text(text, encoding="utf-8")


def read_base_record(folder: Path) -> BaseRecord | None:
    """The record of `folder`, or None when another program wrote the folder.

    Raises:
        ModelError: The file is there but is not a record.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    try:
        return BaseRecord(**json.loads(path.read_text(encoding="utf-8"))["base"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is damaged ({error}); copy the adapter folder again from where it was trained"
        ) from error


def check_base(folder: Path, *, fingerprint: str, base: str, force: bool = False) -> None:
    """Refuse to open the adapter of `folder` on a base other than its own.

    Args:
        folder: The adapter.
        fingerprint: `models.load.model_fingerprint` of the base at hand.
        base: The base's name for the message.
        force: Open it all the same.

    Raises:
        ModelError: The fingerprints differ and `force` is not set.
    """
    record = read_base_record(folder)
    if record is None or force or record.fingerprint == fingerprint:
        return
    raise ModelError(
        f"{folder} was trained on {record.path}"
        f"{f' at {record.revision}' if record.revision else ''} "
        f"(fingerprint {record.fingerprint[:16]}), but {base} has fingerprint {fingerprint[:16]}: "
        "its weights or its config differ. Open it on its own base; `finetune merge --force` is the "
        "only way around that"
    )
