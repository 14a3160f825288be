"""Outputs: over nothing of others, and by one writer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.reliability import faults
from tests.reliability.frame import Case, in_fork
from tests.reliability.places import command, dialogues_file, glm_folder, trained
from tests.reliability.writers import PLACES, ask, config, evaluate, predict, refused, state, write

Place = Callable[[Path], object]


def _device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:  # who may not make a device cannot replace one either
        os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name if Path.cwd() == path.parent else str(path))


def _link(path: Path) -> None:
    path.with_name("target").write_text("mine")
    path.symlink_to(path.with_name("target"))


ODD: dict[str, Place] = {
    "a link": _link,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": os.mkfifo,
    "a device": _device,
    "a socket": _socket,
    "a folder": lambda path: path.mkdir(),
    "a file of another": lambda path: path.write_text("mine\n"),
}


def odd_place(writer: str, name: str, make: Place, folder: Path) -> None:
    """Refused by name; it stays what it was."""
    os.chdir(folder)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    before = state(path), state(path.with_name("target"))
    code, said = write(writer, folder)
    refused(code, said, path.name)
    assert (state(path), state(path.with_name("target"))) == before


def said_so(writer: str, name: str, folder: Path) -> None:
    """A file of another is replaced when that is said."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine\n")
    code, said = write(writer, folder, "--overwrite")
    assert code == 0, said[-800:]
    assert path.read_text() != "mine\n"


def over_its_input(how: str, folder: Path) -> None:
    """The data that is read is never written over, under whatever name."""
    data, output = ask(folder), folder / "ask.jsonl"
    given: Path | str = data
    if how == "a hard link":
        output = folder / "other.jsonl"
        os.link(data, output)
    elif how == "through a link to the folder":
        (folder / "alias").symlink_to(folder)
        output = folder / "alias/ask.jsonl"
    elif how == "of a glob":
        given = f"{folder}/*.jsonl"
    elif how == "new in the data folder":
        given, output = folder, folder / "new.jsonl"
    elif how == "a file of the model":
        output = glm_folder() / "config.json"
    before = data.read_bytes(), (glm_folder() / "config.json").read_bytes()
    code, said = predict(given, output, "--overwrite")
    refused(code, said, output.name)
    assert (data.read_bytes(), (glm_folder() / "config.json").read_bytes()) == before


def scored_over_itself(folder: Path) -> None:
    """`evaluate --predictions FOLDER/predictions/mine.jsonl --output FOLDER`."""
    mine = folder / "predictions/mine.jsonl"
    mine.parent.mkdir()
    mine.write_text('{"prompt": "a", "predict": "b", "label": "c"}\n')
    before = state(mine)
    code, said = command("evaluate", "--predictions", mine, "--output", folder, "--overwrite")
    refused(code, said, "mine.jsonl")
    assert state(mine) == before


def part_of_another(folder: Path) -> None:
    """A `.part` beside the output that this program did not write."""
    part = folder / "out.jsonl.part"
    part.write_text("mine")
    code, said = predict(ask(folder), folder / "out.jsonl")
    refused(code, said, part.name)
    assert part.read_text() == "mine"


def part_of_zeros(folder: Path) -> None:
    """What a power cut leaves of our own part file: begun anew."""
    from finetune.generation import prompts

    prompts.BATCHES_PER_WINDOW = 1
    data, part = ask(folder), folder / "out.jsonl.part"
    if (child := os.fork()) == 0:
        faults.at("finetune.storage.journal", "Journal.append", 3, lambda: os._exit(9))
        predict(data, folder / "out.jsonl")
        os._exit(0)
    os.waitpid(child, 0)
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(lines[0] + bytes(len(lines[1]) - 1) + b"\n")
    code, said = predict(data, folder / "out.jsonl")
    assert code == 0, said[-800:]
    assert len((folder / "out.jsonl").read_text().splitlines()) == 3


def run_in_its_data(source: str, folder: Path) -> None:
    """A run directory below the data would be read as data by the next start."""
    data = folder / "data"
    data.mkdir()
    shutil.copy(dialogues_file(), data / "train.jsonl")
    os.chdir(folder)
    file = config(folder, data__train=source, training__output_dir="data/runs/one")
    code, said = command("train", file)
    refused(code, said, "output_dir")
    assert [path.name for path in data.iterdir()] == ["train.jsonl"]


def ours_again(folder: Path) -> None:
    """What this program wrote is replaced by the same command, and other files stay."""
    for _ in range(2):
        assert predict(ask(folder), folder / "out.jsonl")[0] == 0
        code, said = evaluate(folder / "eval")
        assert code == 0, said[-800:]
        (folder / "eval/notes.txt").write_text("mine")
    assert (folder / "eval/notes.txt").read_text() == "mine"
    assert command("report", folder / "eval")[0] == 0


# --- two at once ---------------------------------------------------------------------------------


