"""Scores after"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from closeness import loss_rounding
from prompt_lists import reply_prompts
from rows import CALL, TOOL, Rows, answering, read_rows, spoken, turns, write_rows

from finetune.config.schema import DataSection, EvaluationSection
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.data.examples.collate import Collator
from finetune.data.examples.dataset import LengthPolicy, PreparedDataset, load_examples
from finetune.data.reading.sources import SourceSpec
from finetune.errors import ConfigError, DataError, ModelError
from finetune.evaluation.evaluate import evaluate
from finetune.evaluation.job import Options, prepare
from finetune.evaluation.loss import validation_loss
from finetune.evaluation.model_scores import evaluate_model
from finetune.evaluation.predictions import Prediction, write_predictions
from finetune.evaluation.targets import find_targets
from finetune.generation.load import open_model
from finetune.generation.prompts import ReplyPrompt, prompts_of
from finetune.generation.settings import Settings, settings_of


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
    assert "method3" in report["signatures"]["bleu-4"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"]["decoding"] == "greedy"
    assert report["scores"]["tool_call_validity"] == 0.0


# --- the parts of an evaluation ----------------------------------------------------------------


def asked(template: ChatTemplate) -> list[ReplyPrompt]:
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


def test_replies_equal_to_their_references_score_100_everywhere(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = asked(template)
    answering(monkeypatch, lambda i: (spoken(template, prompts[i].reference), True))
    result = evaluate_model(None, prompts, max_new_tokens=9, batch_size=2)
    found = {name: value for name, value in result.scores.items() if not name.startswith("json_")}
    scores = {name: round(value or 0, 4) for name, value in found.items()}  # nothing is JSON
    # Replies of fewer than four words have no BLEU-4, and none repeats itself.
    assert {n for n, value in scores.items() if value != 100.0} == {"bleu-4", "repetition_rate"}
    assert scores["repetition_rate"] == 0.0
    assert [one.message for one in result.predictions] == [1, 1, 1, 1, 1, 1, 3, 1, 3]
    assert result.predictions[7].row["reference"] == f"get_weather\n{CALL}"
    assert result.predictions[7].location == "dev.jsonl:7"


def test_what_follows_a_control_token_in_a_reply_is_not_scored(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = asked(template)
    extra = [tiny.CONTROL_IDS["<|assistant|>"], *spoken(template, Message("assistant", "more"))]
    answering(monkeypatch, lambda i: (spoken(template, prompts[i].reference) + extra, False))
    result = evaluate_model(None, prompts, max_new_tokens=9, batch_size=2)
    assert result.scores["exact_match"] == 100.0
    assert result.scores["stop_rate"] == 0.0


def test_no_prompt_contains_its_reference(
    tiny_glm4: Path, template: ChatTemplate, tmp_path: Path
) -> None:
    rows = [{"messages": turns("ask", f"first{n}", "again", f"second{n}")} for n in range(3)]
    prompts = reply_prompts(_conversations(rows), template)
    result = evaluate_model(open_model(tiny_glm4).model, prompts, max_new_tokens=2, batch_size=4)
    assert len(result.predictions) == 6
    for one in result.predictions:
        assert one.reference.content not in one.prompt
        assert one.prompt.endswith("<|assistant|>")
    assert "first1" in result.predictions[3].prompt


def test_prompts_leave_room_for_a_reply_and_what_is_left_out_is_said(
    template: ChatTemplate, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "€" * 250  # three tokens each
    rows = [*held_out(), {"messages": turns(long, "a", "b", "c")}, {"messages": turns(long, "a")}]
    section = EvaluationSection(max_new_tokens=20, max_samples=None)
    prompts = prompts_of(_conversations(rows), template, section, 620)
    assert max(len(prompt.prompt_ids) for prompt in prompts) <= 600
    said = capsys.readouterr()
    assert "1 prompts lost their oldest turns" in said.out
    assert f"dev.jsonl:{len(rows)}" in said.err
    section = EvaluationSection(max_samples=3, max_new_tokens=20)
    few = prompts_of(_conversations(rows), template, section, None)
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
        assert found.loss == pytest.approx(expected, abs=loss_rounding(model.config, 64))
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
    good = Prediction(
        Message("assistant", "回答"), Message("assistant", "r"), scores={"bleu-4": 1.0}
    )

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


def test_results_in_another_number_format_are_not_taken_for_these(
    run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run / "checkpoint-6", tmp_path / "checkpoint-6"))
    settings = settings_of(copy)
    (target,) = find_targets([str(copy)], with_base=False)
    kept = prepare(target, settings, Options()).results.folder
    assert prepare(target, settings, Options()).results.folder == kept
    text = (copy / "config.yaml").read_text()
    assert "dtype: float32" in text
    (copy / "config.yaml").write_text(text.replace("dtype: float32", "dtype: bfloat16"))
    assert prepare(target, settings, Options()).results.folder != kept
