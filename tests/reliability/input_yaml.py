"""Configuration files: the same run in many spellings, and everything that is refused, before any heavy import."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import config_text
from config_text import MINIMAL

from tests.reliability.frame import Case
from tests.reliability.places import light, shared

RATE = MINIMAL + "  learning_rate: 5e-4\n"
SECTIONS = {
    "model": {"path": "some/model"},
    "data": {"train": "train.jsonl"},
    "method": {"kind": "lora"},
    "training": {"output_dir": "runs/x", "learning_rate": 5e-4},
}
BENIGN: dict[str, str | bytes] = {
    "byte order mark": b"\xef\xbb\xbf" + RATE.encode(),
    "CRLF": RATE.replace("\n", "\r\n"),
    "CR": RATE.replace("\n", "\r"),
    "document marker": f"---\n{RATE}",
    "document end": f"{RATE}...\n",
    "version": f"%YAML 1.1\n---\n{RATE}",
    "comments": RATE.replace("\n", "  # why\n"),
    "blank lines": RATE.replace("\n", "\n\n"),
    "JSON": json.dumps(SECTIONS),
    "JSON over lines": json.dumps(SECTIONS, indent=2),
    "keys in another order": json.dumps(dict(reversed(SECTIONS.items()))),
    "single quotes": RATE.replace("some/model", "'some/model'"),
    "double quotes": RATE.replace("some/model", '"some\\u002fmodel"'),
    "folded text": RATE.replace("some/model", ">-\n    some/model"),
    "literal text": RATE.replace("some/model", "|-\n    some/model"),
    "wide indent": RATE.replace("  ", "        "),
    "flow section": RATE.replace("\n  kind: lora", " {kind: lora}"),
    "number as 0.0005": RATE.replace("5e-4", "0.0005"),
    "number as .5E-3": RATE.replace("5e-4", ".5E-3"),
    "no newline at the end": RATE.rstrip("\n"),
    "empty section": RATE + "evaluation:\n",
    "explicit default": RATE + "  seed: 42\n",
    "explicit null": RATE + "  max_steps: null\n",
    "an empty list": RATE.replace("some/model\n", "some/model\n  freeze: []\n"),
}
OVERRIDES = {
    ("method.rank=0",): "command line: method.rank: must be greater than 0, got 0",
    ("method.rnak=8",): "command line: method.rnak: unknown key in method; did you mean rank?",
    ("rank=8",): "command line: rank: unknown key in the top level",
    ("method.rank",): "is not of the form section.key=value",
    ("=8",): "is not of the form section.key=value",
    ("method..rank=8",): "is not of the form section.key=value",
    ("method.rank=*x",): "command line: method.rank: `*x` is refused",
    ("method.rank=!!python/name:os.system",): "tag `!!python/name:os.system` is refused",
    ("model.path.x=1",): "model.path is text, without keys",
    ("training.extra={a: [}",): "command line: training.extra: not valid YAML",
    ("method.rank=${HOME}",): "must be a whole number, got '${HOME}'",
    ("method.kind=full", "method.rank=8"): "method.rank: belongs to kind: lora",
    ("model.dtype=bf16", "data.max_length=x", "training.seed=-1"): "3 problems in the configuration",
}  # fmt: skip
MORE_SURPRISES: list[tuple[str | bytes, str]] = [
    (MINIMAL.encode("utf-16-le"), "is not allowed in YAML"),
    (MINIMAL.encode("utf-32"), "is not UTF-8"),
    (MINIMAL.encode() + "x: ä\n".encode("latin-1"), "x.yaml:9: byte 0xe4 is not UTF-8"),
    (MINIMAL + "x: [" * 2000 + "]" * 2000, "nested deeper than 16 levels"),
    ("&a model: *a\n", "`&a` is refused"),
    (MINIMAL + "!!set {a, b}: 1\n", "x.yaml:9"),
    (MINIMAL + "x: !<tag:yaml.org,2002:python/object/new:os.system> [id]\n", "is refused"),
    (MINIMAL + "model:\n  path: other\n", "x.yaml:9: model: given twice, first in line 1"),
    (MINIMAL + "1: 2\n", "x.yaml:9: 1: unknown key in the top level"),
    (MINIMAL + "null: 2\n", "x.yaml:9: null: unknown key in the top level"),
    (MINIMAL.replace("some/model", "*.safetensors"), "text that begins with * & ! @ % ` goes in quotes"),
    (MINIMAL.replace("some/model", "@model"), "x.yaml:2: not valid YAML"),
    (MINIMAL + "  output_dir: again\n", "x.yaml:9: training.output_dir: given twice"),
    (MINIMAL + "- a\n", "x.yaml:9: not valid YAML"),
    (json.dumps(SECTIONS)[:-3], "not valid YAML"),
    ("\0" * 100, "x.yaml:1: character 0x0000 is not allowed"),
    ("a: 1\n" * 10_000, "given twice"),
    ("a: 1\n" * 100_000, "is larger than 65536 bytes"),
    (bytes(range(256)), "is not UTF-8"),
]  # fmt: skip
MORE_CONTRADICTIONS = [
    ("  max_steps: 5\n  num_epochs: 1\n", "x.yaml:10: training.num_epochs", "contradicts training.max_steps"),
    ("deepspeed:\n  config: ds.json\n  offload_optimizer: cpu\n", "deepspeed.offload_optimizer", "contradicts deepspeed.config"),
    ("evaluation:\n  best_metric: loss\n  patience: 2\n  every_steps: 5\n", "evaluation.patience", "give data.validation"),
    ("  extra: {output_dir: x}\n", "training.extra.output_dir", "training.output_dir"),
    ("  extra: {num_train_epochs: 2}\n", "training.extra.num_train_epochs", "training.num_epochs"),
    ("  extra: {deepspeed: ds.json}\n", "training.extra.deepspeed", "the section deepspeed"),
]  # fmt: skip


def _shown(folder: Path, content: str | bytes) -> str:
    (folder / "x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    outcome = light().run("train", "x.yaml", "--show-config", cwd=folder)
    assert outcome.code == 0, outcome.err
    outcome.cheap()
    return outcome.out


@cache
def _plain() -> str:
    said = _shown(shared(""), RATE)
    assert "learning_rate: 0.0005" in said
    return said


def loads_as_plain(content: str | bytes, folder: Path) -> None:
    """Another spelling of the same configuration gives the same one, every option of it."""
    assert _shown(folder, content) == _plain()


def is_refused(content: str | bytes, said: tuple[str, ...], folder: Path) -> None:
    """The file, the line and the key are named; nothing is made."""
    (folder / "x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    light().run("train", "x.yaml", cwd=folder).refused("x.yaml", *said)
    assert [path.name for path in folder.iterdir()] == ["x.yaml"]


def override_is_refused(words: tuple[str, ...], said: str, folder: Path) -> None:
    """The command line is named as the place."""
    (folder / "x.yaml").write_text(MINIMAL)
    light().run("train", "x.yaml", *words, cwd=folder).refused("command line: ", said)
    assert [path.name for path in folder.iterdir()] == ["x.yaml"]


def an_alias_bomb(folder: Path) -> None:
    """Nine to the power of thirty strings are not made."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    is_refused("\n".join(lines), ("x.yaml:2: a1[8]: `*a0` is refused",), folder)


