"""One state of the data, results that appear together, and any disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability import faults
from tests.reliability.frame import Case
from tests.reliability.places import command, dialogues_file, glm_folder, trained
from tests.reliability.writers import PLACES, ask, config, evaluate, predict, refused, write

# --- data that changes meanwhile -----------------------------------------------------------------


def _appended(data: Path) -> None:
    with data.open("a") as file:
        file.write('{"prompt": "one more"}\n')


def _same_size_and_time(data: Path) -> None:
    before = data.stat()
    data.write_bytes(data.read_bytes().replace(b"quick", b"brown"))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))


def _copy_with_its_times(data: Path) -> None:
    other = data.with_name("other")
    other.write_bytes(data.read_bytes().replace(b"quick", b"brown"))
    os.utime(other, ns=(data.stat().st_atime_ns, data.stat().st_mtime_ns))
    other.replace(data)


CHANGES: dict[str, Callable[[Path], object]] = {
    "rows appended": _appended,
    "equal size and time": _same_size_and_time,
    "another file with the same times": _copy_with_its_times,
    "removed": Path.unlink,
}


def changed_meanwhile(change: Callable[[Path], object], folder: Path) -> None:
    """Replies to rows that were not there, or are there no longer, are not handed over in silence."""
    data = ask(folder, 4)
    faults.at("finetune.storage.journal", "Journal.append", 1, lambda: change(data))
    code, said = predict(data, folder / "out.jsonl")
    refused(code, said, "ask.jsonl")
    assert not (folder / "out.jsonl").exists()


def changed_between(change: Callable[[Path], object], folder: Path) -> None:
    """After a kill and a change nothing of the earlier replies is used."""
    from finetune.generation import prompts

    data, output = ask(folder, 4), folder / "out.jsonl"
    prompts.BATCHES_PER_WINDOW = 1
    if (child := os.fork()) == 0:
        faults.at("finetune.storage.journal", "Journal.append", 3, lambda: os._exit(9))
        predict(data, output)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len((folder / "out.jsonl.part").read_text().splitlines()) == 2
    change(data)
    code, said = predict(data, output)
    assert code == 0, said[-800:]
    asked = [json.loads(line)["messages"][0]["content"] for line in output.open()]
    assert asked == [json.loads(line)["prompt"] for line in data.open()]


# --- killed ---------------------------------------------------------------------------------------


def killed(writer: str, last: int, folder: Path) -> None:
    """Killed at a change of the disk; the next command finds it and leaves nothing behind."""
    if writer == "evaluate":  # over an evaluation that is there
        code, said = evaluate(folder / "eval", "--no-generate", "--overwrite")
        assert code == 0, said[-800:]
        old = (folder / "eval/evaluation.json").read_bytes()
    if (child := os.fork()) == 0:
        import finetune.evaluation.folder as evaluation
        from finetune.storage.journal import ResumableOutput

        if writer == "evaluate":
            faults.during(evaluation, "write", faults.exit_at(last))
        else:
            faults.during(ResumableOutput, "finish", faults.exit_at(last))
        write(writer, folder)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    if writer == "evaluate":
        ended, said = command("report", folder / "eval")
        assert ended == 0, said[-800:]
        scores = json.loads((folder / "eval/evaluation.json").read_text())["targets"][0]["scores"]
        is_old = (folder / "eval/evaluation.json").read_bytes() == old
        assert is_old == ("bleu-4" not in scores)
    code, said = write(writer, folder)
    assert code == 0, said[-800:]
    if writer == "predict":
        assert len((folder / "out.jsonl").read_text().splitlines()) == 3
    left = [path.name for path in folder.rglob("*") if ".part" in path.name or path.name.startswith((".staging", ".ready"))]  # fmt: skip
    assert not left, left


def killed_in_the_middle(call: int, folder: Path) -> None:
    """predict killed behind a batch, more than once: every row is answered once, as in one go."""
    from finetune.generation import prompts

    prompts.BATCHES_PER_WINDOW = 1
    data = ask(folder, 9)
    for number in range(2):
        if (child := os.fork()) == 0:
            faults.at("finetune.storage.journal", "Journal._add", call + number, lambda: os._exit(9), after=True)  # fmt: skip
            predict(data, folder / "out.jsonl")
            os._exit(0)
        os.waitpid(child, 0)
    code, said = predict(data, folder / "out.jsonl")
    assert code == 0, said[-800:]
    code, said = predict(data, folder / "whole.jsonl")
    assert (folder / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert not list(folder.glob("*.part*"))


def cache_killed(last: int, folder: Path) -> None:
    """Killed at a change of the disk while data are prepared: the next start prepares them anew."""
    from finetune.storage import cache

    os.environ["FINETUNE_CACHE"] = str(folder / "cache")
    if (child := os.fork()) == 0:
        faults.during(cache, "_build_missing", faults.exit_at(last))
        write("train", folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    code, said = write("train", folder)
    assert code == 0, said[-800:]
    left = [path.name for path in (folder / "cache").rglob(".staging-*")]
    assert not left, left


def merge_ended_by(number: int, folder: Path) -> None:
    """A merge that is asked to end leaves no staging folder of a model's size."""
    source = trained("lora") / "checkpoint-2"
    if (child := os.fork()) == 0:
        faults.at("finetune.export.folder", "seal", 1, lambda: os.kill(os.getpid(), number))
        code, _ = command("merge", source, "--output", folder / "out", "--no-check")
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (128 + number, -number)
    assert not list(folder.iterdir())


