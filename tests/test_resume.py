"""Resuming: what must match is refused with a table, what may change is listed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from finetune.artifacts import checkpoint
from finetune.artifacts.names import RUN_RECORD
from finetune.config.schema import RunConfig
from finetune.errors import CheckpointError
from finetune.storage import folders
from finetune.training import resume
from finetune.training.resume import RULES, Rule

FACTS = {"model": "aa", "template": "bb", "data": "cc", "global_batch": 8, "dtype": "float32"}
VERSIONS = {"torch": "2.13.0"}
CONFIG = {
    "model": {"path": "a"},
    "data": {"train": "x"},
    "method": {"kind": "lora"},
    "training": {"output_dir": "runs/a"},
}


def write(folder: Path, saved: Mapping[str, Any]) -> None:
    """The record as a checkpoint holds it."""
    (folder / RUN_RECORD).write_text(resume.text_of(saved), encoding="utf-8")


def record(config: dict[str, Any] | None = None, **facts: Any) -> dict[str, Any]:
    resolved = RunConfig.model_validate(config or CONFIG).model_dump()
    return resume.record(resolved, {**FACTS, **facts}, VERSIONS)


def keys_of(section: type[BaseModel]) -> set[str]:
    found = set()
    for name, field in section.model_fields.items():
        kind = field.annotation
        inner = [k for k in getattr(kind, "__args__", (kind,)) if isinstance(k, type)]
        models = [k for k in inner if issubclass(k, BaseModel)]
        if section is RunConfig and name != "method":
            found |= {f"{name}.{key}" for model in models for key in model.model_fields}
        else:
            found.add(name)
    return found


def test_every_option_has_a_rule_and_every_rule_an_option() -> None:
    assert set(RULES) == keys_of(RunConfig)


def test_the_same_run_resumes_without_a_word(tmp_path: Path) -> None:
    write(tmp_path, record())
    assert resume.check(tmp_path, record()) == ()


def other(value: Any) -> Any:
    """A value that differs, of about the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return "something else"


REFUSED = {
    "model.quantization", "model.adapter", "model.freeze", "data.max_length", "data.train_on", "data.on_too_long",
    "data.packing", "data.group_by_length", "method", "training.learning_rate",
    "training.learning_rates", "training.weight_decay", "training.lr_schedule",
    "training.warmup_steps", "training.seed", "training.extra", "deepspeed.zero_stage",
    "deepspeed.offload_optimizer", "deepspeed.offload_parameters", "training.optimizer",
    "data.streaming", "data.shuffle_buffer",
}  # fmt: skip
"""Options whose change makes other training of the same steps; by hand, not read from RULES."""

LISTED = {
    # What is computed otherwise, though the same is computed:
    "model.attention", "model.kernels", "data.cache_image_features", "training.deterministic",
    "training.activation_checkpointing", "training.offload_activations",
    # how long and how the rest of the run goes:
    "training.max_steps", "training.num_epochs", "training.max_grad_norm",
    # and all that decides which checkpoint is the best, and when the run is over.
    "data.validation", "evaluation.every_steps", "evaluation.generate", "evaluation.replies",
    "evaluation.max_new_tokens", "evaluation.max_samples", "evaluation.best_metric",
    "evaluation.patience", "evaluation.keep", "evaluation.choose",
}  # fmt: skip


def test_what_makes_another_run_is_refused_and_what_shows_in_its_figures_is_said() -> None:
    assert {key for key, rule in RULES.items() if rule is Rule.MATCH} == REFUSED
    assert {key for key, rule in RULES.items() if rule is Rule.CHANGE} == LISTED


@pytest.mark.parametrize("key", [key for key in RULES if key != "method"])
def test_each_option_behaves_as_declared(key: str) -> None:
    saved = record({**CONFIG, "deepspeed": {}})
    now = {**saved, "config": {**saved["config"], key: other(saved["config"][key])}}
    found = resume.compare(saved, now)
    refused, listed = [d.key for d in found.refusals], [d.key for d in found.changes]
    wanted = {Rule.MATCH: ([key], []), Rule.CHANGE: ([], [key]), Rule.FREE: ([], [])}
    assert (refused, listed) == wanted[RULES[key]]


