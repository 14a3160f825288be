"""A configuration of another program -> ours, with a word on every option.

finetune migrate lora.yaml --data data/AdvertiseGen --model THUDM/glm-4-9b-chat --output new.yaml
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from finetune.config.extras import OWNED, REFUSED, training_argument_names
from finetune.config.migrate_sources import FILL_IN, read_register, source_of
from finetune.config.migrate_tables import (
    AXOLOTL,
    DEMO,
    LLAMA_FACTORY,
    LORA,
    SWIFT,
    TRAINING_ARGUMENTS,
    TRL,
    Nothing,
    Option,
    Table,
    number,
)
from finetune.config.schema import held_out_share
from finetune.config.yaml_text import one_line, shown
from finetune.errors import ConfigError
from finetune.storage.given import read_given

MOST_OPTIONS = 10_000
"""Of another program's configuration; theirs have hundreds."""
_SECTIONS = ("model", "data", "method", "training", "deepspeed", "evaluation")
_ALWAYS = {
    "model.path": FILL_IN,
    "data.train": FILL_IN,
    "method.kind": "full",
    "training.output_dir": "runs/migrated",
}


@dataclass(frozen=True)
class Program:
    """Another program, and how its configurations are told."""

    name: str
    marks: frozenset[str]
    """Top-level keys that only its configurations have."""
    table: Table

    @property
    def whole_table(self) -> dict[str, str | Option | Nothing]:
        """Its own options before those of LoRA and of TrainingArguments."""
        return {**TRAINING_ARGUMENTS, **LORA, **self.table}


PROGRAMS = (
    Program(
        "the original GLM-4 demo", frozenset({"data_config", "training_args", "peft_config"}), DEMO
    ),
    Program(
        "axolotl",
        frozenset({"base_model", "micro_batch_size", "sequence_len", "sample_packing"}),
        AXOLOTL,
    ),
    Program(
        "LLaMA-Factory",
        frozenset(
            {
                "finetuning_type",
                "stage",
                "cutoff_len",
                "dataset_dir",
                "adapter_name_or_path",
                "template",
            }
        ),
        LLAMA_FACTORY,
    ),
    Program(
        "ms-swift",
        frozenset(
            {"train_type", "tuner_type", "model_type", "val_dataset", "agent_template", "attn_impl"}
        ),
        SWIFT,
    ),
    Program("TRL", frozenset({"dataset_name", "use_peft", "lora_target_modules"}), TRL),
)


@dataclass
class Migration:
    """What became of another program's configuration."""

    program: str
    values: dict[str, Any] = field(default_factory=dict)
    """Our dotted option -> value."""
    origins: dict[str, str] = field(default_factory=dict)
    """Our dotted option -> `their option; what differs`."""
    left: dict[str, str] = field(default_factory=dict)
    """Their option that has no counterpart -> why."""
    commands: list[str] = field(default_factory=list)
    """Commands that do what the old file asked for besides, or instead of, training."""

    @property
    def to_fill_in(self) -> list[str]:
        """Our options whose value the old file does not say."""
        return [key for key, value in self.values.items() if FILL_IN in (value, *_items(value))]

    def text(self) -> str:
        """The new configuration, with a comment on every line that came from an old one."""
        lines = [f"# From a configuration of {self.program}, by `finetune migrate`."]
        lines += [f"# {' '.join(command.split())}" for command in self.commands]
        for section in _SECTIONS:
            options = [key for key in self.values if key.split(".")[0] == section]
            lines += [f"{section}:"] * bool(options)
            lines += [line for key in options for line in self._lines(key)]
        if self.left:
            lines += ["", "# Not here:"]
            lines += [f"#   {name}: {why}" for name, why in self.left.items()]
        return "\n".join(lines) + "\n"

    def _lines(self, key: str) -> Iterator[str]:
        _, *inner = key.split(".")
        indent = "  "
        for part in inner[:-1]:  # only training.extra
            earlier = [k for k in self.values if k.startswith(key.rsplit(".", 1)[0] + ".")]
            if earlier[0] == key:
                yield f"{indent}{part}:"
            indent += "  "
        origin = self.origins.get(key)
        value = one_line(self.values[key])
        yield f"{indent}{inner[-1]}: {value}" + (f"  # {origin}" if origin else "")


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def program_of(tree: Any) -> Program | None:
    """The program whose configuration this is; None for ours and for anything else."""
    if not isinstance(tree, Mapping) or {"model", "method"} <= tree.keys():
        return None
    scores = [(len(program.marks & tree.keys()), program) for program in PROGRAMS]
    best = max(scores, key=lambda score: score[0])
    return best[1] if best[0] else None


