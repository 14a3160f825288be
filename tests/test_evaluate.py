"""Scores after training are those of training; predictions come whole, in order, once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch

from finetune.config import DataSection, EvaluationSection
from finetune.data.collate import Collator
from finetune.data.conversation import Conversation, Message
from finetune.data.dataset import LengthPolicy, PreparedDataset, load_examples
from finetune.data.prompts import ReplyPrompts, reply_prompts
from finetune.data.sources import SourceSpec
from finetune.data.template import ChatTemplate
from finetune.data.tokenizer import load_chat_tokenizer
from finetune.errors import ConfigError, DataError, ModelError
from finetune.evaluation import generate as generation
from finetune.evaluation import predict as prediction
from finetune.evaluation.evaluate import ask, evaluate, evaluate_model
from finetune.evaluation.generate import Reply
from finetune.evaluation.loss import validation_loss
from finetune.evaluation.open import open_model
from finetune.evaluation.predict import PredictOptions, as_reply, predict, reply_messages
from finetune.evaluation.predictions import Prediction, write_predictions
from finetune.evaluation.settings import Settings

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "weather",
        "parameters": {"type": "object", "properties": {"city": {}}, "required": ["city"]},
    },
}
CALL = '{"city": "北京"}'
Rows = list[dict[str, Any]]


def write_rows(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read_rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def held_out() -> Rows:
    """Seven dialogues of different lengths, one with a call."""
    rows: Rows = [{"messages": turns(f"question {'dog ' * n}", f"answer {n}")} for n in range(5)]
    rows.append({"messages": turns("hello", "hello there", "what is this", "a customer order")})
    call = {"role": "assistant", "metadata": "get_weather", "content": CALL}
    result = {"role": "observation", "content": '{"t": 20}'}
    messages = [*turns("北京今天的天气怎么样？"), call, result, turns("", "很好")[1]]
    rows.append({"tools": [TOOL], "messages": messages})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "dev.jsonl", held_out())


@pytest.fixture(scope="module")
def template(tiny_chatglm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_chatglm))


@pytest.fixture(scope="module")
def run(tiny_chatglm: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short LoRA run that evaluated itself at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train = runs.write_dialogues(folder.parent / "train.jsonl", 12)
    settings = runs.config(
        tiny_chatglm, train, folder, data__validation=str(data), training__save_every_steps=3,
        evaluation__every_steps=3, evaluation__max_new_tokens=10, evaluation__batch_size=3,
        evaluation__max_samples=6, model__dtype="float32",
    )  # fmt: skip
    runs.run_here(settings)
    return folder


def logged(run: Path, step: int) -> dict[str, float]:
    lines = read_rows(run / "metrics.jsonl")
    [record] = [one for one in lines if one["step"] == step and "eval_loss" in one]
    return {k.removeprefix("eval_"): v for k, v in record.items() if k.startswith("eval_")}


def stated(report: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in report["scores"].items() if value is not None}


# --- law 10 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 6])
def test_a_checkpoint_scores_afterwards_what_it_scored_in_training(
    run: Path, step: int, tmp_path: Path
) -> None:
    report = evaluate(str(run / f"checkpoint-{step}"), output=tmp_path / "scores")
    assert stated(report) == logged(run, step)
    assert len(stated(report)) > 5
    now = (tmp_path / "scores" / "predictions.jsonl").read_bytes()
    assert now == (run / f"predictions-{step}.jsonl").read_bytes()
    assert report["replies"] == 6


@pytest.mark.slow
def test_two_processes_score_what_one_scored_through_the_command_line(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    script = (
        "import sys; from finetune.cli import main\n"
        f"main(['evaluate', {str(run / 'checkpoint-6')!r}, '--output', {str(out)!r}, '--json'])\n"
    )
    settings = runs.config(run, run, tmp_path / "unused")
    done = runs.run_command(settings, tmp_path, processes=2, script=script)
    assert done.returncode == 0, done.stderr
    assert stated(json.loads(done.stdout)) == logged(run, 6)
    assert (out / "predictions.jsonl").read_bytes() == (run / "predictions-6.jsonl").read_bytes()


def test_what_the_command_line_says_wins_over_the_run(run: Path, tmp_path: Path) -> None:
    changes = {"max_new_tokens": 2, "max_samples": None, "replies": "last_reply", "batch_size": 7}
    report = evaluate(str(run / "checkpoint-6"), output=tmp_path / "out", changes=changes)
    assert report["settings"]["max_new_tokens"] == 2
    assert report["settings"]["max_samples"] == 6  # not said, so as in the run
    rows = read_rows(tmp_path / "out" / "predictions.jsonl")
    assert len({row["where"] for row in rows}) == len(rows) == 6


def test_scores_come_with_what_they_depend_on(tiny_glm: Path, data: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_glm, tmp_path / "base")
    changes = {"max_new_tokens": 4}
    evaluate(str(model), [str(data)], changes=changes)
    report = json.loads((tmp_path / "evaluation-base-dev" / "scores.json").read_text("utf-8"))
    assert report["kind"] == "model"
    assert report["replies"] == 9
    assert "method3" in report["signature"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"]["decoding"] == "greedy"
    assert report["scores"]["tool_call_validity"] == 0.0


# --- the parts of an evaluation ----------------------------------------------------------------


def asked(template: ChatTemplate) -> ReplyPrompts:
    return reply_prompts(_conversations(held_out()), template)


def _conversations(rows: Rows) -> list[Conversation]:
    return [
        Conversation(
            tuple(Message(**message) for message in row["messages"]),
            tuple(row.get("tools", ())),
            f"dev.jsonl:{number}",
        )
        for number, row in enumerate(rows, 1)
    ]


def answering(
    monkeypatch: pytest.MonkeyPatch, text_of: Callable[[int], tuple[list[int], bool]]
) -> None:
    """Puts replies that `text_of(index)` gives in the place of a model's."""

    def fake(model: Any, template: Any, prompts: Any, **_: Any) -> list[Reply]:
        answers = [text_of(index) for index in range(len(prompts))]
        return [Reply(i, tuple(ids), stopped) for i, (ids, stopped) in enumerate(answers)]

    monkeypatch.setattr(generation, "generate", fake)
    monkeypatch.setattr(generation, "check_context", lambda *_, **__: None)