@pytest.mark.parametrize("fact", FACTS)
def test_a_changed_fact_is_refused_with_a_table(tmp_path: Path, fact: str) -> None:
    write(tmp_path, record())
    with pytest.raises(CheckpointError) as caught:
        resume.check(tmp_path, record(**{fact: "other"}))
    assert caught.value.exit_code == 3
    heading, row = str(caught.value).splitlines()[1:3]
    assert heading.split() == ["checkpoint", "now"]
    assert row.split()[-2:] == [str(FACTS[fact]), "other"]
    assert row.strip().startswith(resume.FACTS[fact])


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_that_a_checkpoint_does_not_say_is_refused(fact: str) -> None:
    silent = record()
    del silent["facts"][fact]
    assert [d.key for d in resume.compare(silent, record()).refusals] == [resume.FACTS[fact]]


def test_another_method_or_sharding_is_refused() -> None:
    full = record({**CONFIG, "method": {"kind": "full"}})
    assert "method.kind" in [d.key for d in resume.compare(record(), full).refusals]
    sharded = record({**CONFIG, "deepspeed": {"zero_stage": 2}})
    assert "deepspeed.zero_stage" in [d.key for d in resume.compare(record(), sharded).refusals]


def test_an_option_that_the_older_version_did_not_know_is_only_listed() -> None:
    saved = record()
    del saved["config"]["training.weight_decay"]
    found = resume.compare(saved, record())
    assert (len(found.refusals), [d.key for d in found.changes]) == (0, ["training.weight_decay"])


def test_another_library_version_is_listed() -> None:
    now = {**record(), "versions": {"torch": "2.14.0"}}
    found = resume.compare(record(), now)
    assert (found.refusals, found.changes[0].key) == ((), "version of torch")


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    write(tmp_path, record())
    assert resume.read(tmp_path) == record()
    (tmp_path / "run.json").unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"):
        resume.read(tmp_path)