# --- disks ----------------------------------------------------------------------------------------


def _failing_sync(number: int, *, folders: bool = False, calls: int = 10**9) -> None:
    """From now on fsync raises: of all, or of folders only; that many times."""
    fsync, left = os.fsync, [calls]

    def failing(descriptor: int) -> None:
        if (not folders or stat.S_ISDIR(os.fstat(descriptor).st_mode)) and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    os.fsync = failing  # type: ignore[assignment]


def _no_locks(number: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    fcntl.flock = refused  # type: ignore[assignment]


def bad_disk(writer: str, number: int, folder: Path) -> None:
    """A command that cannot write ends with 6 and a sentence."""
    os.environ["FINETUNE_CACHE"] = str(folder / "cache")
    glm_folder()
    dialogues_file()
    if writer == "report":
        code, said = evaluate(folder / "eval")
        assert code == 0, said[-800:]
        _failing_sync(number)
        code, said = command("report", folder / "eval")
    else:
        _failing_sync(number)
        code, said = write(writer, folder)
    refused(code, said, codes=(2, 6))


def train_goes_on(what: str, number: int, folder: Path) -> None:
    """One save, or one file of predictions, that the disk refuses: said, and the run ends well."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    changes: dict[str, Any] = {"training__max_steps": 3}
    if what == "a save":
        faults.at("finetune.storage.folders", "seal", 1, fail)
    elif what == "the rename of a save":
        faults.at("finetune.storage.folders", "commit", 1, fail)
    elif what == "best.json":
        faults.at("finetune.artifacts.checkpoint", "set_best", 1, fail)
    else:
        faults.at("finetune.training.measuring.validation", "write_predictions", 1, fail)
    if what in ("best.json", "predictions"):
        changes |= {"data__validation": str(dialogues_file()),
                    "evaluation__every_steps": 1, "evaluation__max_new_tokens": 2}  # fmt: skip
    code, said = command("train", config(folder, **changes))
    assert code == 0, said[-1500:]
    assert "Traceback" not in said
    assert os.strerror(number) in said or "no room" in said, said[-1500:]
    assert (folder / "run/checkpoint-3/manifest.json").exists()
    if what == "best.json":
        assert (folder / "run/best.json").exists()


def stays_full(folder: Path) -> None:
    """No save and no predictions for the whole run: said, without a traceback, and the code is 6."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for number in range(1, 9):
        faults.at("finetune.storage.folders", "seal", number, fail)
        faults.at("finetune.training.measuring.validation", "write_predictions", number, fail)
    changes = {"data__validation": str(dialogues_file()), "evaluation__every_steps": 1}
    code, said = command("train", config(folder, training__max_steps=3, evaluation__max_new_tokens=2, **changes))  # fmt: skip
    refused(code, said, "no room", codes=(6,))


def network_disk(writer: str, what: str, number: int, folder: Path) -> None:
    """No fsync of folders, or no file locks: said once, and everything works."""
    os.environ["FINETUNE_CACHE"] = str(folder / "cache")
    if what == "locks":
        _no_locks(number)
    else:
        _failing_sync(number, folders=True)
    code, said = write(writer, folder)
    assert code == 0, said[-1500:]
    word = "no file locks" if what == "locks" else "cannot force names"
    lines = [line for line in said.splitlines() if word in line]
    assert lines
    assert len(lines) == len(set(lines)), lines
    assert not list(folder.rglob(".*.owner"))


def no_home(writer: str, folder: Path) -> None:
    """A user without a home and without an entry in the user database."""
    import pwd
    import tempfile

    def unknown(_: int) -> Any:
        raise KeyError("uid not found")

    pwd.getpwuid = unknown  # type: ignore[assignment]
    for name in ("HOME", "FINETUNE_CACHE", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    (folder / "tmp").mkdir()
    tempfile.tempdir = str(folder / "tmp")
    code, said = write(writer, folder)
    assert code == 0, said[-1500:]


# --- what was kept --------------------------------------------------------------------------------


def kept_is_damaged(pattern: str, folder: Path) -> None:
    """Kept results that are not what was kept are made again."""
    os.environ["FINETUNE_CACHE"] = str(folder / "cache")
    assert evaluate(folder / "one")[0] == 0
    [kept] = (folder / "cache/evaluations").glob(f"*/{pattern}")
    text = kept.read_bytes()
    kept.write_bytes(
        b"".join(text.splitlines(keepends=True)[:-1]) if kept.suffix == ".jsonl" else text[:-9]
    )
    code, said = evaluate(folder / "two")
    assert code == 0, said[-800:]
    one, two = (
        json.loads((folder / name / "evaluation.json").read_text()) for name in ("one", "two")
    )
    assert one["targets"][0]["scores"] == two["targets"][0]["scores"]


def edited(name: str, folder: Path) -> None:
    """A file of an evaluation that was changed afterwards is named."""
    assert evaluate(folder / "eval")[0] == 0
    file = folder / "eval" / name
    file.write_bytes(file.read_bytes()[:-2] + b"\n")
    code, said = command("report", folder / "eval")
    refused(code, said, name)


def cases() -> Iterator[Case]:
    """All of it."""
    glm_folder()
    trained("lora")
    dialogues_file()
    import finetune.evaluation.evaluate
    import finetune.export.merge
    import finetune.generation.predict  # noqa: F401

    for name, change in CHANGES.items():
        yield Case(f"changes: while predict runs, {name}", partial(changed_meanwhile, change))
        if name != "removed":
            yield Case(f"changes: after a kill, {name}", partial(changed_between, change))
    for last in range(0, 40, 2):
        yield Case(f"ended: evaluate, change {last + 1}", partial(killed, "evaluate", last))
    for last in range(8):
        yield Case(
            f"ended: predict, change {last + 1} of its end", partial(killed, "predict", last)
        )
    for call in range(1, 9):
        yield Case(f"killed: predict, write {call}", partial(killed_in_the_middle, call))
    for last in range(9):
        yield Case(f"killed: the token cache, change {last + 1}", partial(cache_killed, last))
    for number in (signal.SIGTERM, signal.SIGHUP):
        yield Case(f"ended: merge by {number.name}", partial(merge_ended_by, int(number)))
    yield from _disks()
    for pattern in ("answers.jsonl", "scored-*.jsonl", "loss.npz", "done.json", "manifest.json"):
        yield Case(f"kept: {pattern} is damaged", partial(kept_is_damaged, pattern))
    for name in ("evaluation.json", "predictions.jsonl", "predictions/glm.jsonl"):
        yield Case(f"kept: {name} of an evaluation is changed", partial(edited, name))


def _disks() -> Iterator[Case]:
    for number in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS):
        name = errno.errorcode[number]
        for writer in ("predict", "evaluate", "report"):
            yield Case(f"disk: {writer}, {name}", partial(bad_disk, writer, number))
        for what in ("a save", "the rename of a save", "best.json", "predictions"):
            yield Case(f"disk: training, {name} in {what}", partial(train_goes_on, what, number))
    for number in (errno.EACCES, errno.EMFILE, errno.ENXIO, errno.ESTALE):
        name = errno.errorcode[number]
        yield Case(f"disk: predict, {name}", partial(bad_disk, "predict", number))
        for what in ("a save", "best.json", "predictions"):
            yield Case(f"disk: training, {name} in {what}", partial(train_goes_on, what, number))
    yield Case("disk: training, a disk that stays full", stays_full)
    for writer in PLACES:
        for number in (errno.EINVAL, errno.ENOTSUP):
            run = partial(network_disk, writer, "sync", number)
            yield Case(f"network: {writer}, no sync of folders ({errno.errorcode[number]})", run)
        for number in (errno.ENOLCK, errno.ENOSYS, errno.EBADF):
            run = partial(network_disk, writer, "locks", number)
            yield Case(f"network: {writer}, no file locks ({errno.errorcode[number]})", run)
        yield Case(f"network: {writer}, no home and no user", partial(no_home, writer))
