"""What is evaluated, under which names and settings, and where the result goes: found out before anything is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import adapters
import pytest

from finetune.config.schema import DataSection, EvaluationSection
from finetune.errors import ConfigError, DataError
from finetune.evaluation import evaluate as evaluating
from finetune.evaluation.evaluate import evaluate
from finetune.evaluation.options import Options
from finetune.evaluation.scores.added import ByModels
from finetune.evaluation.scoring import Scoring
from finetune.evaluation.targets import Target, find_targets
from finetune.generation.backends.choice import BackendChoice
from finetune.generation.settings import Settings, settings_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of it, and the same adapter as a run's checkpoint."""
    place = tmp_path_factory.mktemp("targets")
    base = adapters.make_base(place / "base", shards=1)
    adapters.make_adapter(place / "adapter", base)
    checkpoint = shutil.copytree(place / "adapter", place / "run" / "checkpoint-30")
    write_config(checkpoint, "[held.jsonl]")
    return place


def write_config(checkpoint: Path, validation: str, **training: Any) -> None:
    (checkpoint / "config.yaml").write_text(
        f"model: {{path: m, dtype: float32}}\ndata: {{train: t.jsonl, validation: {validation}, format: pairs}}\n"
        f"method: {{kind: lora}}\ntraining: {json.dumps({'output_dir': 'r'} | training)}\nevaluation: {{max_new_tokens: 9}}\n"
    )


def moved(made: Path, tmp_path: Path, base: str, fingerprint: str | None = None) -> Path:
    """The adapter with another record of its base."""
    folder = Path(shutil.copytree(made / "adapter", tmp_path / "moved"))
    for file in folder.glob("*.json"):
        found = json.loads(file.read_text("utf-8"))
        if "fingerprint" in found:
            file.write_text(json.dumps(found | {"path": base}), "utf-8")
        if "base_model_name_or_path" in found:
            file.write_text(json.dumps(found | {"base_model_name_or_path": base}), "utf-8")
    return folder


def test_a_checkpoint_says_its_run_and_its_step_and_the_base_its_number_format(made: Path) -> None:
    checkpoint = str(made / "run" / "checkpoint-30")
    base, tuned = find_targets([checkpoint], with_base=True)
    assert tuned == Target("run-checkpoint-30", checkpoint, "adapter", 30, str(made / "run"))
    assert base == Target("base", str(made / "base"), "base", like=checkpoint)
    both = find_targets([checkpoint, str(made / "adapter")], with_base=True)
    assert [one.name for one in both] == ["base", "run-checkpoint-30", "adapter"]
    assert both[0].like == checkpoint, "the first that stands on it"


def test_a_base_is_looked_for_among_the_targets_only_where_it_has_moved(
    made: Path, tmp_path: Path
) -> None:
    base = str(made / "base")
    [adapter, _] = find_targets([str(made / "adapter"), base], with_base=False)
    assert adapter.base is None
    gone = moved(made, tmp_path, str(tmp_path / "gone"))
    [adapter, _] = find_targets([str(gone), base], with_base=False)
    assert adapter.base == base
    [whole, adapter, *_] = find_targets([str(gone), base], with_base=True)
    assert (whole.path, whole.kind, adapter.base) == (base, "base", base)
    [alone] = find_targets([str(gone)], with_base=False)
    assert alone.base is None


