"""Several checkpoints, a base and files of replies in one evaluation: swapped, resumed, kept, flat."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from closeness import loss_rounding
from rows import Rows, read_rows, turns, write_rows
from transformers import AutoConfig

from finetune.errors import ConfigError, DataError, ModelError, OutputInUseError
from finetune.evaluation import compute
from finetune.evaluation.evaluate import Options, evaluate
from finetune.evaluation.targets import find_targets
from finetune.generation import prompts
from finetune.generation.load import Models, open_model
from finetune.storage.files import file_digest
from finetune.storage.journal import Journal


def held_out(count: int = 30) -> Rows:
    rows: Rows = []
    for n in range(count):
        texts = [f"question {'dog ' * (n % 5)}{n}", f"answer {n}"]
        more = ["and", "则是这样"] if n % 3 == 0 else []
        rows.append({"messages": turns(*texts, *more), "category": f"part {n % 2}"})
    return rows


@pytest.fixture(scope="module")
def place(tiny_glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a LoRA run with two checkpoints and a prefix run with one, on the same base."""
    place = tmp_path_factory.mktemp("place")
    dev = write_rows(place / "dev.jsonl", held_out())
    train = runs.write_dialogues(place / "train.jsonl", 12)
    for kind, steps in (("lora", 4), ("ptuning_v2", 2)):
        settings = runs.config(
            tiny_glm, train, place / kind, data__validation=str(dev), method__kind=kind,
            training__save_every_steps=2, training__max_steps=steps, evaluation__generate=False,
            evaluation__max_new_tokens=6, evaluation__batch_size=4, model__dtype="float32",
        )  # fmt: skip
        if kind == "ptuning_v2":
            settings["method"] = {"kind": kind, "num_virtual_tokens": 4}
        runs.run_here(settings)
    return place


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is kept from another test."""
    own = tmp_path / "cache"
    own.mkdir()
    (own / "tokenizers").symlink_to(Path(os.environ["FINETUNE_CACHE"]) / "tokenizers")
    monkeypatch.setenv("FINETUNE_CACHE", str(own))
    return own


def checkpoints(place: Path) -> list[str]:
    return [str(place / name) for name in ("lora/checkpoint-2", "ptuning_v2/checkpoint-2", "lora/checkpoint-4")]  # fmt: skip


GENERATE = {"generate": True}


def flat(target: dict[str, Any]) -> dict[str, float]:
    return {name: score["value"] for name, score in target["scores"].items()}


def test_checkpoints_of_all_kinds_score_together_what_each_scores_alone(
    place: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    import finetune.models.load as load

    original = load.load_model
    monkeypatch.setattr(load, "load_model", lambda *a, **k: loaded.append(a) or original(*a, **k))
    out = tmp_path / "together"
    report = evaluate(
        checkpoints(place), output=out, changes=GENERATE, options=Options(with_base=True)
    )
    assert len(loaded) == 1
    assert [(one["name"], one["kind"], one["step"]) for one in report["targets"]] == [
        ("base", "base", None), ("lora-checkpoint-2", "adapter", 2),
        ("ptuning_v2-checkpoint-2", "prefix", 2), ("lora-checkpoint-4", "adapter", 4),
    ]  # fmt: skip
    assert json.loads((out / "evaluation.json").read_text("utf-8")) == {
        name: value for name, value in report.items() if name != "output"
    }
    for number, target in enumerate(report["targets"]):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / f"cache-{number}"))
        alone = evaluate(target["path"], [str(place / "dev.jsonl")], output=tmp_path / str(number),
                         changes={"max_new_tokens": 6, "batch_size": 4, **GENERATE})  # fmt: skip
        expected = flat(target)
        if (
            target["kind"] == "base"
        ):  # alone it has no run that says how large a batch of the loss is
            off = loss_rounding(AutoConfig.from_pretrained(target["path"]), 64)
            for name in ("loss", "perplexity"):  # of e^loss, an error of the loss is a share
                expected[name] = pytest.approx(expected[name], rel=off)
        assert flat(alone["targets"][0]) == expected
        rows = (tmp_path / str(number) / "predictions.jsonl").read_bytes()
        assert rows == (out / target["predictions"]).read_bytes()
    texts = [[r["prediction"] for r in read_rows(out / t["predictions"])] for t in report["targets"]]  # fmt: skip
    assert len({str(one) for one in texts}) == 4


def test_an_evaluation_says_slices_and_what_differs(place: Path, tmp_path: Path) -> None:
    report = evaluate(
        checkpoints(place)[:1], output=tmp_path, changes=GENERATE, options=Options(with_base=True)
    )
    assert {"turns", "category", "language"} <= set(report["slices"])
    for name, values in report["slices"].items():
        counts = [value["base"]["exact_match"]["n"] for value in values.values()]
        assert sum(counts) == 40, name
    assert report["slices"]["turns"]["2"]["base"]["exact_match"]["n"] == 10
    losses = [one for one in report["comparisons"] if one["metric"] == "loss"]
    assert [(one["a"], one["b"]) for one in losses] == [("lora-checkpoint-2", "base")]
    assert losses[0]["verdict"] == "better"
    assert report["data"] == [
        {
            "path": str(place / "dev.jsonl"),
            "fingerprint": file_digest(place / "dev.jsonl"),
            "samples": 40,
        }
    ]
    score = report["targets"][0]["scores"]["perplexity"]
    assert score["low"] < score["value"] < score["high"]
    row = read_rows(tmp_path / "predictions" / "base.jsonl")[1]
    assert row["slices"] | {"source": ""} == {
        "source": "", "category": "part 0", "turns": "2", "prompt_length": "1-64 tokens", "kind": "plain",
        "language": "chinese",
    }  # fmt: skip


def test_a_run_means_all_its_good_checkpoints_through_the_command_line(
    place: Path, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from command_line import exit_code

    replies = tmp_path / "elsewhere.jsonl"
    rows = [(turn[1], turn[0]) for row in held_out() for turn in pairs(row["messages"])]
    write_rows(replies, [{"predict": "answer", "label": label["content"]} for label, _ in rows])
    words = ["evaluate", str(place / "lora"), "--include-base", "--predictions", str(replies), "--regression-data",
             str(place / "train.jsonl"), "--output", str(tmp_path / "out"), "--max-new-tokens", "3", "--generate"]  # fmt: skip
    assert exit_code(*words, "--json") == 0
    report = json.loads(capfd.readouterr().out)
    names = [one["name"] for one in report["targets"]]
    assert names == ["base", "lora-checkpoint-2", "lora-checkpoint-4", "elsewhere"]
    for target in report["targets"][:3]:
        assert target["scores"]["general_loss"]["n"] == 12
    # The general set is what it was trained on.
    [better] = [c for c in report["comparisons"] if c["metric"] == "general_loss" and c["a"] == names[2] and c["b"] == "base"]  # fmt: skip
    assert better["verdict"] == "better"
    assert (tmp_path / "out" / "predictions" / "elsewhere.jsonl").is_file()


def pairs(messages: list[Any]) -> list[tuple[Any, Any]]:
    return [(messages[i], messages[i + 1]) for i in range(0, len(messages), 2)]


def test_a_second_evaluation_generates_nothing_and_says_the_same(
    place: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(checkpoints(place), output=tmp_path / "a", changes=GENERATE)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(Models, "open", refuse)
    moved = shutil.copytree(place / "lora" / "checkpoint-2", tmp_path / "lora" / "checkpoint-2")
    again = evaluate([str(moved), *checkpoints(place)[1:]], output=tmp_path / "b", changes=GENERATE)
    for one, other in zip(first["targets"], again["targets"], strict=True):
        assert flat(one) == flat(other)
        files = [tmp_path / place / one["predictions"] for place in ("a", "b")]
        assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(AssertionError, match="opened"):
        evaluate(
            checkpoints(place), output=tmp_path / "c", changes=GENERATE | {"max_new_tokens": 5}
        )
    weights = moved / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AssertionError, match="opened"):
        evaluate([str(moved)], output=tmp_path / "d", changes=GENERATE)


KILLED = """
import os, signal
from finetune.evaluation import evaluate
from finetune.generation import prompts
from finetune.storage.journal import Journal
prompts.BATCHES_PER_WINDOW = 4
note, noted = Journal.note, []
def counted(self, number, rows):
    note(self, number, rows)
    noted.append(number)
    if len(noted) == 6:  # in the middle of the second window
        os.kill(os.getpid(), signal.SIGKILL)