def hint(tree: Any, key: Sequence[str | int]) -> str | None:
    """What became of an option of a configuration that is another program's, for an error message."""
    program = program_of(tree)
    if program is None:
        return None
    name = ".".join(str(part) for part in key)
    entry = _entry(program, name)
    if entry is None and isinstance(tree.get(name), Mapping):
        inner = [(part, hint(tree, (name, part))) for part in tree[name]]
        return "; ".join(f"{part}: {said}" for part, said in inner if said) or None
    return _told(entry) if entry else None


def told_of(name: str) -> str | None:
    """What became of an option of any other program, wherever its name stands, as an error message says it."""
    entries = [
        entry
        for program in PROGRAMS
        for known, entry in program.whole_table.items()
        if name in (known, known.rpartition(".")[2])
    ]
    # One that has a counterpart says more than one that has none.
    entries.sort(key=lambda entry: isinstance(entry, Nothing))
    return _told(entries[0]) if entries else None


def _told(entry: str | Option | Nothing) -> str:
    if isinstance(entry, Nothing):
        return entry.why
    if isinstance(entry, Option):
        return f"the option is {entry.to}" + (f" ({entry.note})" if entry.note else "")
    return f"the option is {entry}"


def migrate(path: Path, *, model: str | None = None, data: str | None = None) -> Migration:
    """Our configuration for another program's file.

    Args:
        path: The old configuration, YAML or JSON.
        model: The model, where the old file does not name it (the demo's command line does).
        data: The folder or file of the data, likewise; relative file names are seen from it.

    Raises:
        ConfigError: The file cannot be read, or it is no configuration of a program we know.
    """
    try:
        tree = yaml.safe_load(read_given(path, str(path)))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML or JSON: {error}; correct it") from None
    program = program_of(tree)
    if program is None:
        if isinstance(tree, Mapping) and {"model", "method"} <= tree.keys():
            raise ConfigError(
                f"{path} is a configuration of this program already; train it as it is: finetune train FILE"
            )
        names = ", ".join(known.name for known in PROGRAMS)
        raise ConfigError(
            f"{path} is not a configuration of {names}; nothing was written. Give the file of one of them"
        )
    found = Migration(program.name)
    try:  # aliases may make a text of a few lines endless
        options = list(islice(_flat(tree, program), MOST_OPTIONS + 1))
    except RecursionError:
        options = []
    if not options or len(options) > MOST_OPTIONS:
        raise ConfigError(
            f"{path} holds more than {MOST_OPTIONS:,} options, or one that holds itself; correct it"
        )
    for name, value in options:
        _take(found, program, name, value)
    if model is not None:
        found.values["model.path"] = model
    _settle(found, tree, path)
    if data is not None:
        _place_data(found, data)
    for key, default in _ALWAYS.items():
        found.values.setdefault(key, default)
    _order(found)
    return found


def _flat(tree: Mapping[str, Any], program: Program) -> Iterator[tuple[str, Any]]:
    """(dotted option, value); a mapping that is an option of its own stays whole."""
    for name, value in tree.items():
        plain = " ".join(str(name).split())  # names stand in comments of the new file, a line each
        if isinstance(value, Mapping) and plain not in program.whole_table:
            for inner, of_inner in _flat(value, program):
                yield f"{plain}.{inner}", of_inner
        else:
            yield plain, value


def _entry(program: Program, name: str) -> str | Option | Nothing | None:
    table = program.whole_table
    last = name.rsplit(".", 1)[-1]
    return table.get(name) or (
        table.get(last) if program.table is DEMO or "." not in name else None
    )


def _take(found: Migration, program: Program, name: str, value: Any) -> None:
    entry = _entry(program, name)
    last = name.rsplit(".", 1)[-1]
    if entry is None:
        if last in REFUSED:
            found.left[name] = REFUSED[last]
        elif last in training_argument_names() and last not in OWNED:
            found.values[f"training.extra.{last}"] = number(value)
            found.origins[f"training.extra.{last}"] = name
        else:
            found.left[name] = "no such option here"
        return
    if isinstance(entry, Nothing):
        found.left[name] = entry.why
        return
    option = Option(entry) if isinstance(entry, str) else entry
    try:
        ours = option.value(value)
    except (TypeError, ValueError, KeyError, AttributeError):
        found.left[name] = f"its value {shown(value)} is not understood; the option is {option.to}"
        return
    if ours is None or ours == []:
        if value not in (None, False, "none", "no", "disabled", []):
            found.left[name] = option.note or f"{shown(value)} has no counterpart; see {option.to}"
        return
    if isinstance(ours, dict):
        for inner, of_inner in ours.items():
            found.values[f"{option.to}.{inner}"] = of_inner
            found.origins[f"{option.to}.{inner}"] = name
        return
    found.values[option.to] = ours
    found.origins[option.to] = f"{name}; {option.note}" if option.note else name