def spoken(template: ChatTemplate, message: Message) -> list[int]:
    text = f"{message.metadata}\n{message.content}"
    return list(template.tokenizer.plain.encode(text, add_special_tokens=False).ids)


def test_replies_equal_to_their_references_score_100_everywhere(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = asked(template)
    answering(monkeypatch, lambda i: (spoken(template, prompts[i].reference), True))
    result = evaluate_model(None, template, prompts, max_new_tokens=9, batch_size=2)
    assert result.scores.pop("bleu-4") < 100  # replies of fewer than four words never reach it
    assert {name: round(value or 0, 4) for name, value in result.scores.items()} == dict.fromkeys(
        ("rouge-1", "rouge-l", "exact_match", "stop_rate", "tool_call_validity"), 100.0
    ) | {"rouge-2": round(result.scores["rouge-2"] or 0, 4)}
    assert [one.message for one in result.predictions] == [1, 1, 1, 1, 1, 1, 3, 1, 3]
    assert result.predictions[7].reference == f"get_weather\n{CALL}"
    assert result.predictions[7].where == "dev.jsonl:7"


def test_what_follows_a_control_token_in_a_reply_is_not_scored(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = asked(template)
    extra = [tiny.CONTROL_IDS["<|assistant|>"], *spoken(template, Message("assistant", "more"))]
    answering(monkeypatch, lambda i: (spoken(template, prompts[i].reference) + extra, False))
    result = evaluate_model(None, template, prompts, max_new_tokens=9, batch_size=2)
    assert result.scores["exact_match"] == 100.0
    assert result.scores["stop_rate"] == 0.0


def test_no_prompt_contains_its_reference(
    tiny_glm4: Path, template: ChatTemplate, tmp_path: Path
) -> None:
    rows = [{"messages": turns("ask", f"first{n}", "again", f"second{n}")} for n in range(3)]
    prompts = reply_prompts(_conversations(rows), template)
    result = evaluate_model(
        open_model(tiny_glm4).model, template, prompts, max_new_tokens=2, batch_size=4
    )
    assert len(result.predictions) == 6
    for one in result.predictions:
        assert one.reference not in one.prompt
        assert one.prompt.endswith("<|assistant|>")
    assert "first1" in result.predictions[3].prompt


def test_prompts_leave_room_for_a_reply_and_what_is_left_out_is_said(
    template: ChatTemplate, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "€" * 250  # three tokens each
    rows = [*held_out(), {"messages": turns(long, "a", "b", "c")}, {"messages": turns(long, "a")}]
    section = EvaluationSection(max_new_tokens=20, max_samples=None)
    prompts = ask(_conversations(rows), template, section, positions=620)
    assert max(len(prompt.prompt_ids) for prompt in prompts) <= 600
    said = capsys.readouterr()
    assert "1 prompts lost their oldest turns" in said.out
    assert f"dev.jsonl:{len(rows)}" in said.err
    few = ask(
        _conversations(rows), template, EvaluationSection(max_samples=3, max_new_tokens=20),
        positions=None,
    )  # fmt: skip
    assert len(few) == 3
    assert "generating 3 of 12 replies" in capsys.readouterr().out


@pytest.mark.parametrize("weighted", [False, True])
def test_the_validation_loss_is_the_mean_over_supervised_tokens_one_by_one(
    weighted: bool, tiny_glm: Path, template: ChatTemplate, tmp_path: Path
) -> None:
    data = runs.write_dialogues(tmp_path / "dev.jsonl", 7, weights=weighted)
    examples = load_examples(
        [SourceSpec(str(data))], template, LengthPolicy(256), cache_root=tmp_path / "cache"
    )
    model = open_model(tiny_glm).model
    model.train()
    expected = _loss_by_hand(model, examples)
    for batch_size in (1, 3, 7):
        found = validation_loss(model, examples, Collator(tiny.PAD_ID), batch_size=batch_size)
        assert found.loss == pytest.approx(expected, rel=1e-6)
    assert model.training


def _loss_by_hand(model: torch.nn.Module, examples: PreparedDataset) -> float:
    total = weight = 0.0
    for index in range(len(examples)):
        example = examples[index]
        ids = torch.tensor(example.input_ids[None].astype("int64"))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        labels = torch.tensor(example.labels[1:])
        chosen = labels >= 0
        losses = torch.nn.functional.cross_entropy(logits[chosen], labels[chosen], reduction="none")
        shares = torch.ones_like(losses)
        if example.loss_weights is not None:
            shares = torch.tensor(example.loss_weights[1:]).double()[chosen]
        total, weight = total + float((losses * shares).sum()), weight + float(shares.sum())
    return total / weight


def test_a_file_of_predictions_is_whole_or_absent(tmp_path: Path) -> None:
    good = Prediction("a:1", 1, "p", "r", "回答", True, {"bleu-4": 1.0})

    def broken() -> Any:
        yield good
        raise RuntimeError("the disk is on fire")

    target = tmp_path / "new" / "predictions.jsonl"
    with pytest.raises(RuntimeError):
        write_predictions(target, broken())
    assert list(target.parent.iterdir()) == []
    write_predictions(target, [good, good])
    assert [row["prediction"] for row in read_rows(target)] == ["回答", "回答"]
    assert "回答" in target.read_text(encoding="utf-8")


# --- what can be opened ------------------------------------------------------------------------


def test_an_adapter_opens_on_its_base_wherever_that_is_now(
    run: Path, tiny_chatglm: Path, tmp_path: Path
) -> None:
    here = open_model(run / "checkpoint-6")
    assert (here.kind, here.base) == ("adapter", str(tiny_chatglm))
    moved = shutil.copytree(run / "checkpoint-6", tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "gone/with/the/wind"})
    )
    with pytest.raises(ModelError, match="gone/with/the/wind, which is not there"):
        open_model(moved)
    again = open_model(moved, base=str(tiny_chatglm))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(here.model(input_ids=ids).logits, again.model(input_ids=ids).logits)


def test_an_adapter_does_not_open_on_another_base(run: Path, tmp_path: Path) -> None:
    other = tiny.save_model(tmp_path / "other", "chatglm", seed=7)
    with pytest.raises(ModelError, match="fingerprint"):
        open_model(run / "checkpoint-6", base=str(other))


def test_folders_that_are_no_model_are_refused_with_what_to_give(
    run: Path, tiny_glm: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"is a run; .*/checkpoint-6"):
        open_model(run)
    with pytest.raises(ModelError, match=r"neither config\.json nor"):
        open_model(tmp_path)
    with pytest.raises(ModelError, match="whole model"):
        open_model(tiny_glm, base=str(tiny_glm))
    with pytest.raises(ModelError, match="no such"):
        open_model(tmp_path / "nowhere")


def test_an_evaluation_without_data_or_with_a_wrong_option_is_refused(
    tiny_glm: Path, data: Path
) -> None:
    with pytest.raises(ConfigError, match="--data"):
        evaluate(str(tiny_glm))
    with pytest.raises(ConfigError, match="batch_size"):
        evaluate(str(tiny_glm), [str(data)], changes={"batch_size": 0})
    with pytest.raises(DataError, match="nowhere"):
        evaluate(str(tiny_glm), ["nowhere.jsonl"])


def test_the_layout_named_for_all_sources_holds_for_those_that_name_none() -> None:
    section = DataSection(
        train="t", format="pairs", validation=["a", {"path": "b", "format": "alpaca"}],  # type: ignore[list-item]
    )  # fmt: skip
    sources = Settings(section, EvaluationSection()).sources
    assert [(s.path, s.format) for s in sources] == [("a", "pairs"), ("b", "alpaca")]


# --- predict -----------------------------------------------------------------------------------


def dialogues(count: int) -> Rows:
    """Some end in a question, some in a reply that is not to be read."""
    rows: Rows = []
    for n in range(count):
        texts = [f"question {'dog ' * (n % 4)}{n}", "secret reference"]
        rows.append({"messages": turns(*texts[: 1 + n % 2])})
    return rows


OPTIONS = PredictOptions(max_new_tokens=5, batch_size=2)


def test_every_dialogue_gets_its_reply_in_order_and_references_are_ignored(
    tiny_glm: Path, tmp_path: Path
) -> None:
    rows = dialogues(7)
    source = write_rows(tmp_path / "in.jsonl", rows)
    counts = predict(str(tiny_glm), [str(source)], tmp_path / "out.jsonl", options=OPTIONS)
    answered = read_rows(tmp_path / "out.jsonl")
    assert counts["replies"] == len(answered) == 7
    for row, got in zip(rows, answered, strict=True):
        assert got["messages"][:-1] == row["messages"][:1]
        assert got["messages"][-1]["role"] == "assistant"
        assert got["messages"][-1]["content"] != "secret reference"
    assert counts["cut"] == sum(not got["stopped"] for got in answered)
    # Nor do they change the answer.
    bare = write_rows(tmp_path / "bare.jsonl", [{"messages": r["messages"][:1]} for r in rows])
    predict(str(tiny_glm), [str(bare)], tmp_path / "bare-out.jsonl", options=OPTIONS)
    replies = [
        [r["messages"][-1] for r in read_rows(tmp_path / f)]
        for f in ("out.jsonl", "bare-out.jsonl")
    ]
    assert replies[0] == replies[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bare-out.jsonl", "bare.jsonl", "in.jsonl", "out.jsonl",
    ]  # fmt: skip


def test_after_a_crash_answered_dialogues_are_kept_and_not_asked_again(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", dialogues(7))
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(prediction, "BATCHES_PER_WINDOW", 1)
    predict(str(tiny_glm), [str(source)], tmp_path / "whole.jsonl", options=OPTIONS)
    original, questions = generation.generate, []

    def failing(model: Any, template: Any, prompts: Any, **rest: Any) -> Any:
        questions.append(len(prompts))
        if len(questions) == 3:
            raise RuntimeError("out of memory")
        return original(model, template, prompts, **rest)

    monkeypatch.setattr(generation, "generate", failing)
    with pytest.raises(RuntimeError):
        predict(str(tiny_glm), [str(source)], out, options=OPTIONS)
    assert not out.exists()
    part = tmp_path / "out.jsonl.part"
    assert len(read_rows(part)) == 4
    with part.open("a") as file:
        file.write('{"where": "torn')  # a line that the crash cut
    predict(str(tiny_glm), [str(source)], out, options=OPTIONS)
    assert questions == [2, 2, 2, 2, 1]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_lines_of_another_request_are_not_kept(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", dialogues(4))
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(prediction, "BATCHES_PER_WINDOW", 1)
    monkeypatch.setattr(prediction.Journal, "finish", lambda journal: None)
    predict(str(tiny_glm), [str(source)], out, options=OPTIONS)
    first = read_rows(tmp_path / "out.jsonl.part")
    longer = PredictOptions(max_new_tokens=9, batch_size=2)
    predict(str(tiny_glm), [str(source)], out, options=longer)
    second = read_rows(tmp_path / "out.jsonl.part")
    assert len(first) == len(second) == 4
    assert first != second
    write_rows(source, dialogues(3))
    predict(str(tiny_glm), [str(source)], out, options=longer)
    assert len(read_rows(tmp_path / "out.jsonl.part")) == 3


def test_bad_rows_and_dialogues_without_room_are_named_before_anything_is_generated(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "generate", lambda *_, **__: pytest.fail("generated"))
    bad = write_rows(tmp_path / "bad.jsonl", [*dialogues(2), {"messages": turns("")}])
    with pytest.raises(DataError, match=r"bad\.jsonl:3"):
        predict(str(tiny_glm), [str(bad)], tmp_path / "out.jsonl")
    long = write_rows(tmp_path / "long.jsonl", [*dialogues(2), {"messages": turns("x" * 2100)}])
    with pytest.raises(DataError, match=r"1 of 3 prompts(.|\n)*long\.jsonl:3"):
        predict(str(tiny_glm), [str(long)], tmp_path / "out.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "long.jsonl"]


def test_calls_are_written_in_both_forms_and_can_be_read_again(
    tiny_glm: Path, tmp_path: Path, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Message("assistant", CALL, metadata="get_weather")
    one = spoken(template, call)
    two = [*one, tiny.CONTROL_IDS["<|assistant|>"], *one]
    answering(monkeypatch, lambda i: (two if i == 1 else one, True))
    rows = [{"tools": [TOOL], "messages": turns("weather?")} for _ in range(2)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    predict(str(tiny_glm), [str(source)], out)
    single, double = read_rows(out)
    assert single["messages"][1:] == [
        {"role": "assistant", "metadata": "get_weather", "content": CALL}
    ]
    assert single["tool_calls"] == [
        {
            "id": "call_0",
            "type": "function",
            "function": {"name": "get_weather", "arguments": CALL},
        }
    ]
    assert len(double["messages"]) == 3
    assert [one["id"] for one in double["tool_calls"]] == ["call_0", "call_1"]
    examples = load_examples(
        [SourceSpec(str(out))], template, LengthPolicy(512), cache_root=tmp_path / "cache"
    )
    assert len(examples) == 2


def test_a_first_line_is_a_function_only_where_functions_are_offered(
    template: ChatTemplate,
) -> None:
    odd = Message("assistant", "world", metadata="Hello")
    assert as_reply(odd, ()) == Message("assistant", "Hello\nworld")
    assert as_reply(odd, (TOOL,)) == odd
    sentence = Message("assistant", "world", metadata="Hello, dear")
    assert as_reply(sentence, (TOOL,)).content == "Hello, dear\nworld"
    ids = spoken(template, Message("assistant", "fine"))
    assert reply_messages(ids, template, ()) == [Message("assistant", "fine")]
    assert reply_messages([], template, ()) == [Message("assistant", "")]
    # Text that runs into another reply ends there.
    more = [*ids, tiny.CONTROL_IDS["<|assistant|>"], *ids]
    assert reply_messages(more, template, (TOOL,)) == [Message("assistant", "fine")]
