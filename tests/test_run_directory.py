"""One run at a time writes a run directory, and nobody else's death keeps it locked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.artifacts.run_dir import RunDirectory
from finetune.errors import ConfigError, RunDirectoryInUseError

HOLD = (
    "import sys, time; from finetune.artifacts.run_dir import RunDirectory\n"
    "directory = RunDirectory.open(sys.argv[1]); print('held', flush=True); time.sleep(60)\n"
)


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_told_who_holds_the_folder_and_kill_9_frees_it(tmp_path: Path) -> None:
    first = holder(tmp_path / "run")
    try:
        with pytest.raises(RunDirectoryInUseError, match=f"process {first.pid} on ") as caught:
            RunDirectory.open(tmp_path / "run")
        assert caught.value.exit_code == 7
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    RunDirectory.open(tmp_path / "run").close()


def test_a_closed_folder_is_free_and_can_be_opened_again(tmp_path: Path) -> None:
    for _ in range(2):
        with RunDirectory.open(tmp_path), pytest.raises(RunDirectoryInUseError):
            RunDirectory.open(tmp_path)


def test_a_forked_worker_that_outlives_the_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path)
    listen, speak = os.pipe()
    if (child := os.fork()) == 0:
        os.write(speak, b"x")
        time.sleep(30)
        os._exit(0)
    try:
        os.read(listen, 1)  # the worker runs
        directory.close()
        RunDirectory.open(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(listen)
        os.close(speak)


def test_a_forked_worker_that_ends_does_not_release_the_lock(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path):
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(RunDirectoryInUseError):
            RunDirectory.open(tmp_path)


def test_other_ranks_neither_lock_nor_tidy(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path) as leader:
        (tmp_path / ".staging-checkpoint-1").mkdir()
        with RunDirectory.open(tmp_path, is_rank0=False) as other:
            assert other.path == leader.path == tmp_path
        assert (tmp_path / ".staging-checkpoint-1").exists()


def test_opening_tidies_what_an_interrupted_run_left(tmp_path: Path) -> None:
    (tmp_path / ".staging-checkpoint-1").mkdir()
    with RunDirectory.open(tmp_path) as directory:
        assert len(directory.cleaned) == 1
        assert ".staging-checkpoint-1" in directory.cleaned[0]
        assert not (tmp_path / ".staging-checkpoint-1").exists()


def test_the_config_is_written_whole(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "a/b") as directory:
        assert directory.write_config("seed: 1\n").read_text() == "seed: 1\n"
        directory.write_config("seed: 2\n")
        assert {p.name for p in directory.path.iterdir()} == {".lock", "config.yaml"}
        assert (directory.path / "config.yaml").read_text() == "seed: 2\n"


@pytest.mark.parametrize(
    "name",
    ["ünï 模型", "with space", "a'b\"c", "x;$(touch y)", "-r", "n" * 200],
    ids=lambda n: n[:9],
)
def test_odd_names_are_just_names(tmp_path: Path, name: str) -> None:
    with RunDirectory.open(tmp_path / name) as directory:
        directory.write_config("")
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", ["file", "under a file", "too long", "NUL", "read-only"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    path = {
        "file": tmp_path / "file",
        "under a file": tmp_path / "file/run",
        "too long": tmp_path / ("n" * 256),
        "NUL": tmp_path / "a\0b",
        "read-only": Path("/proc/run"),
    }[kind]
    with pytest.raises(ConfigError, match=r"training\.output_dir"):
        RunDirectory.open(path)