def two_at_once(writer: str, delay: float, folder: Path) -> None:
    """One of them writes all of it; the other one ends with 7, or finds it done."""

    def work(_: Path) -> str:
        if writer == "predict":
            code, said = predict(data, folder / "out.jsonl")
        else:
            code, said = evaluate(folder / "eval", "--batch-size", 1)
        assert "Traceback" not in said, said
        return str(code)

    data = ask(folder, 40)
    answers = [folder / "one", folder / "two"]
    children = []
    for answer in answers:
        if (child := os.fork()) == 0:
            answer.write_text(in_fork(work, seconds=60))
            os._exit(0)
        children.append(child)
        time.sleep(delay)
    for child in children:
        os.waitpid(child, 0)
    codes = sorted(answer.read_text() for answer in answers)
    assert codes in (["0", "7"], ["0", "0"]), codes
    if writer == "predict":
        assert len((folder / "out.jsonl").read_text().splitlines()) == 40
        assert not list(folder.glob("*.part*"))
    else:
        assert command("report", folder / "eval")[0] == 0


# --- folders of another kind ----------------------------------------------------------------------


KINDS: dict[str, Callable[[Path], object]] = {
    "a model": lambda place: shutil.copytree(glm_folder(), place),
    "a checkpoint": lambda place: shutil.copytree(trained("lora") / "checkpoint-2", place),
    "a run": lambda place: shutil.copytree(trained("lora"), place),
    "a merged model": lambda place: command("merge", trained("lora"), "--output", place),
    "split data": lambda place: command("data", "split", dialogues_file(), "--output", place, "--share", 0.3),
}  # fmt: skip


def into_another_kind(kind: str, more: tuple[str, ...], folder: Path) -> None:
    """An evaluation replaces nothing that is no evaluation, however it was sealed."""
    place = folder / "place"
    KINDS[kind](place)
    before = {path: state(path) for path in place.rglob("*")}
    assert before
    data = place if kind == "split data" else dialogues_file()
    code, said = command("evaluate", glm_folder(), "--data", data, "--output", place,
                         "--max-new-tokens", 2, "--max-samples", 4, *more)  # fmt: skip
    refused(code, said, "--output")
    assert {path: state(path) for path in place.rglob("*")} == before


def about_to_take_its_place(name: str, folder: Path) -> None:
    """A folder of a stranger whose result says that it was cut short: its page moves nothing of ours."""
    theirs = folder / "theirs"
    (theirs / ".ready-files").mkdir(parents=True)
    (theirs / "mine").write_text("evil")
    (folder / "mine").write_text("mine")
    (theirs / "linked").symlink_to(folder)
    entry = {"size": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    named = name.format(folder=folder)
    (theirs / ".ready-files/manifest.json").write_text(
        json.dumps({"format": 1, "files": {named: entry}}, indent=1) + "\n"
    )
    (theirs / "evaluation.json").write_text("{}")
    code, said = command("report", theirs)
    refused(code, said, codes=(2, 3))
    assert (folder / "mine").read_text() == "mine"


def cases() -> Iterator[Case]:
    """All of it."""
    yield from _odd_places()
    for kind in KINDS:
        for more in ((), ("--overwrite",)):
            run = partial(into_another_kind, kind, more)
            yield Case(f"folders: evaluate into {kind}{', said' * bool(more)}", run)
    for name in ("../mine", "{folder}/mine", "linked/mine", "a/../../mine"):
        run = partial(about_to_take_its_place, name)
        yield Case(f"folders: the report of a result named {name}", run)
    for how in ("itself", "a hard link", "through a link to the folder", "of a glob",
                "new in the data folder", "a file of the model"):  # fmt: skip
        yield Case(f"outputs: predict over its input, {how}", partial(over_its_input, how))
    yield Case("outputs: evaluate over the predictions that it scores", scored_over_itself)
    yield Case("outputs: predict beside a part file of another", part_of_another)
    yield Case("outputs: predict beside a part file of zeros", part_of_zeros)
    for source in ("data", "data/**/*.jsonl", "data/../data"):
        yield Case(f"outputs: a run inside {source}", partial(run_in_its_data, source))
    yield Case("outputs: our own are replaced", ours_again)
    for writer in ("predict", "evaluate"):
        for delay in (0.0, 0.1, 0.5, 1.0):
            yield Case(f"at_once: {writer}, {delay} s apart", partial(two_at_once, writer, delay))


def _odd_places() -> Iterator[Case]:
    glm_folder()
    trained("lora")
    dialogues_file()
    import finetune.evaluation.evaluate
    import finetune.generation.predict  # noqa: F401

    for writer, names in PLACES.items():
        for name in names:
            for kind, make in ODD.items():
                if (name, kind) == ("run/.lock", "a file of another"):
                    continue  # whose text it holds says nothing
                run = partial(odd_place, writer, name, make)
                yield Case(f"outputs: {writer} where {Path(name).name} is {kind}", run)
            if writer != "train":
                run = partial(said_so, writer, name)
                yield Case(f"outputs: {writer} over {Path(name).name}, said", run)
