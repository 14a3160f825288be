"""Scores that other models give, limits of time, tests of what was gained and lost: each alone, nothing asked."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rows import read_rows, write_rows
from test_statistics_parts import of
from test_votes import write

from finetune.errors import ConfigError, DataError, ModelError
from finetune.evaluation.scores import added, embeddings, judge, pairs
from finetune.evaluation.scores.added import ByModels
from finetune.evaluation.scores.embeddings import Embedder
from finetune.evaluation.scores.forgetting import Criterion, gain, not_worse
from finetune.evaluation.scores.judge import Judge
from finetune.evaluation.scores.statistics import compare
from finetune.evaluation.scores.timed import at_most
from finetune.evaluation.scores.votes import score_votes

# --- other models ------------------------------------------------------------------------------


def replies(file: Path, *said: str, kind: str = "adapter", messages: Any = (1, 1, 1)) -> tuple[str, str, Path]:  # fmt: skip
    rows = [
        {"where": "d:1", "message": message, "prompt": "p", "prediction": one, "reference": "good", "scores": {"x": 1.0}}
        for one, message in zip(said, messages, strict=False)
    ]  # fmt: skip
    return file.stem, kind, write_rows(file, rows)


def test_similarities_are_added_to_the_rows_of_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def similarities(texts: Any) -> Any:
        for one in texts:
            asked.append(one)
            yield {embeddings.NAME: float(len(one[0]))}

    model = SimpleNamespace(similarities=similarities, signature={embeddings.NAME: "how"})
    monkeypatch.setattr(Embedder, "of", lambda path: model if path == "bert" else None)
    files = [replies(tmp_path / "a.jsonl", "x", "xx"), replies(tmp_path / "b.jsonl", "xxx")]
    assert added.add_scores(ByModels(bert_score="bert"), files, tmp_path) == {"bert_score": "how"}
    assert [row["scores"] for _, _, file in files for row in read_rows(file)] == [
        {"x": 1.0, "bert_score": 1.0}, {"x": 1.0, "bert_score": 2.0}, {"x": 1.0, "bert_score": 3.0},
    ]  # fmt: skip
    assert asked == [("x", "good"), ("xx", "good"), ("xxx", "good")]
    assert added.add_scores(ByModels(), files, tmp_path) == {}


def test_the_scores_of_other_models_are_named() -> None:
    assert ByModels().names == ()
    assert ByModels(judge="j").names == ("judge_win_rate", "judge_agreement")
    assert ByModels(judge="j", bert_score="b").names[-1] == "bert_score"


def test_what_is_no_judge_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    added.check(ByModels(), tmp_path)
    added.check(ByModels(judge="openai:m@http://x/v1"), tmp_path)
    with pytest.raises(ConfigError, match="--judge"):
        added.check(ByModels(judge="gpt"), tmp_path)


def test_replies_to_other_messages_of_a_dialogue_are_not_judged_beside_the_bases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    rates = lambda pairs: ({judge.WIN: 1.0, judge.AGREE: 0.0} for one in pairs if asked.append(one) is None)  # noqa: E731  # fmt: skip
    who = SimpleNamespace(win_rates=rates, address=SimpleNamespace(model="m", url="u"))
    monkeypatch.setattr(Judge, "of", lambda *_: who)
    files = [replies(tmp_path / "a.jsonl", "b1", "b2", kind="base"), replies(tmp_path / "b.jsonl", "t1", "t2")]  # fmt: skip
    added.add_scores(ByModels(judge="j"), files, tmp_path)
    assert [one[2:] for one in asked] == [("t1", "b1"), ("t2", "b2")]
    assert read_rows(files[0][2])[0]["scores"] == {"x": 1.0, judge.WIN: 50.0, judge.AGREE: None}
    asked.clear()
    files[1] = replies(tmp_path / "c.jsonl", "t1", "t2", messages=(1, 3))
    added.add_scores(ByModels(judge="j"), files, tmp_path)
    assert [one[2:] for one in asked] == [(one, "good") for one in ("b1", "b2", "t1", "t2")]


def test_every_judge_keeps_its_own_answers(tmp_path: Path) -> None:
    names = ("openai:m@http://a/v1", "openai:m@http://b/v1", "openai:n@http://a/v1")
    places = [Judge.of(name, tmp_path).cache for name in (*names, names[0])]
    assert len(set(places)) == 3
    assert {place.parent for place in places} == {tmp_path / "judgements"}
    said = judge.signature(Judge.of(names[0], tmp_path), "the data")
    assert said[judge.AGREE].startswith("share of pairs on which both orders agree, m at http://a/v1")  # fmt: skip
    assert judge._key("\ud800 a") != judge._key("\ud800 b"), "half a sign has a key, too"


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{}]}, [], None])
def test_an_address_that_answers_with_no_chat_is_named(answer: Any) -> None:
    with pytest.raises(DataError, match="--judge: http://x answers with no chat completion"):
        judge._content(answer, "http://x")


@pytest.mark.parametrize("error", [OSError, ValueError, KeyError])
def test_a_model_that_embeds_runs_no_code_of_its_makers_and_one_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    import transformers

    asked: list[Any] = []
    model = SimpleNamespace(to=lambda _: model, eval=lambda: model)
    tokenizer = SimpleNamespace(pad_token=None, eos_token="</s>")

    def opened(found: Any) -> Any:
        return lambda *words, **how: asked.append((words, how)) or found

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", opened(tokenizer))
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", opened(model))
    found = Embedder.of("bert")
    assert asked == [(("bert",), {"trust_remote_code": False})] * 2
    assert (found.tokenizer.pad_token, found.model) == ("</s>", model)
    assert "of bert," in found.signature["bert_score"]
    tokenizer.pad_token = "<pad>"
    assert Embedder.of("bert").tokenizer.pad_token == "<pad>"

    def fail(*_: Any, **__: Any) -> Any:
        raise error("gone\nmore")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"--bert-score bert: '?gone(\\nmore')?; name the folder"):
        Embedder.of("bert")


def test_all_pairs_are_embedded_block_by_block_and_equal_texts_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks: list[list[str]] = []
    places = torch.eye(3)

    def embedded(_: Any, texts: list[str]) -> list[torch.Tensor]:
        blocks.append(texts)
        return [places[["a", "b", "c"].index(text)][None] for text in texts]

    monkeypatch.setattr(embeddings, "AT_ONCE", 2)
    monkeypatch.setattr(Embedder, "_embedded", embedded)
    asked = [("a", "a"), ("a", "b"), ("c", "b"), ("b", "b"), ("c", "c")]
    found = [one["bert_score"] for one in Embedder("m", None, None).similarities(asked)]
    assert found == [pytest.approx(score) for score in (100, 0, 0, 100, 100)]
    assert blocks == [["a", "b"], ["c", "b"], ["c"]]


# --- a limit of time ---------------------------------------------------------------------------


def test_what_takes_too_long_ends_and_the_alarm_is_as_before() -> None:
    def ours(*_: Any) -> None:
        pytest.fail("an alarm came")

    before = signal.signal(signal.SIGALRM, ours)
    try:
        with pytest.raises(TimeoutError), at_most(0.02):
            time.sleep(5)
        with at_most(5):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 4
        with pytest.raises(ZeroDivisionError), at_most(5):
            raise ZeroDivisionError
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        assert signal.getsignal(signal.SIGALRM) is ours
    finally:
        signal.signal(signal.SIGALRM, before)


def test_outside_of_the_main_thread_there_is_no_limit() -> None:
    done: list[bool] = []

    def work() -> None:
        with at_most(5):
            done.append(signal.getitimer(signal.ITIMER_REAL) == (0, 0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_a_schema_without_end_is_named_once_and_blames_no_reply(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pairs, "SCHEMA_SECONDS", 0.02)
    monkeypatch.setattr(pairs, "_TOO_SLOW", set())
    endless = {"type": "string", "pattern": "^(a+)+$"}
    assert pairs.is_valid("a" * 40 + "!", endless)
    assert '{"type": "string"' in capsys.readouterr().err
    monkeypatch.setattr(pairs, "at_most", lambda _: pytest.fail("tried again"))
    assert pairs.is_valid("b", endless)
    monkeypatch.undo()
    assert not pairs.is_valid("b", endless)
    assert pairs.is_valid([[1]], {"$ref": "#"}), "a schema that means itself"


def test_a_schema_that_stands_elsewhere_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    asked: list[Any] = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda *words, **_: asked.append(words))
    assert pairs.is_valid({}, {"$ref": "http://127.0.0.1:9/schema.json"})
    assert asked == []


# --- gained and lost ---------------------------------------------------------------------------


def test_a_gain_says_its_interval_and_a_small_one_that_it_is_none() -> None:
    chance = np.random.default_rng(0)
    before = chance.normal(50, 10, 60)
    after = before + chance.normal(2, 4, 60)
    found = gain(of(list(after), "chrf"), of(list(before), "chrf"), "chrf")
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low < found.difference < found.high
    assert str(found).startswith("chrf is really better (+")
    assert str(Criterion("chrf", 0.1, 0.4)) == "chrf is not really better (+0.1, p = 0.400)"


@pytest.mark.parametrize("name", ["general_loss", "chrf"])
def test_the_interval_beside_a_margin_is_that_of_the_comparison(name: str) -> None:
    chance = np.random.default_rng(1)
    before = chance.normal(50, 10, 80)
    one, other = of(list(before + chance.normal(2, 5, 80)), name), of(list(before), name)
    found = not_worse(one, other, name, 9.0)
    [pair] = compare([other, one])
    assert found.difference == pytest.approx(pair.difference)
    assert (found.low, found.high) == (pytest.approx(pair.low, abs=0.15), pytest.approx(pair.high, abs=0.15))  # fmt: skip


def test_the_smallest_chance_is_one_in_ten_thousand() -> None:
    [found] = compare([of([1.0] * 40, "chrf"), of([2.0] * 40, "chrf")])
    assert found.p == 1 / 10_000


# --- votes -------------------------------------------------------------------------------------


def test_a_model_that_lost_is_worse(tmp_path: Path) -> None:
    [duel] = score_votes([write(tmp_path, *[(["a", "b"], "b", str(n)) for n in range(12)])])
    assert (duel.wins, duel.losses, duel.win_rate, duel.verdict) == (0, 12, 0.0, "worse")
    assert duel.high < 50


@pytest.mark.parametrize(
    "models", [None, "ab", [], ["a"], ["a", 1], [1, 2], ["a", "b", "a"], {"a": 1, "b": 2}]
)
def test_votes_are_between_two_or_more_different_names(tmp_path: Path, models: Any) -> None:
    with pytest.raises(DataError, match=r"votes\.jsonl:1: `models` must name two or more different"):  # fmt: skip
        score_votes([write(tmp_path, (models, None, "1"))])


def test_blank_lines_are_no_votes_and_other_lines_than_objects_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, (["a", "b"], "a", "1"))
    file.write_text("\n" + file.read_text() + "  \n\n" + file.read_text())
    [duel] = score_votes([file])
    assert duel.wins == 2
    for line, said in (("[]", "`models` must"), ("[" * 100_000, "is no JSON"), ("x", "is no JSON")):
        file.write_text(f"\n{line}")
        with pytest.raises(DataError, match=rf"votes\.jsonl:2: {said}"):
            score_votes([file])
    assert len(score_votes([write(tmp_path, (["a", "b"], None, "1"))] * 2)) == 1
