"""What one evaluation reads, keeps and writes down: the parts of a job, of its folder and of what is said of a target."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rows import read_rows, turns, write_rows
from test_compute_parts import Answered, made, replying

from finetune.config.schema import DataSection, EvaluationSection
from finetune.errors import ConfigError
from finetune.evaluation import compute, folder, job, options, schema
from finetune.evaluation.options import Options
from finetune.evaluation.scoring import Scoring, score_external
from finetune.evaluation.targets import Target
from finetune.generation.backends.choice import BackendChoice
from finetune.generation.settings import Settings
from finetune.generation.structured import Form

# --- what is to be done ------------------------------------------------------------------------


def data(file: Path, said: str = "hello") -> str:
    return str(write_rows(file, [{"messages": turns("hi", said)}]))


class Prepared:
    """Stands where a template and examples are opened; keeps how."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.examples: list[Any] = []
        self.template = SimpleNamespace(image=None)
        self.opened: Any = None
        patch.setattr("finetune.generation.load.open_template", self.open)
        patch.setattr(job, "load_examples", self.load)
        patch.setattr(job, "evaluation_key", lambda *asked: f"key-{len(asked)}")
        patch.setattr(Form, "check", lambda _, template: self.checked.append(template))
        patch.setattr(Options, "check", lambda _: self.checked.append("options"))
        self.checked: list[Any] = []

    def open(self, path: str, *, base: str | None) -> Any:
        self.opened = (path, base)
        return self.template

    def load(self, sources: Any, template: Any, policy: Any, **how: Any) -> Any:
        self.examples.append(([source.path for source in sources], policy, how))
        return ["examples"] * len(self.examples)


def test_a_job_takes_the_losses_of_its_data_and_of_the_general_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Prepared(monkeypatch)
    held, general = data(tmp_path / "held.jsonl"), data(tmp_path / "general.jsonl")
    section = DataSection(train=[], validation=[held], max_length=77, cache_dir=str(tmp_path / "c"))
    settings = Settings(section, EvaluationSection(), seed=5)
    target = Target("t", "model", "adapter", base="b")
    found = job.prepare(target, settings, Options(general=(general,)))
    assert stand.opened == ("model", "b")
    assert stand.checked == ["options", stand.template]
    assert found.losses == {"loss": ["examples"], found.general_name: ["examples"] * 2}
    how = {"reading": settings.reading, "seed": 5, "cache_root": tmp_path / "c"}
    assert stand.examples == [([held], settings.policy, how), ([general], settings.policy, how)]
    assert settings.policy.max_length == 77
    assert found.results.folder == tmp_path / "c" / "evaluations" / "key-4"
    assert [str(file) for file in found.seen.states] == [held]
    away = Options(by=BackendChoice(endpoint="openai:m@http://x/v1"))
    assert job.prepare(target, settings, away).losses == {}, "an endpoint tells no losses"
    bare = replace(settings, data=section.model_copy(update={"validation": None, "cache_dir": None}))  # fmt: skip
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "own"))
    found = job.prepare(target, bare, Options())
    assert (found.losses, found.results.folder.parents[1]) == ({}, tmp_path / "own")


def test_the_loss_of_a_general_set_is_kept_by_its_content(tmp_path: Path) -> None:
    file = data(tmp_path / "g.jsonl")
    other = data(tmp_path / "h.jsonl", "bye")
    names = [job.general_name(Options(general=paths)) for paths in ((file,), (other,), (file, other))]  # fmt: skip
    assert job.general_name(Options(general=(file,))) == names[0]
    data(tmp_path / "g.jsonl", "good evening")
    assert len({*names, job.general_name(Options(general=(file,)))}) == 4


def whole(tmp_path: Path, **changes: Any) -> Any:
    one = made(tmp_path, **changes)
    return job.EvaluationJob(one.target, one.settings, one.options, one.template, one.losses, one.results, one.seen)  # fmt: skip


