"""The command line: one entry for every form, one message per error, exit codes that scripts rely on."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import cli, console
from finetune.errors import CheckpointError

ROOT = Path(__file__).parent.parent
COMMANDS = ("train", "evaluate", "predict", "merge", "chat", "schema", "data")
DATA_COMMANDS = ("data check", "data show", "data tokens")

CONFIG = """\
model:
  path: some/model
data:
  train: no-such-file.jsonl
method:
  kind: lora
training:
  output_dir: runs/x
"""


def run(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python program with these words, as a user would start it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory of the test's own, with x.yaml in it."""
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(CONFIG)
    return tmp_path


def exit_code(*words: str) -> object:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    return caught.value.code


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
    assert done.stderr.count("error: data.train: no-such-file.jsonl does not exist") == 1
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
        assert exit_code("x.yaml", "foo") == 2
        assert exit_code("evaluate") == 2
    errors = capsys.readouterr().err
    assert errors.count("`foo` is not of the form") == 1
    assert errors.count("Missing argument") == 1


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
        (["evaluate"], "Missing argument 'TARGET'"),
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
    assert "data.validation: no file matches a/*.jsonl" in error
    assert "model.path: ./nowhere is not a folder" in error
    assert "deepspeed.config: ds.json is not a file" in error


@pytest.fixture
def failing(monkeypatch):
    """Makes every training run end with an error."""

    def fail_with(error: BaseException) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("finetune.config_file.load", fail)

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
        "import finetune.config_file as c, finetune.cli\n"
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


# Every command, from both ends

DIALOGUES = [
    {"messages": [{"role": "user", "content": f"hello {n}"},
                  {"role": "assistant", "content": f"the order {n}"}]}
    for n in range(6)
]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_chatglm) -> Path:
    """A directory with data, a configuration, and the run that it made through the command line."""
    folder = tmp_path_factory.mktemp("workplace")
    rows = [json.dumps(row) + "\n" for row in DIALOGUES]
    (folder / "rows.jsonl").write_text("".join(rows))
    (folder / "run.yaml").write_text(
        f"model:\n  path: {tiny_chatglm}\n"
        "data:\n  train: rows.jsonl\n  validation: rows.jsonl\n  max_length: 64\n"
        "method:\n  kind: lora\n"
        "training:\n  output_dir: run\n  batch_size: 2\n  report_to: []\n"
        "evaluation:\n  max_new_tokens: 4\n"
    )
    done = run(ROOT / "finetune.py", "run.yaml", "training.max_steps=2", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "summary.json").write_text(done.stdout)
    return folder


@pytest.fixture
def answer(workplace, monkeypatch, capfd):
    """Runs a command with --json in the workplace and gives what it answers."""
    monkeypatch.chdir(workplace)

    def answered(*words: str) -> dict[str, object]:
        code = exit_code(*words, "--json")
        out, err = capfd.readouterr()
        assert code == 0, err
        return json.loads(out)

    return answered


