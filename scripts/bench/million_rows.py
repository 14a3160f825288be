"""Preparing a million short rows: by one process, by shards, and put together again.

    python scripts/bench/million_rows.py --tokenizer FOLDER [--rows 1000000] [--files 16] [--shards 4]

FOLDER holds the files of a tokenizer. Rows are dialogues of two short messages, made of seeded words, in so
many files. Each child is measured by its own resource usage (CPU seconds of all threads, peak memory):
one that prepares everything, one for each shard (`finetune data prepare --shard`), and one that finds the
shards and copies them together. What the last one made must equal what the first one made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import prepare

WORDS = [
    "the",
    "order",
    "was",
    "sent",
    "on",
    "Monday",
    "and",
    "arrives",
    "in",
    "two",
    "days",
    "这件衣服的版型很好",
    "面料舒适",
    "透气",
    "customer",
    "asks",
    "where",
    "to",
    "find",
    "a",
    "receipt",
    "请问",
    "今天",
    "天气",
    "怎么样",
    "please",
    "return",
    "it",
    "within",
    "30",
    "days",
    "谢谢",
    "how",
    "much",
    "is",
    "shipping",
]


def write_rows(folder: Path, rows: int, files: int) -> None:
    """Files of rows, each file with as many as the others."""
    draw = random.Random(0)
    folder.mkdir()
    for number in range(files):
        with (folder / f"rows-{number:03}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(number, rows, files):
                asked, said = (
                    " ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(2)
                )
                messages = [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": said},
                ]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def child(tokenizer: Path, rows: Path, cache: Path, shard: str) -> None:
    """Prepare, and print the counts and what tells the examples from others."""
    from finetune.config.data_section import DataSection
    from finetune.config.schema import ModelSection
    from finetune.data.examples.ahead import prepare_ahead
    from finetune.data.examples.store import ExampleFile

    section = DataSection(train=str(rows), cache_dir=str(cache))
    counts = prepare_ahead(section, ModelSection(path=str(tokenizer)), 0, shard or None)
    entries = (cache / "examples").glob("*/examples.arrow")
    largest = max(entries, key=lambda file: file.stat().st_size)
    digest = hashlib.sha256(ExampleFile(largest).digests().tobytes()).hexdigest()
    print(json.dumps({"rows": counts.rows, "tokens": counts.tokens, "digest": digest}))


def said(name: str, found: dict[str, Any], rows: int) -> None:
    """One line of Markdown."""
    print(f"| {name} | {found['cpu']:.1f} | {rows / found['cpu']:,.0f} | {found['peak_mb']} |", flush=True)  # fmt: skip


def main() -> None:
    """The table."""
    if sys.argv[1:2] == ["child"]:
        return child(*map(Path, sys.argv[2:5]), sys.argv[5])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--shards", type=int, default=4)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows", asked.rows, asked.files)

        def run(cache: str, shard: str = "") -> dict[str, Any]:
            given = asked.tokenizer.resolve(), folder / "rows", folder / cache, shard
            return prepare.run("child", *given, program=__file__)

        print(
            f"{asked.rows:,} rows\n\n| | CPU s | rows a CPU second | peak MB |\n|---|---|---|---|"
        )
        whole = run("alone")
        said(f"everything, {whole['tokens']:,} tokens", whole, asked.rows)
        for number in range(1, asked.shards + 1):
            part = run("shared", f"{number}/{asked.shards}")
            said(f"shard {number}/{asked.shards}", part, part["rows"])
        together = run("shared")
        said("put together", together, asked.rows)
        same = whole["digest"] == together["digest"]
        print(f"\nthe same examples in the same order: {same}")
    raise SystemExit(not same)


if __name__ == "__main__":
    sys.path.insert(0, str(prepare.ROOT))
    main()
