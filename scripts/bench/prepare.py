"""What preparing dialogues costs, against the tokenizer's own cost on the same texts.

    python scripts/bench/prepare.py --assets FOLDER [--rows 20000 200000] [--rounds 3] [--json]
    python scripts/bench/prepare.py --assets FOLDER --file data/toolcall/glaive_zh_sharegpt.json --against CHECKOUT

FOLDER holds assets/glm-4-9b-chat (the published tokenizer's files) and the four public files that
SETS names under data/, which are not part of this repository. The dialogues of AdvertiseGen, Alpaca and the tool set (four times as often as the others, which
makes 188 tokens on average) are repeated, each time in another order, into a temporary JSONL file.
Then two kinds of child process take turns, each measured by its own resource usage:

    floor     `encode_batch_fast` on the dialogues as texts, 1,000 at a time, nothing kept;
              its figure is the CPU time of those calls alone, without start and reading
    prepare   files -> examples on disk, the whole process: start, imports, opening the tokenizer
              and the template, reading, checking, tokenising, spans, writing, verifying

CPU seconds are user + system over all threads. The ratio is between medians of the rounds.

With --file the rows of that one file are repeated as they are, in their own layout. With --against
another checkout of this project prepares the same rows in turn, and takes the place of the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = "assets/glm-4-9b-chat"
SETS = {
    "data/advertisegen/train.jsonl": 1,
    "data/advertisegen/dev.jsonl": 1,
    "data/alpaca/alpaca_zh.json": 1,
    "data/toolcall/glaive_zh_sharegpt.json": 4,
}
"""Files, and how often each is in one pass over all."""
BATCH = 1000


def main() -> None:
    """Run as a program: the table, or the child that the first argument names."""
    if sys.argv[1:2] == ["floor"]:
        return floor(Path(sys.argv[2]), Path(sys.argv[3]))
    if sys.argv[1:2] == ["prepare"]:
        return prepare(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
    if sys.argv[1:2] == ["texts"]:
        return write_texts(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--assets",
        type=Path,
        required=True,
        help="folder with assets/glm-4-9b-chat (a tokenizer) and the files: " + ", ".join(SETS),
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="of the first size; of the others one preparation is measured, without a floor",
    )
    parser.add_argument("--file", type=Path, help="the one file under FOLDER whose rows are meant")
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for place, rows in enumerate(given.rows):
            rounds = given.rounds if place == 0 else 0
            work = Path(folder) / str(rows)
            work.mkdir()
            assets, file = given.assets.resolve(), work / "rows.jsonl"
            write_rows(assets, file, rows, given.file)
            tokenizer = assets / TOKENIZER
            if given.against:
                results.append(beside(given.against.resolve(), tokenizer, file, given.rounds))
                print(json.dumps(results[-1]), flush=True)
                continue
            results.append(measure(tokenizer, work, rows, rounds))
            if not given.json:
                print(as_text(results[-1]), flush=True)
    if given.json and not given.against:
        print(json.dumps(results, indent=1))
    return None


def beside(other: Path, tokenizer: Path, rows: Path, rounds: int) -> dict[str, Any]:
    """Medians of both checkouts' preparation of the same rows, in turns, and their ratios."""
    found: dict[str, list[dict[str, Any]]] = {"here": [], "there": []}
    programs = {"here": __file__, "there": str(other / "scripts/bench/prepare.py")}
    for number in range(rounds + 1):
        for name, program in programs.items():
            cache = rows.parent / f"{name}-{number}"
            figures = run("prepare", tokenizer, rows, cache, program=program)
            shutil.rmtree(cache)
            if number:  # the first round fills the system's caches
                found[name].append(figures)
    if len({figures["tokens"] for side in found.values() for figures in side}) != 1:
        raise SystemExit(f"not the same tokens: {found}")
    medians = {
        name: {key: statistics.median(one[key] for one in side) for key in ("cpu", "peak_mb")}
        for name, side in found.items()
    }
    ratios = {key: medians["here"][key] / medians["there"][key] for key in ("cpu", "peak_mb")}
    return {"rows": sum(1 for _ in rows.open("rb")), "rounds": rounds, **medians, "ratios": ratios}