def test_each_target_is_asked_once_and_files_beside_models_too(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(made)
    names = [str(made / "adapter"), "adapter", "./adapter/"]
    assert len(find_targets(names, with_base=False)) == 1
    base, *rest = find_targets([*names, "base"], with_base=True)
    assert [one.kind for one in (base, *rest)] == ["base", "adapter"]
    for name in ("a b.jsonl", "a,b.jsonl", "deeper/a b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    files = [str(tmp_path / name) for name in ("a b.jsonl", "a,b.jsonl", "deeper/a b.jsonl", "a b.jsonl")]  # fmt: skip
    found = find_targets([], files, with_base=False)
    assert [(one.name, one.kind) for one in found] == [
        ("a-b", "predictions"), ("a-b-2", "predictions"), ("a-b-3", "predictions"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="gone is no file of predictions"):
        find_targets([], ["gone"], with_base=False)
    odd = find_targets([str(made / "adapter" / ".." / "adapter")], with_base=False)
    assert odd[0].name == "adapter"


# --- settings and place ------------------------------------------------------------------------


def test_settings_are_those_of_the_first_checkpoint_whatever_stands_before_it(made: Path) -> None:
    checkpoint = str(made / "run" / "checkpoint-30")
    targets = find_targets([str(made / "base"), checkpoint], with_base=False)
    assert targets[0].kind == "base"
    found = evaluating._settings(targets, (), {"replies": "last_reply"}, Options())
    assert (found.evaluation.max_new_tokens, found.evaluation.replies) == (9, "last_reply")
    assert found.data.validation == ["held.jsonl"]
    assert found.dtype == "float32"
    named = evaluating._settings(targets, ["other.jsonl"], {}, Options())
    assert named.data.validation == ["other.jsonl"]


def test_tasks_alone_ask_no_held_out_data_unless_it_is_named(made: Path) -> None:
    checkpoint = find_targets([str(made / "run" / "checkpoint-30")], with_base=False)
    tasks = Options(tasks=("mmlu",))
    assert evaluating._settings(checkpoint, (), {}, tasks).sources == ()
    assert len(evaluating._settings(checkpoint, ["a.jsonl"], {}, tasks).sources) == 1
    base = find_targets([str(made / "base")], with_base=False)
    assert evaluating._settings(base, (), {}, tasks).sources == ()
    with pytest.raises(ConfigError, match="give held-out files with --data"):
        evaluating._settings(base, (), {}, Options())


def test_a_run_says_how_it_was_evaluated_and_a_model_from_elsewhere_nothing(
    made: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(made / "adapter", tmp_path / "checkpoint-1"))
    write_config(checkpoint, "v.jsonl", batch_size=3, seed=7)
    text = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(text.replace("dtype: float32", "dtype: float32, attention: eager, kernels: torch, quantization: nf4"))  # fmt: skip
    found = settings_of(checkpoint)
    assert (found.loss_batch_size, found.seed) == (3, 7)
    assert (found.dtype, found.attention, found.kernels, found.quantization) == (
        "float32", "eager", "torch", "nf4",
    )  # fmt: skip
    assert found.data.format == "pairs"
    (checkpoint / "config.yaml").unlink()
    plain = Settings(DataSection(train=[]), EvaluationSection())
    assert settings_of(checkpoint) == settings_of(made / "base") == plain


@pytest.mark.parametrize(
    ("kind", "path", "data", "place"),
    [
        ("adapter", "run/checkpoint-30", ["x/dev.jsonl", "y.jsonl"], "run/evaluation-checkpoint-30-dev"),
        ("base", "base", [], "evaluation-base-tasks"),
        ("base", "THUDM/glm-4", ["dev.jsonl"], "evaluation-glm-4-dev"),
        ("predictions", "x/replies.jsonl", [], "x/evaluation-replies"),
    ],
)  # fmt: skip
def test_a_result_lies_beside_what_was_evaluated(
    made: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, path: str, data: list[str], place: str
) -> None:
    monkeypatch.chdir(made)
    settings = Settings(DataSection(train=[], validation=data), EvaluationSection())  # type: ignore[arg-type]
    assert evaluating._beside(Target("t", path, kind), settings) == made / place
    if kind == "base" and not data:
        assert evaluating._beside(Target("t", path, kind), None).name == "evaluation-base-data"


class Steps:
    """What an evaluation does, without doing it."""

    def __init__(self, patch: pytest.MonkeyPatch, *, rank0: bool = True) -> None:
        self.done: list[str] = []
        note = lambda name, value=None: lambda *_, **__: self.done.append(name) or value  # noqa: E731
        patch.setattr(evaluating.job, "prepare", note("prepare", "job"))
        patch.setattr(evaluating.folder, "check_place", lambda *asked: self.done.append("check") or self.checked.append(asked))  # fmt: skip
        self.checked: list[tuple[Any, ...]] = []
        patch.setattr(evaluating.compute, "run", note("run"))
        patch.setattr(evaluating.folder, "write", note("write", {"written": True}))
        patch.setattr(evaluating.console, "is_rank0", lambda: rank0)


def test_only_the_first_process_writes_and_the_place_is_looked_at_before_the_work(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    assert evaluate(str(made / "base"), ["d.jsonl"]) == {"written": True}
    assert steps.done == ["prepare", "check", "run", "write"]
    place, [target], options, sources = steps.checked[0]
    assert (place, target.kind, options, sources) == (made / "evaluation-base-d", "base", Options(), ["d.jsonl"])  # fmt: skip
    prepared: list[Settings] = []
    monkeypatch.setattr(evaluating.job, "prepare", lambda _, settings, __: prepared.append(settings))  # fmt: skip
    evaluate(str(made / "base"), ["d.jsonl"], changes={"max_new_tokens": 3, "max_samples": None})
    assert prepared[0].evaluation.max_new_tokens == 3
    other = Steps(monkeypatch, rank0=False)
    assert evaluate(str(made / "base"), ["d.jsonl"]) == {}
    assert other.done == ["prepare", "check", "run"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(temperature=-0.1), "temperature is -0.1; it must be 0"),
        (Options(by=BackendChoice(endpoint="openai:m@http://x/v1")), "replies for one model, and 2 are named"),
        (Options(scoring=Scoring(own=("plain",))), "write module:function"), (Options(by_models=ByModels(judge="gpt")), "--judge"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_first(
    made: Path, monkeypatch: pytest.MonkeyPatch, options: Options, said: str
) -> None:
    steps = Steps(monkeypatch)
    with pytest.raises(ConfigError, match=said):
        evaluate([str(made / "base"), str(made / "adapter")], ["d.jsonl"], options=options)
    assert steps.done == []


@pytest.mark.parametrize(
    ("choice", "how", "said"),
    [
        (BackendChoice("vllm"), {}, None), (BackendChoice(endpoint="openai:m@http://x"), {}, None), (BackendChoice(), {"restricted": True, "sampled": True, "needs_weights": True}, None),
        (BackendChoice("vllm"), {"needs_weights": True}, None), (BackendChoice(endpoint="openai:m@http://x"), {"sampled": True}, None),
        (BackendChoice("vllm"), {"sampled": True}, "--backend vllm replies greedily; leave --temperature out"),
        (BackendChoice("vllm"), {"restricted": True}, "do not go with --backend vllm;"),
        (BackendChoice(endpoint="openai:m@http://x"), {"restricted": True}, "do not go with --endpoint;"),
        (BackendChoice(endpoint="openai:m@http://x"), {"needs_weights": True}, "--endpoint gives replies only: leave out --tasks"),
        (BackendChoice(endpoint="m"), {}, "--endpoint 'm': write openai:MODEL@URL"),
    ],
)  # fmt: skip
def test_what_replies_from_elsewhere_do_not_go_with_is_named(
    choice: BackendChoice, how: dict[str, bool], said: str | None
) -> None:
    asked = {"restricted": False, "sampled": False, "needs_weights": False} | how
    if said is None:
        choice.check(**asked)
        return
    with pytest.raises(ConfigError, match=said):
        choice.check(**asked)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (Options(), (False, False, False)), (Options(tasks=("mmlu",)), (False, False, True)),
        (Options(general=("g",)), (False, False, True)), (Options(temperature=0.1), (False, True, False)),
    ],
)  # fmt: skip
def test_options_tell_the_backend_what_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, options: Options, asked: tuple[bool, bool, bool]
) -> None:
    from finetune.evaluation import options as module
    from finetune.generation.structured import Form

    said: list[dict[str, bool]] = []
    monkeypatch.setattr(BackendChoice, "check", lambda _, **how: said.append(how))
    monkeypatch.setattr(module, "check_harness", lambda _: None)
    options.check()
    Options(form=Form(must_call=True)).check()
    names = ("restricted", "sampled", "needs_weights")
    assert said[0] == dict(zip(names, asked, strict=True))
    assert said[1]["restricted"] is True


def test_how_tokens_are_chosen_is_said_in_words() -> None:
    from finetune.generation.structured import Form

    assert Options().decoding == "greedy"
    assert Options(seed=4).decoding == "greedy"
    sampled = Options(temperature=0.5, seed=4, form=Form(must_call=True), by=BackendChoice("vllm"))
    assert sampled.decoding == "temperature 0.5, seed 4, a call where there are tools, by vllm"
    assert Options(by=BackendChoice(endpoint="openai:m@http://x")).decoding == "greedy, by openai:m@http://x"  # fmt: skip
    both = str(Form('{"type": "object"}', must_call=True))
    assert both.startswith("a call where there are tools; else JSON under schema ")
