"""Every command through the real command line, from both ends."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from closeness import LARGEST_LOGIT, additions, rounding
from command_line import ROOT, exit_code, run
from transformers import AutoConfig

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
    assert report["scores"] == {name: trained.get(name) for name in report["scores"]}
    assert json.loads((workplace / "scores" / "scores.json").read_text()) == report
    assert len((workplace / "scores" / "predictions.jsonl").read_text().splitlines()) == 6


def test_predict_writes_a_reply_to_every_dialogue(workplace, answer):
    report = answer("predict", "run", "--data", "rows.jsonl", "--output", "p.jsonl",
                    "--max-new-tokens", "3")  # fmt: skip
    rows = [json.loads(line) for line in (workplace / "p.jsonl").read_text().splitlines()]
    assert report["replies"] == len(rows) == 6
    assert [row["messages"][0] for row in rows] == [row["messages"][0] for row in DIALOGUES]


def test_merge_writes_a_checkpoint_that_equals_base_and_adapter(workplace, answer):
    report = answer("merge", "run", "--output", "merged", "--check", "full")
    assert report["output"] == "merged"
    sums = additions(AutoConfig.from_pretrained(workplace / "merged"), 64)
    assert report["largest_difference"] < rounding(sums, LARGEST_LOGIT)
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
