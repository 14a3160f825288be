"""A run from outside: its folder, its processes, and what a dry run would be refused for."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.artifacts.run_dir import RunDirectory
from finetune.config.schema import DataSection, ModelSection, TrainingSection
from finetune.errors import CheckpointError, ConfigError, RunDirectoryInUseError
from finetune.training import run, session
from finetune.training.session import run_directory, would_start


def training(folder: Path, **options: Any) -> TrainingSection:
    return TrainingSection(output_dir=str(folder), **options)


@pytest.fixture
def data(tmp_path: Path) -> DataSection:
    for name in ("train", "held-out"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    return DataSection(
        train=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "held-out.jsonl")
    )


def old_run(folder: Path, *, harmful: bool = False) -> None:
    """A checkpoint of an earlier run; `harmful`: whose states anybody can write."""
    states = folder / "checkpoint-2/global_step2"
    states.mkdir(parents=True)
    (states / "states.pt").touch()
    if harmful:
        (states / "states.pt").chmod(0o666)


@pytest.mark.parametrize("read", ["train", "validation"])
def test_a_run_does_not_write_into_a_folder_that_it_reads(
    read: str, data: DataSection, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    asked = training(tmp_path / "rows/run")
    section = data.model_copy(update={read: str(tmp_path / "rows")})
    with pytest.raises(ConfigError, match=r"training\.output_dir: .* lies inside"):
        would_start(asked, section, trust=False)
    with pytest.raises(ConfigError, match=r"training\.output_dir"), run_directory(asked, section, trust=False):  # fmt: skip
        pass


def test_a_dry_run_names_a_file_in_the_place_of_the_folder_as_the_run_does(
    data: DataSection, tmp_path: Path
) -> None:
    asked = training(tmp_path / "train.jsonl")
    for start in (lambda: would_start(asked, data, trust=False), lambda: run_directory(asked, data, trust=False).__enter__()):  # fmt: skip
        with pytest.raises(ConfigError, match=r"training\.output_dir: .* cannot be used as a run"):
            start()


def test_a_folder_that_another_run_holds_is_refused(data: DataSection, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with RunDirectory.open(str(folder), is_rank0=True):
        with pytest.raises(RunDirectoryInUseError, match="is in use by"):
            would_start(training(folder), data, trust=False)
        with pytest.raises(RunDirectoryInUseError), run_directory(training(folder), data, trust=False):  # fmt: skip
            pass
    assert would_start(training(folder), data, trust=False) is None


@pytest.mark.parametrize("trust", [False, True])
def test_states_of_others_are_trusted_only_when_that_is_said(
    trust: bool, data: DataSection, tmp_path: Path
) -> None:
    old_run(tmp_path / "run", harmful=True)
    asked = training(tmp_path / "run", resume="auto")

    def entered() -> str:
        with run_directory(asked, data, trust=trust) as folder:
            return folder.name

    if trust:
        assert would_start(asked, data, trust=True) is None  # it is damaged, and passed over
        assert entered() == "run"
        return
    for start in (lambda: would_start(asked, data, trust=False), entered):
        with pytest.raises(CheckpointError, match="--trust-checkpoint"):
            start()


def test_a_damaged_checkpoint_is_passed_over_with_its_reason(
    data: DataSection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old_run(tmp_path / "run")
    assert would_start(training(tmp_path / "run"), data, trust=False) is None
    assert "checkpoint-2 is passed over: " in capsys.readouterr().err


def test_never_refuses_an_old_run_before_data_is_prepared(
    data: DataSection, tmp_path: Path
) -> None:
    old_run(tmp_path / "run")
    asked = training(tmp_path / "run", resume="never")
    for start in (lambda: would_start(asked, data, trust=False), lambda: run_directory(asked, data, trust=False).__enter__()):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"training\.resume is never"):
            start()


def test_a_dry_run_trusts_no_more_than_the_run_would(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def start(training: Any, data: Any, *, trust: bool) -> None:
        asked.append(trust)
        raise CheckpointError("seen")

    monkeypatch.setattr(run, "settled", lambda config: config)
    monkeypatch.setattr(run.session, "would_start", start)
    config: Any = SimpleNamespace(training=None, data=None)
    for trust in (False, True):
        with pytest.raises(CheckpointError, match="seen"):
            run.dry_run(config, trust_checkpoint=trust)
    assert asked == [False, True]


@pytest.mark.parametrize("held_out", [None, "examples"])
def test_a_run_holds_what_an_evaluation_takes_only_where_it_has_one(held_out: str | None) -> None:
    sections = ("model", "method", "training", "deepspeed", "evaluation")
    config: Any = SimpleNamespace(
        **{name: name for name in sections}, data=SimpleNamespace(max_length=9)
    )
    data: Any = SimpleNamespace(validation=held_out, longest=7)
    found = run.memory_of(config, data)
    assert found.evaluation == (held_out and "evaluation")
    assert (found.max_length, found.longest) == (9, 7)


def test_a_dry_run_tells_what_all_processes_will_hold_and_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.training import dry_run

    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(dry_run, "local_folder", lambda *_, **__: tmp_path)
    monkeypatch.setattr(dry_run, "tensors", lambda folder: range(1234))
    asked: list[int] = []

    def plan(gpu: Any, folder: Path) -> Any:
        asked.append(gpu.number)
        return SimpleNamespace(memory_bytes=2_500_000_000)

    memory: Any = SimpleNamespace(
        model=ModelSection(path=str(tmp_path)), method=SimpleNamespace(kind="full"), plan=plan
    )
    data: Any = SimpleNamespace(
        validation=range(7), train=range(9), stream=None, steps=lambda training: 30,
        size=lambda: "9", an_epoch=lambda: " (10 an epoch)",
    )  # fmt: skip
    found = dry_run.foreseen(
        training(tmp_path / "run", report_to=[]), data, memory, Path("checkpoint-4")
    )
    assert asked == [8]
    assert found == {
        "output_dir": str(tmp_path / "run"), "steps": 30, "examples": 9, "validation_examples": 7,
        "resumes_from": "checkpoint-4", "model_tensors": 1234, "memory_bytes_per_gpu": 2_500_000_000,
    }  # fmt: skip
    said = capsys.readouterr().out
    for part in ("1,234 tensors", "9 examples", "7 examples", "30 steps (10 an epoch)", "2.5 GB on each GPU"):  # fmt: skip
        assert part in said
    data.validation, data.stream = None, "a stream"
    streamed = dry_run.foreseen(training(tmp_path / "run", report_to=[]), data, memory, None)
    assert (streamed["examples"], streamed["validation_examples"], streamed["resumes_from"]) == (None, None, None)  # fmt: skip


def test_a_dry_run_of_a_model_that_is_still_on_its_hub_says_so_and_names_missing_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.training import dry_run

    fetched: list[Any] = []
    monkeypatch.setattr(
        dry_run, "local_folder",
        lambda path, revision, files: fetched.append((path, revision, files)) or tmp_path,
    )  # fmt: skip
    memory: Any = SimpleNamespace(
        model=ModelSection(path="org/name", revision="main"), method=SimpleNamespace(kind="lora"),
        plan=lambda gpu, folder: SimpleNamespace(memory_bytes=1),
    )  # fmt: skip
    data: Any = SimpleNamespace(
        validation=None, train=(), stream="a stream", steps=lambda training: 30,
        size=lambda: "a stream of 2 files", an_epoch=lambda: "",
    )  # fmt: skip
    found = dry_run.foreseen(training(tmp_path / "run", report_to=[]), data, memory, None)
    assert found["model_tensors"] is None
    assert fetched == [("org/name", "main", dry_run.TOKENIZER_FILES)]  # and no weights
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for row in (
        "train lora on org/name", "open the model, fetched from its hub first",
        "learn from a stream of 2 files", "measure on nothing", "do 30 steps",
        f"write to {tmp_path / 'run'}",
    ):  # fmt: skip
        assert row in rows
    with pytest.raises(ConfigError, match="pip install no_such_tracker"):
        dry_run.foreseen(
            TrainingSection.model_construct(report_to=["no_such_tracker"]), data, memory, None
        )


def test_a_run_outlives_its_readers_and_libraries_are_quiet_in_it(
    data: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(session.console, "tolerate_lost_output", lambda: events.append("tolerant"))
    monkeypatch.setattr(
        "finetune.models.library_logging.quiet_libraries", lambda: events.append("quiet")
    )
    with run_directory(training(tmp_path / "run"), data, trust=False):
        assert events == ["tolerant"]
    with session.all_processes(training(tmp_path), deepspeed=False):
        assert events == ["tolerant", "quiet"]


@pytest.mark.parametrize("deepspeed", [False, True])
def test_processes_join_and_are_watched_for_the_timeout_of_the_section(
    deepspeed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    asked: list[Any] = []

    @contextmanager
    def noted(*given: Any, **named: Any) -> Any:
        asked.append((given[:1], named))
        yield

    monkeypatch.setattr("finetune.distributed.processes.joined_processes", noted)
    monkeypatch.setattr("finetune.distributed.watchdog.watching", noted)
    section = training(tmp_path, process_timeout_minutes=2.5)
    with session.all_processes(section, deepspeed=deepspeed):
        pass
    with pytest.raises(SystemExit) as ended, session.all_processes(section, deepspeed=deepspeed) as stop:  # fmt: skip
        stop.agreed_signal = signal.SIGTERM
    assert ended.value.code == 143
    assert asked[:2] == [((), {"timeout_minutes": 2.5, "deepspeed": deepspeed}), ((2.5,), {})]


def test_the_command_of_the_end_is_told_of_a_folder_that_is_refused(
    data: DataSection, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    asked = training(folder, on_end=f"touch {tmp_path / 'told'}")
    with RunDirectory.open(str(folder), is_rank0=True), pytest.raises(RunDirectoryInUseError), run_directory(asked, data, trust=False):  # fmt: skip
        pass
    assert (tmp_path / "told").exists()


def test_the_commit_of_a_hub_id_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "pinned_revision", lambda path, revision: f"{path}@{revision}")
    assert session.pinned(ModelSection(path="org/x", revision="main")).revision == "org/x@main"


@pytest.mark.parametrize("asked", [None, signal.SIGTERM])
def test_a_run_that_a_signal_ended_says_how_to_go_on_and_gives_the_handlers_back(
    asked: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def through() -> None:
        with session.all_processes(training(tmp_path), deepspeed=False) as stop:
            stop.install()
            assert signal.getsignal(signal.SIGTERM) != before
            if asked is not None:
                stop.local_signal = asked
                stop.sync()

    if asked is None:
        through()
    else:
        with pytest.raises(SystemExit) as caught:
            through()
        assert caught.value.code == 128 + asked
        assert "run the same command to resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


def test_handlers_come_back_after_an_error_too(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def through() -> None:
        with session.all_processes(training(tmp_path), deepspeed=False) as stop:
            stop.install()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        through()
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_run_is_lies_in_its_folder(tmp_path: Path) -> None:
    session.describe(tmp_path, "model: {}\n", {"train": {"examples": 3}})
    assert (tmp_path / "config.yaml").read_text() == "model: {}\n"
    assert json.loads((tmp_path / "data.json").read_text()) == {"train": {"examples": 3}}
