"""What a stream of dialogues costs beside preparing the same rows, and how much memory it holds.

    python scripts/bench/stream.py --assets FOLDER [--rows 20000 200000]

FOLDER is as in prepare.py. The rows are cut into eight files. Children, each measured by its own
resource usage: one goes through a pass of the stream (`data.streaming`), one starts at its middle and
takes the next 100 examples, as a resumed run does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import prepare

TOKENIZER = prepare.TOKENIZER
FILES = 8


def main() -> None:
    """Run as a program: the table, or the child that the first argument names."""
    if sys.argv[1:2] == ["stream"]:
        return print(json.dumps(stream(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for rows in given.rows:
            shards = Path(folder) / str(rows)
            shards.mkdir()
            write_shards(given.assets.resolve(), shards, rows)
            tokenizer = given.assets.resolve() / TOKENIZER
            whole = prepare.run("stream", tokenizer, shards, "{}", program=__file__)
            middle = json.dumps(whole["middle"])
            resumed = prepare.run("stream", tokenizer, shards, middle, program=__file__)
            print(
                f"{rows:,} dialogues, {whole['tokens']:,} tokens: {whole['cpu']:.1f} CPU s, "
                f"{whole['peak_mb']} MB; 100 examples from the middle on: {resumed['cpu']:.1f} CPU s, "
                f"the first after {resumed['first_s']:.2f} s"
            )
    return None


def write_shards(assets: Path, folder: Path, count: int) -> None:
    """The rows that prepare.py makes, in FILES files."""
    together = folder / "all"
    prepare.write_rows(assets, together, count)
    with together.open(encoding="utf-8") as lines:
        for number in range(FILES):
            share = islice(lines, -(-count // FILES))
            (folder / f"{number}.jsonl").write_text("".join(share), encoding="utf-8")
    together.unlink()


def stream(tokenizer: Path, shards: Path, start: str) -> dict[str, Any]:
    """Child: one pass, or 100 examples from a position on."""
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer
    from finetune.data.examples.preparation import LengthPolicy
    from finetune.data.examples.stream import START, ExampleStream, StreamSettings, position_of
    from finetune.data.reading.shards import shards_of
    from finetune.data.reading.sources import AS_IS, SourceSpec

    template = ChatTemplate(load_chat_tokenizer(tokenizer))
    sources = [SourceSpec(str(shards))]
    options = StreamSettings(LengthPolicy(100_000), AS_IS, seed=0, shuffle_buffer=10_000)
    found = ExampleStream(shards_of(sources), sources, template, options)
    position = json.loads(start)
    begun = time.perf_counter()
    if position:
        items = found.items(position_of(position))
        next(items)
        first = time.perf_counter() - begun
        return {"first_s": first, "tokens": sum(item.tokens for item in islice(items, 99))}
    half = sum(1 for file in shards.glob("*.jsonl") for _ in file.open(encoding="utf-8")) // 2
    tokens, middle = 0, START
    for number, item in enumerate(found.items()):
        if found.position.number_of_pass:
            break
        tokens += item.tokens
        middle = found.position if number == half else middle
    return {"tokens": tokens, "middle": middle.as_json()}


if __name__ == "__main__":
    sys.path.insert(0, str(prepare.ROOT))
    main()