@pytest.mark.parametrize("part", ["config", "facts", "versions"])
@pytest.mark.parametrize("value", [None, [], "x"])
def test_a_record_that_lacks_a_part_is_damaged(part: str, value: Any, tmp_path: Path) -> None:
    damaged = record() | {part: value}
    if value is None:
        del damaged[part]
    write(tmp_path, damaged)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        resume.read(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_looks_for_the_checkpoint_and_all_begin_there(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.distributed import processes

    found = resume.Start(tmp_path, 7)
    asked: list[Any] = []

    def broadcast(work: Any, group: Any) -> Any:
        asked.append(group)
        return work() if rank == 0 else found

    monkeypatch.setattr(processes, "broadcast_from_rank0", broadcast)
    monkeypatch.setattr(processes, "patient_group", lambda: "of the disk")
    monkeypatch.setattr(resume, "start", lambda *given: asked.append(given) or found)
    assert resume.start_together(tmp_path, "auto", {"config": {}}) == found
    assert asked == ["of the disk", *([(tmp_path, "auto", {"config": {}})] if rank == 0 else [])]


def save(run: Path, step: int) -> Path:
    with folders.staged(run / f"checkpoint-{step}") as stage:
        (stage / "optimizer.pt").write_bytes(b"state")
    return run / f"checkpoint-{step}"


def test_auto_takes_the_newest_good_one_and_says_what_it_passed_over(tmp_path: Path) -> None:
    assert resume.choose(tmp_path, "auto") == (None, [])
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    (second / "optimizer.pt").unlink()
    assert resume.choose(tmp_path, "auto") == (first, [(second, "optimizer.pt is missing")])


def test_weights_alone_are_passed_over_for_the_newest_that_can_be_resumed(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    with folders.staged(tmp_path / "weights-2") as stage:
        (stage / "weights").write_bytes(b"weights")
    assert resume.choose(tmp_path, "auto") == (first, [])
    with pytest.raises(CheckpointError, match="holds weights only"):
        resume.choose(tmp_path, str(tmp_path / "weights-2"))


@pytest.mark.parametrize(("save", "refused"), [("weights", True), ("resumable", False)])
def test_only_a_run_that_keeps_weights_alone_must_not_add_to_those_of_another(
    tmp_path: Path, save: str, refused: bool
) -> None:
    with folders.staged(tmp_path / "weights-2") as stage:
        (stage / "weights").write_bytes(b"weights")
    now = record({**CONFIG, "training": {"output_dir": "x", "save": save}})
    if refused:
        with pytest.raises(CheckpointError, match="holds weights-2 of an earlier run"):
            resume.start(tmp_path, "auto", now)
    else:
        assert resume.start(tmp_path, "auto", now) == resume.Start()


def test_a_damaged_note_of_the_best_is_refused_before_hours_of_training(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        resume.start(tmp_path, "auto", record())


@pytest.mark.parametrize(
    ("mode", "owner", "sharded", "said"),
    [
        (0o644, 0, True, None),
        (0o664, 0, True, None),  # a group of one's own
        (0o646, 0, True, "anybody can write to states.pt"),
        (0o644, 1, True, "user .* wrote"),
        (0o646, 1, False, None),  # no pickles are opened
    ],
)
def test_states_that_are_pickles_must_be_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, owner: int, sharded: bool, said: str | None
) -> None:  # fmt: skip
    folder = save(tmp_path, 3)
    place = folder / ("global_step3" if sharded else "states")
    place.mkdir()
    (place / "states.pt").write_bytes(b"states")
    (place / "states.pt").chmod(mode)
    weights = tmp_path / "weights-4/global_step4"  # is never resumed
    weights.mkdir(parents=True)
    (weights / "states.pt").touch()
    (weights / "states.pt").chmod(0o666)
    user = resume.os.getuid()
    monkeypatch.setattr(resume.os, "getuid", lambda: user + owner)
    resume.check_owner(tmp_path, "never")
    for asked in ("auto", str(folder)):
        if said is None:
            resume.check_owner(tmp_path, asked)
            continue
        with pytest.raises(CheckpointError, match=f"{said}.*--trust-checkpoint"):
            resume.check_owner(tmp_path, asked)


@pytest.mark.parametrize("trusted", ["checkpoint-3", "checkpoint-3/global_step3"])
def test_folders_of_states_that_anybody_can_write_to_are_refused_too(
    trusted: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, 3)
    (folder / "global_step3").mkdir()
    resume.check_owner(tmp_path, "auto")
    (tmp_path / trusted).chmod(0o777)
    name = Path(trusted).name
    with pytest.raises(CheckpointError, match=f"anybody can write to {name};"):
        resume.check_owner(tmp_path, "auto")


def test_long_values_are_shortened_and_missing_ones_are_named() -> None:
    saved, now = record(), record()
    saved["config"]["training.extra"] = {"a": "x" * 80}
    now["facts"]["model"] = "y" * 60
    del now["facts"]["template"]
    found = {one.key: (one.checkpoint, one.now) for one in resume.compare(saved, now).refusals}
    shown = '{"a": "' + "x" * 50 + "..."
    assert found["training.extra"] == (shown, "{}")
    assert found["the base model's weights and config"] == ("aa", "y" * 60)
    assert found["the tokenizer and chat template"] == ("bb", "(not set)")


def test_other_processes_are_a_remedy_where_the_global_batch_differs(tmp_path: Path) -> None:
    write(tmp_path, record(global_batch=24))
    with pytest.raises(CheckpointError, match=r"x processes is 24$"):
        resume.check(tmp_path, record())
    with pytest.raises(CheckpointError) as caught:
        resume.check(tmp_path, record(global_batch=24, model="other"))
    assert "processes is" not in str(caught.value)


def test_what_was_written_is_what_is_compared_whatever_kind_it_had() -> None:
    saved, now = record(), record()
    now["config"]["model.freeze"] = tuple(now["config"]["model.freeze"])
    now["facts"]["global_batch"] = 8.0
    now["config"]["data.cache_dir"] = Path("x")  # not as it lies in a file
    saved["config"]["data.cache_dir"] = "x"
    assert resume.compare(saved, now) == resume.ResumeComparison((), ())


def test_never_refuses_to_start_over_an_old_run(tmp_path: Path) -> None:
    assert resume.choose(tmp_path, "never") == (None, [])
    save(tmp_path, 1)
    save(tmp_path, 10)
    save(tmp_path, 9)
    with pytest.raises(CheckpointError, match=r"holds 3 checkpoints .*\(newest: checkpoint-10\) and training\.resume is never"):  # fmt: skip
        resume.choose(tmp_path, "never")


def test_a_start_says_what_was_passed_over_what_it_goes_on_from_and_what_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        with folders.staged(tmp_path / f"checkpoint-{step}") as stage:
            write(stage, record())
    (tmp_path / "checkpoint-4/run.json").unlink()
    now = record({**CONFIG, "training": {"output_dir": "runs/a", "max_grad_norm": 0.5}})
    begun = resume.start(tmp_path, "auto", now)
    assert (begun.folder, begun.step, begun.compares_anew) == (tmp_path / "checkpoint-2", 2, False)
    told = capsys.readouterr()
    assert told.err == f"warning: {tmp_path / 'checkpoint-4'} is passed over: run.json is missing\n"
    assert told.out == (
        f"resuming from {tmp_path / 'checkpoint-2'}\n  training.max_grad_norm: was 1.0, now 0.5\n"
    )


def test_a_named_checkpoint_is_never_replaced_by_another(tmp_path: Path) -> None:
    save(tmp_path, 1)
    second = save(tmp_path, 2)
    assert resume.choose(tmp_path, str(second)) == (second, [])
    (second / "optimizer.pt").write_bytes(b"stale")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt has other content"):
        resume.choose(tmp_path, str(second))
    with pytest.raises(CheckpointError, match="must be auto, never or a checkpoint directory"):
        resume.choose(tmp_path, str(tmp_path / "checkpoint-3"))


# --- what the best score is judged by -------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "change", "anew"),
    [
        ("loss", {}, False),
        ("loss", {"validation": "other rows"}, True),
        ("loss", {"general": "other rows"}, True),
        ("loss", {"evaluation.best_metric": "bleu-4"}, True),
        ("loss", {"evaluation.choose": "domain_without_forgetting"}, True),
        ("loss", {"evaluation.keep": {"data": "x"}}, True),
        ("loss", {"evaluation.patience": 3}, False),
        ("loss", {"evaluation.max_samples": 7}, False),  # says nothing about a loss
        ("bleu-4", {"evaluation.max_samples": 7}, True),
        ("bleu-4", {"evaluation.max_new_tokens": 7}, True),
        ("bleu-4", {"evaluation.replies": "last_reply"}, True),
        ("bleu-4", {"training.max_grad_norm": 7.0}, False),
    ],
)
def test_best_and_patience_begin_anew_when_what_they_compare_has_changed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    metric: str,
    change: dict[str, Any],
    anew: bool,
) -> None:
    with folders.staged(tmp_path / "checkpoint-2") as stage:
        config = {**CONFIG, "evaluation": {"best_metric": metric}}
        saved = record(config, validation="rows", general="rows")
        write(stage, saved)
    checkpoint.set_best(tmp_path, tmp_path / "checkpoint-2", metric, 1.0)
    now = {**saved, "config": dict(saved["config"]), "facts": dict(saved["facts"])}
    for key, value in change.items():
        now["facts" if key in ("validation", "general") else "config"][key] = value
    (tmp_path / "untuned.npz").write_bytes(b"what the untuned model scored on these rows")
    begun = resume.start(tmp_path, "auto", now)
    assert (begun.folder, begun.step) == (tmp_path / "checkpoint-2", 2)
    assert begun.compares_anew is anew
    assert (checkpoint.best(tmp_path) is None) is anew
    assert ("begin anew" in capsys.readouterr().out) is anew
    other_rows = bool({*change} & {"validation", "general"})
    assert (tmp_path / "untuned.npz").exists() is not other_rows


def test_other_held_out_examples_are_listed_by_name(tmp_path: Path) -> None:
    write(tmp_path, record(validation="rows"))
    (change,) = resume.check(tmp_path, record(validation="other rows"))
    assert (change.key, change.checkpoint, change.now) == (
        "the held-out examples", "rows", "other rows",
    )  # fmt: skip


def test_a_checkpoint_of_before_held_out_examples_were_kept_goes_on(tmp_path: Path) -> None:
    write(tmp_path, record())
    assert resume.check(tmp_path, record(validation="rows")) == ()
