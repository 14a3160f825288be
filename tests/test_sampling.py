"""Drawn replies: by `predict`, several to a dialogue, and in a chat; repeatable by their seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rows import read_rows, turns, write_rows

from finetune.chat.terminal import Voice
from finetune.cli import main
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.errors import ConfigError
from finetune.generation import generate as generation
from finetune.generation import prompts
from finetune.generation.load import OpenedModel, open_model
from finetune.generation.predict import PredictOptions, predict
from finetune.generation.settings import GREEDY, Sampling

OPTIONS = PredictOptions(max_new_tokens=5, batch_size=2)


@pytest.fixture(scope="module")
def opened(tiny_glm: Path) -> OpenedModel:
    return open_model(tiny_glm)


def dialogues(count: int) -> list[dict[str, Any]]:
    return [{"messages": turns(f"question {'dog ' * (n % 4)}{n}")} for n in range(count)]


def test_drawn_replies_to_a_dialogue_follow_each_other_and_outlive_a_crash(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By seed, whatever stands in one batch; of one alone they are what they are among others."""
    source = write_rows(tmp_path / "in.jsonl", dialogues(4))
    drawn = replace(OPTIONS, sampling=Sampling(1.2, top_k=40), seed=3, num_replies=3)
    monkeypatch.setattr(prompts, "BATCHES_PER_WINDOW", 1)
    predict(str(tiny_glm), [str(source)], tmp_path / "whole.jsonl", options=replace(drawn, batch_size=5))  # fmt: skip
    calls = iter(range(3))
    write = generation.write_replies

    def failing(*given: Any, **named: Any) -> Any:
        if next(calls, None) == 2:
            raise RuntimeError("out of memory")
        return write(*given, **named)

    monkeypatch.setattr(generation, "write_replies", failing)
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError):
        predict(str(tiny_glm), [str(source)], out, options=drawn)
    predict(str(tiny_glm), [str(source)], out, options=drawn)
    rows = read_rows(out)
    assert rows == read_rows(tmp_path / "whole.jsonl")
    assert [(row["where"], row["reply"]) for row in rows] == [
        (f"{source}:{line}", reply) for line in (1, 2, 3, 4) for reply in (0, 1, 2)
    ]
    said = [row["messages"][-1]["content"] for row in rows]
    assert len(set(said)) > 8
    predict(str(tiny_glm), [str(source)], tmp_path / "other.jsonl", options=replace(drawn, seed=4))
    assert said != [row["messages"][-1]["content"] for row in read_rows(tmp_path / "other.jsonl")]
    with pytest.raises(ConfigError, match="3 greedy replies to a dialogue are all the same"):
        predict(str(tiny_glm), [str(source)], tmp_path / "no.jsonl", options=replace(drawn, sampling=GREEDY))  # fmt: skip
    with pytest.raises(ConfigError, match="sampling and --num-replies go with --backend transf"):
        predict(str(tiny_glm), [str(source)], tmp_path / "no.jsonl", options=replace(drawn, backend="vllm"))  # fmt: skip


def test_evaluation_takes_what_predict_wrote_and_several_replies_count_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(number: int, text: str, **more: Any) -> dict[str, Any]:
        said = {"role": "assistant", "content": text}
        return {"where": f"in.jsonl:{number}", "messages": [*turns("how?"), said], "stopped": True} | more  # fmt: skip

    wanted = {"reference": {"role": "assistant", "content": "yes"}}
    said = [(1, "yes"), (1, "yes"), (1, "no"), (2, "no"), (2, "no"), (2, "no")]
    rows = [line(number, text, reply=at % 3, **wanted) for at, (number, text) in enumerate(said)]
    source = write_rows(tmp_path / "out.jsonl", rows)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--predictions", str(source), "--output", str(tmp_path / "scores")])
    assert end.value.code == 0
    target = json.loads((tmp_path / "scores/evaluation.json").read_text())["targets"][0]
    exact = target["scores"]["exact_match"]
    assert exact["value"] == pytest.approx(100 / 3)
    # Two dialogues with means of 2/3 and 0: resamples of two units reach no further than these.
    assert (exact["low"], exact["high"]) == (0, pytest.approx(200 / 3))
    write_rows(source, [line(1, "yes")])
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--predictions", str(source), "--output", str(tmp_path / "none")])
    assert end.value.code != 0
    assert "had no reply to compare with" in capsys.readouterr().err


def test_a_seed_makes_a_chat_repeatable_and_its_replies_follow_each_other(
    opened: OpenedModel,
) -> None:
    conversation = Conversation((Message("user", "hello"),))
    how = Sampling(1.3, top_k=20, min_p=0.01, frequency_penalty=0.3)

    def said(seed: int) -> list[str]:
        voice = Voice(opened.model, opened.template, max_new_tokens=12, sampling=how, seed=seed)
        return [voice.reply(conversation, lambda _: None)[0].content for _ in range(3)]

    first = said(7)
    assert said(7) == first
    assert said(8)[:2] == first[1:]
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("top_p", 1.1), ("top_k", -1), ("min_p", 2), ("presence_penalty", 3),
     ("frequency_penalty", -3), ("repetition_penalty", 0)],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}; it must be"):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_the_commands_options_reach_the_chat(
    tiny_glm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr("finetune.chat.terminal.chat", lambda *_, **how: told.append((how["sampling"], how["seed"])))  # fmt: skip
    given = "--temperature 0.7 --top-p 0.9 --top-k 5 --min-p 0.1 --presence-penalty 0.2 --frequency-penalty 0.3 --repetition-penalty 1.1 --seed 4"
    for words in ([], ["--temperature", "0.7"], given.split()):
        with pytest.raises(SystemExit):
            main(["chat", str(tiny_glm), *words])
    assert told == [
        (GREEDY, None),
        (Sampling(0.7, top_p=0.8), None),
        (Sampling(0.7, 0.9, 5, 0.1, 0.2, 0.3, 1.1), 4),
    ]