def measure(tokenizer: Path, work: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Figures of one size: floor and preparation in turns, or with 0 rounds one preparation alone."""
    file = work / "rows.jsonl"
    floors, preparations = [], []
    if rounds:
        run("texts", tokenizer, file, work / "texts.jsonl")  # also converts the tokenizer
    for number in range(max(rounds, 1)):
        if rounds:
            floors.append(run("floor", tokenizer, work / "texts.jsonl"))
        preparations.append(run("prepare", tokenizer, file, work / f"cache-{number}"))
    again = run("prepare", tokenizer, file, work / "cache-0")
    if len({p["tokens"] for p in [*floors, *preparations, again]}) != 1:
        raise SystemExit(f"not the same tokens: {floors} {preparations}")
    cpu = statistics.median(p["cpu"] for p in preparations)
    result = {
        "rows": rows,
        "tokens": again["tokens"],
        "rounds": rounds,
        "prepare_cpu_s": round(cpu, 2),
        "prepare_peak_mb": max(p["peak_mb"] for p in preparations),
        "again_cpu_s": round(again["cpu"], 2),
        "again_peak_mb": again["peak_mb"],
    }
    if not floors:
        return result
    floor_cpu = statistics.median(f["encode_cpu"] for f in floors)
    return result | {
        "floor_cpu_s": round(floor_cpu, 2),
        "floor_process_cpu_s": round(statistics.median(f["cpu"] for f in floors), 2),
        "floor_peak_mb": max(f["peak_mb"] for f in floors),
        "ratio": round(cpu / floor_cpu, 2),
    }


def as_text(result: dict[str, Any]) -> str:
    """One size as lines of a table."""
    lines = [f"{result['rows']:,} dialogues, {result['tokens']:,} tokens"]
    if result["rounds"]:
        lines[0] += f", median of {result['rounds']} rounds"
        lines.append(
            f"  encode_batch_fast {result['floor_cpu_s']:8.2f} CPU s {result['floor_peak_mb']:6} MB"
            f"   (its whole process {result['floor_process_cpu_s']:.2f})"
        )
    ratio = f"   ratio {result['ratio']:.2f}" if "ratio" in result else ""
    return "\n".join(
        [
            *lines,
            f"  prepare           {result['prepare_cpu_s']:8.2f} CPU s {result['prepare_peak_mb']:6} MB"
            + ratio,
            f"  prepared before   {result['again_cpu_s']:8.2f} CPU s {result['again_peak_mb']:6} MB",
        ]
    )


def run(*command: object, program: str = __file__) -> dict[str, Any]:
    """What a child of this file, or of another `program`, prints as JSON, with its CPU seconds and peak memory."""
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(
            [sys.executable, program, *map(str, command)], stdout=out, cwd=ROOT
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            raise SystemExit(f"{command[0]} ended with {child.returncode}")
        out.seek(0)
        printed = json.loads(out.read().splitlines()[-1])
    figures = {"cpu": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss // 1024}
    return figures | printed


def write_rows(assets: Path, target: Path, count: int, only: Path | None = None) -> None:
    """`count` rows, pass after pass, each pass shuffled: of the `messages` layout over the sets, or of one file as they are."""
    sys.path.insert(0, str(ROOT))
    lines = own_rows(assets / only) if only else rows_of_sets(assets)
    shuffler = random.Random(0)
    with target.open("w", encoding="utf-8") as out:
        for place in range(count):
            if place % len(lines) == 0:
                shuffler.shuffle(lines)
            out.write(lines[place % len(lines)] + "\n")


def own_rows(file: Path) -> list[str]:
    """The rows of a file in its own layout, as JSON."""
    from finetune.data.reading.files import read_rows

    return [json.dumps(row.value, ensure_ascii=False) for row in read_rows(file)]  # type: ignore[union-attr]


def rows_of_sets(assets: Path) -> list[str]:
    """The dialogues of all sets as rows of the `messages` layout."""
    from finetune.data.reading.sources import SourceSpec, read_conversations

    return [
        json.dumps(as_row(conversation), ensure_ascii=False)
        for file, times in SETS.items()
        for conversation in read_conversations([SourceSpec(str(assets / file))])
        for _ in range(times)
    ]


def as_row(conversation: Any) -> dict[str, Any]:
    """A dialogue in the `messages` layout."""
    messages = [
        {"role": m.role, "content": m.content} | ({"metadata": m.metadata} if m.metadata else {})
        for m in conversation.messages
    ]
    return {"messages": messages} | (
        {"tools": list(conversation.tools)} if conversation.tools else {}
    )


def write_texts(tokenizer: Path, rows: Path, target: Path) -> None:
    """Child: every dialogue as the text that gives its ids, one JSON string per line."""
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer
    from finetune.data.reading.sources import SourceSpec, read_conversations

    template = ChatTemplate(load_chat_tokenizer(tokenizer))
    stream = read_conversations([SourceSpec(str(rows))])
    with target.open("w", encoding="utf-8") as out:
        while batch := list(islice(stream, BATCH)):
            for rendered in template.render(batch):
                out.write(json.dumps(template.decode(rendered.input_ids)) + "\n")
    print("{}")


def floor(tokenizer: Path, texts: Path) -> None:
    """Child: `encode_batch_fast` on all texts."""
    from tokenizers import Tokenizer

    from finetune.data.chat.tokenizer import tokenizer_file

    encoder = Tokenizer.from_file(str(tokenizer_file(tokenizer)))
    tokens, spent = 0, 0.0
    for batch in batches_of_texts(texts):
        started = time.process_time()
        encodings = encoder.encode_batch_fast(batch, add_special_tokens=False)
        spent += time.process_time() - started
        tokens += sum(map(len, encodings))
    print(json.dumps({"encode_cpu": spent, "tokens": tokens}))


def batches_of_texts(path: Path) -> Iterator[list[str]]:
    """The lines of a file of JSON strings, 1,000 at a time."""
    with path.open(encoding="utf-8") as lines:
        while batch := [json.loads(line) for line in islice(lines, BATCH)]:
            yield batch


def prepare(tokenizer: Path, rows: Path, cache: Path) -> None:
    """Child: files to examples."""
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer
    from finetune.data.examples.dataset import LengthPolicy, load_examples
    from finetune.data.reading.sources import SourceSpec

    template = ChatTemplate(load_chat_tokenizer(tokenizer))
    dataset = load_examples(
        [SourceSpec(str(rows))], template, LengthPolicy(100_000), cache_root=cache
    )
    print(json.dumps({"tokens": dataset.counts.tokens}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
