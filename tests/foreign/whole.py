"""All suites, the list of what skips in them, and the table of the documentation."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

from tests.foreign.runner import HERE, ROOT, Outcome, run
from tests.foreign.sources import source_of

SKIPS = HERE / "skips.json"
PAGES = (ROOT / "docs/foreign_tests.md", ROOT / "docs/foreign_tests_zh.md")
BEGIN, END = "<!-- by python -m tests.foreign --write -->", "<!-- end -->"

FAMILIES = {
    "TestChatGLM": "`chatglm`",
    "TestChatGLMVision": "`chatglm`, GLM-4V",
    "TestOurGlm": "`glm`",
    "TestOurGlm4": "`glm4`",
    "TestOurMixture": "`glm4_moe`",
    "TestOurMla": "`glm4_moe_lite`",
    "TestOurGrid": "`glm4v`",
    "TestOurGrid46": "`glm46v`",
    "TestOurOcr": "`glm_ocr`",
    "TestOurGridMixture": "`glm4v_moe`",
    "TestGlm": "transformers' `Glm`",
    "TestMixture": "transformers' `Glm4Moe`",
    "TestMla": "transformers' `Glm4MoeLite`",
    "TestGrid": "transformers' `Glm4v`",
    "TestGrid46": "transformers' `Glm46V`",
    "TestOcr": "transformers' `GlmOcr`",
    "TestGridMixture": "transformers' `Glm4vMoe`",
}
TEXTS = ("TestChatGLM", "TestChatGLMVision", "TestOurGlm", "TestOurGlm4", "TestGlm")
"""The families whose skips are laid side by side; of the others the pages show what differs."""


def beside(family: str) -> str:
    """transformers' own class under the same tester; Glm where it has none, and of that itself."""
    theirs = family.replace("TestOur", "Test")
    return theirs if theirs in FAMILIES and family not in TEXTS else "TestGlm"


PEFT_FAMILIES = {"chatglm": "`chatglm`"}

HOURS = 3 * 3600
"""What a family may take: a quarter of an hour on idle cores, and several times that on busy ones."""

PART = 6
"""So many of PEFT's tests, each on some thirty methods, are run by one process."""

Skips = dict[str, dict[str, list[str]]]
"""By suite and family, then by reason, the tests that skip."""


def run_all(suites: list[str], folder: Path | None = None) -> dict[str, dict[str, Outcome]]:
    """The outcomes of each family by test, of transformers' suite, PEFT's or both.

    What a folder holds of an earlier run is taken from there; what is run now is kept in it.
    """
    found: dict[str, dict[str, Outcome]] = {}
    if "transformers" in suites:
        for family in FAMILIES:
            tests = partial(run, "transformers", [family], timeout=HOURS, show=True)
            found[f"transformers {family}"] = _by_test(_once(folder, family, tests))
    if "peft" in suites:
        for family in PEFT_FAMILIES:
            outcomes: dict[str, Outcome] = {}
            names = _peft_names()
            for start in range(0, len(names), PART):
                part = [f"TestDecoder::{name}" for name in names[start : start + PART]]
                tests = partial(run_peft, family, part, show=True)
                outcomes |= _once(folder, f"peft-{family}-{start // PART}", tests)
            found[f"peft {family}"] = _by_test(outcomes)
    return found


def _once(
    folder: Path | None, name: str, tests: Callable[[], dict[str, Outcome]]
) -> dict[str, Outcome]:
    """The outcomes that the folder has under a name, else those of the tests."""
    if folder is None:
        return tests()
    kept = folder / f"{name}.json"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        made = tests()
        kept.write_text(json.dumps({test: asdict(outcome) for test, outcome in made.items()}))
    return {test: Outcome(**values) for test, values in json.loads(kept.read_text()).items()}


def _peft_names() -> list[str]:
    """PEFT's tests of decoders by name."""
    text = (source_of("peft") / "test_decoder_models.py").read_text(encoding="utf-8")
    return re.findall(r"^    def (test_\w+)\(", text, re.M)