def test_train_answers_with_the_summary_of_a_run_that_is_on_disk(workplace):
    summary = json.loads((workplace / "summary.json").read_text())
    assert summary["steps"] == 2
    assert (workplace / "run" / "config.yaml").is_file()
    assert (workplace / "run" / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_evaluate_of_a_run_gives_the_scores_of_its_training(workplace, answer):
    report = answer("evaluate", "run", "--output", "scores")
    trained = json.loads((workplace / "summary.json").read_text())["scores"]
    assert report["scores"] == pytest.approx({name: trained.get(name) for name in report["scores"]})
    assert json.loads((workplace / "scores" / "scores.json").read_text()) == report
    assert len((workplace / "scores" / "predictions.jsonl").read_text().splitlines()) == 6


def test_predict_writes_a_reply_to_every_dialogue(workplace, answer):
    report = answer("predict", "run", "--data", "rows.jsonl", "--output", "p.jsonl",
                    "--max-new-tokens", "3")  # fmt: skip
    rows = [json.loads(line) for line in (workplace / "p.jsonl").read_text().splitlines()]
    assert report["replies"] == len(rows) == 6
    assert [row["messages"][0] for row in rows] == [row["messages"][0] for row in DIALOGUES]


def test_merge_writes_a_checkpoint_that_equals_base_and_adapter(workplace, answer):
    report = answer("merge", "run", "--output", "merged")
    assert report["output"] == "merged"
    assert report["largest_difference"] < 1e-4
    assert (workplace / "merged" / "model.safetensors").is_file()


def test_chat_answers_until_it_is_told_to_quit(workplace, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/quit\n"))
    assert exit_code("chat", "run", "--max-new-tokens", "3", "--system", "be brief") == 0
    assert "opening run/checkpoint-2" in capfd.readouterr().out


def test_data_check_counts_and_exits_2_when_a_row_is_bad(workplace, answer, capfd):
    assert answer("data", "check", "rows.jsonl")["sources"][0]["dialogues"] == 6
    Path("bad.jsonl").write_text(json.dumps(DIALOGUES[0]) + '\n{"messages": 5}\n')
    assert exit_code("data", "check", "bad.jsonl") == 2
    assert "error: 1 bad rows:\n  bad.jsonl:2: " in capfd.readouterr().err


def test_data_show_marks_what_carries_loss(workplace, tiny_chatglm, answer, capfd):
    shown = answer("data", "show", "rows.jsonl", "--model", str(tiny_chatglm), "--line", "3")
    assert shown["where"] == "rows.jsonl:3"
    assert exit_code("data", "show", "rows.jsonl", "--model", str(tiny_chatglm)) == 0
    out = capfd.readouterr().out
    assert "<|user|>\nhello 0<|assistant|>«\nthe order 0<|user|>»\n" in out
    assert "it stops at <|user|>" in out


def test_data_tokens_prints_a_row_per_dialogue(workplace, tiny_chatglm, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    assert exit_code("data", "tokens", "rows.jsonl", "--model", str(tiny_chatglm)) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert len(rows) == 6
    for row in rows:
        ((start, end),) = row["trained_spans"]
        assert 0 < start < end == len(row["input_ids"])


# The console


@pytest.fixture
def terminal(monkeypatch):
    """Pretends that a person watches."""
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    monkeypatch.setattr(console, "_consoles", {})
    monkeypatch.setenv("COLUMNS", "100")


def test_only_rank_0_talks(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    console.say("a")
    console.warn("b")
    console.table(["c"], [[1]])
    with console.progress(1, "d") as meter, console.json_output() as emit:
        meter.advance()
        emit({"e": 1})
    assert capfd.readouterr() == ("", "")


def test_text_is_never_read_as_markup(terminal, capsys):
    console.say("[gMASK]<sop> [bold]not bold[/bold] :smile:")
    console.table(["[x]"], [["[/x]"]])
    out = capsys.readouterr().out
    assert "[gMASK]<sop> [bold]not bold[/bold] :smile:\n" in out
    assert "[x]" in out
    assert "[/x]" in out


def test_a_long_line_is_not_broken_on_a_terminal(terminal, capsys):
    console.say("x" * 300)
    assert capsys.readouterr().out == "x" * 300 + "\n"


def test_a_plain_table_is_aligned_also_in_chinese(capsys):
    console.table(["file", "rows"], [["你好", 5], ["abcdef", 12]])
    assert capsys.readouterr().out == (
        "file    rows\n"
        "------  ----\n"
        "你好       5\n"
        "abcdef    12\n"
    )  # fmt: skip


def test_in_a_log_file_progress_is_a_line_every_few_seconds_at_most(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress(100, "rows") as meter:
        for _ in range(100):
            now += 0.1875  # 18.75 seconds in all
            meter.advance()
    assert capsys.readouterr().out.splitlines() == [
        "rows: 27/100 (27 %), 14 s left, 5 s so far",
        "rows: 54/100 (54 %), 9 s left, 10 s so far",
        "rows: 81/100 (81 %), 4 s left, 15 s so far",
        "rows: 100/100 (100 %), 0 s left, 19 s so far",
    ]


def test_progress_of_an_unknown_total_is_a_count(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress(None, "rows") as meter:
        now = 61.0
        meter.advance(5, "still going")
    assert capsys.readouterr().out == "rows: 5, 1:01 so far, still going\n"


def test_with_json_standard_output_holds_only_json_whoever_prints(capfd):
    with console.json_output() as emit:
        console.say("talk")
        print("a library")
        os.write(1, b"a library in C\n")
        subprocess.run(["echo", "a child"], check=True)
        emit({"分数": 1.5})
    console.say("back")
    out, err = capfd.readouterr()
    assert out == '{"分数": 1.5}\nback\n'
    assert sorted(err.splitlines()) == ["a child", "a library", "a library in C", "talk"]


def test_durations_are_written_as_people_write_them():
    assert [console.duration(s) for s in (0.4, 59.6, 187, 3725)] == [
        "0 s", "1:00", "3:07", "1:02:05",
    ]  # fmt: skip
