"""Asked length against written length: what a text scores, and what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.evaluation.evaluate import Options, evaluate
from finetune.evaluation.schema import read_evaluation
from finetune.evaluation.tasks import writing


@pytest.mark.parametrize(
    ("written", "score"),
    [(1000, 100), (2500, 50), (4000, 0), (9000, 0), (500, 50), (334, 0.3), (100, 0), (0, 0)],
)
def test_a_text_scores_by_how_near_it_is_to_the_asked_length(written: int, score: float) -> None:
    # Longer: 1 - (2.5 - 1) / 3. Shorter: 1 - (2 - 1) / 2.
    assert writing.length_score(1000, written) == pytest.approx(score, abs=0.1)


@pytest.mark.parametrize(
    ("text", "length"), [("It's 3.5 km, he said.", 5), ("天空，是蓝色的！", 6), ("GLM-4 很好", 4), ("…", 0)]
)  # fmt: skip
def test_words_are_counted_and_characters_of_chinese(text: str, length: int) -> None:
    assert writing.length_of(text) == length


def test_written_texts_are_scored_by_length_and_by_what_is_new(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.generation.generate import Reply

    def answers(model: Any, template: Any, prompts: Any, **_: Any) -> list[Reply]:
        texts = ["\n" + " ".join(f"word{n}" for n in range(300)), "\n" + "again " * 300]
        replies = []
        for number in range(len(prompts)):
            ids = template.tokenizer.plain.encode(texts[number % 2], add_special_tokens=False).ids
            replies.append(Reply(number, tuple(ids), True))
        return replies

    monkeypatch.setattr("finetune.generation.generate.generate", answers)
    evaluate([str(tiny_glm)], output=tmp_path / "out", options=Options(tasks=("writing:300..700",)))
    [target] = read_evaluation(tmp_path / "out").targets
    assert target.scores["writing/300"].value == pytest.approx(100)
    assert target.scores["writing/300:new"].value == pytest.approx(50, abs=1)
    assert target.scores["writing/600"].value == pytest.approx(50)
    assert target.scores["writing/600"].n == 8