Journal.note = counted
evaluate.evaluate(TARGET, output=None, changes={"generate": True})
"""


def test_a_killed_evaluation_goes_on_where_it_was(
    place: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = checkpoints(place)[0]
    monkeypatch.setattr(prompts, "BATCHES_PER_WINDOW", 4)
    script = tmp_path / "killed.py"
    script.write_text(f"TARGET = {target!r}\n{KILLED}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    [kept] = (cache / "evaluations").iterdir()
    assert len(read_rows(kept / "answers.jsonl.part")) == 16
    noted: list[int] = []
    original = Journal.note
    monkeypatch.setattr(Journal, "note", lambda self, n, rows: (noted.append(n), original(self, n, rows))[1])  # fmt: skip
    evaluate(target, output=tmp_path / "resumed", changes=GENERATE)
    assert noted == [2, 3, 0, 1]  # 40 replies are 10 batches; 6 were there
    assert not list(kept.glob("*.batches"))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "other"))
    evaluate(target, output=tmp_path / "whole", changes=GENERATE)
    names = ("predictions.jsonl",)
    for name in names:
        assert (tmp_path / "resumed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_memory_does_not_grow_with_the_number_of_samples(
    tiny_glm: Path, cache: Path, tmp_path: Path
) -> None:
    def peak(count: int) -> float:
        rows = [{"messages": turns(f"ask {n}", "好")} for n in range(count)]
        data = write_rows(tmp_path / f"{count}.jsonl", rows)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        changes = {"max_new_tokens": 1, "batch_size": 16}
        report = evaluate(str(tiny_glm), [str(data)], output=tmp_path / str(count), changes=changes)
        assert report["replies"] == count
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    few = peak(1100)  # more than a window
    assert peak(10_000) - few < 40


def test_one_process_evaluates_a_model_at_a_time(
    place: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(compute, "_measure_losses", refuse)
    with pytest.raises(RuntimeError):
        evaluate(checkpoints(place)[0], output=tmp_path, changes=GENERATE)
    [kept] = (cache / "evaluations").iterdir()
    monkeypatch.undo()
    monkeypatch.setenv("FINETUNE_CACHE", str(cache))
    code = f"import fcntl, time; f = open({str(kept / '.lock')!r}, 'w'); fcntl.flock(f, 2); print('held', flush=True); time.sleep(60)"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            with pytest.raises(OutputInUseError, match="another process evaluates"):
                evaluate(checkpoints(place)[0], output=tmp_path, changes=GENERATE)
        finally:
            holder.kill()


# --- targets -------------------------------------------------------------------------------------


def test_a_base_that_moved_is_found_among_the_targets(
    place: Path, tiny_glm: Path, tmp_path: Path
) -> None:
    lora = shutil.copytree(place / "lora" / "checkpoint-2", tmp_path / "adapter")
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))  # fmt: skip
    stranger = tiny.save_model(tmp_path / "stranger", "glm", seed=5)
    targets = find_targets([str(lora), str(stranger), str(tiny_glm)], with_base=True)
    assert [(one.name, one.base) for one in targets] == [
        ("base", None), ("adapter", str(tiny_glm)), ("stranger", None),
    ]  # fmt: skip
    with pytest.raises(ModelError, match="gone, which is not there"):
        evaluate(str(lora), [str(place / "dev.jsonl")])


def test_names_are_unique_and_kinds_are_told(place: Path, tiny_glm: Path, tmp_path: Path) -> None:
    again = shutil.copytree(place / "lora", tmp_path / "a b" / "lora")
    merged = shutil.copytree(tiny_glm, tmp_path / "merged model")
    (merged / "manifest.json").write_text("{}")
    targets = find_targets(
        [f"{place}/lora/checkpoint-2", str(again / "checkpoint-2"), str(merged), str(merged)],
        with_base=False,
    )  # fmt: skip
    assert [(one.name, one.kind, one.run) for one in targets] == [
        ("lora-checkpoint-2", "adapter", str(place / "lora")),
        ("lora-checkpoint-2-2", "adapter", str(again)),
        ("merged-model", "merged", None),
    ]  # fmt: skip
    with pytest.raises(ModelError, match="none of the targets says"):
        find_targets([str(merged)], with_base=True)


def test_a_prefix_comes_off_and_leaves_the_base_as_it_was(place: Path, tiny_glm: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    models = Models()
    with torch.no_grad():
        logits = [
            models.open(target).model(input_ids=ids).logits.clone()
            for target in (*checkpoints(place), checkpoints(place)[1])
        ]
        fresh = [open_model(target).model(input_ids=ids).logits for target in checkpoints(place)]
        bare = models.open(str(tiny_glm), like=checkpoints(place)[0])
        assert torch.equal(bare.model(input_ids=ids).logits, open_model(tiny_glm).model(input_ids=ids).logits)  # fmt: skip
    for one, other in zip(logits, [*fresh, fresh[1]], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(logits[0], logits[1])


def test_sampling_is_kept_apart_from_greedy_and_says_its_seed(
    place: Path, cache: Path, tmp_path: Path
) -> None:
    target = checkpoints(place)[0]
    reports = [
        evaluate(target, output=tmp_path / str(n), changes=GENERATE, options=options)
        for n, options in enumerate(
            [Options(), Options(temperature=1.0, seed=1), Options(temperature=1.0, seed=2)]
        )
    ]
    texts = {(tmp_path / str(n) / "predictions.jsonl").read_text("utf-8") for n in range(3)}
    assert len(texts) == 3
    assert [one["settings"]["decoding"] for one in reports] == [
        "greedy", "temperature 1.0, seed 1", "temperature 1.0, seed 2",
    ]  # fmt: skip


def test_wrong_requests_are_refused_before_a_model_is_opened(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(Models, "open", refuse)
    target = checkpoints(place)[0]
    with pytest.raises(DataError, match="no-general"):
        evaluate(target, options=Options(general=("no-general.jsonl",)))
    with pytest.raises(ConfigError, match="temperature"):
        evaluate(target, options=Options(temperature=-1.0))
