"""`launch`, `doctor` and `init` without processes, cards or a model: each part alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import ROOT, exit_code

from finetune.cli import doctor, init
from finetune.cli.launch import launch
from finetune.config.load import load
from finetune.data.preview.report import Lengths, SourceReport
from finetune.errors import ConfigError
from finetune.planning.plan import Gpu

# --- launch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "alone"),
    [([], True), (["--max-restarts=1"], True), (["--nnodes=2"], False), (["--rdzv-endpoint=a:1"], False), (["--rdzv_backend=c10d"], False), (["--master-addr=a"], False)],
)  # fmt: skip
def test_torchrun_is_told_of_one_machine_only_where_nothing_else_is_said(
    options: list[str], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("torch.distributed.run.main", given.append)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert launch("gpu", [*options, "x.yml", "a.b=1", "y.yaml"]) == 0
    added = ["--standalone", "--local-addr=127.0.0.1"] if alone else []
    assert given == [["--nproc-per-node=1", *options, *added, "-m", "finetune", "train", "x.yml", "a.b=1", "y.yaml"]]  # fmt: skip
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    launch("gpu", ["x.yaml"])
    launch("5", ["x.yaml"])
    assert [words[0] for words in given[1:]] == ["--nproc-per-node=3", "--nproc-per-node=5"]


def child_failed(code: int) -> Exception:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failure = ProcessFailure(local_rank=7, pid=1, exitcode=code, error_file="<N/A>")
    return ChildFailedError("train", {7: failure})


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: child_failed(3), 3), (lambda: child_failed(-9), 137), (lambda: child_failed(-15), 143), (lambda: SystemExit(2), 2),
        (lambda: SystemExit(None), 0), (lambda: SystemExit("wrong"), 1),
    ],
)  # fmt: skip
def test_a_run_ends_with_the_code_of_its_first_failure(
    make: Callable[[], BaseException], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: list[str]) -> None:
        raise make()

    monkeypatch.setattr("torch.distributed.run.main", fail)
    assert launch("2", ["x.yaml"]) == code


def test_what_torchrun_does_not_understand_is_a_mistake_of_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(words: list[str]) -> None:
        raise ValueError("Unsupported nproc_per_node value: many")

    monkeypatch.setattr("torch.distributed.run.main", fail)
    with pytest.raises(ConfigError, match="torchrun: Unsupported nproc_per_node value: many"):
        launch("many", ["x.yaml"])


# --- doctor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("remedy", "code"), [("", 0), ("do it", 1)])
def test_doctor_ends_with_1_where_something_is_to_be_done(
    remedy: str, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    findings = [doctor.Finding("a", "b"), doctor.Finding("c", "d", remedy)]
    monkeypatch.setattr(doctor, "examine", lambda hub: findings)
    assert exit_code("doctor") == code
    said = capfd.readouterr()
    rows = [line.split() for line in said.out.splitlines()[2:]]
    assert rows == [["a", "b", "ok"], ["c", "d", "!" if remedy else "ok"]]
    assert said.err == ("warning: c: d: do it\n" if remedy else "")
    assert exit_code("doctor", "--json") == code
    told = json.loads(capfd.readouterr().out)
    assert told == [{"what": "a", "found": "b", "remedy": ""}, {"what": "c", "found": "d", "remedy": remedy}]  # fmt: skip


def test_doctor_measures_the_disk_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(doctor, "default_root", lambda: tmp_path / "not" / "there")

    room = [0]

    def usage(folder: Path) -> Any:
        asked.append(folder)
        return SimpleNamespace(free=room[0], total=room[0])

    monkeypatch.setattr(doctor.shutil, "disk_usage", usage)
    for free, well in ((20_000_000_001, [True, True, True]), (20_000_000_000, [False, False, True]), (1_000_000_000, [False, False, True]), (999_999_999, [False, False, False])):  # fmt: skip
        asked.clear()
        room[0] = free
        found = list(doctor._room())
        assert asked[1] == tmp_path
        assert [finding.is_well for finding in found] == well[: len(found)]


def test_doctor_looks_at_what_the_program_needs_and_not_at_extras(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = ["torch>=2.6", "pytest; extra == 'dev'", "no-such>=1"]
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    monkeypatch.setattr(doctor, "version", lambda name: "2.7.0a1")
    found = {finding.what: finding.is_well for finding in doctor._libraries()}
    assert found == {"Python": True, "torch": True, "no-such": True}
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: mode != os.W_OK)
    assert [(f.what, f.is_well) for f in doctor._locks()] == [("working directory", False)]


# --- init ------------------------------------------------------------------------------------------


def source(**how: Any) -> SourceReport:
    given: dict[str, Any] = dict.fromkeys(SourceReport.__dataclass_fields__, 0)
    given |= {"path": "rows.jsonl", "formats": {}, "languages": {}, "unread": {}, "doubts": {}, "dialogues": 1000}  # fmt: skip
    lengths = dict.fromkeys(Lengths.__dataclass_fields__, 0) | {"tokens": 4_096_000, "longest": 500, "median": 300}  # fmt: skip
    given |= {"lengths": Lengths(**(lengths | how.pop("lengths", {})))}
    return SourceReport(**(given | how))


@pytest.mark.parametrize(
    ("longest", "images", "texts", "row"),
    [(500, 0, 0, 4096), (4096, 0, 0, 4096), (4097, 0, 0, 5120), (9000, 0, 1000, 4096), (9000, 0, 10, 9216), (500, 5, 0, 512), (512, 5, 0, 512), (1, 5, 0, 256)],
)  # fmt: skip
def test_a_row_holds_the_longest_dialogue(longest: int, images: int, texts: int, row: int) -> None:
    assert init._row(source(images=images, texts=texts, lengths={"longest": longest})) == row


@pytest.mark.parametrize(
    ("images", "gpus", "narrow", "lengths", "kinds"),
    [
        (0, 1, True, [4096, 4096, 4096, 2048, 2048, 1024, 1024], "kcqlqlq"),
        (0, 2, True, [4096, 4096, 4096, 4096, 2048, 2048, 1024, 1024], "kcsqlqlq"),
        (0, 1, False, [4096, 4096, 2048, 1024], "kcll"),
        (5, 1, True, [512, 512, 512], "kcq"), (5, 1, False, [512, 512], "kc"),
    ],
)  # fmt: skip
def test_each_way_holds_less_than_the_one_before(
    images: int, gpus: int, narrow: bool, lengths: list[int], kinds: str
) -> None:
    rungs = list(init._rungs(source(images=images), gpus, narrow=narrow))
    assert [rung.length for rung in rungs] == lengths
    told = ["k" if not r.checkpointing else "s" if r.shards else "q" if r.quantized else "c" if r.length == lengths[0] else "l" for r in rungs]  # fmt: skip
    assert "".join(told) == kinds


@pytest.mark.parametrize(
    ("dialogues", "gpus", "passes", "every", "held_out"),
    [(1000, 1, 8, 37, "5%"), (1000, 8, 7, 5, "5%"), (400, 1, 8, 37, "5%"), (399, 1, 8, 37, "20%"), (40, 1, 8, 37, "20%"), (39, 1, 8, 37, None)],
)  # fmt: skip
def test_steps_are_counted_over_all_cards(
    dialogues: int, gpus: int, passes: int, every: int, held_out: str | None
) -> None:
    """1,000 rows of 4,096 tokens three times: 375 steps of 8 rows on one card."""
    rung = init.Rung(4096, "said")
    made = init._tree(source(dialogues=dialogues), "m", rung, gpus, Path("a/my.yaml"))
    training = made["training"]
    assert (training["gradient_accumulation_steps"], training["save_every_steps"]) == (passes, every)  # fmt: skip
    assert training["output_dir"] == "runs/my"
    assert made["data"].get("validation") == held_out
    assert ("evaluation" in made) is (held_out is not None)
    if held_out:
        assert made["evaluation"]["every_steps"] == every
    assert made["data"]["packing"] is True
    assert "deepspeed" not in made
    assert "quantization" not in made["model"]


@pytest.mark.parametrize(("texts", "generates"), [(0, True), (999, True), (1000, False)])
def test_replies_are_asked_for_unless_all_is_plain_text(texts: int, generates: bool) -> None:
    made = init._tree(source(texts=texts), "m", init.Rung(4096, "said"), 1, Path("my.yaml"))
    assert made["evaluation"].get("generate", True) is generates


def test_pictures_and_texts_have_their_own_options() -> None:
    rung = init.Rung(512, "said", shards=True, quantized=True)
    made = init._tree(source(images=5), "m", rung, 2, Path("my.yaml"))
    assert made["model"] == {"path": "m", "dtype": "bfloat16", "quantization": "nf4", "freeze": ["vision"]}  # fmt: skip
    assert made["data"]["cache_image_features"] is True
    assert "packing" not in made["data"]
    assert made["deepspeed"] == {"zero_stage": 3}
    made = init._tree(source(texts=1000), "m", init.Rung(4096, "said"), 1, Path("my.yaml"))
    assert made["evaluation"]["generate"] is False


@pytest.mark.parametrize("tokens", [None, 10])
def test_few_rows_are_still_a_run(tokens: int | None) -> None:
    rows = replace(source(dialogues=3), lengths=None) if tokens is None else source(lengths={"tokens": tokens})  # fmt: skip
    made = init._tree(rows, "m", init.Rung(4096, "said"), 1, Path("my.yaml"))["training"]
    assert (made["gradient_accumulation_steps"], made["save_every_steps"]) == (1, 5)
    if tokens is None:
        assert init._row(rows) == 4096
        assert init._comments(rows, init.Rung(4096, "s"), PLAN)["data.max_length"] == "tokens"


PLAN: Any = SimpleNamespace(memory_bytes=9.25e9, gpu=Gpu(24_000_000_000))


def test_what_is_written_first_is_what_the_shipped_configuration_of_this_method_says() -> None:
    made = init._tree(source(), "m", init.Rung(4096, "said"), 1, Path("my.yaml"))
    shipped = load(ROOT / "configs/lora.yaml").config.model_dump()
    assert {name: shipped["method"][name] for name in made["method"]} == made["method"]
    assert made["training"]["learning_rate"] == shipped["training"]["learning_rate"]
    assert made["model"]["dtype"] == shipped["model"]["dtype"]
    assert made["training"]["num_epochs"] == 3
    assert made["evaluation"]["max_samples"] == 200
    assert made["training"]["activation_checkpointing"] is True
    fastest = init.Rung(4096, "said", checkpointing=False)
    assert init._tree(source(), "m", fastest, 1, Path("m"))["training"]["activation_checkpointing"] is False  # fmt: skip


def test_every_choice_stands_beside_its_reason_in_figures() -> None:
    rows = source(duplicates=3)
    rung = init.Rung(4096, "why")
    tree = init._tree(rows, "m", rung, 1, Path("my.yaml"))
    said = init._comments(rows, rung, PLAN)
    assert said["data.max_length"] == "tokens; yours have 300 as a rule, 500 at most"
    assert said["training.activation_checkpointing"] == "9.2 of 24 GB of each GPU: why"
    assert said["data.train"] == "1,000 dialogues, 3 of them twice"
    text = init.Draft(tree, said, "finetune train\nmy.yaml", PLAN).text()
    assert text.splitlines()[0] == "# finetune train my.yaml", (
        "a line of its own, whatever a name holds"
    )
    for section, options in tree.items():
        for name in options:
            line = next(one for one in text.splitlines() if one.startswith(f"  {name}: "))
            assert line.partition(" # ")[2] == said.get(f"{section}.{name}", "")
    keys = {f"{section}.{name}" for section in ("model", "data", "training", "evaluation") for name in option_names(section)}  # fmt: skip
    assert said.keys() <= keys


def option_names(section: str) -> list[str]:
    from finetune.config.reference import option_keys

    return [key.partition(".")[2] for key in option_keys() if key.startswith(f"{section}.")]


def test_the_least_of_all_ways_is_told_where_none_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = iter([9e9, 4e9, 6e9, 5e9, 8e9, 7e9, 9e9])
    monkeypatch.setattr(init, "check", lambda data, model: SimpleNamespace(num_bad=0, notes=lambda: ["take care"], sources=[source()]))  # fmt: skip
    monkeypatch.setattr(init, "local_folder", lambda model, files: tmp_path)
    monkeypatch.setattr(init, "read_json", lambda file: {})
    monkeypatch.setattr(init, "planned", lambda config, gpu: (None, SimpleNamespace(fits=False, memory_bytes=next(held))))  # fmt: skip
    with pytest.raises(ConfigError, match=r"^m does not fit: at the least 4\.0 GB .*--gpu is 3\.5 GB"):  # fmt: skip
        init.draft("d", "m", Gpu(3_500_000_000), Path("my.yaml"))
    assert next(held, None) is None, "every way was tried"
    assert capsys.readouterr().err == "warning: take care\n"


def test_a_plan_counts_the_steps_of_all_its_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.cli import inputs
    from finetune.config.load import load_mapping

    given: list[Any] = []
    monkeypatch.setattr("finetune.planning.run_memory.RunMemory", lambda *sections, **_: given.append(sections) or SimpleNamespace(plan=lambda gpu: gpu))  # type: ignore[func-returns-value]  # fmt: skip
    tree = {
        "model": {"path": "a/b"}, "data": {"train": "x", "max_length": 1024, "packing": True}, "method": {"kind": "lora"},
        "training": {"output_dir": "y", "tokens_per_step": 65536}, "deepspeed": {"zero_stage": 2},
    }  # fmt: skip
    config = load_mapping(tree).config
    for number, passes in ((1, 64), (4, 16)):
        gpu = Gpu(24_000_000_000, number=number)
        assert inputs.planned(config, gpu)[1] is gpu
        assert given[-1][2].gradient_accumulation_steps == passes
        assert given[-1][:2] == (config.model, config.method)
        assert given[-1][3:] == (config.deepspeed, None)
