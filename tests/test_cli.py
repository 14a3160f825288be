"""The command line: one entry for every form, one message per error, exit codes that scripts rely on."""

from __future__ import annotations

import json
import os
import re
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import CONFIG, ROOT, exit_code, run

from finetune.errors import CheckpointError

COMMANDS = ("train", "evaluate", "predict", "merge", "chat", "schema", "init", "status", "data")
DATA_COMMANDS = ("data check", "data show", "data tokens")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory of the test's own, with x.yaml in it."""
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(CONFIG)
    return tmp_path


# The forms


@pytest.mark.parametrize(
    "form",
    [
        (ROOT / "finetune.py",),
        (ROOT / "finetune.py", "train"),
        ("-m", "finetune"),
        ("-m", "finetune", "train"),
        ("-c", "from finetune.cli import main; main()", "train"),
    ],
    ids=["finetune.py", "finetune.py train", "-m", "-m train", "command"],
)
def test_every_form_trains_the_same_from_another_directory(here, form):
    done = run(*form, "x.yaml", "model.dtyp=auto", cwd=here)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: command line: model.dtyp: unknown key in model; did you mean dtype?\n"
    )


def test_the_installed_command_is_the_same_entry():
    assert 'finetune = "finetune.cli:main"' in (ROOT / "pyproject.toml").read_text()


def test_a_spawned_child_of_finetune_py_does_not_run_it_again():
    assert "main" in runpy.run_path(str(ROOT / "finetune.py"), run_name="__mp_main__")


def test_under_torchrun_an_error_is_said_once(here):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = run(*launcher, ROOT / "finetune.py", "x.yaml", cwd=here)
    assert done.stderr.count("error: x.yaml:4: data.train: no-such-file.jsonl does not exist") == 1
    assert "exitcode  : 2" in done.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in done.stderr


@pytest.mark.parametrize("order", [("0", "1"), ("1", "0")])
def test_the_first_process_that_meets_an_error_says_it(here, monkeypatch, capsys, order):
    for rank in order:
        error_file = here / "attempt_0" / rank / "error.json"
        error_file.parent.mkdir(parents=True)
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
        assert exit_code("x.yaml") == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_without_torchruns_folder_only_rank_0_speaks(here, monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert exit_code("x.yaml", "foo") == 2
        assert exit_code("evaluate") == 2
    errors = capsys.readouterr().err
    assert errors.count("`foo` is not of the form") == 1
    assert errors.count("there is nothing to evaluate") == 1


# Help and usage


@pytest.mark.parametrize("command", COMMANDS + DATA_COMMANDS)
def test_every_command_has_a_help_page(command, capsys):
    assert exit_code(*command.split(), "--help") == 0
    page = capsys.readouterr().out
    assert page.startswith(f"Usage: finetune {command} ")
    if command in ("train", "evaluate", "predict", "merge", "data check", "data show"):
        assert "--json" in page


def test_the_help_page_lists_every_command_in_full(capsys):
    assert exit_code("--help") == 0
    page = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^  {command} +[A-Z].*\w\.?$", page, re.MULTILINE), command
    assert "..." not in page.split("Commands:")[1]


def test_help_answers_without_anything_heavy_in_well_under_a_second(tmp_path):
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("-X", "importtime", "-m", "finetune", "--help", cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if seconds[-1] < 0.7:
            break
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "datasets", "numpy", "pydantic", "rich"}
    assert min(seconds) < 0.7  # CPU seconds: the machine may be busy with other things


def test_a_wrong_path_answers_without_anything_heavy(here):
    done = run("-X", "importtime", "-m", "finetune", "x.yaml", cwd=here)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 2
    assert "pydantic" in imported
    assert not imported & {"torch", "transformers", "datasets"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "x.yaml"], "Did you mean 'train'?"),
        (["evaluate"], "there is nothing to evaluate"),
        (["merge", "x"], "Missing option '--output'"),
        (["merge", "x", "--outptu", "y"], "--output"),
        (["evaluate", "x", "--data", "y", "--replies", "every"], "'every' is not one of"),
        (["predict", "x", "--data", "y", "--output", "z", "--batch-size", "0"], "--batch-size"),
        (["x.yaml", "--lr", "3"], "No such option"),
        ([], "Usage: finetune"),
    ],
)
def test_a_wrong_command_line_exits_2_with_a_hint(here, capsys, words, said):
    assert exit_code(*words) == 2
    out, err = capsys.readouterr()
    assert said.lower() in (out + err).lower()


