"""The suites of tests/reliability: what the continuous integration runs of them, and their table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability import attacks, promises
from tests.reliability.frame import Case, in_fork

ROOT = Path(__file__).resolve().parent.parent
BARS = {
    "saves": 120,
    "signals": 40,
    "resume": 110,
    "inputs": 250,
    "artifacts": 45,
    "security": 100,
    "strangers": 1000,
}


@pytest.mark.parametrize("suite", list(BARS))
def test_every_case_of_the_subset_survives_and_none_is_missing(suite: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability", suite, "--subset"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_without_fsync_manifest_or_staging_a_case_fails() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability", "saves", "--mutations"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("without ") == 3


@pytest.mark.parametrize("suite", list(BARS))
def test_the_recorded_totals_are_n_of_n_and_reach_their_bars(suite: str) -> None:
    counts = promises.load()[suite]["all"].values()
    assert all(survived == of for survived, of in counts)
    assert sum(of for _, of in counts) >= BARS[suite]


def test_every_attack_of_strangers_has_cases_in_groups_that_survived() -> None:
    recorded = {
        (suite, group): pair
        for suite, columns in promises.load().items()
        for group, pair in columns["all"].items()
    }
    assert attacks.tried() == 527
    for one in attacks.attacks():
        found = [recorded.get(pair, [0, 0]) for pair in one.groups]
        assert all(survived == of > 0 for survived, of in found), one
        assert sum(of for _, of in found) >= one.tried, one


@pytest.mark.parametrize("page", ["SECURITY.md", "SECURITY_zh.md"])
def test_every_promise_of_security_names_cases_that_survived_or_a_test(page: str) -> None:
    rows = [
        line.split("|")
        for line in (ROOT / page).read_text("utf-8").splitlines()
        if line[:2] == "| "
    ]
    named = [re.findall("`([^`]+)`", row[-2]) for row in rows[1:]]
    assert len(named) == 14
    recorded = {
        f"{suite}:{group}" for suite, columns in promises.load().items() for group in columns["all"]
    }
    for names in named[:-1]:  # the other processes of a run are trusted
        assert names
        for name in names:
            assert name in recorded or (ROOT / name).is_file(), name


def test_an_attack_without_its_cases_is_named() -> None:
    one = attacks.Attack("one", 2, ("saves / crash: a [b]*",))
    names = ["saves / crash: a [b] 1", "saves / crash: a [b] 2"]
    assert one.problem(names) == ""
    assert one.problem(names[:1]) == "one: 1 cases for 2"
    assert "no case" in one.problem(["saves / crash: a b"])


@pytest.mark.parametrize("page", list(promises.HEADS))
def test_the_table_of_promises_is_that_of_the_recorded_totals(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert promises.with_table(text, page) == text


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_readme_says_how_many_faults_there_are(readme: str) -> None:
    assert f"{promises.total():,}" in (ROOT / readme).read_text(encoding="utf-8")


def test_a_case_that_says_raises_or_hangs_has_not_survived() -> None:
    def raising(folder: Path) -> str:
        raise ValueError("broken")

    def hanging(folder: Path) -> str:
        while True:
            pass

    assert in_fork(lambda folder: None, seconds=5) == ""
    assert in_fork(lambda folder: "lost", seconds=5) == "lost"
    assert "ValueError: broken" in in_fork(raising, seconds=5)
    assert "not done after" in in_fork(hanging, seconds=0.2)
    assert Case("group: what", raising).group == "group"


def test_fewer_cases_than_recorded_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "load", lambda: {"saves": {"all": {"crash": [3, 3]}}})
    assert promises.fallen("saves", "all", {"crash": [3, 3]}, ()) == []
    assert promises.fallen("saves", "all", {"crash": [2, 3]}, ())
    assert promises.fallen("saves", "all", {"crash": [2, 2]}, ())
    assert promises.fallen("saves", "all", {}, ())
