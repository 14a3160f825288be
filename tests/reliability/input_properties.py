"""Properties that hold for whatever hypothesis thinks of: JSONL, YAML, encodings, and broken bytes of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dialogues import dialogues
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.reliability.frame import Case

OPTIONS = settings(
    max_examples=150,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(TEXT, JSON, max_size=3), min_size=1, max_size=5)


def _rows(path: Path) -> list[Any]:
    from finetune.data.reading.files import read_rows

    return list(read_rows(path))


def jsonl_is_read_as_written(folder: Path) -> None:
    """Any JSON, escaped or not, whatever ends its lines, in a line or an array."""

    @seed(1)
    @OPTIONS
    @given(ROWS, st.booleans(), st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from([None, 1]))
    def holds(rows: list[Any], ascii_only: bool, newline: str, indent: int | None) -> None:
        lines = newline.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        array = json.dumps(rows, ensure_ascii=ascii_only, indent=indent).replace("\n", newline)
        for name, text in (("a.jsonl", lines), ("a.json", array)):
            (folder / name).write_bytes(text.encode())
            assert [row.value for row in _rows(folder / name)] == rows

    holds()


def broken_jsonl_is_named(folder: Path) -> None:
    """Bytes put in, changed or cut at any place give rows or reasons, never an exception."""
    from finetune.data.reading.files import BadRow, Row

    @seed(2)
    @OPTIONS
    @given(ROWS, st.integers(0, 400), st.binary(max_size=6), st.integers(0, 6), st.booleans())
    def holds(rows: list[Any], at: int, put: bytes, cut: int, array: bool) -> None:
        text = json.dumps(rows) if array else "\n".join(map(json.dumps, rows))
        whole = text.encode()
        path = folder / "a.jsonl"
        path.write_bytes(whole[:at] + put + whole[at + cut :])
        for row in _rows(path):
            assert isinstance(row, Row | BadRow)
            assert row.location.startswith(f"{path}:")
            if isinstance(row, Row):
                json.dumps(row.value, ensure_ascii=False, allow_nan=False).encode()
            else:
                assert row.reason

    holds()


def yaml_is_read_back(folder: Path) -> None:
    """A resolved configuration with any text in it is read back equal."""
    from finetune.config.load import dump_config, load_config
    from finetune.config.schema import RunConfig

    @seed(3)
    @OPTIONS
    @given(TEXT, st.floats(1e-12, 1e12), st.integers(1, 10**9), st.lists(TEXT, max_size=2))
    def holds(text: str, rate: float, steps: int, parts: list[str]) -> None:
        sections = {
            "model": {"path": text, "revision": text, "freeze": parts},
            "data": {"train": [text, {"path": text, "weight": rate}]},
            "method": {"kind": "lora"},
            "training": {"output_dir": text, "learning_rate": rate, "max_steps": steps},
        }
        config = RunConfig.model_validate(sections)
        path = folder / "x.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config

    holds()


def broken_yaml_is_named(folder: Path) -> None:
    """Bytes put in, changed or cut at any place give a configuration or a message, nothing else."""
    from config_text import MINIMAL

    from finetune.config.load import load_config
    from finetune.errors import ConfigError

    @seed(4)
    @OPTIONS
    @given(st.integers(0, len(MINIMAL)), st.binary(max_size=6), st.integers(0, 6))
    def holds(at: int, put: bytes, cut: int) -> None:
        path = folder / "x.yaml"
        path.write_bytes(MINIMAL.encode()[:at] + put + MINIMAL.encode()[at + cut :])
        said = "x.yaml"
        try:
            load_config(path)
        except ConfigError as error:
            said = str(error)
        assert "x.yaml" in said

    holds()


def encoding_is_reversible(folder: Path) -> None:
    """Any dialogue: the replies that are trained, decoded, are the replies."""
    from tests.reliability.input_controls import _template

    template = _template()

    @seed(5)
    @OPTIONS
    @given(dialogues())
    def holds(dialogue: Any) -> None:
        (rendered,) = template.render([dialogue])
        ids = rendered.input_ids.tolist()
        for reply in rendered.replies:
            message = dialogue.messages[reply.message]
            said = template.parse(ids[reply.start : reply.end])
            assert said.metadata == message.metadata.strip()
            assert said.content == message.content

    holds()


def rows_are_dialogues_or_reasons(folder: Path) -> None:
    """Any JSON in the place of messages and tools: a dialogue that renders, or a RowError."""
    from finetune.data.dialogue.conversation import RowError
    from finetune.data.dialogue.formats import to_conversation
    from tests.reliability.input_controls import _template

    message = st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "observation", "x"])},
        optional=dict.fromkeys(("content", "metadata", "tool_calls", "train", "weight", "name", "tools"), JSON),
    )  # fmt: skip

    @seed(6)
    @OPTIONS
    @given(st.lists(message | JSON, max_size=4), st.none() | JSON)
    def holds(messages: list[Any], tools: Any) -> None:
        try:
            dialogue = to_conversation({"messages": messages, "tools": tools}, "messages")
        except RowError:
            return
        _template().render([dialogue])

    holds()


PROPERTIES: dict[str, Callable[[Path], None]] = {
    "JSONL is read as it was written": jsonl_is_read_as_written,
    "broken JSONL is named": broken_jsonl_is_named,
    "YAML is read back": yaml_is_read_back,
    "broken YAML is named": broken_yaml_is_named,
    "encoding is reversible": encoding_is_reversible,
    "rows are dialogues or reasons": rows_are_dialogues_or_reasons,
}


def cases() -> Iterator[Case]:
    """Every property, 150 examples each."""
    from tests.reliability.input_controls import _template

    _template()
    for name, check in PROPERTIES.items():
        yield Case(f"properties: {name}", check)
