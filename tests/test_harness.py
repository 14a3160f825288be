"""Public tasks reach a model through lm-evaluation-harness, or say what is missing."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import exit_code
from rows import turns, write_rows

from finetune.errors import ConfigError
from finetune.evaluation.evaluate import Options, evaluate
from finetune.evaluation.schema import read_evaluation
from finetune.evaluation.tasks import harness, plan
from finetune.evaluation.tasks.plan import Task


def test_without_the_harness_the_extra_is_named_before_a_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, tiny_glm: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "no_such_package")
    data = write_rows(tmp_path / "dev.jsonl", [{"messages": turns("a", "b")}])
    with pytest.raises(ConfigError, match=r"pip install 'glm4-finetune\[tasks\]'"):
        evaluate(str(tiny_glm), [str(data)], options=Options(tasks=("ceval",)))


def test_tasks_are_asked_in_one_process_and_their_files_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "json")
    harness.check_harness(())
    with pytest.raises(ConfigError, match=r"gone\.yaml is no file"):
        harness.check_harness(("ceval", "gone.yaml"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        harness.check_harness(("ceval",))


INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")


def test_words_of_tasks_mean_tasks_presets_texts_and_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    asked = plan.read_tasks(["mmlu,gsm8k", "text:mmlu", "calls:some,where", "mmlu"])
    assert asked == [
        Task("mmlu", "chat"),
        Task("gsm8k", "chat"),
        Task("mmlu", "text"),
        Task("some,where", "calls"),
    ]
    assert plan.read_tasks(["ceval"]) == [Task("ceval-valid", "chat")]
    base = plan.read_tasks(["glm4-base"])
    assert {task.kind for task in base} == {"text"}
    assert "gsm8k" in {task.name for task in base}
    assert plan.left_out(["glm4-base", "glm4-base"]) == [
        "humaneval"
    ]  # it runs what the model writes
    figures = {one.score: one.value for one in plan.published(["glm4-chat,multilingual"])}
    assert figures["mmlu/acc"] == 72.4
    assert figures["xcopa/acc"] == 80.1
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert plan.left_out(["glm4-chat"]) == []


@needs_harness
def test_the_harness_has_every_task_of_the_presets() -> None:
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    assert [task.name for task in plan.read_tasks([*plan.PRESETS]) if task.name not in known] == []


def test_scores_of_tasks_are_means_over_questions_or_the_harness_own() -> None:
    rows = [{"doc_id": n, "filter": "none", "acc": n % 2, "f1": (1, n)} for n in range(4)]
    found = {
        "results": {
            "own": {"alias": "own", "acc,none": 0.5, "f1,none": 0.2, "f1_stderr,none": 0.1},
            "group": {"acc,none": 0.5},
            "second": {"acc,none": 0.5},
        },
        "group_subtasks": {"group": ["own", "second"]},
        "samples": {"own": rows, "second": rows},
        "n-samples": {"own": {"original": 9, "effective": 4}},
    }  # fmt: skip
    by_name = dict(harness._scores(found, "own", "chat template"))
    assert by_name["own/acc"].values == (0.0, 100.0, 0.0, 100.0)
    assert by_name["own/acc"].ids[1] == "own:1"
    assert by_name["own/f1"].described("own/f1") == {
        "value": 0.2,
        "low": pytest.approx(0.2 - 0.196),
        "high": pytest.approx(0.2 + 0.196),
        "n": 4,
    }
    [(name, score)] = harness._scores(found, "group", "plain text")
    assert (name, len(score.ids)) == ("group/acc", 8)


def task(folder: Path) -> Path:
    rows = [
        {"question": f"Is {n} even?", "choices": ["yes", "no"], "answer": n % 2} for n in range(6)
    ]
    write_rows(folder / "rows.jsonl", rows)
    file = folder / "even_or_odd.yaml"
    file.write_text(
        "task: even_or_odd\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    return file


@needs_harness
def test_a_task_of_ones_own_is_asked_and_kept(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "dev.jsonl", [{"messages": turns("a", "b")}])
    options = Options(tasks=(str(task(tmp_path)),))
    changes = {"generate": False}
    report = evaluate(str(tiny_glm), [str(data)], output=tmp_path / "a", changes=changes, options=options)  # fmt: skip
    score = report["targets"][0]["scores"]["even_or_odd/acc"]
    assert score["n"] == 6
    assert score["low"] < score["value"] < score["high"]
    assert "chat template, 0-shot" in report["signatures"]["even_or_odd/acc"]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(harness, "run_tasks", refuse)
    again = evaluate(str(tiny_glm), [str(data)], output=tmp_path / "b", changes=changes, options=options)  # fmt: skip
    assert again["targets"] == report["targets"]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="no nonsense_task"):
        evaluate(str(tiny_glm), [str(data)], changes=changes, options=Options(tasks=("nonsense_task",)))  # fmt: skip
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text("utf-8"))["slices"] == {}


@needs_harness
def test_tasks_alone_need_no_data_and_models_are_compared_question_by_question(
    tiny_glm: Path, tmp_path: Path
) -> None:
    file = task(tmp_path)
    options = Options(tasks=(str(file), f"text:{file}"), tasks_data=str(tmp_path))
    evaluate([str(tiny_glm)], output=tmp_path / "a", options=options)
    found = read_evaluation(tmp_path / "a")
    assert found.metrics == ["even_or_odd/acc"]
    assert found.targets[0].scores["even_or_odd/acc"].n == 6
    assert found.data == []


@needs_harness
def test_a_published_task_reads_its_data_from_a_folder_and_models_are_compared_by_it(
    tiny_glm: Path, tiny_glm4: Path, tmp_path: Path
) -> None:
    # As `hf download --repo-type dataset openai/gsm8k --local-dir FOLDER/openai/gsm8k` leaves it.
    place = tmp_path / "data/openai/gsm8k"
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is one more.\n#### {n + 1}"} for n in range(8)]  # fmt: skip
    (place / "main").mkdir(parents=True)
    for split in ("train", "test"):
        write_rows(place / f"main/{split}.jsonl", rows)
    files = "".join(f"  - {{split: {split}, path: main/{split}.jsonl}}\n" for split in ("train", "test"))  # fmt: skip
    (place / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")  # fmt: skip
    options = Options(tasks=("gsm8k",), tasks_data=str(tmp_path / "data"))
    evaluate([str(tiny_glm), str(tiny_glm4)], output=tmp_path / "out", changes={"max_samples": 2}, options=options)  # fmt: skip
    found = read_evaluation(tmp_path / "out")
    names = [f"gsm8k/exact_match:{way}" for way in ("strict-match", "flexible-extract")]
    assert sorted(found.metrics) == sorted(names)
    assert [target.scores[names[0]].n for target in found.targets] == [2, 2]
    assert "5-shot" in found.signatures[names[0]]
    one, other = (target.name for target in found.targets)
    pair = found.comparison(one, other, names[0])
    assert pair is not None
    assert pair.verdict == "no real difference"


def write_choices(place: Path, subjects: list[str], rows: dict[str, list[dict[str, Any]]]) -> None:
    """A data set with a config for every subject, as those of MMLU and C-Eval are; all have the same rows."""
    place.mkdir(parents=True)
    for split, questions in rows.items():
        write_rows(place / f"{split}.jsonl", questions)
    files = "".join(f"  - {{split: {split}, path: {split}.jsonl}}\n" for split in rows)
    configs = "".join(f"- config_name: {subject}\n  data_files:\n{files}" for subject in subjects)
    (place / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


@needs_harness
def test_mmlu_and_ceval_alone_are_asked_from_a_folder_and_what_was_forgotten_is_told(
    tiny_glm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("mmlu_anatomy", "mmlu_virology", "ceval-valid_accountant", "ceval-valid_law")
    choices = ["one", "two", "three", "four"]
    asked = [{"question": f"{n} + 1?", "subject": "x", "choices": choices, "answer": n % 4} for n in range(6)]  # fmt: skip
    write_choices(tmp_path / "cais/mmlu", ["anatomy", "virology"], {"dev": asked, "validation": asked, "test": asked})  # fmt: skip
    exam = [
        {"id": n, "question": f"{n} 加一是？", **dict(zip("ABCD", "一二三四", strict=True)), "answer": "ABCD"[n % 4], "explanation": ""}
        for n in range(6)
    ]  # fmt: skip
    write_choices(tmp_path / "ceval/ceval-exam", ["accountant", "law"], {"dev": exam, "val": exam, "test": exam})  # fmt: skip
    other = tmp_path / "tuned"
    shutil.copytree(tiny_glm, other)
    words = ("evaluate", str(tiny_glm), str(other), "--tasks", ",".join(names), "--tasks-data", str(tmp_path))  # fmt: skip
    assert exit_code(*words, "--output", str(tmp_path / "out"), "--max-samples", "4") == 0
    found = read_evaluation(tmp_path / "out")
    assert found.data == []
    for name in names:
        one = found.targets[0].scores[f"{name}/acc"]
        assert one.n == 4
        assert one.low <= one.value <= one.high
    assert "no real difference" in "".join(capfd.readouterr())


@pytest.fixture(scope="module")
def opened(tiny_glm: Path) -> Any:
    from finetune.generation.load import Models

    return Models().open(str(tiny_glm))


@needs_harness
def test_continuations_have_the_probability_that_the_model_gives_them(
    opened: Any,
) -> None:
    import torch
    from lm_eval.api.instance import Instance

    from finetune.evaluation.tasks.language_model import OpenLanguageModel

    model, template = opened.model, opened.template
    asked = OpenLanguageModel(model, template, batch_size=3)
    shown = asked.apply_chat_template([{"role": "user", "content": "Which?"}])
    pairs = [(shown, " A"), (shown, " B"), (shown, "a longer one"), ("Once upon ", "a time"), ("x", "y")]  # fmt: skip
    instances = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    found = asked.loglikelihood(instances)

    def alone(context: list[int], continuation: list[int]) -> float:
        ids = torch.tensor([context + continuation])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        places = range(len(context) - 1, ids.shape[1] - 1)
        return sum(float(logprobs[at, token]) for at, token in zip(places, continuation, strict=True))  # fmt: skip

    plain = template.tokenizer.plain
    encode = lambda text: list(plain.encode(text, add_special_tokens=False).ids)  # noqa: E731
    from finetune.data.dialogue.conversation import Conversation, Message

    chat = list(template.prompt(Conversation((Message("user", "Which?"),)), 1))
    prefix = chat[: chat.index(template.user_id)]
    expected = [
        *(alone(chat, encode(f"\n{text}")) for text in ("A", "B", "a longer one")),
        alone(prefix + encode("Once upon"), encode("Once upon a time")[len(encode("Once upon")) :]),
        alone(prefix + encode("x"), encode("xy")[len(encode("x")) :]),
    ]
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-3)


@needs_harness
def test_a_generated_answer_ends_where_the_task_says(opened: Any) -> None:
    from lm_eval.api.instance import Instance

    from finetune.evaluation.tasks.language_model import OpenLanguageModel

    asked = OpenLanguageModel(opened.model, opened.template, batch_size=2)
    shown = asked.apply_chat_template([{"role": "user", "content": "Tell"}])

    def answers(until: list[str]) -> list[str]:
        options = {"until": until, "max_gen_toks": 12}
        requests = [Instance("generate_until", {}, (text, options), n) for n, text in enumerate((shown, "Once"))]  # fmt: skip
        return asked.generate_until(requests)

    whole = answers([])
    assert all(whole)
    ends = [text[len(text) // 2] for text in whole]
    cut = answers(ends)
    assert [min(text.find(end) for end in ends if end in text) for text in whole] == list(map(len, cut))  # fmt: skip
