"""Checkpoints are whole or absent, damage never goes unseen, and a good one always remains."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from finetune.artifacts import checkpoint
from finetune.errors import CheckpointError, OutputInUseError, SpaceError
from finetune.storage import folders
from finetune.storage.manifest import is_untouched

CONTENT = {
    "model.safetensors": b"weights " * 500,
    "optimizer.pt": b"state" * 100,
    "sub/rank_1": b"",
}


def save(run: Path, step: int, *, replace: bool = False, **extra: bytes) -> Path:
    final = run / f"checkpoint-{step}"
    with folders.staged(final, replace=replace) as stage:
        for name, data in {**CONTENT, **extra}.items():
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_bytes(str(step).encode() + data)
    return final


def failing_save(run: Path, error: Exception) -> None:
    """A save that writes half a file and then meets `error`."""
    with folders.staged(run / "checkpoint-2") as stage:
        (stage / "model.safetensors").write_bytes(b"half")
        raise error


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_saved_checkpoint_verifies_and_holds_what_was_written(run: Path) -> None:
    final = save(run, 1)
    assert folders.verify(final) == []
    assert (final / "sub/rank_1").read_bytes() == b"1"
    assert names(run) == {"checkpoint-1"}


def damage(final: Path, name: str, how: str, stale: Path) -> None:
    file = final / name
    data = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "emptied":
        file.write_bytes(b"")
    elif how == "halved":
        file.write_bytes(data[: len(data) // 2])
    elif how == "one bit flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "appended":
        file.write_bytes(data + b"\n")
    elif how == "a stale copy":
        shutil.copy(stale / name, file)
    elif how == "a link":
        file.unlink()
        file.symlink_to(stale / name)


@pytest.mark.parametrize(
    "how",
    ["deleted", "emptied", "halved", "one bit flipped", "appended", "a stale copy", "a link"],
)
@pytest.mark.parametrize("name", [*CONTENT, "manifest.json"])
def test_any_damage_to_any_file_is_noticed_and_the_one_before_is_taken(
    run: Path, name: str, how: str
) -> None:
    older, newer = save(run, 9), save(run, 10)
    damage(newer, name, how, older)
    problems = folders.verify(newer)
    assert name in " ".join(problems) or how == "a stale copy"
    assert checkpoint.newest_good(run) == (older, [(newer, "; ".join(problems))])


def test_every_byte_of_the_manifest_counts(run: Path) -> None:
    with folders.staged(run / "checkpoint-1") as stage:
        (stage / "a").write_bytes(b"x")
    file = run / "checkpoint-1/manifest.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 3, 6):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            file.write_bytes(data)
            assert folders.verify(run / "checkpoint-1"), (place, bit)


def test_a_file_that_was_added_later_is_noticed(run: Path) -> None:
    final = save(run, 1)
    (final / "training_args.bin").write_bytes(b"pickle")
    assert folders.verify(final) == ["training_args.bin is not in the manifest"]


def test_a_folder_without_a_manifest_is_no_checkpoint(run: Path) -> None:
    (run / "checkpoint-7").mkdir()
    good, skipped = checkpoint.newest_good(run)
    assert good is None
    assert skipped[0][0].name == "checkpoint-7"
    assert "did not finish" in skipped[0][1]


def test_steps_are_compared_as_numbers(run: Path) -> None:
    save(run, 100), save(run, 20), (run / "checkpoint-final").mkdir()
    assert [path.name for path in checkpoint.checkpoints(run)] == [
        "checkpoint-20",
        "checkpoint-100",
    ]
    assert checkpoint.newest_good(run)[0] == run / "checkpoint-100"


# --- a save that fails ---------------------------------------------------------------------------


def test_an_error_while_saving_leaves_what_was_there(run: Path) -> None:
    old = save(run, 1)
    with pytest.raises(ZeroDivisionError):
        failing_save(run, ZeroDivisionError())
    assert names(run) == {"checkpoint-1"}
    assert folders.verify(old) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),
    ],
    ids=["full", "quota", "safetensors", "torch.save"],
)
def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(run: Path, error: Exception) -> None:
    old = save(run, 1)
    with pytest.raises(SpaceError, match="checkpoint before took") as caught:
        failing_save(run, error)
    assert (caught.value.exit_code, isinstance(caught.value, CheckpointError)) == (6, True)
    assert names(run) == {"checkpoint-1"}
    assert folders.verify(old) == []


def test_a_real_limit_on_file_size_is_a_full_disk(run: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from finetune.errors import SpaceError\n"
        "from finetune.storage import folders\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n"
        "    with folders.staged(Path(sys.argv[1])) as stage:\n"
        "        (stage / 'a').write_bytes(bytes(100_000))\n"
        "except SpaceError as error: sys.exit(error.exit_code)\n"
    )
    command = [sys.executable, "-c", code, str(run / "checkpoint-1")]
    assert subprocess.run(command, cwd=Path(__file__).parent.parent).returncode == 6
    assert names(run) == set()


def test_saving_over_a_checkpoint_needs_saying_so(run: Path) -> None:
    final = save(run, 1)
    with pytest.raises(CheckpointError, match="exists already"):
        save(run, 1)
    save(run, 1, replace=True, more=b"x")
    assert (final / "more").exists()
    assert (names(run), folders.verify(final)) == ({"checkpoint-1"}, [])


def test_two_processes_cannot_stage_the_same_folder(run: Path) -> None:
    with folders.staged(run / "out") as stage:
        (stage / "a").write_text("first")
        with pytest.raises(OutputInUseError, match="another process is writing"):
            folders.open_stage(run / "out")
        assert folders.clean(run) == []
    assert (run / "out/a").read_text() == "first"


# --- crashes -------------------------------------------------------------------------------------

CALLS = ("fsync", "rename", "mkdir", "link", "unlink", "rmdir", "open")


def die_at_call(last: int) -> None:
    """End this process in place of the call number `last` that changes the disk."""
    seen, lock = [0], threading.Lock()
    for name in CALLS:
        call = getattr(os, name)

        def counted(*args: Any, call: Any = call, **options: Any) -> Any:
            with lock:
                if seen[0] == last:
                    os._exit(9)
                seen[0] += 1
            return call(*args, **options)

        setattr(os, name, counted)


def survives_everywhere(run: Path, act: Any, check: Any) -> int:
    """Kill `act` at each of its calls in turn, on a fresh copy; `check` looks at what is left."""
    pristine = run.with_name("pristine")
    shutil.copytree(run, pristine)
    for last in range(1000):
        shutil.rmtree(run)
        shutil.copytree(pristine, run)
        if (child := os.fork()) == 0:
            die_at_call(last)
            act()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        folders.clean(run)
        check()
        if code == 0:
            return last
        assert code == 9
    raise AssertionError("never finished")


def test_a_save_killed_anywhere_leaves_a_whole_checkpoint_or_none(run: Path) -> None:
    old = save(run, 1)
    outcomes = set()

    def check() -> None:
        assert folders.verify(old) == []
        left = names(run) - {"checkpoint-1"}
        assert left in (set(), {"checkpoint-2"})
        assert not left or folders.verify(run / "checkpoint-2") == []
        outcomes.add(len(left))

    points = survives_everywhere(run, lambda: save(run, 2), check)
    assert points >= 10
    assert outcomes == {0, 1}


def test_replacing_a_checkpoint_killed_anywhere_leaves_the_old_or_the_new(run: Path) -> None:
    final = save(run, 1)
    outcomes = set()

    def check() -> None:
        assert names(run) == {"checkpoint-1"}
        assert folders.verify(final) == []
        outcomes.add((final / "more").exists())

    survives_everywhere(run, lambda: save(run, 1, replace=True, more=b"x"), check)
    assert outcomes == {False, True}


@pytest.mark.parametrize("links", [True, False])
def test_one_file_of_a_checkpoint_changes_and_a_kill_leaves_the_old_or_the_new(
    run: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def refused(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refused)
    final = save(run, 1)
    before = {name: (final / name).read_bytes() for name in CONTENT}
    outcomes = set()

    def check() -> None:
        assert names(run) == {"checkpoint-1"}
        assert folders.verify(final) == []
        now = {name: (final / name).read_bytes() for name in CONTENT}
        assert {name for name in CONTENT if now[name] != before[name]} <= {"optimizer.pt"}
        outcomes.add(now["optimizer.pt"])

    survives_everywhere(run, lambda: folders.amend(final, "optimizer.pt", "new"), check)
    assert outcomes == {before["optimizer.pt"], b"new"}


def test_a_rotation_killed_anywhere_leaves_no_half_checkpoint(run: Path) -> None:
    for step in (1, 2, 3):
        save(run, step)

    def check() -> None:
        assert {"checkpoint-3"} <= names(run) <= {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
        assert all(folders.verify(path) == [] for path in checkpoint.checkpoints(run))

    assert survives_everywhere(run, lambda: checkpoint.rotate(run, 1), check) > 10
    assert names(run) == {"checkpoint-3"}


def test_files_are_durable_before_the_manifest_and_the_manifest_before_the_rename(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (events.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd)),
    )
    monkeypatch.setattr(os, "rename", lambda *a: (events.append("rename"), rename(*a)))
    save(run, 1)
    assert set(events[:3]) == {"model.safetensors", "optimizer.pt", "rank_1"}
    assert events[3:] == ["sub", "manifest.json", ".staging-checkpoint-1", "rename", "run"]


def test_left_overs_are_removed_and_named(run: Path) -> None:
    save(run, 1)
    (run / ".staging-checkpoint-2/sub").mkdir(parents=True)
    (run / ".trash-checkpoint-0").mkdir()
    (run / ".staging-config.yaml").write_text("half")
    shutil.copytree(run / "checkpoint-1", run / ".replaced-checkpoint-5")
    done = folders.clean(run)
    assert len(done) == 4
    assert names(run) == {"checkpoint-1", "checkpoint-5"}


# --- rotation ------------------------------------------------------------------------------------


def test_rotation_keeps_the_newest_and_the_best(run: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(run, step)
    checkpoint.set_best(run, run / "checkpoint-2", "loss", 0.1)
    best = checkpoint.best(run)
    assert best == run / "checkpoint-2"
    done = checkpoint.rotate(run, 2, protect=[best])
    assert [path.name for path in done.removed] == ["checkpoint-1", "checkpoint-3"]
    assert names(run) == {"checkpoint-2", "checkpoint-4", "checkpoint-5", "best.json"}


def test_rotation_deletes_nothing_while_the_newest_is_damaged(run: Path) -> None:
    for step in (1, 2, 3):
        save(run, step)
    (run / "checkpoint-3/optimizer.pt").write_bytes(b"")
    done = checkpoint.rotate(run, 1)
    assert done.removed == ()
    assert "checkpoint-3 is damaged" in (done.problem or "")
    assert checkpoint.newest_good(run)[0] == run / "checkpoint-2"


def test_rotation_never_empties_a_run(run: Path) -> None:
    save(run, 1)
    for keep in (1, 0):
        assert checkpoint.rotate(run, keep).removed == ()
    assert folders.verify(run / "checkpoint-1") == []


@pytest.mark.parametrize("how", ["deleted", "emptied", "halved", "one bit flipped", "appended"])
def test_a_checkpoint_that_was_sealed_just_now_is_not_read_but_must_be_untouched(
    run: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = save(run, 1), save(run, 2)
    assert is_untouched(new)
    later = (new / "manifest.json").stat().st_mtime_ns + 10_000_000
    damage(new, "model.safetensors", how, old)
    if how != "deleted":
        os.utime(new / "model.safetensors", ns=(later, later))
    assert not is_untouched(new)
    assert checkpoint.rotate(run, 1, whole=new).problem is not None
    assert old.exists()
    again = save(run, 3)
    monkeypatch.setattr("finetune.storage.manifest._hash", lambda *_, **__: pytest.fail("read"))
    assert set(checkpoint.rotate(run, 1, whole=again).removed) == {old, new}
