"""`finetune evaluate --require`: exit code 8 exactly when a rule is not met, with the reason."""

from __future__ import annotations

from pathlib import Path

import command_line
import pytest
from rows import write_rows
from test_report_words import compared, evaluation

from finetune.errors import ConfigError, RequirementError
from finetune.evaluation.schema import Published
from finetune.report import sentences
from finetune.report.requirements import check_requirements, read_requirements


def met(text: str, verdict: str = "better", **scores: float) -> bool:
    pair = compared("one", "base", 5.0, verdict)
    found = evaluation(pair, **(scores or {"base": 40.0, "one": 45.0}))
    try:
        return bool(check_requirements(found, read_requirements([text])))
    except RequirementError:
        return False


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # one has 45.0 (44.0 to 46.0), the base 40.0
        ("rouge-l >= 45", True), ("rouge-l>=45.1", False), ("rouge-l > 45", False),
        ("rouge-l <= 45", True), ("rouge-l < 45", False), ("rouge-l >= 44 surely", True),
        ("rouge-l >= 45 surely", False), ("rouge-l <= 45 surely", False),
        ("rouge-l <= 46 surely", True), ("bleu-4 >= 0", False),
    ],
)  # fmt: skip
def test_a_limit_is_met_by_the_best_tuned_model(text: str, expected: bool) -> None:
    assert met(text) is expected


@pytest.mark.parametrize("kind", ["not worse", "better"])
@pytest.mark.parametrize("verdict", ["better", "no real difference", "worse"])
def test_a_comparison_with_the_base_goes_by_its_verdict(kind: str, verdict: str) -> None:
    wanted = {"not worse": {"better", "no real difference"}, "better": {"better"}}[kind]
    assert met(f"{kind} than base on rouge-l", verdict) is (verdict in wanted)


@pytest.mark.parametrize("verdict", ["no real difference", "worse"])
def test_a_public_task_is_named_by_itself_where_it_has_one_score(verdict: str) -> None:
    pair = compared("one", "base", -0.5, verdict, metric="mmlu/acc")
    found = evaluation(pair, metric="mmlu/acc", base=70.5, one=70.0)
    rules = read_requirements(["not worse than base on mmlu"])
    if verdict == "worse":
        with pytest.raises(RequirementError, match="worse than base in mmlu/acc"):
            check_requirements(found, rules)
    else:
        assert check_requirements(found, rules)


def test_a_rule_that_cannot_be_told_is_not_met_and_says_why() -> None:
    alone = evaluation(one=45.0)
    with pytest.raises(RequirementError, match="add --include-base"):
        check_requirements(alone, read_requirements(["not worse than base on rouge-l"]))
    with pytest.raises(RequirementError, match="no score 'chrf'; there are rouge-l"):
        check_requirements(alone, read_requirements(["chrf > 1"]))
    untuned = evaluation(base=45.0)
    with pytest.raises(RequirementError, match="no tuned model"):
        check_requirements(untuned, read_requirements(["better than base on rouge-l"]))


def test_lines_that_are_no_rules_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"'rouge-l'.*\n.*'rouge-l >= high'"):
        read_requirements(["rouge-l", "rouge-l >= high", "loss < 2"])


def test_the_command_ends_with_8_and_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"predict": "yes", "label": "yes"}, {"predict": "no", "label": "yes"}]
    file = write_rows(tmp_path / "replies.jsonl", rows)
    for rule, code in (("exact_match >= 50", 0), ("exact_match >= 51", 8), ("exact_match", 2)):
        words = ("evaluate", "--predictions", str(file), "--output", str(tmp_path / "out"))
        assert command_line.exit_code(*words, "--require", rule) == code
        assert rule in "".join(capfd.readouterr())
    assert (tmp_path / "out" / "report.html").is_file()


def test_what_was_forgotten_is_said_of_public_tasks_and_general_data() -> None:
    level = compared("one", "base", -0.5, "no real difference", metric="mmlu/acc")
    found = evaluation(level, metric="mmlu/acc", base=70.5, one=70.0)
    assert sentences.forgotten(found, "mmlu/acc") == [
        "one forgot nothing that can be told: of 1 scores on public tasks and general data none is really worse than the base's."
    ]
    worse = compared("one", "base", -9.0, "worse", metric="mmlu/acc")
    [said] = sentences.forgotten(
        evaluation(worse, metric="mmlu/acc", base=70.5, one=61.5), "mmlu/acc"
    )
    assert said.startswith("one is worse than base in mmlu/acc")
    assert sentences.forgotten(evaluation(base=1.0, one=2.0), "rouge-l") == []


def test_a_published_figure_stands_beside_the_scores() -> None:
    found = evaluation(metric="mmlu/acc", base=70.5, one=70.0)
    figures = [Published(score=name, value=74.7, model="GLM-4-9B") for name in ("mmlu/acc", "x/y")]
    assert sentences.beside_published(found.model_copy(update={"published": figures})) == [
        "mmlu/acc: base 70.5 (69.5 to 71.5), one 70.0 (69.0 to 71.0); GLM-4-9B is published with 74.7."
    ]