def _settle(found: Migration, tree: Mapping[str, Any], path: Path) -> None:
    """What depends on several old options at once."""
    values = found.values
    lengths = [tree.get(name) for name in ("max_input_length", "max_output_length")]
    if all(isinstance(length, int) for length in lengths):
        values["data.max_length"] = sum(lengths) + 1  # type: ignore[arg-type]
        found.origins["data.max_length"] = "max_input_length + max_output_length + the stop"
    if "4v" not in str(values.get("model.path")).lower() and "freezeV" in tree:
        values.pop("model.freeze", None)
        found.left["freezeV"] = (
            "of GLM-4V, where it is model.freeze: [vision]; text models have no vision encoder"
        )
    if "training.max_steps" in values:
        values.pop("training.num_epochs", None)
    if values.get("data.packing"):
        values.pop("data.group_by_length", None)
    _settle_method(found)
    if found.program == "LLaMA-Factory":
        names = {key: found.values.get(key) for key in ("data.train", "data.validation")}
        register = read_register(str(tree.get("dataset_dir") or "data"), path.parent)
        for key, listed in names.items():
            if isinstance(listed, list):
                found.values[key] = [source_of(name, register, found.left) for name in listed]
        _limit_rows(found, tree.get("max_samples"))
    found.commands += _other_commands(tree)
    if found.commands and values.pop("model.adapter", None):
        found.left["adapter_name_or_path"] = "named in the command above"


def _limit_rows(found: Migration, rows: Any) -> None:
    """LLaMA-Factory's `max_samples` for the training sources that the file names."""
    sources = found.values.get("data.train")
    if not isinstance(rows, int) or not isinstance(sources, list) or FILL_IN in sources:
        return
    found.values["data.train"] = [
        {**(source if isinstance(source, dict) else {"path": source}), "max_rows": rows}
        for source in sources
    ]
    found.left["max_samples"] = "max_rows of each source in data.train; validation is used whole"


def _settle_method(found: Migration) -> None:
    """The method that the options speak of, without options of another one."""
    values = found.values
    given = [key for key in values if key.startswith("method.") and key != "method.kind"]
    if given:
        values.setdefault("method.kind", "lora")
    kind = values.get("method.kind")
    for key in given:
        if kind == "full" or (kind == "ptuning_v2") != (key == "method.num_virtual_tokens"):
            found.left[found.origins.get(key, key)] = f"belongs to another method than {kind}"
            del values[key]
    if kind == "full":
        values.pop("model.quantization", None)


def _other_commands(tree: Mapping[str, Any]) -> list[str]:
    """What the old file asks for that is a command here."""
    model = tree.get("model_name_or_path", "MODEL")
    adapter = tree.get("adapter_name_or_path", model)
    base = f" --base {model}" if adapter != model else ""
    if "export_dir" in tree:
        return [
            f"The old file merges; that is: finetune merge {adapter}{base} --output {tree['export_dir']}"
        ]
    if tree.get("do_predict"):
        return [f"The old file predicts; that is: finetune evaluate {adapter} --data FILE"]
    if "infer_backend" in tree and "dataset" not in tree:
        return [f"The old file chats; that is: finetune chat {adapter}{base} (or finetune serve)"]
    return []


def _place_data(found: Migration, data: str) -> None:
    folder = Path(data)
    for key in ("data.train", "data.validation"):
        value = found.values.get(key)
        if held_out_share(value) is not None:
            continue
        if isinstance(value, str) and value != FILL_IN and not Path(value).is_absolute():
            found.values[key] = str(folder / value) if folder.suffix == "" else data
    train = found.values.get("data.train")
    if train in (None, FILL_IN) or (isinstance(train, list) and FILL_IN in train):
        found.values["data.train"] = data


def _order(found: Migration) -> None:
    """Our options in the order of the sections, `kind` first in its."""
    order = {section: number for number, section in enumerate(_SECTIONS)}
    keys = sorted(
        found.values,
        key=lambda key: (order[key.split(".")[0]], key != "method.kind", key.count(".")),
    )
    found.values = {key: found.values[key] for key in keys}
