"""Slips of people: each is told with exit code 2, where it is and what to do, in English and in Chinese."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import exit_code

from finetune import launcher
from finetune.config.migrate import migrate
from finetune.config.yaml_text import one_line, parse
from finetune.errors import ConfigError
from finetune.evaluation.targets import find_targets
from finetune.generation.settings import REPETITION, Sampling

PREDICTIONS = '{"prompt": "a", "predict": "b", "label": "c"}\n'
OLD = "stage: sft\nfinetuning_type: lora\nmodel_name_or_path: x\ndataset: a\n"
SCORED = ["evaluate", "--predictions", "p.jsonl", "--output", "out"]


def written(**files: str) -> Callable[[Path], object]:
    """Files with these texts."""
    return lambda folder: [
        (folder / name.replace("__", ".")).write_text(text) for name, text in files.items()
    ]


SLIPS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "a score with a slip": (written(), [*SCORED, "--require", "rogue-l >= 4"], "did you mean rouge-l"),
    "a score in capitals": (written(), [*SCORED, "--require", "ROUGE-L >= 4"], "did you mean rouge-l"),
    "a score that there is not": (written(), [*SCORED, "--require", "x > 4"], "there is no score 'x'"),
    "a size that is no number": (written(), [*SCORED, "--batch-size", "many"], "--batch-size must be"),
    "a size of nothing": (written(), [*SCORED, "--batch-size", "0"], "--batch-size must be"),
    "nothing to watch": (written(), ["evaluate", "--watch"], "--watch looks at runs"),
    "a metric with a slip": (written(m1__py="def f(a, b) return"), [*SCORED, "--metric", "m1:f"], "cannot be imported"),
    "a metric that exits": (written(m2__py="raise SystemExit(0)"), [*SCORED, "--metric", "m2:f"], "cannot be imported"),
    "two metrics of one name": (
        written(m3__py="def f(a, b): return 1", m4__py="def f(a, b): return 2"),
        [*SCORED, "--metric", "m3:f", "--metric", "m4:f"],
        "another metric is called f too",
    ),
    "a judge in brackets": (written(), [*SCORED, "--judge", "openai:a@http://[::1"], "write openai:MODEL@URL"),
    "a judge on port 99999": (written(), [*SCORED, "--judge", "openai:a@http://x:99999/v1"], "write openai:MODEL@URL"),
    "a judge with a password": (written(), [*SCORED, "--judge", "openai:a@http://me:pw@x/v1"], "set OPENAI_API_KEY"),
    "a schema of no type": (written(s__json='{"type": "text"}'), [*SCORED, "--check-schema", "s.json"], "is no JSON Schema"),
    "a schema that refers to nothing": (
        written(s__json='{"properties": {"a": {"$ref": "#/$defs/b"}}}'), [*SCORED, "--check-schema", "s.json"], "is no JSON Schema"
    ),
    "a schema that is fetched": (written(s__json='{"$ref": "http://x/y"}'), [*SCORED, "--check-schema", "s.json"], "is no JSON Schema"),
    "a schema with half a regex": (written(s__json='{"pattern": "("}'), [*SCORED, "--check-schema", "s.json"], "is no JSON Schema"),
    "a date that is none": (written(o__yaml=OLD + "x: 2024-99-99\n"), ["migrate", "o.yaml"], "cannot be read as YAML"),
    "a number of 6,000 digits": (written(o__yaml=OLD + f"x: {'9' * 6000}\n"), ["migrate", "o.yaml"], "cannot be read as YAML"),
    "options that hold themselves": (written(o__yaml=OLD + "x: &x {a: *x}\n"), ["migrate", "o.yaml"], "one that holds itself"),
    "options without end": (
        written(o__yaml=OLD + "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40))),
        ["migrate", "o.yaml"],
        "more than 10,000 options",
    ),
    "no process": (written(x__yaml=""), ["launch", "-n", "0", "x.yaml"], "--processes must be from 1"),
    "a million processes": (written(x__yaml=""), ["launch", "-n", "1000000", "x.yaml"], "--processes must be from 1"),
    "a place that takes no files": (written(), ["migrate", "old.yaml", "--output", "/proc/x.yaml"], "/proc/"),
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    written(p__jsonl=PREDICTIONS, old__yaml=OLD)(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_told_in_one_message_with_its_remedy(
    here: Path, slip: str, language: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    make, words, said = SLIPS[slip]
    make(here)
    monkeypatch.setenv("FINETUNE_LANG", language)
    assert exit_code(*words) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    if language == "en":
        assert said in told
    else:
        assert re.search("[\u4e00-\u9fff]{2}", told), told


@pytest.mark.parametrize(
    "words", [["predict", "m", "--data", "d", "--output", "o"], ["train", "x.yaml"]]
)
def test_a_working_directory_that_is_gone_is_named(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert exit_code(*words) == 2
    assert "working directory is not there" in capsys.readouterr().err


VARIABLES = {
    "a rank of a word": {"RANK": "first"},
    "a rank without a size": {"RANK": "5"},
    "a size of nothing": {"WORLD_SIZE": "0", "RANK": "0"},
    "a size without a rank": {"WORLD_SIZE": "2"},
    "a size without an address": {"WORLD_SIZE": "2", "RANK": "0"},
    "a rank behind the last": {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
    "a local rank of a word": {"LOCAL_RANK": "x"},
}  # fmt: skip


@pytest.mark.parametrize("what", VARIABLES)
def test_variables_of_a_launcher_that_do_not_fit_are_named_by_whoever_meets_them(
    here: Path, what: str, tiny_glm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    for name in (*launcher.NUMBERS, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert launcher.problem() is None
    for name, value in VARIABLES[what].items():
        monkeypatch.setenv(name, value)
    assert re.search("RANK|WORLD_SIZE", launcher.problem() or "")
    assert launcher.rank() >= 0
    assert launcher.world_size() >= 0
    (here / "d.jsonl").write_text('{"prompt": "a"}\n')
    words = ["predict", str(tiny_glm), "--data", "d.jsonl", "--output", "o.jsonl"]
    if what != "a rank behind the last":  # rank 0 says it
        assert exit_code(*words) == 2
        assert "start with torchrun" in capsys.readouterr().err


RULES = {
    "data.train=[]": "names no file",
    "method.target_modules=[]": "names no layer",
    "method.alpha=1e308": "must be at most",
    "training.extra.adam_beta1=2.0": "must be 0 or more and below 1",
    "training.extra.adam_beta2=-1": "must be 0 or more and below 1",
    "training.extra.adam_epsilon=0": "must be 1e-15 or more",
}


@pytest.mark.parametrize("override", RULES)
def test_a_value_that_no_step_survives_is_refused_with_the_configuration(
    here: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"model": {"path": "m"}, "data": {"train": "p.jsonl"}, "method": {"kind": "lora"}, "training": {"output_dir": "r"}}  # fmt: skip
    (here / "x.yaml").write_text(json.dumps(text))
    assert exit_code("train", "x.yaml", override) == 2
    told = capsys.readouterr().err
    assert override.partition("=")[0] in told
    assert RULES[override] in told


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e-320, 1e300])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"])  # fmt: skip
def test_no_number_that_logits_do_not_survive_is_taken(name: str, value: float) -> None:
    fine = {"presence_penalty": -1.0, "frequency_penalty": -1.0, "temperature": 1e300}
    if value == fine.get(name) or (value == 1e-320 and name != "repetition_penalty"):
        assert getattr(Sampling(**{name: value}), name) == value
        return
    with pytest.raises(ConfigError, match=name):
        Sampling(**{name: value})
    assert Sampling(repetition_penalty=REPETITION[0]).repetition_penalty == REPETITION[0]


def test_targets_of_any_names_have_names_of_their_own(tmp_path: Path) -> None:
    files = []
    for folder, name in (
        ("x", "a"),
        ("y", "a"),
        ("z", "a-2"),
        ("w", "a"),
        ("v", "a-2"),
        ("u", "a-2-2"),
    ):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / f"{name}.jsonl")
        files[-1].write_text(PREDICTIONS)
    names = [one.name for one in find_targets([], [*map(str, files)], with_base=False)]
    assert len(set(names)) == len(files)
    assert names[:3] == ["a", "a-2", "a-2-2"]


TEXTS = ["a\nb", "a\n\n  b: c", "# a", "a #b", "- x", "'", '"', "a: b", "\t", "null", "1e5", "\x85", "\u2028x", "*a", "%a", "好", "a\\nb"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_is_written_in_one_line_and_read_as_it_was(text: str) -> None:
    for value in (text, [text, {"path": text}]):
        line = one_line(value)
        assert "\n" not in line
        assert parse(f"section:\n  key: {line}  # why\n", "x").value == {"section": {"key": value}}


def test_a_name_of_another_configuration_brings_no_line_into_ours(tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(OLD + '"a\\nmodel:\\n  path: evil": 1\noutput_dir: "r\\nmodel: {path: evil}"\n')
    text = migrate(old).text()
    found = parse(text, "new.yaml")
    assert not found.problems
    assert found.value["model"] == {"path": "x"}
    assert found.value["training"]["output_dir"] == "r\nmodel: {path: evil}"