# Errors and exit codes


def test_paths_that_lead_nowhere_are_named_together_before_anything_heavy(here, capsys):
    overrides = ["model.path=./nowhere", "data.validation=[a/*.jsonl]", "deepspeed.config=ds.json"]
    assert exit_code("x.yaml", *overrides) == 2
    error = capsys.readouterr().err
    assert "data.train: no-such-file.jsonl does not exist" in error
    assert "data.validation[0]: no file matches a/*.jsonl" in error
    assert "model.path: not a directory, and not a hub id like org/name: ./nowhere" in error
    assert "deepspeed.config: ds.json is not a file" in error


@pytest.fixture
def failing(monkeypatch):
    """Makes every training run end with an error."""

    def fail_with(error: BaseException) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("finetune.config.load.load", fail)

    return fail_with


def test_an_error_of_ours_is_one_line_and_its_exit_code(failing, capsys):
    failing(CheckpointError("runs/x: damaged"))
    assert exit_code("x.yaml") == 3
    assert capsys.readouterr().err == "error: runs/x: damaged\n"


def test_debug_shows_the_traceback_wherever_it_stands(failing, capsys):
    failing(CheckpointError("runs/x: damaged"))
    for words in (("--debug", "x.yaml"), ("train", "x.yaml", "--debug")):
        assert exit_code(*words) == 3
        error = capsys.readouterr().err
        assert error.startswith("Traceback")
        assert error.endswith("CheckpointError: runs/x: damaged\n")


def test_an_unexpected_error_keeps_its_traceback_and_exits_1(here):
    code = (
        "import finetune.config.load as c, finetune.cli\n"
        "def load(*_): raise ZeroDivisionError('ours to fix')\n"
        "c.load = load\n"
        "finetune.cli.main(['x.yaml'])"
    )
    done = run("-c", code, cwd=here)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "ZeroDivisionError: ours to fix" in done.stderr


def test_ctrl_c_exits_130_without_a_traceback(failing, capsys):
    failing(KeyboardInterrupt())
    assert exit_code("x.yaml") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(here):
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "schema"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


def test_chinese_on_a_terminal_without_chinese_is_no_crash(here):
    (here / "你好.yaml").write_text("x: 1\n---\n", encoding="utf-8")
    done = run("-m", "finetune", "你好.yaml", cwd=here, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert r"error: \u4f60\u597d.yaml:2: a second document" in done.stderr


# What the commands print


def test_schema_prints_the_json_schema_and_the_page(capfd):
    assert exit_code("schema") == 0
    assert json.loads(capfd.readouterr().out)["properties"].keys() >= {"model", "data"}
    assert exit_code("schema", "--markdown") == 0
    assert capfd.readouterr().out == (ROOT / "docs/config.md").read_text(encoding="utf-8")


def test_show_config_prints_a_configuration_that_can_be_used_again(here, capsys):
    assert exit_code("x.yaml", "training.seed=7", "--show-config") == 0
    shown = capsys.readouterr().out
    Path("again.yaml").write_text(shown)
    assert exit_code("train", "again.yaml", "--show-config") == 0
    assert capsys.readouterr().out == shown
    assert "  seed: 7\n" in shown


def test_show_config_as_json_is_a_configuration_too(here, capfd):
    assert exit_code("x.yaml", "training.seed=7", "--show-config", "--json") == 0
    shown = capfd.readouterr().out
    assert json.loads(shown)["training"]["seed"] == 7
    Path("again.yaml").write_text(shown)
    assert exit_code("again.yaml", "--show-config", "--json") == 0
    assert capfd.readouterr().out == shown


def test_show_config_says_which_options_another_method_leaves_out(here, capfd):
    Path("lora.yaml").write_text(CONFIG.replace("kind: lora", "kind: lora\n  rank: 4"))
    assert exit_code("lora.yaml", "method.kind=full", "--show-config") == 0
    assert "method.rank of the file left out" in capfd.readouterr().err
