"""Other members of the kinds that strangers tried: any writer, any signal, any field that is null."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.reliability import faults
from tests.reliability.frame import Case
from tests.reliability.places import command, dialogues_file, glm_folder, trained
from tests.reliability.strangers_folders import TENSORS, WEIGHTS, _adapter, tensors
from tests.reliability.strangers_outputs import ODD, Place
from tests.reliability.writers import ask, evaluate, refused, state, write

# --- any writer, any odd target ------------------------------------------------------------------


def _source() -> Path:
    return trained("lora") / "checkpoint-2"


def _old_config(folder: Path) -> Path:
    path = folder / "old.yaml"
    path.write_text("stage: sft\nfinetuning_type: lora\nmodel_name_or_path: x\ndataset: a\n")
    return path


WRITERS: dict[str, tuple[str, Callable[[Path], tuple[int, str]]]] = {
    "merge": ("out", lambda folder: command("merge", _source(), "--output", folder / "out")),
    "export": ("out", lambda folder: command("export", glm_folder(), "--layout", "published", "--output", folder / "out")),
    "data split": ("out", lambda folder: command("data", "split", dialogues_file(), "--output", folder / "out", "--share", 0.3)),
    "data split, its file": ("out/train.jsonl", lambda folder: command("data", "split", dialogues_file(), "--output", folder / "out", "--share", 0.3)),
    "init": ("x.yaml", lambda folder: command("init", "--data", dialogues_file(), "--model", glm_folder(), "--gpus", 1, "--gpu", "24GB", "--output", folder / "x.yaml")),
    "migrate": ("x.yaml", lambda folder: command("migrate", _old_config(folder), "--data", dialogues_file(), "--model", glm_folder(), "--output", folder / "x.yaml")),
    "board": ("x.html", lambda folder: command("board", trained("lora").parent, "--output", folder / "x.html")),
    "replay": ("x.jsonl", lambda folder: command("replay", glm_folder(), "--prompts", ask(folder), "--output", folder / "x.jsonl")),
}  # fmt: skip


def odd_target(writer: str, make: Place, folder: Path) -> None:
    """Refused by name; it stays what it was."""
    os.chdir(folder)
    name, run = WRITERS[writer]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    before = state(path), state(path.with_name("target"))
    refused(*run(folder), path.name)
    assert (state(path), state(path.with_name("target"))) == before
    assert not [left for left in folder.rglob(".*") if left.name != ".lock"]


def odd_page(name: str, make: Place, folder: Path) -> None:
    """The page of an evaluation where something of others stands."""
    os.chdir(folder)
    code, said = evaluate(folder / "eval")
    assert code == 0, said[-800:]
    path = folder / "eval" / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    make(path)
    before = state(path), state(path.with_name("target"))
    refused(*command("report", folder / "eval"), path.name)
    assert (state(path), state(path.with_name("target"))) == before


def over_what_is_read(name: str, folder: Path) -> None:
    """`--overwrite` is no leave to write over what the command reads."""
    if name == "board":
        run = Path(shutil.copytree(trained("lora"), folder / "runs/one"))
        target, words = run / "metrics.jsonl", ("board", run.parent)
    elif name == "replay, its prompts":
        target = ask(folder)
        words = ("replay", glm_folder(), "--prompts", target)
    else:
        model = Path(shutil.copytree(glm_folder(), folder / "model"))
        target, words = model / "config.json", ("replay", model, "--prompts", ask(folder))
    before = state(target)
    refused(*command(*words, "--output", target, "--overwrite"), target.name)
    assert state(target) == before


def through_a_linked_folder(name: str, folder: Path) -> None:
    """A folder of a result that leads elsewhere: nothing is written there."""
    code, said = evaluate(folder / "eval")
    assert code == 0, said[-800:]
    shutil.rmtree(folder / "eval" / name, ignore_errors=True)
    (folder / "elsewhere").mkdir()
    (folder / "eval" / name).symlink_to(folder / "elsewhere")
    if name == "plots":
        code, said = command("report", folder / "eval")
    else:
        code, said = evaluate(folder / "eval", "--overwrite")
    refused(code, said, name)
    assert not list((folder / "elsewhere").iterdir())


# --- any signal, any command ---------------------------------------------------------------------

MOMENTS = {
    "predict": ("finetune.storage.journal", "Journal.append"),
    "evaluate": ("finetune.evaluation.folder", "write"),
    "merge": ("finetune.export.folder", "seal"),
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)  # fmt: skip


def asked_to_end(name: str, number: int, folder: Path) -> None:
    """The code says which signal it was; nothing half is left, and the same command then does it."""

    def run() -> tuple[int, str]:
        return WRITERS["merge"][1](folder) if name == "merge" else write(name, folder)

    if (child := os.fork()) == 0:
        faults.at(*MOMENTS[name], 1, lambda: os.kill(os.getpid(), number))
        code, said = run()
        (folder / "said").write_text(said)
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = (folder / "said").read_text() if (folder / "said").exists() else ""
    assert code in (128 + number, -number), (code, said[-800:])
    assert "Traceback" not in said, said[-800:]
    code, said = run()
    assert code == 0, said[-800:]
    left = [path.name for path in folder.rglob("*") if ".part" in path.name or path.name.startswith(".staging")]  # fmt: skip
    assert not left, left


def server_asked_to_end(number: int, folder: Path) -> None:
    """A server ends in order, with 0, whatever asks it to."""
    import http.client
    import time

    import runs

    port = runs.free_port()
    if (child := os.fork()) == 0:
        code, said = command("serve", glm_folder(), "--port", port)
        (folder / "said").write_text(said)
        os._exit(code)
    for _ in range(2000):
        time.sleep(0.05)
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                break
        except OSError:
            continue
    os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = (folder / "said").read_text()
    assert code == 0, (code, said[-800:])
    assert said.rstrip().endswith("stopped"), said[-800:]


# --- any field that is null ----------------------------------------------------------------------


def null_field(file: str, key: str, name: str, folder: Path) -> None:
    """Absence, or refused by name in one message; never a traceback."""
    if file == "adapter_config.json":
        target = _adapter(folder)
    else:
        target = Path(shutil.copytree(glm_folder(), folder / "model"))
    values = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(values | {key: None}))
    rows = folder / "ask.jsonl"
    rows.write_text('{"prompt": "the quick", "response": "dog"}\n')
    words = {
        "predict": ["--data", rows, "--output", folder / "out", "--max-new-tokens", 1],
        "merge": ["--output", folder / "out"],
    }
    code, said = command(name, target, *words[name])
    assert "Traceback" not in said, said[-2000:]
    assert code in (0, 2, 3), (code, said[-2000:])
    assert code == 0 or said.count("error: ") == 1, said[-2000:]


def null_in_record(file: str, key: str, folder: Path) -> None:
    """A record of ours that a stranger has written: resumed as without it, or refused in words."""
    from finetune.storage.manifest import seal

    run = Path(shutil.copytree(trained("lora"), folder / "run"))
    path = run / "checkpoint-2" / file
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {key: None}))
    if file != "manifest.json":
        seal(path.parent)
    settings = json.loads(trained("lora").with_suffix(".yaml").read_text())
    settings["training"] |= {"output_dir": str(run), "max_steps": 3}
    (folder / "x.yaml").write_text(json.dumps(settings))
    code, said = command("train", folder / "x.yaml")
    assert "Traceback" not in said, said[-2000:]
    assert code in (0, 2, 3), (code, said[-2000:])


# --- any tensor ----------------------------------------------------------------------------------


def any_tensor(place: int, what: str, folder: Path) -> None:
    """The first or the last tensor of an adapter, not one in its middle."""
    copy = _adapter(folder)
    tensors(WEIGHTS, lambda found, _: TENSORS[what](found, sorted(found)[place]))(copy)
    code, said = command("merge", copy, "--output", folder / "out")
    refused(code, said, codes=(2, 3))
    assert not (folder / "out").exists()


def cases() -> Iterator[Case]:
    """All of it."""
    glm_folder()
    trained("lora")
    dialogues_file()
    import finetune.evaluation.evaluate
    import finetune.export.merge
    import finetune.generation.predict  # noqa: F401

    yield from _writers()
    for name in MOMENTS:
        for number in SIGNALS:
            run = partial(asked_to_end, name, number)
            yield Case(f"told: {name} by {number.name}", run)
    for number in SIGNALS:
        yield Case(f"told: serve by {number.name}", partial(server_asked_to_end, number))
    yield from _nulls()
    for what in TENSORS:
        for place in (0, -1):
            yield Case(f"tensors: {what}, number {place}", partial(any_tensor, place, what))


def _writers() -> Iterator[Case]:
    for kind, make in ODD.items():
        for writer in WRITERS:
            if (writer, kind) != ("data split", "a folder"):  # whose files are the next writer's
                run = partial(odd_target, writer, make)
                yield Case(f"writers: {writer} where {kind} is", run)
        for name in ("report.html", "plots/lengths.svg", "plots/lengths.png"):
            yield Case(f"writers: report where {name}, {kind}, is", partial(odd_page, name, make))
    for name in ("board", "replay, its prompts", "replay, its model"):
        yield Case(f"writers: {name} over what it reads", partial(over_what_is_read, name))
    for name in ("plots", "predictions"):
        yield Case(f"writers: {name} is a link", partial(through_a_linked_folder, name))


def _nulls() -> Iterator[Case]:
    opened = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    for file in opened:
        for key in json.loads((glm_folder() / file).read_text()):
            yield Case(f"null: {key} of {file}", partial(null_field, file, key, "predict"))
    for key in json.loads((_source() / "adapter_config.json").read_text()):
        for name in ("predict", "merge"):
            run = partial(null_field, "adapter_config.json", key, name)
            yield Case(f"null: {key} of an adapter, {name}", run)
    for file in ("trainer_state.json", "run.json", "finetune.json", "manifest.json"):
        for key in json.loads((_source() / file).read_text()):
            yield Case(f"null: {key} of {file}", partial(null_in_record, file, key))