def run_peft(family: str, tests: list[str], *, show: bool = False) -> dict[str, Outcome]:
    """The outcomes of PEFT's tests on a tiny checkpoint of a family."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    with tempfile.TemporaryDirectory() as place:
        os.environ["FOREIGN_MODEL"] = str(tiny.save_model(Path(place) / family, family))
        return run("peft", tests, timeout=HOURS, show=show)


def skips_of(outcomes: Mapping[str, Outcome]) -> dict[str, list[str]]:
    """By reason, the tests that skip."""
    by_reason: dict[str, list[str]] = {}
    for test, outcome in sorted(outcomes.items()):
        if outcome.outcome == "skipped":
            by_reason.setdefault(plain(outcome.reason), []).append(test)
    return dict(sorted(by_reason.items()))


def plain(reason: str) -> str:
    """A reason without what differs from run to run and family to family."""
    reason = re.sub(r"<class '[\w.]*\.(\w+)'>", r"\1", reason)
    reason = re.sub(r"\b(ChatGLM|Glm4?)(Model|For\w+)\b", "the class", reason)
    reason = re.sub(r"\S*/foreign-\S*|/tmp/\S+", "the tiny checkpoint", reason)
    return " ".join(reason.split())[:160]


def listed() -> Skips:
    """What may skip, by suite and family."""
    skips: Skips = json.loads(SKIPS.read_text(encoding="utf-8"))
    return skips


def compare(found: Mapping[str, Mapping[str, Outcome]], skips: Skips) -> list[str]:
    """Problems: every failure, and every difference between what skipped and what is listed."""
    problems = []
    for family, outcomes in found.items():
        known = {test: reason for reason, tests in skips.get(family, {}).items() for test in tests}
        for test, outcome in outcomes.items():
            if outcome.outcome == "failed":
                problems.append(f"{family} {test} failed: {outcome.reason}")
            elif outcome.outcome == "skipped" and known.get(test) != plain(outcome.reason):
                problems.append(
                    f"{family} {test} skipped ({outcome.reason}) but listed is {known.get(test)}"
                )
            elif outcome.outcome == "passed" and test in known:
                problems.append(f"{family} {test} passed but is listed to skip: {known[test]}")
    return problems


def write(found: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Write the list of skips and the tables of both pages."""
    skips = (listed() if SKIPS.is_file() else {}) | {f: skips_of(o) for f, o in found.items()}
    SKIPS.write_text(json.dumps(skips, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        table = "\n".join(
            [*_counts(found), "", *_side_by_side(skips), "", *_differences(skips)]
        ).rstrip()
        page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def _counts(found: Mapping[str, Mapping[str, Outcome]]) -> list[str]:
    versions = f"transformers {version('transformers')}, PEFT {version('peft')}, torch {version('torch')}"  # fmt: skip
    lines = [
        versions,
        "",
        "| suite | family | passed | failed | skipped |",
        "|---|---|---|---|---|",
    ]
    for key, outcomes in found.items():
        suite, family = key.split(" ", 1)
        count = Counter(outcome.outcome for outcome in outcomes.values())
        name = (FAMILIES | PEFT_FAMILIES)[family]
        lines.append(
            f"| {suite} | {name} | {count['passed']} | {count['failed']} | {count['skipped']} |"
        )
    return lines


def _side_by_side(skips: Skips) -> list[str]:
    """A row for each reason, with how many tests of each family skip for it."""
    columns = {FAMILIES[key]: skips.get(f"transformers {key}", {}) for key in TEXTS}
    reasons = sorted({reason for column in columns.values() for reason in column})
    lines = [
        "| reason | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for reason in reasons:
        numbers = [str(len(column.get(reason, [])) or "") for column in columns.values()]
        lines.append(f"| {reason.replace('|', '/')} | " + " | ".join(numbers) + " |")
    return lines


def _differences(skips: Skips) -> list[str]:
    """A row for each family and test that skips in it and not in transformers' own class, or there only.

    Nothing where there is none.
    """
    lines = ["| family | test | skips here | skips in transformers' class |", "|---|---|---|---|"]
    for family in (name for name in FAMILIES if name not in TEXTS and beside(name) != name):
        ours, theirs = (
            {test: reason for reason, tests in skips.get(key, {}).items() for test in tests}
            for key in (f"transformers {family}", f"transformers {beside(family)}")
        )
        for test in sorted(ours.keys() ^ theirs.keys()):
            reasons = f"{ours.get(test, '')} | {theirs.get(test, '')}"
            lines.append(f"| {FAMILIES[family]} | `{test}` | {reasons} |")
    return lines if len(lines) > 2 else []


def _by_test(outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Without the class's name, so that families can be compared."""
    return {name.split("::", 1)[1]: outcome for name, outcome in outcomes.items()}
