"""What each command prints for people, and that `--json` is the answer of the function and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import CONFIG, exit_code

from finetune.export.convert import ExportReport
from finetune.export.merge import MergeReport
from finetune.export.push import PushReport


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_LANG", "en")
    Path("run.yaml").write_text(CONFIG)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    return tmp_path


def returning(value: Any) -> Callable[..., Any]:
    return lambda *given, **named: value


MERGED = MergeReport(
    output=Path("out"), source=((Path("a"), 1.0), (Path("b"), 0.5)), base=Path("base"), num_updated=3, num_replaced=1,
    untied=False, num_bytes=2_500_000_000, seconds=4.2, largest_difference=1.5e-5, notes=("noted",),
)  # fmt: skip
EXPORTED = ExportReport(Path("out"), Path("source"), "hf", 7, 1_250_000_000, 3.6, 2.5e-6, ("noted", "too"))  # fmt: skip
PUSHED = PushReport("me/x", Path("source"), {"a.json": 2_500_000, "b": 1_250_000_000}, True, "https://hub/1", ("noted",))  # fmt: skip
PREPARED = SimpleNamespace(kept=1200, rows=2300, tokens=45_000)
SPLIT = SimpleNamespace(train=90, held_out=10)
REPLAYED = SimpleNamespace(replies=7, cut=2, train=Path("cache/train.jsonl"), held_out=Path("cache/held.jsonl"))  # fmt: skip
CHECKED = SimpleNamespace(
    num_bad=0, bad_rows=[], table=lambda: (["file"], [["f1"]]), notes=lambda: ["take care"], as_dict=lambda: {"sources": []}
)  # fmt: skip
SHOWN = SimpleNamespace(
    location="f:1", format="messages", num_tokens=9, num_supervised=4, num_examples=3, text=lambda: "TEXT",
    plain=lambda: "PLAIN", prompt="PROMPT", stop="STOP", as_dict=lambda: {"where": "f:1"},
)  # fmt: skip
ANSWERS: dict[str, tuple[str, Any, Any, list[str]]] = {
    "merge a b:0.5 --output out": (
        "finetune.export.merge.merge", MERGED,
        {"output": "out", "source": [["a", 1.0], ["b", 0.5]], "base": "base", "num_updated": 3, "num_replaced": 1, "untied": False,
         "num_bytes": 2_500_000_000, "seconds": 4.2, "largest_difference": 1.5e-5, "notes": ["noted"]},
        ["note: noted", "out: a + 0.5 x b merged into base, 3 tensors updated, 2.50 GB in 4 s", "largest difference of the logits: 1.50e-05"],
    ),
    "export a --layout hf --output out": (
        "finetune.export.convert.export", EXPORTED,
        {"output": "out", "source": "source", "layout": "hf", "num_tensors": 7, "num_bytes": 1_250_000_000, "seconds": 3.6, "largest_difference": 2.5e-6, "notes": ["noted", "too"]},
        ["note: noted", "note: too", "out: source in the hf layout, 7 tensors, 1.25 GB in 4 s", "largest difference of the logits: 2.50e-06"],
    ),
    "push a --repo me/x --yes": (
        "finetune.export.push.push", PUSHED,
        {"repo": "me/x", "source": "source", "files": {"a.json": 2_500_000, "b": 1_250_000_000}, "private": True, "address": "https://hub/1", "notes": ["noted"]},
        ["note: noted", "  a.json  2.50 MB", "  b  1250.00 MB", "2 files, 1.25 GB, of source are at https://hub/1 (private)"],
    ),
    "push a --repo me/y": (
        "finetune.export.push.push", PushReport("me/y", Path("s"), {"c": 1_000_000}, False, None),
        {"repo": "me/y", "source": "s", "files": {"c": 1_000_000}, "private": False, "address": None, "notes": []},
        ["  c  1.00 MB", "1 files, 0.00 GB, of s would go to me/y (public); nothing was sent: add --yes"],
    ),
    "data check f1": ("finetune.data.preview.report.check", CHECKED, {"sources": []}, ["file", "f1"]),
    "data show f --model m": (
        "finetune.data.preview.report.show", SHOWN, {"where": "f:1"},
        ["f:1 (messages): 9 tokens, 4 of them carry loss",
         "the last of 3 examples: this checkpoint thinks, so each turn is trained behind its own prompt",
         "PLAIN", "prompt of the last reply:", "PROMPT", "it stops at STOP"],
    ),
    "data prepare run.yaml": (
        "finetune.data.examples.ahead.prepare_ahead", PREPARED, {"examples": 1200, "rows": 2300, "tokens": 45_000},
        ["1,200 examples from 2,300 rows, 45,000 tokens are prepared"],
    ),
    "data split f1 --output out": (
        "finetune.data.reading.split.split", SPLIT, {"train": 90, "held_out": 10},
        ["90 dialogues in out/train.jsonl, 10 in out/held_out.jsonl"],
    ),
    "replay model": (
        "finetune.generation.replay.replay_of", REPLAYED,
        {"train": "cache/train.jsonl", "held_out": "cache/held.jsonl", "replies": 7, "cut": 2}, ["7 replies, 2 left out that did not end: cache"],
    ),
    "predict model --data d --output o": ("finetune.generation.predict.predict", {"replies": 6}, {"replies": 6}, []),
    "bench model": ("finetune.evaluation.tasks.speed.bench", {"tokens": 6}, {"tokens": 6}, []),
    "train run.yaml": ("finetune.training.run.train", {"steps": 6}, {"steps": 6}, []),
    "train run.yaml --dry-run": ("finetune.training.run.dry_run", {"steps": 0}, {"steps": 0}, []),
    "runs nowhere": ("finetune.report.runs.find_runs", [], [], ["no runs in nowhere"]),
}  # fmt: skip


@pytest.mark.parametrize("words", ANSWERS)
def test_a_command_says_what_was_done_and_answers_with_all_of_it(
    words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    function, value, answer, lines = ANSWERS[words]
    monkeypatch.setattr(function, returning(value))
    monkeypatch.setattr("finetune.cli.commands.check_inputs", lambda loaded: None)
    assert exit_code(*words.split()) == 0
    said = capfd.readouterr()
    assert [line for line in said.out.splitlines() if line.strip(" -")] == lines
    assert ("take care" in said.err) is (value is CHECKED)
    assert exit_code(*words.split(), "--json") == 0
    said = capfd.readouterr()
    assert json.loads(said.out) == answer
    assert all(line in said.err for line in lines), "what is said goes to standard error"


def test_bad_rows_are_answered_in_json_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    report = SimpleNamespace(num_bad=1, bad_rows=[SimpleNamespace(location="f:2", reason="no reply")], table=lambda: ([], []), notes=list, as_dict=lambda: {"bad": 1})  # fmt: skip
    monkeypatch.setattr("finetune.data.preview.report.check", returning(report))
    assert exit_code("data", "check", "f", "--json") == 2
    said = capfd.readouterr()
    assert json.loads(said.out) == {"bad": 1}
    assert "1 bad rows:\n  f:2: no reply\nFix these rows; training leaves them out with data.on_bad_row=skip" in said.err  # fmt: skip


def test_a_dialogue_that_is_one_example_is_not_said_to_be_the_last_of_several(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.data.preview.report.show", returning(SimpleNamespace(**{**vars(SHOWN), "num_examples": 1})))  # fmt: skip
    assert exit_code("data", "show", "f", "--model", "m") == 0
    assert "the last of" not in capfd.readouterr().out


def test_nothing_is_said_of_logits_that_were_not_compared(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.export.convert.export", returning(ExportReport(Path("o"), Path("s"), "hf", 1, 1, 1.0)))  # fmt: skip
    assert exit_code("export", "a", "--layout", "hf", "--output", "o") == 0
    assert "logits" not in capfd.readouterr().out


def test_a_split_reads_the_files_that_are_named(
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in "ab":
        rows = [{"prompt": f"{name}{n}", "response": "yes"} for n in range(20)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        exit_code("data", "split", "a.jsonl", "b.jsonl", "--output", "out", "--share", "0.25") == 0
    )
    held = Path("out/held_out.jsonl").read_text().splitlines()
    train = Path("out/train.jsonl").read_text().splitlines()
    assert len(train) > len(held) > 0
    assert len(train) + len(held) == 40
    assert f"{len(train)} dialogues in out/train.jsonl, {len(held)} in out/held_out.jsonl" in capfd.readouterr().out  # fmt: skip
    assert exit_code("data", "split", "a.jsonl", "--output", "out") == 2, (
        "they are not written over"
    )


@pytest.mark.parametrize("output", [None, "new.jsonl"])
def test_replies_of_a_replay_are_written_where_a_file_is_named(
    output: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr("finetune.generation.replay.check_replay_output", lambda *_, **how: given.append(how["overwrite"]))  # fmt: skip
    monkeypatch.setattr("finetune.generation.replay.replay_of", lambda section, model, rest: given.append((section.max_new_tokens, model, rest)) or REPLAYED)  # type: ignore[func-returns-value]  # fmt: skip
    monkeypatch.setattr("finetune.generation.replay.write_replay", lambda *files: given.append(files))  # fmt: skip
    words = ["replay", "some/model", *(["--output", output] if output else [])]
    assert exit_code(*words) == 0
    asked = (512, "some/model", None)
    assert given == ([False, asked, (REPLAYED, Path("new.jsonl"))] if output else [asked])


# --- an output is looked at before the work --------------------------------------------------------

WORK = {
    "predict model --data d --output model": "finetune.generation.predict.predict",
    "replay model --output model": "finetune.generation.replay.replay_of",
    "init --data d --model model --gpus 1 --gpu 24GB --output model": "finetune.cli.init.draft",
    "board model --output model": "finetune.report.board.write",
}


@pytest.mark.parametrize("words", WORK)
def test_a_folder_in_the_place_of_a_file_is_told_before_the_work(
    words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(WORK[words], work)
    assert exit_code(*words.split()) == 2
    assert capfd.readouterr().err == "error: --output: model is a folder; name a file\n"


def test_a_board_is_written_over_an_old_one_only_where_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []
    monkeypatch.setattr("finetune.report.board.write", lambda folder, output: written.append(output))  # fmt: skip
    assert exit_code("board", "model", "--output", "new.html") == 0
    assert capfd.readouterr().out == "board: new.html\n"
    assert exit_code("board", "model", "--output", "run.yaml") == 2
    assert exit_code("board", "model", "--output", "run.yaml", "--overwrite") == 0
    assert written == [Path("new.html"), Path("run.yaml")]


# --- configurations --------------------------------------------------------------------------------


def test_a_migrated_configuration_is_written_with_a_word_on_what_is_left_and_what_comes_next(
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = SimpleNamespace(
        text=lambda: "model: {path: 'é'}\n", origins={"a": 1, "b": 2}, program="LLaMA-Factory", left={"template": "not needed"},
        commands=["finetune data check x"], to_fill_in=["model.path", "data.train"],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.config.migrate.migrate", returning(found))
        assert exit_code("migrate", "old.yaml") == 0
        assert capfd.readouterr().out == "model: {path: 'é'}\n"
        assert exit_code("migrate", "old.yaml", "--output", "my new.yaml") == 0
        said = capfd.readouterr()
        assert said.out.splitlines() == [
            "my new.yaml: 2 options of LLaMA-Factory are in it", "  not in it: template: not needed",
            "  finetune data check x", "next: torchrun finetune.py 'my new.yaml'",
        ]  # fmt: skip
        assert said.err == "warning: write these into it: model.path, data.train\n"
        assert Path("my new.yaml").read_text("utf-8") == "model: {path: 'é'}\n"
        found.to_fill_in = []
        assert exit_code("migrate", "old.yaml", "--output", "other.yaml") == 0
        assert capfd.readouterr().err == ""


def test_a_plan_is_a_table_of_all_rows_with_what_would_help(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []
    plan = SimpleNamespace(numbers=dict)
    memory = SimpleNamespace(less=lambda: "LESS")
    evaluation = SimpleNamespace(rows=lambda: [["evaluation", "3 %"]])
    monkeypatch.setattr("finetune.cli.config_commands.planned", lambda *_: (memory, plan))
    monkeypatch.setattr("finetune.planning.words.rows", lambda found: [["memory", "9 GB"]])
    monkeypatch.setattr("finetune.planning.words.knobs", lambda *asked: given.append(asked) or ["turn it"])  # type: ignore[func-returns-value]  # fmt: skip

    def evaluating(found: Any, model: Any, data: Any, asked: Any) -> Any:
        given.append((found, model.path, data.train, asked.every_steps))
        return evaluation

    monkeypatch.setattr("finetune.planning.evaluating.planned_evaluation", evaluating)
    assert exit_code("plan", "run.yaml", "evaluation.every_steps=7", "--gpus", "3", "--gpu", "24GB") == 0  # fmt: skip
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert lines[0] == ["run.yaml", "3", "x", "24GB"]
    assert lines[2:] == [["memory", "9", "GB"], ["evaluation", "3", "%"], ["turn", "it"]]
    assert given == [(plan, "some/model", "no-such-file.jsonl", 7), (plan, "LESS")]
    monkeypatch.setattr("finetune.planning.evaluating.planned_evaluation", returning(None))
    assert exit_code("plan", "run.yaml") == 0
    assert "evaluation" not in capfd.readouterr().out


def test_a_first_configuration_for_one_card_is_tried_dry_first(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = SimpleNamespace(text=lambda: "a: 1\n", plan=None, command="finetune train my.yaml")
    monkeypatch.setattr("finetune.cli.init.draft", returning(found))
    monkeypatch.setattr("finetune.planning.words.in_short", returning("9 GB"))
    words = ["init", "--data", "d", "--model", "m", "--gpu", "24GB", "--gpus"]
    assert exit_code(*words, "1") == 0
    assert capfd.readouterr().out == "my.yaml: 9 GB on each GPU\nnext: finetune train my.yaml --dry-run\n"  # fmt: skip
    assert Path("my.yaml").read_text() == "a: 1\n"
    Path("my.yaml").unlink()
    assert exit_code(*words, "2") == 0
    assert capfd.readouterr().out.endswith("next: finetune train my.yaml\n")
