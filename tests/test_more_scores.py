"""Labels, JSON, a judge and embeddings: what each says of replies, by hand or by another library."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows import write_rows
from test_metrics import pair
from test_uncertainty import coverage
from typer.testing import CliRunner

from finetune.cli.commands import app
from finetune.errors import ConfigError, DataError
from finetune.evaluation.evaluate import Options, evaluate
from finetune.evaluation.schema import read_evaluation
from finetune.evaluation.scores import judge
from finetune.evaluation.scores.added import ByModels
from finetune.evaluation.scores.judge import Judge
from finetune.evaluation.scores.labels import LabelReader, LabelTable
from finetune.evaluation.scores.metrics import numbers_of
from finetune.evaluation.scoring import Scoring


def labelled(pairs: list[tuple[str, str]]) -> LabelTable | None:
    """The table of (reference, reply) pairs, each a dialogue of its own."""
    reader = LabelReader()
    for number, (reference, reply) in enumerate(pairs):
        reader.add(reference, reply, f"file:{number}")
    return reader.table()


def predictions(file: Path, pairs: list[tuple[str, str]]) -> str:
    """A file of (reference, reply) pairs."""
    rows = [{"prompt": f"q{n}", "prediction": b, "reference": a} for n, (a, b) in enumerate(pairs)]
    return str(write_rows(file, rows))


SPAM = [("spam", "Spam.")] * 3 + [("spam", "ham")] + [("ham", "ham")] * 5 + [("ham", "no idea")]


def test_labels_have_an_accuracy_an_f1_each_and_a_confusion() -> None:
    table = labelled(SPAM)
    assert table is not None
    report = table.report()
    assert report.labels == ["ham", "spam"]
    assert report.confusion == [[5, 0, 1], [1, 3, 0]]
    # Ham: 5 right of 6 given and of 6 wanted. Spam: 3 of 3 given, of 4 wanted.
    assert report.precision == pytest.approx([500 / 6, 100])
    assert report.recall == pytest.approx([500 / 6, 75])
    assert report.f1 == pytest.approx([500 / 6, 600 / 7])
    scores = table.described()
    assert scores["label_accuracy"]["value"] == pytest.approx(80)
    assert scores["label_macro_f1"]["value"] == pytest.approx((500 / 6 + 600 / 7) / 2)
    assert scores["label_macro_f1"]["low"] < 80 < scores["label_macro_f1"]["high"]  # type: ignore[operator]
    assert {one["n"] for one in scores.values()} == {10}


@pytest.mark.parametrize(
    "references",
    [
        ["yes", "no"] * 4,  # too few
        [f"answer {n}" for n in range(30)],
        ["yes"] * 30,
        ["yes", "no", "a\nb"] * 10,
        ["yes", "no", "x" * 65] * 10,
        ["yes", "no", ""] * 10,
    ],
)
def test_texts_are_no_labels(references: list[str]) -> None:
    assert labelled([(one, one) for one in references]) is None


def test_the_interval_of_a_macro_f1_holds_the_truth() -> None:
    # Three labels of unlike frequency, right with the probability 0.7, else the next one.
    shares = np.array([0.5, 0.3, 0.2])
    names = ("a", "b", "c")

    def draw(chance: np.random.Generator) -> Any:
        right = chance.choice(3, 120, p=shares)
        given = np.where(chance.random(120) < 0.7, right, (right + 1) % 3)
        table = labelled([(names[a], names[b]) for a, b in zip(right, given, strict=True)])
        assert table is not None
        whole = table.measure()
        column = whole.names.index("label_macro_f1")
        return type(whole)(("f1",), whole.units, lambda sums: whole.scores(sums)[:, [column]])

    hits = 0.7 * shares
    given = hits + 0.3 * np.roll(shares, 1)
    truth = float(np.mean(200 * hits / (shares + given)))
    assert 0.91 <= coverage(draw, truth, rounds=300) <= 0.985


def test_a_label_report_is_in_the_evaluation_and_models_are_compared_by_it(tmp_path: Path) -> None:
    right = [(one, one) for one, _ in SPAM] * 4
    files = (predictions(tmp_path / "good.jsonl", right), predictions(tmp_path / "poor.jsonl", SPAM * 4))  # fmt: skip
    evaluate([], options=Options(predictions=files), output=tmp_path / "out")
    found = read_evaluation(tmp_path / "out")
    assert found.labels["poor"].confusion == [[20, 0, 4], [4, 12, 0]]
    one = found.comparison("good", "poor", "label_macro_f1")
    assert one is not None
    assert one.verdict == "better"


SCHEMA = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}


@pytest.mark.parametrize(
    ("reply", "reference", "expected"),
    [
        ('{"b": 1.0, "city": "x"}', '{"city": "x", "b": 1}', (100.0, 100.0, 100.0)),
        ('{"city": 3}', '{"city": "x"}', (100.0, 0.0, 0.0)),
        ('{"city": "x"', '{"city": "x"}', (0.0, 0.0, 0.0)),
        ("null", '{"city": "x"}', (100.0, 0.0, 0.0)),
        ("x", "[1]", (0.0, 0.0, 0.0)),
        ("[1]", "[1]", (100.0, 100.0, 0.0)),
        ('{"city": "x"}', "a text", (None, None, 100.0)),
        ("17", "17", (None, None, 0.0)),  # a number is a text like any other
    ],
)
def test_a_reply_that_is_to_be_json_is_valid_equal_and_under_its_schema(
    reply: str, reference: str, expected: tuple[float | None, ...]
) -> None:
    scores, _ = numbers_of(pair(reply, reference), schema=json.dumps(SCHEMA))
    names = ("json_validity", "json_match", "json_schema_validity")
    assert tuple(scores[name] for name in names) == expected
    without, _ = numbers_of(pair(reply, reference))
    assert without["json_schema_validity"] is None


def test_the_command_takes_a_schema_to_count_by_and_refuses_what_is_none(tmp_path: Path) -> None:
    file = predictions(tmp_path / "out.jsonl", [("a", '{"city": "x"}'), ("b", "no")])
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    words = ["evaluate", "--predictions", file, "--output", str(tmp_path / "e"), "--check-schema"]
    done = CliRunner().invoke(app, [*words, str(schema)])
    assert done.exit_code == 0, done.output
    score = read_evaluation(tmp_path / "e").targets[0].scores["json_schema_validity"]
    assert (score.value, score.n) == (50.0, 2)
    schema.write_text("[]")
    with pytest.raises(ConfigError, match=r"--check-schema .*not a schema"):
        CliRunner().invoke(app, [*words, str(schema)], catch_exceptions=False)


class _Endpoint(BaseHTTPRequestHandler):
    """Prefers the longer answer, or always the first; what it was asked is kept."""

    asked: list[str]
    rule = "longer"
    failures = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        type(self).asked.append(text)
        if type(self).rule.startswith("http"):
            self.send_response(307)
            self.send_header("Location", f"{type(self).rule}/chat/completions")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if type(self).failures:
            type(self).failures -= 1
            self.send_error(503 if type(self).rule != "refuses" else 401)
            return
        one, other = (text.split(f"=== answer {which} ===\n")[1].split("\n===")[0] for which in "AB")  # fmt: skip
        said = {"longer": "A" if len(one) > len(other) else "B", "first": "A"}.get(self.rule)
        content = f"Both are fine. [[{said}]]" if said else "I cannot say."
        data = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def endpoint(rule: str = "longer", failures: int = 0) -> Iterator[tuple[str, type[_Endpoint]]]:
    kind = type("Kind", (_Endpoint,), {"asked": [], "rule": rule, "failures": failures})
    server = HTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"openai:some/model@http://127.0.0.1:{server.server_port}/v1", kind
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


PAIRS = [("p", "", "long reply", "short"), ("p", "", "s", "the longer"), ("p", "r", "same", "same")]


def test_a_judge_is_asked_in_both_orders_and_nothing_twice(tmp_path: Path) -> None:
    with endpoint() as (name, server):
        found = list(Judge.of(name, tmp_path).win_rates(PAIRS))
        assert [one[judge.WIN] for one in found] == [100.0, 0.0, 50.0]
        assert [one[judge.AGREE] for one in found] == [100.0, 100.0, None]
        assert len(server.asked) == 4  # equal texts are level without a question
        orders = [text.split("=== answer A ===\n")[1].split("\n")[0] for text in server.asked]
        assert sorted(orders) == ["long reply", "s", "short", "the longer"]
        again = list(Judge.of(name, tmp_path).win_rates(PAIRS))
        assert (again, len(server.asked)) == (found, 4)


def test_a_judge_that_always_takes_the_first_answer_is_level_and_does_not_agree(
    tmp_path: Path,
) -> None:
    with endpoint("first") as (name, _):
        [one, other, _] = Judge.of(name, tmp_path).win_rates(PAIRS)
    assert one == other == {judge.WIN: 50.0, judge.AGREE: 0.0}


def test_a_judge_that_sends_elsewhere_is_named_and_nobody_there_is_asked(tmp_path: Path) -> None:
    with (
        endpoint() as (elsewhere, other),
        endpoint(elsewhere.partition("@")[2]) as (name, server),
        pytest.raises(DataError, match=r"does not answer \(307"),
    ):
        list(Judge.of(name, tmp_path).win_rates(PAIRS[:1]))
    assert server.asked
    assert other.asked == []


def test_a_judge_that_fails_is_asked_again_and_one_that_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.generation.backends.address.time.sleep", lambda _: None)
    with endpoint(failures=2) as (name, server):
        found = list(Judge.of(name, tmp_path / "a").win_rates(PAIRS))
        assert found[0][judge.WIN] == 100.0
        assert len(server.asked) == 6
    with endpoint("refuses", failures=99) as (name, server):
        with pytest.raises(DataError, match=r"401 .*OPENAI_API_KEY"):
            list(Judge.of(name, tmp_path / "b").win_rates(PAIRS[:1]))
        assert 1 <= len(server.asked) <= 2, "each order once, or given up before"
    with endpoint("silent") as (name, _):
        found = list(Judge.of(name, tmp_path / "c").win_rates(PAIRS))
        assert [one[judge.WIN] for one in found] == [None, None, 50.0]
    with pytest.raises(ConfigError, match="openai:MODEL@URL"):
        Judge.of("gpt-4o", tmp_path)


def test_judged_replies_have_a_win_rate_with_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    pairs = [("a reference", "a much longer reply" if n % 4 else "no") for n in range(24)]
    with endpoint() as (name, _):
        options = Options(predictions=(predictions(tmp_path / "x.jsonl", pairs),), by_models=ByModels(name))  # fmt: skip
        evaluate([], options=options, output=tmp_path / "out")
    found = read_evaluation(tmp_path / "out")
    score = found.targets[0].scores[judge.WIN]
    assert (score.value, score.n) == (75.0, 24)
    assert score.low < 75 < score.high  # type: ignore[operator]
    assert "some/model" in found.signatures[judge.WIN]


def test_the_base_is_level_with_itself_and_the_tuned_model_is_compared_with_it(
    tmp_path: Path,
) -> None:
    from finetune.evaluation.scores.added import add_scores

    files = []
    for kind, reply in (("base", "ok"), ("adapter", "a better one")):
        rows = [
            {"where": f"d:{n}", "message": 1, "prompt": "p", "reference": "r", "prediction": reply, "scores": {}}
            for n in range(3)
        ]  # fmt: skip
        files.append((kind, kind, write_rows(tmp_path / f"{kind}.jsonl", rows)))
    with endpoint() as (name, server):
        said = add_scores(ByModels(name), files, tmp_path)
    rates = [
        [json.loads(line)["scores"][judge.WIN] for line in file.read_text().splitlines()]
        for _, _, file in files
    ]
    assert rates == [[50.0] * 3, [100.0] * 3]
    assert all("=== a good answer ===\nr\n" in text for text in server.asked)
    assert "the base" in said[judge.WIN]


def test_bert_score_matches_the_nearest_tokens_in_both_directions() -> None:
    import torch

    from finetune.evaluation.scores.embeddings import f1

    one = torch.eye(3)[[0, 1]]
    other = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8], [0.0, 0.0, 1.0]])
    # Precision: (1 + 0.6) / 2. Recall: (1 + 0.6 + 0) / 3.
    assert f1(one, other) == pytest.approx(100 * 2 * 0.8 * (1.6 / 3) / (0.8 + 1.6 / 3))
    assert f1(one, one) == pytest.approx(100)
    assert f1(one[:0], other) == f1(other, one[:0]) == f1(one[:1], one[1:]) == 0.0


def test_bert_score_of_a_model_ignores_padding_and_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])  # fmt: skip
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    BertModel(BertConfig(vocab_size=12, max_position_embeddings=40, **sizes)).save_pretrained(tmp_path / "bert")  # fmt: skip
    from finetune.evaluation.scores.embeddings import NAME, Embedder

    model = Embedder.of(str(tmp_path / "bert"))
    pairs = [("a b c", "a b c"), ("a b", "c d e f g h"), ("", "a")]
    together = [one[NAME] for one in model.similarities(pairs)]
    alone = [next(model.similarities([one]))[NAME] for one in pairs]
    assert together == pytest.approx(alone, abs=1e-3)
    assert together[0] == pytest.approx(100, abs=1e-3)
    assert 0 < together[1] < 100  # type: ignore[operator]
    assert together[2] == 0.0
    with pytest.raises(Exception, match="--bert-score"):
        Embedder.of(str(tmp_path / "nothing"))


def test_scores_of_a_schema_are_told_in_the_settings() -> None:
    assert Scoring().told == {"definition": "default", "own": []}
    assert len(Scoring(schema="{}").told["schema"]) == 8
