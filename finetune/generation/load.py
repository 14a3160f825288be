"""A folder that anybody trained, merged or downloaded -> a model with its chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.errors import ModelError
from finetune.generation.settings import settings_of
from finetune.methods import of_adapter

ADAPTER = "adapter_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that is ready to reply."""

    model: Any
    """In evaluation mode, on the GPU of this process if there is one."""
    template: ChatTemplate
    kind: Literal["adapter", "model"]
    base: str
    """The model that an adapter was opened on; of a whole model, itself."""


class Models:
    """Opens one model after another; a base that several adapters share is loaded once.

    Each opening ends the one before: an adapter is taken off its base before the next is put on.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._bare: Any = None
        """The model of `_key` without an adapter."""
        self._worn: Any = None
        """The same with one, or None."""
        self._method: Any = None
        """The record of its method."""

    def open(
        self, target: str | Path, *, base: str | None = None, like: str | None = None
    ) -> OpenedModel:
        """The model in `target`, as `open_model` opens it; in the number format of `like`, if given."""
        template = open_template(target, base=base)
        from finetune.distributed.processes import local_device
        from finetune.models.library_logging import quiet_libraries
        from finetune.models.load import load_model

        quiet_libraries()
        path, revision = base_of(target, base)
        saved = settings_of(like or target)
        key = path, revision, saved.dtype, saved.attention, saved.quantization
        self._take_off()
        if key != self._key:
            self._bare = None  # before the next is loaded: there may be room for one only
            loaded: Any = load_model(
                path,
                revision=revision,
                dtype=saved.dtype,
                attention=saved.attention,
                quantization=saved.quantization,
            )
            self._bare, self._key = loaded.to(local_device()), key
        if not is_adapter(target):
            return OpenedModel(self._bare, template, "model", path)
        self._method = of_adapter(adapter_config(Path(target)).get("peft_type"), Path(target))
        adapted = self._method.code.load_adapter(self._bare, Path(target))
        self._worn = adapted.to(local_device())
        return OpenedModel(self._worn, template, "adapter", path)

    def _take_off(self) -> None:
        if self._worn is None:
            return
        self._bare = self._method.code.detach(self._worn)
        self._worn = None


def open_model(target: str | Path, *, base: str | None = None) -> OpenedModel:
    """The model in `target`: a base or merged checkpoint, a hub id, an adapter, or a checkpoint of a run.

    A checkpoint computes in the number format of its run, anything else in that of `model.dtype: auto`.

    Args:
        target: what is opened; of a run, one of its checkpoints.
        base: the adapter's base where its own record is out of date; its content is still checked.

    Raises:
        ModelError: `target` or the adapter's base is no model, or they do not belong together.
    """
    return Models().open(target, base=base)


def open_template(target: str | Path, *, base: str | None = None) -> ChatTemplate:
    """The chat template of what `open_model` opens, within a second and without torch."""
    _refuse_run_directory(Path(target))
    path, revision = base_of(target, base)
    if not is_adapter(target):
        return ChatTemplate(load_chat_tokenizer(*_tokenizer_source(path, revision)))
    if not Path(path).is_dir() and not _may_be_hub_id(path):
        raise ModelError(
            f"{target} is an adapter of {path}, which is not there (seen from {Path.cwd()}); "
            "say where its base model is now"
        )
    return ChatTemplate(load_chat_tokenizer(path, revision))


def is_adapter(target: str | Path) -> bool:
    """Whether `target` is an adapter, which needs a base."""
    return (Path(target) / ADAPTER).is_file()


def base_of(target: str | Path, base: str | None) -> tuple[str, str | None]:
    """Path and revision of the weights to load: the adapter's base, or `target` itself."""
    if not is_adapter(target):
        if base is not None:
            raise ModelError(f"{target} is a whole model, not an adapter: leave the base out")
        return str(target), None
    config = adapter_config(Path(target))
    path = base or config.get("base_model_name_or_path")
    if not path:
        raise ModelError(f"{Path(target) / ADAPTER} names no base model; say where it is")
    return str(path), None if base else config.get("revision")


def adapter_config(folder: Path) -> dict[str, Any]:
    """What PEFT's adapter_config.json in `folder` says."""
    try:
        return dict(json.loads((folder / ADAPTER).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{folder / ADAPTER} is damaged ({error}); copy the folder again"
        ) from error


def _tokenizer_source(path: str, revision: str | None) -> tuple[str, str | None]:
    """Where the tokenizer of a whole model lies: beside it, else with the base it was tuned from."""
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZERS):
        from finetune.artifacts.base_record import read_base_record

        if record := read_base_record(folder):
            return record.path, record.revision
    return path, revision


def _refuse_run_directory(folder: Path) -> None:
    is_model = (folder / ADAPTER).is_file() or (folder / "config.json").is_file()
    if is_model or not folder.is_dir():
        return
    if found := sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name)):
        raise ModelError(f"{folder} is a run; give one of its checkpoints, such as {found[-1]}")
    raise ModelError(
        f"{folder} has neither config.json nor {ADAPTER}; give the folder of a model, "
        "an adapter or a checkpoint"
    )


def _may_be_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))
