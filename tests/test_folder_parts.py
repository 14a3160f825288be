"""Slices, the best, comparisons from both sides, and the pictures and records that an evaluation folder keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.data.dialogue.conversation import Conversation, Message
from finetune.errors import DataError
from finetune.evaluation import predictions, schema
from finetune.evaluation.schema import Comparison, Evaluation, Score, TargetScores

# --- prompts and slices ------------------------------------------------------------------------


def prompt(turns: int = 1, tokens: int = 5, *, tools: Any = (), metadata: str = "") -> Any:
    reference = Message("assistant", "你好", metadata)
    return SimpleNamespace(
        location="a:b.jsonl:7", turns=turns, prompt_ids=[0] * tokens, tools=tools, reference=reference,
        conversation=Conversation((reference,)),
    )  # fmt: skip


def test_every_reply_belongs_to_one_part_of_each_slice() -> None:
    found = predictions.slices_of(prompt())
    assert found["source"] == "a:b.jsonl"
    assert [predictions.slices_of(prompt(n))["turns"] for n in (1, 3, 4, 9)] == ["1", "3", "4 or more", "4 or more"]  # fmt: skip
    assert [predictions.slices_of(prompt(tools=tools, metadata=said))["kind"] for tools, said in (((), ""), (({},), ""), ((), "f"))] == ["plain", "tool", "tool"]  # fmt: skip
    lengths = {64: "1-64 tokens", 65: "65-256 tokens", 256: "65-256 tokens", 257: "257-1024 tokens", 4096: "1025-4096 tokens", 4097: "over 4096 tokens"}  # fmt: skip
    assert {n: predictions.slices_of(prompt(tokens=n))["prompt_length"] for n in lengths} == lengths


@pytest.mark.parametrize(
    ("text", "language"),
    [("好 ab", "chinese"), ("好 abcd", "latin script"), ("今日は ab", "japanese"), ("", "other"), ("17 + 4", "other"), ("カタカナ", "japanese"), ("ありがとう", "japanese"), ("コーヒー", "japanese"), ("ሀሁ ᎠᎡ abc", "other"), ("오늘 좋다 ok", "korean"), ("a" * 400 + "好" * 900, "latin script")],
)  # fmt: skip
def test_a_language_is_told_by_most_letters_of_the_beginning(text: str, language: str) -> None:
    assert predictions.language(text) == language


# --- what an evaluation folder says ------------------------------------------------------------


def evaluation(*kinds: str, **scores: list[float | None]) -> Evaluation:
    targets = [
        TargetScores(
            name=f"{kind}{n}", path="p", kind=kind, predictions="x",
            scores={name.replace("_", "-", 1) if name == "rouge_l" else name: Score(value=values[n], n=3) for name, values in scores.items()},
        )
        for n, kind in enumerate(kinds)
    ]  # fmt: skip
    return Evaluation(format=1, targets=targets)


def test_the_best_is_the_best_tuned_target_in_the_direction_of_the_score() -> None:
    found = evaluation("base", "adapter", "full", rouge_l=[90.0, 40.0, 50.0], loss=[0.1, 2.0, 1.5], chrf=[9.0, None, 1.0])  # fmt: skip
    assert found.best("rouge-l").name == "full2"
    assert found.best("loss").name == "full2"
    assert found.best("chrf").name == "full2"
    assert evaluation("base", loss=[1.0]).best("loss").name == "base0"
    assert found.headline == "rouge-l"
    assert found.base is found.targets[0]


def test_scores_of_no_reply_are_no_scores() -> None:
    found = Evaluation(format=1, targets=[TargetScores(name="a", path="p", kind="base", predictions="x", scores={"chrf": Score(n=0), "loss": Score(value=1.0, n=2)})])  # fmt: skip
    assert found.metrics == ["loss"]


def test_a_comparison_is_the_same_from_both_sides() -> None:
    one = Comparison(a="x", b="y", metric="chrf", difference=2.0, low=1.0, high=5.0, p=0.01, p_holm=0.02, verdict="better")  # fmt: skip
    found = evaluation("base").model_copy(update={"comparisons": [one]})
    assert found.comparison("x", "y", "chrf") is one
    other = found.comparison("y", "x", "chrf")
    assert other == one.model_copy(update={"a": "y", "b": "x", "difference": -2.0, "low": -5.0, "high": -1.0, "verdict": "worse"})  # fmt: skip
    assert schema._turned(other) == one
    assert found.comparison("x", "y", "loss") is None
    level = one.model_copy(update={"verdict": "no real difference", "low": None, "difference": 0.0})
    assert schema._turned(level).verdict == "no real difference"
    assert schema._turned(level).high is None


@pytest.mark.parametrize(
    ("value", "found"),
    [(1.5, 1.5), (3, 3.0), (True, None), (False, None), ("5", None), (None, None)],
)
def test_a_score_of_a_row_is_a_number_and_no_flag(value: Any, found: float | None) -> None:
    assert schema._scores({"x": value}) == ({} if found is None else {"x": found})
    assert schema._scores([value]) == {}


def test_what_nothing_measured_is_none() -> None:
    for value in (float("nan"), float("inf"), -1e100, 1e100):
        assert Score(value=value).value is None
    assert Score(value=-9e99).value == -9e99


@contextmanager
def image(file: Path, size: tuple[int, int]) -> Iterator[Path]:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(file, "WEBP")
    yield file


@pytest.mark.parametrize(("size", "shown"), [((384, 10), True), ((385, 10), False), ((10, 385), False)])  # fmt: skip
def test_a_kept_picture_is_small_on_both_sides(tmp_path: Path, size: tuple[int, int], shown: bool) -> None:  # fmt: skip
    with image(tmp_path / schema._picture("a.png"), size):
        if shown:
            assert schema.picture(tmp_path, "a.png")
            return
        with pytest.raises(DataError, match="larger than 384 pixels"):
            schema.picture(tmp_path, "a.png")


def test_pictures_are_kept_small_each_once_and_while_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    names = []
    for number, size in enumerate(((800, 400), (100, 900), (50, 50))):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", size, (number, 0, 0)).save(file)
        names.append(str(file))
    schema.keep_pictures(tmp_path / "out", [names[0], "gone.png", *names, names[1]])
    kept = []
    for name in names:
        with Image.open(tmp_path / "out" / schema._picture(name)) as small:
            kept.append(small.size)
    assert kept == [(384, 192), (43, 384), (50, 50)], "the longer side has 384"
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 3
    first = len((tmp_path / "out" / schema._picture(names[0])).read_bytes())
    monkeypatch.setattr(schema, "PICTURE_BYTES", first)
    schema.keep_pictures(tmp_path / "few", names)
    assert [file.name for file in (tmp_path / "few" / "pictures").iterdir()] == [Path(schema._picture(names[0])).name]  # fmt: skip


def test_kept_pictures_have_no_other_colours_and_no_large_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    for mode in ("RGBA", "P", "L"):
        Image.new(mode, (9, 9)).save(tmp_path / f"{mode}.png")
        schema.keep_pictures(tmp_path, [str(tmp_path / f"{mode}.png")])
        with Image.open(tmp_path / schema._picture(str(tmp_path / f"{mode}.png"))) as kept:
            assert (kept.mode, kept.format) == ("RGB", "WEBP")
    data = schema.picture(tmp_path, str(tmp_path / "L.png"))
    monkeypatch.setattr(schema, "PICTURE_BYTES", len(data) - 1)
    with pytest.raises(DataError, match="is no picture"):
        schema.picture(tmp_path, str(tmp_path / "L.png"))


def test_a_prediction_has_all_of_its_prompt_and_the_call_that_its_tools_make() -> None:
    asked: list[Any] = []
    template = SimpleNamespace(parse=lambda *words: asked.append(words) or Message("assistant", "{}", "f"))  # fmt: skip
    one = prompt(tools=({"name": "f"},))
    one.template, one.index, one.text, one.images = template, 3, "asked", ("a.png",)
    found = predictions.predicted(one, (5, 6), False)
    assert asked == [((5, 6), ({"name": "f"},))]
    assert (found.reply, found.reference) == (Message("assistant", "{}", "f"), one.reference)
    assert (found.location, found.message, found.prompt, found.images) == ("a:b.jsonl:7", 3, "asked", ("a.png",))  # fmt: skip
    assert (found.stopped, found.tools, found.slices["kind"]) == (False, ({"name": "f"},), "tool")


@pytest.mark.parametrize("name", schema.RUN_FILES)
def test_records_of_a_run_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:  # fmt: skip
    assert schema.run_copy(tmp_path, "run") is None
    copy = tmp_path / schema._run("run")
    copy.mkdir(parents=True)
    (copy / schema.RUN_CONFIG).write_text("a: 1")
    assert schema.run_copy(tmp_path, "run") == copy
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path.parent / "nothing there")
    if name == schema.RUN_CONFIG:
        assert schema.run_copy(tmp_path, "run") is None
        return
    with pytest.raises(DataError, match="holds no file"):
        schema.run_copy(tmp_path, "run")
