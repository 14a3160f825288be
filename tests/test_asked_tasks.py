"""Which tasks are asked of a model with what, where they fit, and what is wrong with their files or names."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rows import write_rows
from test_call_tasks import AREA, leaderboard, question, wanted

from finetune.data.dialogue.conversation import Message
from finetune.errors import ConfigError, DataError, ModelError
from finetune.evaluation.tasks import ask, calls, harness, needle, plan, speed, writing
from finetune.evaluation.tasks.calls import CATEGORIES, MadeCall, read_questions
from finetune.evaluation.tasks.harness import Asking
from finetune.evaluation.tasks.plan import Task
from finetune.evaluation.tasks.table import TaskScore

# --- which are asked ---------------------------------------------------------------------------


def test_every_kind_of_task_is_asked_with_its_own_and_no_score_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def stub(name: str) -> Callable[..., Any]:
        def note(model: Any, template: Any, *words: Any, **how: Any) -> dict[str, TaskScore]:
            asked.append((name, *words, how))
            return {f"{name}/{len(asked)}": TaskScore("s")}

        return note

    monkeypatch.setattr(harness, "run_tasks", stub("harness"))
    for module in (needle, writing, calls):
        monkeypatch.setattr(module, "ask", stub(module.PREFIX))
    how = Asking(7, 5)
    found = ask.ask("m", "t", ["mmlu", "calls:here", "needle:1k..2k", "writing:300"], how)  # type: ignore[arg-type]
    tasks = [Task("mmlu", "chat"), Task("here", "calls"), Task("1k..2k", "needle"), Task("300", "writing")]  # fmt: skip
    assert asked == [
        ("harness", tasks, how, {}), ("calls", Path("here"), {"batch_size": 7, "max_samples": 5}),
        ("needle", [1024, 2048], {}), ("writing", [300], 7, {}),
    ]  # fmt: skip
    assert list(found) == ["harness/1", "calls/2", "needle/3", "writing/4"]


@pytest.mark.parametrize(
    ("names", "tasks"),
    [
        (["mmlu,", ",gsm8k"], [Task("mmlu", "chat"), Task("gsm8k", "chat")]), (["needle:4k,writing:500"], [Task("4k", "needle"), Task("500", "writing")]),
        (["one,two.yaml"], [Task("one,two.yaml", "chat")]), (["text:ceval"], [Task("ceval", "text")]), ([], []),
    ],
)  # fmt: skip
def test_words_are_parted_by_commas_where_they_name_no_file(
    names: list[str], tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one,two.yaml").touch()
    assert plan.read_tasks(names) == tasks


@pytest.mark.parametrize(
    ("name", "label"),
    [("a/own.yaml", "own"), ("a/own.yml", "own"), ("mmlu", "mmlu"), ("a.b", "a.b")],
)
def test_a_file_is_called_by_its_name_alone(name: str, label: str) -> None:
    assert Task(name, "chat").label == label


@pytest.mark.parametrize(
    ("said", "runs"), [("1", True), ("0", False), ("true", False), (None, False)]
)
def test_programs_are_run_where_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch, said: str | None, runs: bool
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    if said is not None:
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", said)
    assert plan.runs_code() is runs
    for preset in ("glm4-base", "glm4-chat"):
        names = {task.name for task in plan.read_tasks([preset])}
        assert any("humaneval" in name for name in names) is runs


def test_the_figures_of_the_presets_are_those_that_the_page_lists() -> None:
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text("utf-8")
    for preset, figures in plan.PRESETS.items():
        [row] = [line for line in text.splitlines() if line.startswith(f"| `{preset}`")]
        names = [figure.score.partition("/")[0] for figure in figures]
        assert ", ".join(names) in row
        [model] = {figure.model for figure in figures}
        assert f"{model}: {', '.join(f'{figure.value:.1f}' for figure in figures)} |" in row
        assert {figure.task.startswith("text:") for figure in figures} == {preset == "glm4-base"}


def test_what_keeps_tasks_from_being_asked_is_said_before_a_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "no_such_package")
    assert harness.harness_version() == ""
    harness.check_harness(["calls:here", "needle:1k", "writing:300"])
    for name in ("needle:100", "writing:x"):
        with pytest.raises(ConfigError, match=f"--tasks {name}: write"):
            harness.check_harness([name])
    for name in ("mmlu", "text:mmlu"):
        with pytest.raises(ConfigError, match="--tasks mmlu needs lm-evaluation-harness"):
            harness.check_harness([name])
    with pytest.raises(ConfigError, match=r"gone\.yml is no file"):
        harness.check_harness(["gone.yml"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(harness, "PACKAGE", "json")
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    harness.check_harness(["glm4-chat"])
    assert "humaneval_instruct: left out, because it runs programs" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    harness.check_harness([])


def test_scores_of_a_filter_and_of_tasks_that_carry_a_tag_have_names_of_their_own() -> None:
    rows = [{"doc_id": 3, "filter": "strict", "acc": 1}, {"doc_id": 3, "filter": "none", "acc": 0}]
    found = {
        "results": {"one": {"acc,strict": 1.0, "acc,none": 0.0}, "two": {"acc,none": 0.0}},
        "group_subtasks": {"tag": ["one", "inner"], "inner": ["two"]}, "samples": {"one": rows, "two": rows[1:]},
        "n-shot": {"one": 3},
    }  # fmt: skip
    scores = dict(harness._scores(found, "tag", "how"))
    assert scores["tag/acc"].ids == ("one:3", "two:3")
    assert scores["tag/acc"].values == (0.0, 0.0)
    assert (scores["tag/acc:strict"].ids, scores["tag/acc:strict"].values) == (("one:3",), (100.0,))
    assert scores["tag/acc"].signature.startswith("how, 3-shot, ")


# --- calls -------------------------------------------------------------------------------------


def test_every_category_is_read_in_every_spelling_and_no_other(tmp_path: Path) -> None:
    assert {"simple", "multiple", "parallel", "parallel_multiple", "irrelevance", "relevance"} == {*CATEGORIES}  # fmt: skip
    (tmp_path / "possible_answer").mkdir()
    names = {f"BFCL_v3_{prefix}{name}.json": f"{prefix}{name}" for name in CATEGORIES for prefix in ("", "live_")}  # fmt: skip
    names |= {"BFCL_v4_simple_python.json": "simple", "BFCL_multiple.json": "multiple", "BFCL_v3_exec_simple.json": None}  # type: ignore[dict-item]  # fmt: skip
    for file, category in names.items():
        assert category is None or calls._category(tmp_path / file) == category
        write_rows(tmp_path / file, [question(0, category or "x")])
        if category and not category.endswith("relevance") and "irrelevance" not in category:
            truth = {"id": f"{category}_0", "ground_truth": [{"math.area": {"base": [1]}}]}
            write_rows(tmp_path / "possible_answer" / file, [truth])
    found = read_questions(tmp_path)
    assert {one.category for one in found} == {*names.values()} - {None}
    assert {one.category for one in found if not one.answer} == {f"{prefix}{name}" for name in ("irrelevance", "relevance") for prefix in ("", "live_")}  # fmt: skip
    assert {one.group for one in found} == {*CATEGORIES}


@pytest.mark.parametrize(
    "changes",
    [
        {"question": [[{"role": "user"}]]}, {"question": 3}, {"question": []}, {"question": [["text"]]}, {"function": [{"description": "no name"}]},
        {"function": 3}, {"function": [3]},
    ],
)  # fmt: skip
def test_a_row_that_is_no_question_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_rows(tmp_path / "BFCL_v3_irrelevance.json", [question(0, "irrelevance") | changes])
    with pytest.raises(DataError, match=r"irrelevance\.json:1: not a question of one turn"):
        read_questions(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "2: .*; copy the"), ("[" * 100_000, "2: "), ("[]", "2: has not all of id, question, function"), ('{"id": 1, "question": []}', "2: has not all of")],
)  # fmt: skip
def test_a_line_that_is_no_row_is_named_and_blank_ones_are_none(
    tmp_path: Path, line: str, said: str
) -> None:
    file = tmp_path / "BFCL_v3_irrelevance.json"
    row = json.dumps(question(0, "irrelevance"))
    file.write_text(f"{row}\n\n  \n{row}\n")
    assert len(read_questions(tmp_path)) == 2
    file.write_text(f"\n{line}\n")
    with pytest.raises(DataError, match=rf"irrelevance\.json:{said}"):
        read_questions(tmp_path)


def test_a_function_is_asked_with_its_name_its_words_and_its_parameters() -> None:
    assert calls._described(AREA | {"examples": []}).keys() == {"name", "description", "parameters"}
    assert calls._described({"name": "f"}) == {"name": "f"}


@pytest.mark.parametrize("sign", [*" ,./-_*^'\""])
def test_signs_that_the_leaderboard_overlooks_make_no_other_value(sign: str) -> None:
    assert calls._equal(f"New{sign}York", "newyork")
    assert not calls._equal("New+York", "newyork")


def test_a_value_inside_of_an_object_may_stand_without_a_list() -> None:
    one = wanted({"find": {"where": [{"city": "Rome", "zip": ""}]}})
    assert one.is_right([MadeCall("find", {"where": {"city": "rome"}})])
    assert not one.is_right([MadeCall("find", {"where": {"city": "rome", "zip": 7}})])
    assert not one.is_right([MadeCall("find", {"where": {"zip": ""}})])


@pytest.mark.parametrize(
    ("text", "found"),
    [('{"a": 1}', {"a": 1}), ("[1]", None), ("{", None), ("", None), ("[" * 100_000, None)],
)
def test_arguments_are_a_json_object_or_none(text: str, found: Any) -> None:
    assert calls._arguments(text) == found


def test_the_calls_of_a_reply_are_the_messages_with_a_name() -> None:
    said = [Message("assistant", "so", " "), Message("assistant", '{"a": 1}', " f "), Message("assistant", "x", "g")]  # fmt: skip
    template: Any = SimpleNamespace(messages=lambda ids, tools: said if (ids, tools) == ([1], ({},)) else [])  # fmt: skip
    assert calls.calls_of(template, [1], ({},)) == [MadeCall("f", {"a": 1}), MadeCall("g", None)]


def test_questions_are_asked_greedily_with_room_for_a_call_and_of_a_template_with_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune.generation.generate as generate

    asked: list[Any] = []

    def replies(_: Any, __: Any, prompts: Any, **how: Any) -> Any:
        asked.append((prompts, how))
        return [SimpleNamespace(ids=[]) for _ in prompts]

    monkeypatch.setattr(generate, "generate", replies)
    template: Any = SimpleNamespace(takes_tools=True, prompts=lambda of: [end for _, end in of], messages=lambda *_: [])  # fmt: skip
    found = calls.ask(None, template, leaderboard(tmp_path), batch_size=3, max_samples=2)
    assert asked == [([1] * 6, {"max_new_tokens": 512, "batch_size": 3})]
    assert found["calls/all"].ids[:3] == ("irrelevance_0", "irrelevance_1", "parallel_0")
    assert found["calls/irrelevance"].values == (100.0, 100.0)
    assert "right parallel replies" in found["calls/parallel"].signature
    calls.ask(None, template, tmp_path, batch_size=3, max_samples=None)
    assert len(asked[1][0]) == 9
    template.takes_tools = False
    with pytest.raises(ModelError, match="has no place for tools"):
        calls.ask(None, template, tmp_path, batch_size=3, max_samples=2)


def test_a_category_is_no_part_of_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune.generation.generate as generate

    def question(category: str, right: bool) -> Any:
        talk = SimpleNamespace(messages=(), tools=())
        return SimpleNamespace(id=category, category=category, conversation=talk, is_right=lambda _: right)  # fmt: skip

    asked = [question("simple", True), question("live_simple", False)]
    monkeypatch.setattr(calls, "read_questions", lambda _: asked)
    monkeypatch.setattr(generate, "generate", lambda *_, **__: [SimpleNamespace(ids=[])] * 2)
    template: Any = SimpleNamespace(takes_tools=True, prompts=lambda of: of, messages=lambda *_: [])
    found = calls.ask(None, template, Path(), batch_size=1, max_samples=None)
    assert {name: (score.ids, score.values) for name, score in found.items()} == {
        "calls/simple": (("simple",), (100.0,)), "calls/live_simple": (("live_simple",), (0.0,)),
        "calls/all": (("simple", "live_simple"), (100.0, 0.0)),
    }  # fmt: skip


# --- long texts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "free", "fitting"),
    [(1000, 3000, [400, 1000]), (999, 3000, [400]), (1000, 2999, [400]), (None, 3000, [400, 1000]), (None, 3 * 1200, [400, 1000, 1200])],
)  # fmt: skip
def test_a_length_fits_up_to_the_last_position_and_the_last_byte(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], positions: int | None, free: int, fitting: list[int]
) -> None:  # fmt: skip
    import finetune.generation.generate as generate
    from finetune.distributed import device

    monkeypatch.setattr(generate, "context_length", lambda _: positions)
    monkeypatch.setattr(generate, "cache_tokens", lambda _, free: free)
    monkeypatch.setattr(device, "free_bytes", lambda: free)
    assert list(needle._with_room(None, [400, 1000, 1200])) == fitting
    said = capsys.readouterr().err
    for length in {400, 1000, 1200} - {*fitting}:
        beyond = positions is not None and length > positions
        assert (f"needle: {length} tokens are beyond the model's {positions} positions" in said) is beyond  # fmt: skip
        assert (f"of {length} tokens, held 3 times, do not fit" in said) is not beyond
    assert said.count("left out") == 3 - len(fitting)
    with pytest.raises(ConfigError, match=rf"needle: no length fits; ask for {min(positions or 10**9, free // 3)} tokens"):  # fmt: skip
        list(needle._with_room(None, [10**7]))


class Row(SimpleNamespace):
    """A row whose prompt cannot be read."""

    ids = (1, 2)
    error = OSError("no room")


class Decoder:
    """Answers nothing."""

    active = False

    def __init__(self, *_: Any, **__: Any) -> None:
        self.asked: list[Any] = []

    def add(self, requests: Any, *_: Any) -> list[Any]:
        Decoder.prompt = requests[0].prompt
        return [Row()]

    prompt: Any = ()


def test_an_error_of_a_row_is_no_reply_and_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune.generation.decoder as decoder

    monkeypatch.setattr(decoder, "Decoder", Decoder)
    template: Any = SimpleNamespace(stop_ids=(), tokenizer=SimpleNamespace(vocab_size=50))
    model: Any = SimpleNamespace(training=False, eval=lambda: None, train=lambda _: None)
    monkeypatch.setattr("finetune.distributed.map_batches.evaluating", lambda _: nullcontext())
    hidden = needle.Hidden("en:1:100", 1, "", [1, 2, 3], "5")
    with pytest.raises(OSError, match="no room"):
        needle.replies_to(model, template, [hidden])
    with pytest.raises(OSError, match="no room"):
        speed._measure(model, template, 300, 4)
    assert max(Decoder.prompt) < 50, "ids that the tokenizer has"
    assert len({*Decoder.prompt}) > 20


def test_a_speed_is_said_with_all_of_its_parts() -> None:
    found = speed.Speed(12_000, 2.0, 6000.0, 0.5, 3.5)
    assert speed._said(found) == "   12,000 tokens: read at 6,000 tokens/s, first token after 2.00 s, written at 0.5 tokens/s, 3.5 GB"  # fmt: skip


def test_every_topic_is_asked_in_both_languages_as_long_as_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import finetune.generation.generate as generate

    found = list(writing.wanted(700))
    assert len({one.message for one in found}) == len({one.id for one in found}) == 8
    assert [one.id for one in found[::4]] == ["en:700:0", "zh:700:0"]
    assert all("700" in one.message and one.words == 700 for one in found)
    asked: list[Any] = []
    monkeypatch.setattr(generate, "context_length", lambda _: None)
    monkeypatch.setattr(generate, "generate", lambda _, __, prompts, **how: asked.append(how) or [SimpleNamespace(ids="") for _ in prompts])  # fmt: skip
    template: Any = SimpleNamespace(prompts=lambda of: [[0] for _ in of], parse=lambda _: SimpleNamespace(content=""))  # fmt: skip
    scores = writing.ask(None, template, [300, 700], 5)
    assert asked == [{"max_new_tokens": 900, "batch_size": 5}, {"max_new_tokens": 2100, "batch_size": 5}]  # fmt: skip
    assert scores["writing/700"].values == (0.0,) * 8
    assert scores["writing/700"].ids == tuple(one.id for one in found)
