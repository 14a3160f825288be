"""The model card says where a model comes from, and nothing that is nobody's business."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import runs
from adapters import make_adapter

from finetune.export.convert import export
from finetune.export.merge import merge

SECRET = "hf_abcdefghijklmnopqrstuvwxyz012345"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_chatglm: Path) -> Path:
    work = tmp_path_factory.mktemp("work")
    train = runs.write_dialogues(work / "train.jsonl", 6)
    held_out = runs.write_dialogues(work / "dev.jsonl", 3, seed=4)
    settings = runs.config(
        tiny_chatglm, train, work / "run", data__validation=str(held_out), training__max_steps=2,
        evaluation__every_steps=2, training__extra={"hub_token": SECRET},
    )  # fmt: skip
    runs.run_here(settings)
    return work / "run"


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What merge and export make of the run, by name."""
    work = tmp_path_factory.mktemp("written")
    merge(run, work / "merged", check="none")
    export(str(work / "merged"), work / "hf", layout="hf", check="none")
    export(str(run), work / "adapter", layout="hf")
    return {folder.name: folder for folder in work.iterdir()}


@pytest.mark.parametrize("name", ["merged", "hf", "adapter"])
def test_the_card_names_base_method_data_options_scores_and_versions(
    run: Path, written: dict[str, Path], tiny_chatglm: Path, name: str
) -> None:
    card = (written[name] / "README.md").read_text()
    record = json.loads((run / "checkpoint-2/run.json").read_text())
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for line in (
        f"library_name: {'peft' if name == 'adapter' else 'transformers'}",
        f"| base | {tiny_chatglm.name} (fingerprint `{record['facts']['model'][:16]}`) |",
        "| method | lora |",
        "train.jsonl: 6 examples of 6 rows",
        "tokens carry loss",
        f"(fingerprint `{record['facts']['data'][:16]}`)",
        "| method.rank | `4` |",
        "| training.learning_rate | `0.01` |",
        f"| loss | {logged['eval_loss']:.4g} |",
        "* bleu-4: sentence, words by script: jieba for Chinese",
        f"torch {record['versions']['torch']}",
    ):
        assert line in card, line


def test_the_card_holds_no_secret_and_no_path_of_this_machine(
    run: Path, written: dict[str, Path]
) -> None:
    for name, folder in written.items():
        card = (folder / "README.md").read_text()
        for word in (SECRET, "extra", "output_dir", str(folder.parent), str(run.parent), "/tmp"):
            assert word not in card, (name, word)
    assert "model_type glm)" in (written["hf"] / "README.md").read_text()


def test_scores_of_an_evaluation_with_their_intervals_go_before_those_of_the_training(
    run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    folder = run / "evaluation-checkpoint-2-dev"
    folder.mkdir()
    score = {"value": 41.5, "low": 38.25, "high": 44.75, "n": 60}
    target = {"name": "tuned", "path": str(run / "checkpoint-2"), "scores": {"rouge-l": score}}
    report = {
        "data": [{"path": "/home/me/dev.jsonl", "fingerprint": "ab" * 32, "samples": 60}],
        "signatures": {"rouge-l": "f1, as signed", "chrf": "not asked"},
        "targets": [{**target, "path": "elsewhere"}, target],
    }
    (folder / "evaluation.json").write_text(json.dumps(report))
    merge(run, tmp_path / "merged", check="none")
    card = (tmp_path / "merged/README.md").read_text()
    assert "### Scores on dev.jsonl (fingerprint `abababababababab`)" in card
    assert "| rouge-l | 41.5 | 38.25 to 44.75 | 60 |" in card
    assert "* rouge-l: f1, as signed" in card
    assert "not asked" not in card
    assert "held-out data in training" not in card


def test_the_card_of_several_adapters_tells_of_each_with_its_weight(
    run: Path, tmp_path: Path, tiny_chatglm: Path
) -> None:
    foreign = make_adapter(tmp_path / "foreign", tiny_chatglm, r=8)
    merge([(run / "checkpoint-2", 0.75), (foreign, -0.5)], tmp_path / "merged", check="none")
    card = (tmp_path / "merged/README.md").read_text()
    first, second = card.split("## Adapter ")[1:]
    assert first.startswith("checkpoint-2, weight 0.75\n")
    assert "train.jsonl: 6 examples of 6 rows" in first
    assert second.startswith("foreign, weight -0.5\n")
    assert "| method | lora |" in second
    assert "train.jsonl" not in second


def test_the_card_of_a_fully_tuned_model_names_its_base_and_method_in_both_layouts(
    tmp_path: Path, tiny_chatglm: Path
) -> None:
    train = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    settings = runs.config(tiny_chatglm, train, tmp_path / "run", training__max_steps=1)
    settings["method"] = {"kind": "full"}
    runs.run_here(settings)
    merge(tmp_path / "run", tmp_path / "merged", check="none")
    export(str(tmp_path / "run"), tmp_path / "hf", layout="hf", check="none")
    for name in ("merged", "hf"):
        card = (tmp_path / name / "README.md").read_text()
        for line in (
            "library_name: transformers", f"| base | {tiny_chatglm.name} (fingerprint `",
            "| method | full |", "train.jsonl: 4 examples of 4 rows", "### Versions",
        ):  # fmt: skip
            assert line in card, (name, line)
