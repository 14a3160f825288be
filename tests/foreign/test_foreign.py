"""The tests of transformers and PEFT that tell most, on our classes; `python -m tests.foreign` has all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.foreign import whole
from tests.foreign.runner import Outcome, run, run_file
from tests.foreign.sources import NoSourceError, source_of

TELLING = (Path(__file__).parent / "telling.txt").read_text(encoding="utf-8").split()
"""Tests of `suite_transformers.py`, one a line: those of a few seconds that have ever failed here."""
PEFT_TELLING = (Path(__file__).parent / "telling_peft.txt").read_text(encoding="utf-8").split()


def need(library: str) -> None:
    try:
        source_of(library)
    except NoSourceError as error:
        pytest.skip(str(error))


def problems(key: str, outcomes: dict[str, Outcome]) -> list[str]:
    return whole.compare(
        {key: {k.split("::", 1)[1]: o for k, o in outcomes.items()}}, whole.listed()
    )


@pytest.mark.slow
def test_transformers_tests_pass_on_the_published_layout_and_skip_what_is_listed() -> None:
    need("transformers")
    families = ("TestChatGLM", "TestChatGLMVision")
    tests = [f"{family}::{test}" for family in families for test in TELLING]
    outcomes = run("transformers", tests, timeout=600)
    assert {test: o.reason for test, o in outcomes.items() if o.outcome == "failed"} == {}
    for family in families:
        own = {test: o for test, o in outcomes.items() if test.startswith(f"{family}::")}
        assert len(own) >= len(TELLING)
        assert problems(f"transformers {family}", own) == []


@pytest.mark.slow
def test_pefts_tests_of_decoders_pass_on_the_published_layout_and_skip_what_is_listed() -> None:
    need("peft")
    outcomes = whole.run_peft("chatglm", [f"TestDecoder::{test}" for test in PEFT_TELLING])
    assert {"passed"} <= {outcome.outcome for outcome in outcomes.values()}
    assert problems("peft chatglm", outcomes) == []


def test_no_more_is_skipped_than_on_transformers_own_class() -> None:
    def number(family: str) -> int:
        return sum(map(len, whole.listed()[f"transformers {family}"].values()))

    for family in whole.FAMILIES:
        assert number(family) <= number("TestGlm"), family


def test_a_failure_and_every_difference_from_the_list_is_a_problem() -> None:
    skips = {"suite": {"no GPU": ["a", "b"]}}

    def found(**outcomes: tuple[str, str]) -> list[str]:
        made = {test: Outcome(*outcome, 0.1) for test, outcome in outcomes.items()}
        return whole.compare({"suite": made}, skips)

    assert found(a=("skipped", "no GPU"), b=("skipped", "no  GPU"), c=("passed", "")) == []
    assert found(a=("passed", "")) == ["suite a passed but is listed to skip: no GPU"]
    assert found(a=("failed", "boom")) == ["suite a failed: boom"]
    assert "listed is None" in found(c=("skipped", "no GPU"))[0]
    assert "listed is no GPU" in found(a=("skipped", "too slow"))[0]


def test_a_test_that_hangs_or_kills_its_process_is_named_and_the_others_run(tmp_path: Path) -> None:
    file = tmp_path / "suite_odd.py"
    file.write_text(
        "import os, time\n"
        "def test_a(): pass\n"
        "def test_kills(): os._exit(9)\n"
        "def test_fails(): assert False, 'boom'\n"
        "def test_hangs(): time.sleep(60)\n"
    )
    outcomes = run_file(file, [str(file)], timeout=60, limit=1)
    assert {test: outcome.outcome for test, outcome in outcomes.items()} == {
        "test_a": "passed", "test_hangs": "failed", "test_kills": "failed", "test_fails": "failed",
    }  # fmt: skip
    assert "within 1 s" in outcomes["test_hangs"].reason
    assert "exit 9" in outcomes["test_kills"].reason
    assert "boom" in outcomes["test_fails"].reason
