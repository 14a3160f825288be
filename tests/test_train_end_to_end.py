"""From a config file to scores, a merged model and back again, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
from closeness import loss_rounding
from transformers import AutoConfig

from finetune.cli import main


def command(*words: str | Path) -> None:
    """One command line in this process; it must end well."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 0


def config_file(settings: dict[str, Any], folder: Path) -> Path:
    file = folder / "config.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return file


def scores(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["scores"]
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluating_a_checkpoint_afterwards_gives_the_numbers_of_its_training(
    tiny_chatglm: Path, tmp_path: Path, dtype: str
) -> None:
    train = runs.write_dialogues(tmp_path / "train.jsonl", 12)
    held_out = runs.write_dialogues(tmp_path / "dev.jsonl", 5, seed=1, weights=True)
    settings = runs.config(
        tiny_chatglm, train, tmp_path / "run", data__validation=str(held_out), model__dtype=dtype,
        evaluation__every_steps=3, evaluation__at_start=True, training__learning_rate=3e-2,
        training__save_every_steps=3,
    )  # fmt: skip
    command("train", config_file(settings, tmp_path))
    in_training = {
        record["step"]: {k[5:]: v for k, v in record.items() if k.startswith("eval_")}
        for record in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
        if "eval_loss" in record
    }
    assert list(in_training) == [0, 3, 6]
    assert in_training[0]["loss"] > in_training[6]["loss"]
    for step in (3, 6):
        output = tmp_path / f"evaluation-{step}"
        command("evaluate", tmp_path / f"run/checkpoint-{step}", "--output", output)
        assert scores(output) == in_training[step]
        one, other = (
            [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            for file in (tmp_path / f"run/predictions-{step}.jsonl", output / "predictions.jsonl")
        )
        assert one == other


def test_a_merged_model_scores_what_its_adapter_scores(tiny_glm4: Path, tmp_path: Path) -> None:
    train = runs.write_dialogues(tmp_path / "train.jsonl", 8)
    settings = runs.config(
        tiny_glm4, train, tmp_path / "run", data__validation=str(train), training__max_steps=3,
        training__learning_rate=3e-2,
    )  # fmt: skip
    command("train", config_file(settings, tmp_path))
    command("merge", tmp_path / "run", "--output", tmp_path / "merged")
    for target, name in ((tmp_path / "run/checkpoint-3", "a"), (tmp_path / "merged", "m")):
        command(
            "evaluate", target, "--data", train, "--output", tmp_path / name, "--max-new-tokens", 8,
        )  # fmt: skip
    found, expected = scores(tmp_path / "a"), scores(tmp_path / "m")
    off = loss_rounding(AutoConfig.from_pretrained(tiny_glm4), 64)
    expected["loss"] = pytest.approx(expected["loss"], abs=off)
    assert found == expected


def real_vocabulary(assets: Path, folder: Path) -> Path:
    """A tiny random GLM-4 with the published tokenizer and its 151,552 rows."""
    import tiny

    tiny.save_model(folder, "chatglm", padded_vocab_size=151552, vocab_size=151552)
    published = assets / "assets/glm-4-9b-chat"
    (folder / "tokenizer.json").unlink()
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(published / name, folder / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_real_rows_and_the_real_vocabulary_go_all_the_way_in_two_processes_under_stage_2(
    glm4_assets: Path, tmp_path: Path
) -> None:
    model = real_vocabulary(glm4_assets, tmp_path / "model")
    adverts = (glm4_assets / "data/advertisegen/train.jsonl").read_text(encoding="utf-8")
    (tmp_path / "adverts.jsonl").write_text("".join(adverts.splitlines(keepends=True)[:24]))
    calls = json.loads((glm4_assets / "data/toolcall/glaive_zh_sharegpt.json").read_text("utf-8"))
    (tmp_path / "calls.json").write_text(json.dumps(calls[:12], ensure_ascii=False))
    settings = runs.config(
        model, tmp_path / "adverts.jsonl", tmp_path / "run", deepspeed__zero_stage=2,
        data__train=[str(tmp_path / "adverts.jsonl"), str(tmp_path / "calls.json")],
        data__validation=str(tmp_path / "calls.json"), data__max_length=1024,
        training__max_steps=2, training__lr_schedule="constant", evaluation__max_samples=4,
    )  # fmt: skip
    longer = json.loads(json.dumps(settings))
    longer["training"]["max_steps"] = 3
    for one in (settings, longer):
        done = runs.run_command(one, tmp_path, processes=2)
        assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert "training.max_steps: was 2, now 3" in done.stdout
    assert len(runs.history(tmp_path / "run")) == 3
    command("merge", tmp_path / "run", "--output", tmp_path / "merged")
    last = {
        key[5:]: values[-1]
        for key in ("eval_loss", "eval_bleu-4", "eval_stop_rate", "eval_tool_call_validity")
        if (values := runs.history(tmp_path / "run", key))
    }
    command("evaluate", tmp_path / "run/checkpoint-3", "--output", tmp_path / "evaluation")
    offline = scores(tmp_path / "evaluation")
    off = loss_rounding(AutoConfig.from_pretrained(model), 1024)
    assert {name: offline[name] for name in last} == pytest.approx(last, abs=off)