def test_scores_of_tasks_are_kept_by_what_was_asked_of_how_much(tmp_path: Path) -> None:
    asked = [
        whole(tmp_path, options=Options(tasks=("mmlu",))), whole(tmp_path, options=Options(tasks=("gsm8k",))),
        whole(tmp_path, options=Options(tasks=("mmlu",), tasks_data="d")), whole(tmp_path, options=Options(tasks=("mmlu",)), max_samples=3),
    ]  # fmt: skip
    assert len({one.tasks_name for one in asked}) == 4
    one = replace(asked[0], options=replace(asked[0].options, overwrite=True))
    assert one.tasks_name == asked[0].tasks_name


def test_prompts_are_read_as_the_checkpoint_reads_them_with_the_room_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(job, "read_conversations", lambda sources, reading: asked.append(reading) or "dialogues")  # fmt: skip
    monkeypatch.setattr(job.PromptStream, "of", lambda *words: words)
    one = whole(tmp_path)
    template = SimpleNamespace(layout=SimpleNamespace(thinking=True), image_rule=None)
    one = replace(one, template=template)
    assert one.prompts(99) == ("dialogues", template, one.settings.evaluation, 99)
    [reading] = asked
    assert reading.rules.thinks is True


# --- what is done ------------------------------------------------------------------------------


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune.distributed.processes as processes

    monkeypatch.setattr(processes, "broadcast_from_rank0", lambda of: of())
    monkeypatch.setattr(processes, "is_rank0", lambda: True)


def test_the_base_of_a_job_is_the_one_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "model_base", lambda *asked: SimpleNamespace(path=asked))
    one = replace(whole(tmp_path), target=Target("t", "m", "adapter", base="b"))
    assert one.base == ("m", "b")


@pytest.mark.usefixtures("one_process")
def test_prompts_have_the_room_of_who_answers_and_what_is_left_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    said: list[str] = []
    stream = SimpleNamespace(counts=SimpleNamespace(say=lambda: said.append("counts")))
    one = made(tmp_path)
    one.prompts = lambda positions: asked.append(positions) or stream
    monkeypatch.setattr(compute, "held_out_files", lambda *_: [])
    Answered(monkeypatch, [1])
    compute._generate_replies(one, replying())
    assert (asked, said) == ([50], ["counts"])
    assert one.results.facts["seconds"] >= 0


def test_another_process_finishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune.distributed.processes as processes

    first_says = iter([None, 0])  # nothing is there yet
    monkeypatch.setattr(processes, "broadcast_from_rank0", lambda _: next(first_says))
    monkeypatch.setattr(processes, "is_rank0", lambda: False)
    one = made(tmp_path, generate=False)
    compute._generate_replies(one, replying())
    assert not (one.results.folder / "done.json").exists()


def test_our_own_generation_tells_its_room_its_format_and_who_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune.generation.generate as generate

    asked: list[Any] = []
    made_one = SimpleNamespace(prompts_per_rank=[3, 4])
    monkeypatch.setattr(generate, "Generator", lambda *words, **how: asked.append((words, how)) or made_one)  # fmt: skip
    monkeypatch.setattr(generate, "context_length", lambda model: model.room)
    one, model = made(tmp_path), SimpleNamespace(room=99, dtype="torch.float16")
    found = compute._through_model(one, model, 7)
    assert asked == [((model, one.template), {"max_new_tokens": 20, "batch_size": 7})]
    assert (found.backend, found.positions, found.rows) == (made_one, 99, 7)
    assert found.facts() == {"dtype": "torch.float16", "prompts_per_rank": [3, 4]}


