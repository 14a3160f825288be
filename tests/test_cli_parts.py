"""What stands between the words of a command line and a command: each part alone, both ends of every bound."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import CONFIG, exit_code

from finetune import cli
from finetune.cli import floors, inputs
from finetune.cli.export_commands import _weighted
from finetune.cli.report_commands import say_votes
from finetune.config.load import load_mapping
from finetune.errors import ConfigError, DataError, ModelError
from finetune.planning.plan import Gpu

# --- what a command ends with ----------------------------------------------------------------------


def ended(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a command line that meets an error."""

    def fail(words: Any) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    return exit_code("x")


def broken_pipe() -> SystemExit:
    error = SystemExit(1)
    error.__context__ = BrokenPipeError()
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130), (SystemExit(7), 7), (broken_pipe(), 141), (ConfigError("x"), 2), (MemoryError(), 5),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 6), (RuntimeError("CUDA out of memory. Tried to"), 5),
    ],
    ids=repr,
)  # fmt: skip
def test_the_exit_code_says_what_went_wrong(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert ended(error, monkeypatch) == code
    said = capfd.readouterr().err
    assert "Traceback" not in said
    if code == 6:
        assert said.startswith("error: runs/x: the disk cannot be written or read (No space left")


def test_a_fault_of_ours_is_no_message_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_run", lambda words: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["x"])


def test_memory_is_told_in_gigabytes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    used = SimpleNamespace(ru_maxrss=3_000_000)  # KiB on Linux
    monkeypatch.setattr(resource, "getrusage", lambda who: used)
    for platform, said in (("linux", "3.07 GB"), ("darwin", "0.00 GB")):
        monkeypatch.setattr("sys.platform", platform)
        ended(MemoryError("no room"), monkeypatch)
        error = capfd.readouterr().err
        assert "out of memory: no room" in error
        assert f"has used is {said}" in error


@pytest.mark.parametrize("host", ["hub.example/x", "10.0.0.7:80"])
def test_no_password_of_an_address_is_shown(
    host: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended(ConfigError(f"https://me:secret@{host} and http://token@{host} do not answer"), monkeypatch)  # fmt: skip
    said = capfd.readouterr().err
    assert said == f"error: https://…@{host} and http://…@{host} do not answer\n"
    ended(ConfigError("https://a.b/c and me@d.e"), monkeypatch)
    assert "https://a.b/c and me@d.e" in capfd.readouterr().err


def test_processes_say_unlike_errors_each_and_like_ones_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for rank, text in enumerate(["one", "two", "one"]):
        file = tmp_path / "attempt" / str(rank) / "error.json"
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        ended(ConfigError(text), monkeypatch)
    assert capfd.readouterr().err == "error: one\nerror: two\n"
    monkeypatch.delenv("RANK")
    ended(ConfigError("one"), monkeypatch)
    assert capfd.readouterr().err == "error: one\n", "without ranks one process speaks"


# --- the words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "trains"),
    [
        (["x.yaml"], True), (["x.yml", "a.b=1"], True), (["runs/x"], True), (["a.b=1"], True), (["--show-config", "x.yaml"], True),
        (["train", "x.yaml"], False), (["merge", "runs/x"], False), ([], False), (["--help"], False),
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_without_a_command_trains(words: list[str], trains: bool) -> None:
    assert cli._with_command(words) == (["train", *words] if trains else words)


@pytest.mark.parametrize(
    ("words", "is_old"),
    [
        ("data/fix model configs/lora.yaml", True), ("data/fix model lora.yml yes", True), ("data model lora.yaml", True),
        ("data check lora.yaml", False), ("train lora.yaml", False), ("data/fix a=b lora.yaml", False), ("a b c.yaml d e", False),
        ("merge a b.yaml", False), ("a b c", False), ("--debug a b c.yaml", True), ("a/b c/d e.yaml", True),
    ],
)  # fmt: skip
def test_the_demos_command_is_answered_with_ours(words: str, is_old: bool) -> None:
    commands = {"data": SimpleNamespace(commands={"check": 1}), "merge": 1, "train": 1}
    if not is_old:
        cli._check_demo_command(words.split(), commands)
        return
    with pytest.raises(ConfigError, match=r"finetune migrate .* --output new\.yaml"):
        cli._check_demo_command(words.split(), commands)


@pytest.mark.parametrize(
    ("words", "left", "hub"),
    [
        ("a --hub modelscope b", "a b", "modelscope"), ("--hub=modelscope a", "a", "modelscope"), ("a --hub", "a", ""), ("a b", "a b", None),
        ("a --hubs x", "a --hubs x", None), ("--hub= a", "a", ""),
    ],
)  # fmt: skip
def test_the_hub_may_stand_anywhere(
    words: str, left: str, hub: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_HUB", "before")
    assert cli._with_hub(words.split()) == left.split()
    assert os.environ["FINETUNE_HUB"] == ("before" if hub is None else hub)


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [("a", "a", 1.0), ("a:0.5", "a", 0.5), ("a:-2", "a", -2.0), ("a:b:2", "a:b", 2.0), ("there:3", "there:3", 1.0)],
)  # fmt: skip
def test_a_weight_stands_behind_the_last_colon_unless_a_folder_is_called_so(
    text: str, path: str, weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there:3").mkdir()
    assert _weighted(text) == (Path(path), weight)
    with pytest.raises(ConfigError, match="the weight must be a number, got 'x'"):
        _weighted("a:x")


# --- before anything heavy -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "is_old"),
    [("2.6", False), ("2.6.0", False), ("2.10", False), ("2.5.9", True), ("1.9", True), ("2.6.0a0+cu12", False), ("10.0", False)],
)  # fmt: skip
def test_a_library_is_as_old_as_the_floor_or_newer(
    found: str, is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "torch":
            raise floors.PackageNotFoundError(name)
        return found

    table = {"torch": ("9", "missing"), "a": ("2.6", "holes"), "b": ("2.6", "others")}
    monkeypatch.setattr(floors, "FLOORS", table)
    monkeypatch.setattr(floors, "version", version)
    if not is_old:
        floors.check_versions()
        return
    with pytest.raises(ConfigError) as caught:
        floors.check_versions()
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b"]
    assert f"a {found} is installed and 2.6 is the oldest" in lines[0]
    assert "pip install 'a>=2.6'" in lines[0]


def test_the_first_command_looks_at_the_versions(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(floors, "version", lambda name: "0.1")
    assert exit_code("schema") == 2
    assert "torch 0.1 is installed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24e9), ("24gb", 24e9), ("24G", 24e9), ("24", 24e9), ("1.5 GB", 1.5e9), ("0", None), ("-1", None), ("x", None), ("1e6", None), ("nan", None)],
)  # fmt: skip
def test_the_memory_of_a_card_is_in_gigabytes_of_a_thousand(text: str, size: float | None) -> None:
    if size is not None:
        assert inputs.gigabytes(text) == size
        return
    with pytest.raises(ConfigError, match="write --gpu 24GB"):
        inputs.gigabytes(text)


def test_a_file_to_be_written_is_looked_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs.check_output_file(tmp_path / "new" / "x.jsonl")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    for output, reason in ((tmp_path, "is a folder; name a file"), (tmp_path / "file" / "x", "cannot be written"), (tmp_path / ("x" * 245), "File name too long")):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            inputs.check_output_file(output)
    for denied in (os.W_OK, os.X_OK):
        monkeypatch.setattr(os, "access", lambda path, mode, denied=denied: not mode & denied)
        with pytest.raises(ConfigError, match="its folder is read-only"):
            inputs.check_output_file(tmp_path / "x")


def tree(tmp_path: Path, **data: Any) -> dict[str, Any]:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return {
        "model": {"path": str(tmp_path)}, "data": {"train": str(tmp_path / "rows.jsonl"), **data},
        "method": {"kind": "lora"}, "training": {"output_dir": "x"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({}, None, []),
        ({"data.validation": "5%"}, None, []),
        ({"data.validation": "none.jsonl"}, DataError, ["data.validation: none.jsonl"]),
        ({"data.train": ["no1", "no2"]}, DataError, ["data.train[0]: no1", "data.train[1]: no2"]),
        ({"model.path": "./no"}, ModelError, ["model.path: not a directory"]),
        ({"model.path": "./no", "data.train": "no1"}, DataError, ["data.train: no1", "model.path: not"]),
        ({"model.path": "a/b"}, None, []),
        ({"deepspeed": {"config": "no.json"}}, ConfigError, ["deepspeed.config: no.json is not a file"]),
        ({"deepspeed": {"config": "."}}, ConfigError, ["deepspeed.config: . is not a file"]),
        ({"data.validation": "5%", "evaluation": {"best_metric": "no-such"}}, ConfigError, ["evaluation.best_metric: "]),
    ],
    ids=str,
)  # fmt: skip
def test_all_paths_that_lead_nowhere_are_named_and_the_first_gives_the_kind(
    change: dict[str, Any], kind: Any, said: list[str], tmp_path: Path
) -> None:
    config = tree(tmp_path)
    for key, value in change.items():
        section, dot, name = key.partition(".")
        if dot:
            config[section][name] = value
        else:
            config[section] = value
    loaded = load_mapping(config)
    if kind is None:
        inputs.check_inputs(loaded)
        return
    with pytest.raises(kind) as caught:
        inputs.check_inputs(loaded)
    assert type(caught.value) is kind
    for text in said:
        assert text in str(caught.value)


def test_completion_offers_what_begins_like_this() -> None:
    found = inputs.option_names("training.save")
    assert "training.save_every_steps=" in found
    assert all(name.startswith("training.save") and name.endswith("=") for name in found)
    assert inputs.option_names("save") == []


def test_the_memory_of_an_evaluation_counts_only_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    class Memory:
        def __init__(self, *sections: Any, **lengths: int) -> None:
            given.append((sections[-1], lengths))

        def plan(self, gpu: Gpu) -> None:
            return None

    monkeypatch.setattr("finetune.planning.run_memory.RunMemory", Memory)
    for validation in (None, "5%"):
        config = load_mapping(tree(tmp_path, max_length=77, validation=validation)).config
        inputs.planned(config, Gpu(bytes=10**10))
    assert [bool(evaluation) for evaluation, _ in given] == [False, True]
    assert given[0][1] == {"max_length": 77, "longest": 77}


# --- single commands -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data split a --output b --share 0", "--share is a part of 1"), ("data split a --output b --share 1", "--share is a part of 1"),
        ("data check a --max-length 3", "give --model too"), ("data show a --model b --index 0 --line 1", "not both"),
        ("migrate old.yaml --output there", "there exists already"), ("init --output there", "there exists already"),
        ("board runs --output there", "there exists already"), ("evaluate --votes v --data d", "--votes scores what people said"), ("evaluate --votes v --predictions d", "--votes scores"), ("evaluate m --votes v", "--votes scores"),
        ("evaluate a/b --bleu-unit x", "must be word or character"), ("chat a/b --save-to c", "add --web"), ("chat a/b c=a/b", "add --web"),
        ("serve a/b --save-to c", "add --page"), ("help no-such", "there is no topic 'no-such'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said_before_anything_is_done(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("kept")
    Path("old.yaml").write_text("model_name_or_path: a\nstage: sft\ndataset: b\n")
    assert exit_code(*words.split()) == 2
    assert said in capfd.readouterr().err
    assert Path("there").read_text() == "kept"


def test_votes_go_with_nothing_else() -> None:
    for others in ((["a"], None, None), (None, ["a"], None), (None, None, ["a"])):
        with pytest.raises(ConfigError, match="--votes"):
            say_votes(["v"], *others)


@pytest.mark.parametrize(
    ("listed", "bad", "more"), [(2, 2, None), (2, 3, "1 more"), (0, 4, "4 more")]
)
def test_bad_rows_that_are_not_listed_are_counted(
    listed: int, bad: int, more: str | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    rows = [SimpleNamespace(location=f"a:{n}", reason="no") for n in range(listed)]
    report = SimpleNamespace(num_bad=bad, bad_rows=rows, table=lambda: ([], []), notes=list, as_dict=dict)  # fmt: skip
    monkeypatch.setattr("finetune.data.preview.report.check", lambda *_, **__: report)
    assert exit_code("data", "check", "x") == 2
    said = capfd.readouterr().err
    assert f"{bad} bad rows" in said
    assert (f"and {more}" in said) if more else ("more" not in said)


@pytest.mark.parametrize("terminal", [True, False])
def test_tokens_have_colours_on_a_terminal_alone(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = SimpleNamespace(
        location="a:1", format="messages", num_tokens=3, num_supervised=2, num_examples=1, text=lambda: "COLOURED",
        plain=lambda: "PLAIN", prompt="p", stop="s", as_dict=dict,
    )  # fmt: skip
    monkeypatch.setattr("finetune.data.preview.report.show", lambda *_, **__: shown)
    monkeypatch.setattr("finetune.console.on_terminal", lambda: terminal)
    assert exit_code("data", "show", "x", "--model", "y") == 0
    said = capfd.readouterr().out
    assert ("COLOURED" in said, "PLAIN" in said) == (terminal, not terminal)
    assert "3 tokens, 2 of them carry loss" in said


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_plan_in_numbers_has_those_of_its_evaluation(
    evaluates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    found = SimpleNamespace(numbers=lambda: {"memory": 1})
    evaluation = SimpleNamespace(numbers=lambda: {"evaluation_tokens": 2}) if evaluates else None
    monkeypatch.setattr("finetune.cli.config_commands.planned", lambda config, gpu: (None, found))
    monkeypatch.setattr("finetune.planning.evaluating.planned_evaluation", lambda *_: evaluation)
    (tmp_path / "x.yaml").write_text(CONFIG)
    assert exit_code("plan", str(tmp_path / "x.yaml"), "--json") == 0
    assert json.loads(capfd.readouterr().out) == {"memory": 1} | ({"evaluation_tokens": 2} if evaluates else {})  # fmt: skip


def test_a_merge_says_the_weight_of_each_that_is_not_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tuple((Path(name), weight) for name, weight in (("a", 1.0), ("b", 2.0), ("c", 0.5), ("d", -1.0)))  # fmt: skip
    report = SimpleNamespace(notes=["noted"], source=source, output="out", base="base", num_updated=3, num_bytes=2_500_000_000, seconds=4.2, largest_difference=0.0)  # fmt: skip
    monkeypatch.setattr("finetune.export.merge.merge", lambda *_, **__: report)
    assert exit_code("merge", "a", "--output", "out") == 0
    said = capfd.readouterr().out
    assert "out: a + 2 x b + 0.5 x c + -1 x d merged into base, 3 tensors updated, 2.50 GB in 4 s" in said  # fmt: skip
    assert "note: noted" in said
    assert "largest difference of the logits: 0.00e+00" in said


def test_the_schema_names_the_scores_that_choose(capfd: pytest.CaptureFixture[str]) -> None:
    from finetune.evaluation.scores.metrics import CHOOSING

    assert exit_code("schema") == 0
    schema = json.loads(capfd.readouterr().out)
    assert schema["$defs"]["EvaluationSection"]["properties"]["best_metric"]["enum"] == list(CHOOSING)  # fmt: skip
