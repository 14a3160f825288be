"""How a command line ends, whatever stops it: the code, the one message, and who of several processes says it."""

from __future__ import annotations

import errno
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from command_line import ROOT, exit_code

import finetune
from finetune import cli, console
from finetune.cli import floors
from finetune.errors import ConfigError
from finetune.language import pages


def met(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a command line whose work raises this."""

    def fail(words: Any) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    return exit_code("x")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 6, "error: the disk cannot be written or read (No space left on device); free some space"),
        (RuntimeError("No space left (os error 28)\nstack"), 6, "error: the disk cannot be written or read (No space left (os error 28)); free"),
        (OSError(errno.EIO, "Input/output error", "runs/x"), 6, "error: runs/x: the disk cannot be written or read (Input/output error)"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "runs/x"), 2, "error: runs/x: No such file or directory; check the path, or choose another place"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"runs/x"), 2, "error: runs/x: Not a directory; check"),
        (OSError(errno.ENOMEM, "Cannot allocate memory", "runs/x"), 5, "error: out of memory: [Errno 12] Cannot allocate memory"),
        (MemoryError(), 5, "error: out of memory: MemoryError\nThe most this process"),
        (MemoryError("x" * 400), 5, f"error: out of memory: {'x' * 300}\n"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_the_machine_refuses_is_a_message_with_its_place(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert met(error, monkeypatch) == code
    assert capfd.readouterr().err.startswith(said)


@pytest.mark.parametrize("error", [FileNotFoundError("no name"), OSError("no name"), KeyError("x")])
def test_what_names_no_path_is_an_error_of_ours_while_the_working_directory_is_there(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(error)):
        met(error, monkeypatch)


def test_memory_that_ran_out_names_what_needs_less(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    met(MemoryError("no room"), monkeypatch)
    said = capfd.readouterr().err
    assert "a smaller --batch-size, fewer --max-new-tokens, shorter rows" in said


def test_the_streams_are_made_ready_before_and_written_out_after_whatever_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(console, "open_missing_streams", lambda: told.append("opened"))
    monkeypatch.setattr(console, "flush_at_exit", lambda: told.append("flushed"))
    monkeypatch.setattr(cli, "_run", lambda words: told.append("run") or 3)  # type: ignore[func-returns-value]
    assert exit_code("x") == 3
    assert told == ["opened", "run", "flushed"]
    for error in (ConfigError("x"), KeyboardInterrupt(), SystemExit(1)):
        told.clear()
        met(error, monkeypatch)
        assert told == ["opened", "flushed"]
    told.clear()
    with pytest.raises(ZeroDivisionError):
        met(ZeroDivisionError(), monkeypatch)
    assert told == ["opened", "flushed"]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_has_no_chinese_shows_it_in_escapes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict")
    monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(cli, "_run", lambda words: print("你", file=getattr(sys, name)) or 0)
    assert exit_code("x") == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u4f60\n"  # type: ignore[attr-defined]


def test_a_mistyped_line_is_said_by_the_first_of_several_processes_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert exit_code("merge", "x", "--outptu", "y") == 2
    assert capsys.readouterr().err.count("--outptu") == 1


def test_a_question_that_is_not_answered_ends_the_command_as_an_interrupt_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: object, **__: object) -> str:
        raise typer.Abort

    monkeypatch.setattr("typer.prompt", ended)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert exit_code("init", "--output", str(tmp_path / "my.yaml")) == 130


@pytest.mark.parametrize(
    ("data", "model", "config"), [("data/fix", "some/model", "lora.yaml"), ("b", "a", "c.yml")]
)
def test_the_command_of_the_demo_is_answered_with_each_word_in_its_place(
    data: str, model: str, config: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        cli._check_demo_command([data, model, config, "yes"], {})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"`finetune.py {data} {model} {config} yes` is the original demo's")
    assert lines[1:3] == [
        f"  finetune migrate {config} --data {data} --model {model} --output new.yaml",
        "  torchrun finetune.py new.yaml",
    ]


@pytest.mark.parametrize(
    ("library", "safe", "holes"),
    [
        ("torch", "2.6.0", "2.5.1"), ("transformers", "5.10.4", "5.10.3"), ("pillow", "12.3.0", "12.2.0"),
        ("deepspeed", "0.15.1", "0.15.0"), ("torch", "2.6.0", "unknown"),
    ],
)  # fmt: skip
def test_a_library_with_a_known_hole_stops_every_command(
    library: str, safe: str, holes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The versions of the advisories: CVE-2025-32434 of torch, CVE-2024-43497 of DeepSpeed."""
    for found, problems in ((safe, 0), (holes, 1)):
        monkeypatch.setattr(floors, "version", lambda name, f=found: f if name == library else "99")
        if not problems:
            floors.check_versions()
            continue
        with pytest.raises(ConfigError, match=f"^{library} {found} is installed"):
            floors.check_versions()


def test_the_version_is_said_and_nothing_else_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capfd.readouterr().out == f"{finetune.__version__}\n"
    with pytest.raises(AttributeError):
        finetune.__getattr__("api")


# --- pages in the terminal -------------------------------------------------------------------------


def test_a_page_of_the_documentation_is_shown_and_without_a_name_all_are_listed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_LANG", "en")
    assert exit_code("help") == 0
    rows = capfd.readouterr().out.splitlines()
    named = {line.split()[0] for line in rows[2:]}
    assert named == set(pages.topics())
    assert any(
        line.split() == ["exit_codes", *pages.topics()["exit_codes"].split()] for line in rows
    )
    assert exit_code("help", "exit_codes") == 0
    shown = capfd.readouterr().out
    title = (ROOT / "docs/reference/exit_codes.md").read_text(encoding="utf-8").splitlines()[0]
    assert shown.startswith(title)


def test_help_of_a_command_is_its_help_page_and_a_slip_has_a_proposal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_LANG", "en")
    for words in ("merge", "data check"):
        assert exit_code("help", words) == 0
        assert capfd.readouterr().out.startswith(f"Usage: finetune {words} ")
    for words, near in (("exit_code", "exit_codes"), ("data checks", None), ("merge check", None)):
        assert exit_code("help", words) == 2
        said = capfd.readouterr().err
        assert f"there is no topic {words!r}" in said
        assert ("did you mean" in said) is (near is not None)
        assert near is None or f"did you mean {near}?" in said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_script_that_asks_the_command(
    shell: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("completion", shell) == 0
    script = capfd.readouterr().out
    assert "_FINETUNE_COMPLETE=complete_" + shell in script
    assert "finetune" in script


def test_what_a_shell_asks_for_is_answered_with_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_FINETUNE_COMPLETE", "complete_bash")
    for line, wanted in (
        ("finetune tra", {"train"}),
        ("finetune train x.yaml training.save_ev", {"training.save_every_steps="}),
        ("finetune merge a --no-ch", {"--no-check"}),
    ):
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
        assert exit_code() == 0
        assert set(capfd.readouterr().out.split()) == wanted


# --- launch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "taken"), [("1", True), ("1024", True), ("0", False), ("1025", False), ("-1", False)]
)  # fmt: skip
def test_a_machine_has_from_1_to_1024_processes_and_the_run_s_code_is_the_command_s(
    processes: str, taken: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import logging
    import os

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    seen: list[str | None] = []
    quiet = logging.getLogger("torch.distributed.elastic")
    monkeypatch.setattr(quiet, "level", logging.WARNING)

    def run(words: list[str]) -> None:
        seen.extend([words[0], os.environ.get("OMP_NUM_THREADS")])
        assert not quiet.isEnabledFor(logging.ERROR)
        raise ChildFailedError("train", {0: ProcessFailure(0, 1, 4, "<N/A>")})

    monkeypatch.setattr("torch.distributed.run.main", run)
    for threads in (None, "7"):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if threads:
            monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert exit_code("launch", "-n", processes, "x.yaml") == (4 if taken else 2)
    number = f"--nproc-per-node={processes}"
    assert seen == ([number, "1", number, "7"] if taken else [])
    assert ("--processes must be from 1 to 1024" in capfd.readouterr().err) is not taken


def test_the_output_of_a_launched_run_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("torch.distributed.run.main", lambda words: told.append("run"))
    stream = SimpleNamespace(flush=lambda: told.append("flushed"))
    from finetune.cli import launch

    monkeypatch.setattr(launch.sys, "stdout", stream)
    assert launch.launch("1", ["x.yaml"]) == 0
    assert told == ["run", "flushed"]


def test_a_group_without_a_command_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("data") == 2
    said = "".join(capsys.readouterr())
    assert said.startswith("Usage: finetune data ")
    for name in ("check", "show", "tokens", "split", "prepare"):
        assert f"\n  {name} " in said


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
def test_where_no_mark_can_be_left_the_first_process_speaks(
    rank: str, speaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    assert cli._speaks("x") is speaks
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/null")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli._speaks("x") is speaks