def test_replies_from_elsewhere_are_asked_of_the_same_model_with_the_same_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(BackendChoice, "at_endpoint", lambda _, *words, **how: asked.append((words, how)))  # fmt: skip
    monkeypatch.setattr(compute, "through_vllm", lambda *words, **how: asked.append((words, how)))
    one = made(tmp_path, options=Options(by=BackendChoice(endpoint="e")))
    one.target = Target("t", "model", "adapter", base="b")
    one.prompts = lambda room: [SimpleNamespace(prompt_ids=[0] * room)] * 2
    compute._through_endpoint(one)
    compute._through_vllm(one, 7)
    (words, how), (more, others) = asked
    assert (words, how) == ((one.template, "model"), {"base": "b", "rows": 4, "max_new_tokens": 20})
    assert (*more[:2], others) == (one.template, "model", {"base": "b", "rows": 7, "max_new_tokens": 20})  # fmt: skip
    assert list(more[2](5)) == [5, 5]


def test_what_vllms_environment_lacks_is_named_by_package(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"vllm": "vllm", "peft": "peft", "pyarrow": "pyarrow", "jieba": "jieba", "nltk": "nltk", "rouge_chinese": "rouge-chinese", "icu": "pyicu-wheels", "sacrebleu": "sacrebleu"}  # fmt: skip
    for module, package in packages.items():
        monkeypatch.setattr(options, "find_spec", lambda name, gone=module: None if name == gone else "spec")  # fmt: skip
        with pytest.raises(ConfigError, match=f"does not have {package}, which the scores need"):
            Options(by=BackendChoice("vllm")).check()
        Options().check()

    def importing(_: str) -> Any:
        raise ValueError("__spec__ is None")

    monkeypatch.setattr(options, "find_spec", importing)
    Options(by=BackendChoice("vllm")).check()


# --- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("evaluation.json", True), ("scores.json", True), ("predictions.jsonl", True), ("predictions/a.jsonl", True), ("runs/1/config.yaml", True),
        ("pictures/1.webp", True), ("config.yaml", False), ("predictions.txt", False), ("model/runs", False), ("checkpoint-2/x", False),
    ],
)  # fmt: skip
def test_an_evaluations_folder_may_be_written_again_and_no_other(name: str, ours: bool) -> None:
    assert folder.belongs(name) is ours


def rows(*replies: str) -> list[dict[str, Any]]:
    return [{"prediction": reply, "reference": "yes"} for reply in replies]


def write(output: Path, *files: Path, **given: Any) -> dict[str, Any]:
    asked = [Target(file.stem, str(file), "predictions") for file in files]
    return folder.write(output, asked, [], Options(**given))


def test_what_an_earlier_version_wrote_is_written_over_and_what_it_did_not_is_not(
    tmp_path: Path,
) -> None:
    one, two = (write_rows(tmp_path / f"{name}.jsonl", rows(name)) for name in ("one", "two"))
    out = tmp_path / "out"
    write(out, one)
    write(out, one, two)
    assert not (out / "scores.json").exists(), "of the result before"
    write(out, one)
    (out / "manifest.json").unlink()
    report = write(out, one)
    assert report["scores"]["exact_match"] == 0.0
    assert read_rows(out / "predictions.jsonl") == read_rows(out / "predictions" / "one.jsonl")
    assert json.loads((out / "scores.json").read_text("utf-8")) == report
    (out / "manifest.json").unlink()
    (out / "predictions" / "two.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"two\.jsonl is there, and this program did not write it"):  # fmt: skip
        write(out, one, two)
    write(out, one, two, overwrite=True)
    (out / "evaluation.json").write_text("{")
    (out / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="did not write it"):
        write(out, one)


def test_no_file_is_written_through_a_link(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", rows("a"))
    (tmp_path / "out").mkdir()
    for name in ("evaluation.json", "predictions"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
        for given in ({}, {"overwrite": True}):
            asked = [Target("one", str(one), "predictions")]
            with pytest.raises(ConfigError):
                folder.check_place(tmp_path / "out", asked, Options(**given))
        (tmp_path / "out" / name).unlink()
    assert not os.path.lexists(tmp_path / "elsewhere")


def test_answers_of_a_judge_are_kept_where_the_run_keeps_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "default"))
    assert folder._cache([]) == tmp_path / "default"
    section = DataSection(train=[], cache_dir=str(tmp_path / "own"))
    jobs: Any = [SimpleNamespace(settings=SimpleNamespace(data=section))]
    assert folder._cache(jobs) == tmp_path / "own"
    jobs[0].settings.data = DataSection(train=[])
    assert folder._cache(jobs) == tmp_path / "default"


def test_replies_that_a_run_made_are_copied_as_they_are_with_its_records(tmp_path: Path) -> None:
    file = tmp_path / "made.jsonl"
    score_external(write_rows(tmp_path / "raw.jsonl", rows("yes")), file, Scoring(), like=None)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "data.json"):
        (run / name).write_text(name)
    asked = [Target("base", str(file), "base"), Target("run-2", str(file), "adapter", 2, str(run))]
    found = folder.write(tmp_path / "out", asked, [], Options())
    assert [one["step"] for one in found["targets"]] == [None, 2]
    for name in ("base", "run-2"):
        assert (tmp_path / "out" / "predictions" / f"{name}.jsonl").read_bytes() == file.read_bytes()  # fmt: skip
    copy = schema.run_copy(tmp_path / "out", str(run))
    assert copy is not None
    assert {one.name: one.read_text() for one in copy.iterdir()} == {name: name for name in schema.RUN_FILES}  # fmt: skip
    assert found["output"] == str(tmp_path / "out")