def all_at_once(folder: Path) -> None:
    """One file with a problem of every kind names each of them with its line."""
    text = (
        "model:\n  path: m\n  dtyp: auto\ndata:\n  train: [5]\n  max_length: long\n"
        "method:\n  kind: full\n  rank: 8\ntraining:\n  max_steps: 1\n  num_epochs: 1\n"
        "  seed: 1\n  seed: 2\n  extra: {optmi: x}\nx: !!str 5\ny: &a 1\n"
    )
    lines = {3: "model.dtyp", 5: "data.train[0]", 6: "data.max_length", 9: "method.rank",
             10: "training.output_dir", 12: "training.num_epochs", 14: "training.seed",
             15: "training.extra.optmi", 16: "x", 17: "y"}  # fmt: skip
    said = [f"  x.yaml:{line}: {key}: " for line, key in lines.items()]
    is_refused(text, ("10 problems in the configuration:", *said), folder)


def cases() -> Iterator[Case]:
    """Every configuration."""
    _plain()
    for name, content in BENIGN.items():
        yield Case(f"yaml: benign, {name}", partial(loads_as_plain, content))
    refused: list[tuple[str, str | bytes, tuple[str, ...]]] = []
    for line, said in [*config_text.UNKNOWN_KEYS, *config_text.WRONG_KINDS]:
        refused.append(("yaml", MINIMAL + line, (said,)))
    for train, said in config_text.WRONG_SOURCES:
        refused.append(("yaml", MINIMAL.replace("train.jsonl", train), (said,)))
    for content, said in [*config_text.SURPRISES, *MORE_SURPRISES]:
        refused.append(("yaml", content, (said,)))
    for lines, key, said in [*config_text.CONTRADICTIONS, *MORE_CONTRADICTIONS]:
        refused.append(("contradictions", MINIMAL + lines, (key, said)))
    for number, (group, content, said) in enumerate(refused, 1):
        name = f"{group}: {number}, {' '.join(said)}"
        yield Case(name, partial(is_refused, content, said))
    yield Case("yaml: an alias bomb", an_alias_bomb)
    yield Case("yaml: a problem of every kind at once", all_at_once)
    for words, said in OVERRIDES.items():
        yield Case(f"yaml: {' '.join(words)}", partial(override_is_refused, words, said))
