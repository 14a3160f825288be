"""Data of strangers: damaged tables, rows that take for ever, text for the terminal, images that change."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability import faults
from tests.reliability.frame import Case
from tests.reliability.places import command, glm_folder, shared
from tests.reliability.writers import refused

ROWS = [
    {"prompt": f"the quick {n}", "response": f"brown fox {n} {'over the dog ' * 40}"}
    for n in range(40)
]

# --- damaged Parquet -----------------------------------------------------------------------------


def _parquet(path: Path, **how: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path, write_page_checksum=True, **how)
    return path.read_bytes()


def _zeroed(whole: bytes, place: int) -> bytes:
    return whole[:place] + bytes(24) + whole[place + 24 :]


def _flipped(whole: bytes, place: int) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :]


DAMAGES: dict[str, Callable[[bytes, int], bytes]] = {
    "cut": lambda whole, place: whole[:place],
    "24 bytes of zero": _zeroed,
    "a bit flipped": _flipped,
    "a piece gone": lambda whole, place: whole[:place] + whole[place + 8 :],
}
PLACES = 8
LAYOUTS: dict[str, dict[str, Any]] = {
    "snappy": {},
    "no compression": {"compression": "none", "use_dictionary": False},
}


def damaged_table(
    layout: str, damage: Callable[[bytes, int], bytes], place: int, folder: Path
) -> None:
    """Found and named, or nothing of the rows is touched."""
    from finetune.data.reading.files import BadRow, read_rows
    from finetune.errors import DataError

    path = folder / "rows.parquet"
    whole = _parquet(path, **LAYOUTS[layout])
    path.write_bytes(damage(whole, len(whole) * place // PLACES + 5))
    code, said = command("data", "check", path)
    assert "Traceback" not in said, said[-1500:]
    assert code in (0, 2), (code, said[-500:])
    try:
        rows = [None if isinstance(row, BadRow) else row.value for row in read_rows(path)]
    except DataError:
        rows = None
    assert code == 2 or rows == ROWS, said[-500:]
    assert code == 0 or "rows.parquet" in said, said[-500:]


# --- rows that take for ever ---------------------------------------------------------------------


def _zipped(text: str, times: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(times):
                file.write(text.encode() * (1 << 20))

    return write


def _row(**row: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(row) + "\n") and None


def _calls(count: int) -> Callable[[Path], None]:
    calls = [{"id": str(n), "type": "function", "function": {"name": "f", "arguments": "{}"}} for n in range(count)]  # fmt: skip
    results = [{"role": "tool", "tool_call_id": str(n), "content": "x"} for n in range(count)]
    asked, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    return _row(messages=[asked, {"role": "assistant", "tool_calls": calls}, *results, reply],
                tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])  # fmt: skip


def _tools(count: int) -> Callable[[Path], None]:
    tools = [{"type": "function", "function": {"name": f"t{n}", "parameters": {}}} for n in range(count)]  # fmt: skip
    return _row(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tools=tools)  # fmt: skip


SLOW: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a gigabyte of blank lines, packed": ("x.jsonl.gz", _zipped("\n", 1024)),
    "a gigabyte of blank lines in a table, packed": ("x.csv.gz", _zipped("\n", 1024)),
    "a gigabyte of blank lines behind a header": ("x.csv.gz", lambda path: path.write_bytes(gzip.compress(b"prompt,response\n" + b"\n" * 2**28, 1))),
    "blank lines between two rows": ("x.jsonl", lambda path: path.write_text(json.dumps(ROWS[0]) + "\n" * 10**8 + json.dumps(ROWS[1]) + "\n")),
    "a gigabyte of blank lines of plain text": ("x.txt.gz", _zipped("\n", 1024)),
    "a gigabyte of spaces, packed": ("x.jsonl.gz", _zipped(" ", 1024)),
    "100 MB of line ends": ("x.jsonl", lambda path: path.write_bytes(b"\r" * 10**8)),
    "an array of 2 * 10^7 numbers": ("x.json", lambda path: path.write_bytes(b"[" + b"1," * 2 * 10**7 + b"1]")),
    "2 * 10^6 rows that are none": ("x.jsonl", lambda path: path.write_bytes(b"1\n" * 2 * 10**6)),
    "20,000 calls in a row": ("x.jsonl", _calls(20_000)),
    "40,000 tools in a row": ("x.jsonl", _tools(40_000)),
    "5 MB of brackets in a text": ("x.jsonl", _row(prompt="[" * 5 * 10**6, response="b")),
    "5 MB of braces in a reply": ("x.jsonl", _row(prompt="a", response="{" * 5 * 10**6)),
    "300,000 tags in a reply": ("x.jsonl", _row(prompt="a", response="<think>" * 300_000)),
    "300,000 images in Markdown": ("x.jsonl", _row(prompt="![a](" * 300_000, response="b")),
    "100,000 messages": ("x.jsonl", _row(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 50_000)),
    "500,000 keys in a row": ("x.jsonl", _row(prompt="a", response="b", **{f"k{n}": 1 for n in range(500_000)})),
    "a number of 10^6 digits": ("x.jsonl", lambda path: path.write_text('{"prompt": ' + "9" * 10**6 + ', "response": "b"}\n')),
    "nesting without end": ("x.json", lambda path: path.write_bytes(b"[" * 10**7)),
}  # fmt: skip
SECONDS = 15.0
"""Of a core; ordinary data of these sizes take one or two."""
MEGABYTES = 1500


def slow_rows(name: str, make: Callable[[Path], object], folder: Path) -> None:
    """Read or refused within seconds and without gigabytes."""
    import resource

    path = folder / name
    make(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    code, said = command("data", "check", path)
    taken = time.process_time() - begun
    assert "Traceback" not in said, said[-1500:]
    assert code in (0, 2), (code, said[-500:])
    assert taken < SECONDS, f"{taken:.1f} s"
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert more < MEGABYTES, f"{more:.0f} MB"


def skippable_frame(folder: Path) -> None:
    """What pzstd writes: a frame to be skipped in front."""
    import zstandard

    path = folder / "x.jsonl.zst"
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path.write_bytes(b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size" + zstandard.compress(text))  # fmt: skip
    code, said = command("data", "check", path)
    assert code == 0, said[-500:]
    assert "40" in said, said[-500:]


# --- what the terminal gets ----------------------------------------------------------------------

ESCAPE = "\x1b]52;c;aGk=\x07\x1b[2J\u202e"


def raw_text(where: str, words: Callable[[Path], tuple[object, ...]], folder: Path) -> None:
    """No control character of a row, a name or a config reaches the terminal."""
    name = f"{ESCAPE}.jsonl" if where == "the file's name" else "rows.jsonl"
    row: dict[str, Any] = {"prompt": "the quick", "response": "dog"}
    if where == "a text":
        row = {"prompt": ESCAPE, "response": ESCAPE}
    elif where == "a column":
        row[ESCAPE] = ESCAPE
    elif where == "a role":
        row = {"messages": [{"role": ESCAPE, "content": "a"}]}
    path = folder / name
    path.write_text(json.dumps(row) + "\n")
    code, said = command(*words(path))
    assert "Traceback" not in said, said[-1500:]
    assert code in (0, 2), (code, said[-500:])
    assert not {"\x1b", "\x07", "\u202e"} & set(said), said[-500:]


READERS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "data check": lambda path: ("data", "check", path),
    "data show": lambda path: ("data", "show", path, "--model", glm_folder()),
    "evaluate": lambda path: ("evaluate", glm_folder(), "--data", path, "--output", path.parent / "out", "--max-new-tokens", 2),
    "predict": lambda path: ("predict", glm_folder(), "--data", path, "--output", path.parent / "out", "--max-new-tokens", 2),
}  # fmt: skip

# --- images --------------------------------------------------------------------------------------


def _same_size_and_times(image: Path) -> None:
    from PIL import Image

    before = image.stat()
    Image.new("RGB", (20, 10), "blue").save(image)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))


def _copied_with_its_times(image: Path) -> None:
    from PIL import Image

    other, before = image.with_name("other.bmp"), image.stat()
    Image.new("RGB", (20, 10), "blue").save(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(image)


IMAGES: dict[str, Callable[[Path], object]] = {
    "equal size and times": _same_size_and_times,
    "a copy with its times": _copied_with_its_times,
    "removed": Path.unlink,
    "emptied": lambda image: image.write_bytes(b""),
}


def changed_image(change: Callable[[Path], object], meanwhile: bool, folder: Path) -> None:
    """Other pixels than those that were prepared are never learned from in silence."""
    import pictures
    import runs
    from PIL import Image

    rows = pictures.write_dialogues(folder, 2)
    image = folder / "images/red.bmp"
    Image.new("RGB", (20, 10), "red").save(image)
    rows.write_text(rows.read_text("utf-8").replace("red.png", "red.bmp"), "utf-8")
    settings = runs.config(_glm4v(), rows, folder / "run", training__max_steps=4)
    settings["training"] |= {"save_every_steps": 2}
    (folder / "x.yaml").write_text(json.dumps(settings))
    if (child := os.fork()) == 0:
        act = partial(change, image) if meanwhile else partial(os._exit, 9)
        faults.at("finetune.training.callbacks.schedule", "Schedule.on_step_end", 3, act)
        code, said = command("train", folder / "x.yaml")
        (folder / "said").write_text(said)
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not meanwhile:
        assert code == 9, code
        change(image)
        code, said = command("train", folder / "x.yaml")
    else:
        said = (folder / "said").read_text()
    refused(code, said, codes=(2, 3))
    assert "red.bmp" in said or "data" in said, said[-500:]


def _glm4v() -> Path:
    import pictures

    folder = shared("glm4v-data")
    return folder if folder.exists() else Path(pictures.save_model(folder))


# --- tokenizers ----------------------------------------------------------------------------------


def _replace(pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": "b"}


TOKENIZERS: dict[str, dict[str, Any]] = {
    "a normalizer without end": {"normalizer": _replace("(a+)+$")},
    "a normalizer that makes texts longer": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 10}] * 9}},
    "a split without end": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"(((\w)*)*)*!"}, "behavior": "Isolated", "invert": False}},
    "a decoder of no kind": {"decoder": {"type": "Nope"}},
    "no model": {"model": None},
    "ids that are none": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    "merges of what is not there": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["zz yy"]}},
    "padding to 10^9": {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                                    "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
}  # fmt: skip


def odd_tokenizer(changes: dict[str, Any], name: str, folder: Path) -> None:
    """Opened as if it were plain, or refused in words within seconds."""
    model = Path(shutil.copytree(glm_folder(), folder / "model"))
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a" * 60, "response": "dog"}) + "\n")
    begun = time.process_time()
    code, said = command(
        name, model, "--data", rows, "--output", folder / "out", "--max-new-tokens", 2
    )
    assert "Traceback" not in said, said[-1500:]
    assert "panicked" not in said, said[-1500:]
    assert code in (0, 2, 3), (code, said[-500:])
    assert time.process_time() - begun < SECONDS


def cases() -> Iterator[Case]:
    """All of it."""
    glm_folder()
    _glm4v()
    import finetune.evaluation.evaluate
    import finetune.generation.predict  # noqa: F401

    yield from _tables()
    for what, (name, make) in SLOW.items():
        yield Case(f"slow: {what}", partial(slow_rows, name, make), seconds=90.0)
    for what, change in IMAGES.items():
        for meanwhile in (True, False):
            when = "while the run goes on" if meanwhile else "between a kill and the resume"
            yield Case(f"pictures: {what}, {when}", partial(changed_image, change, meanwhile))
    for what, changes in TOKENIZERS.items():
        for name in ("predict", "evaluate"):
            yield Case(f"tokenizers: {what}, {name}", partial(odd_tokenizer, changes, name))


def _tables() -> Iterator[Case]:
    for layout in LAYOUTS:
        for what, damage in DAMAGES.items():
            for place in range(PLACES):
                run = partial(damaged_table, layout, damage, place)
                yield Case(f"tables: Parquet, {layout}, {what} at {place} of {PLACES}", run)
    yield Case("tables: a frame of pzstd", skippable_frame)
    for reader, words in READERS.items():
        for where in ("a text", "a column", "a role", "the file's name"):
            yield Case(f"terminal: {where}, {reader}", partial(raw_text, where, words))