def test_a_model_at_hand_is_asked_within_its_room_until_it_is_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import finetune.generation.generate as generate
    from finetune.evaluation import model_scores

    asked: list[Any] = []
    monkeypatch.setattr(generate, "context_length", lambda _: 50)
    monkeypatch.setattr(generate, "check_context", lambda *words: asked.append(words))
    monkeypatch.setattr(
        generate, "generate", lambda *words, **how: asked.append((words, how)) or []
    )
    prompt = SimpleNamespace(prompt_ids=[1, 2, 3], name="d:1", template="t")
    with pytest.raises(ValueError, match="zip"):  # no reply
        model_scores.evaluate_model("m", [prompt], max_new_tokens=9, batch_size=4, should_stop=bool)  # type: ignore[list-item]
    how = {"max_new_tokens": 9, "batch_size": 4, "should_stop": bool}
    assert asked == [(50, [3], 9, ["d:1"]), (("m", "t", [[1, 2, 3]]), how)]


def test_pictures_are_kept_of_data_that_was_checked_and_of_no_file_of_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[list[str]] = []
    monkeypatch.setattr(schema, "keep_pictures", lambda _, images: kept.append([*images]))
    monkeypatch.setattr(folder, "ScoredTarget", lambda target, job, file, options: SimpleNamespace(file=file))  # fmt: skip
    said = SimpleNamespace(model_dump=dict)
    monkeypatch.setattr(folder, "evaluation_of", lambda *_: said)
    monkeypatch.setattr(folder, "single", lambda *_: {})
    monkeypatch.setattr(folder, "write_evaluation", lambda *_: None)
    lines = write_rows(tmp_path / "lines.jsonl", [{"images": ["a.png", "b.png"]}, {}])
    monkeypatch.setattr(folder, "_write_predictions", lambda job, file, how: (file.parent.mkdir(exist_ok=True), file.write_bytes(lines.read_bytes())))  # fmt: skip
    monkeypatch.setattr(folder.scoring, "score_external", lambda source, file, how, like: (file.parent.mkdir(exist_ok=True), file.write_bytes(lines.read_bytes())))  # fmt: skip
    one = made(tmp_path)
    folder._write(tmp_path, tmp_path / "out", [one.target], [one], Options())
    assert kept == [["a.png", "b.png"]]
    folder._write(tmp_path, tmp_path / "out", [Target("x", "x", "predictions")], [], Options())
    assert len(kept) == 1
