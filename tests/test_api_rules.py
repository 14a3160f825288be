"""What the functions for Python hand on, and what they answer, without a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import finetune
from finetune import api
from finetune.data.dialogue.conversation import Message
from finetune.errors import DataError


class Metrics:
    @staticmethod
    def own(reply: str, reference: str) -> float:
        return 1.0


def test_an_evaluation_hands_on_all_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    pages: list[Path] = []

    def evaluate(models: Any, data: Any, **how: Any) -> dict[str, Any]:
        given.update(how, models=models, data=data)
        return {"output": str(tmp_path / "made")}

    monkeypatch.setattr("finetune.evaluation.evaluate.evaluate", evaluate)
    monkeypatch.setattr("finetune.report.page.write_page", pages.append)
    finetune.evaluate("a/b", "c/d", data="x", output="out", include_base=True, metrics=[Metrics.own, "m:f"], max_new_tokens=3)  # fmt: skip
    options = given["options"]
    assert (given["models"], given["data"], given["output"]) == (["a/b", "c/d"], ["x"], Path("out"))
    assert given["changes"] == {"max_new_tokens": 3}
    assert (options.with_base, options.scoring.own) == (True, (f"{__name__}:Metrics.own", "m:f"))
    assert pages == [tmp_path / "made"]
    finetune.evaluate("a/b", data=["x", "y"])
    assert (given["data"], given["output"], given["options"].with_base) == (["x", "y"], None, False)
    monkeypatch.setattr("finetune.evaluation.evaluate.evaluate", lambda *_, **__: {})
    assert finetune.evaluate("a/b") == {}, "only the first process writes the page"
    assert len(pages) == 2


def test_a_run_is_opened_as_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = SimpleNamespace(model=1, template=2)
    asked: list[Any] = []
    monkeypatch.setattr("finetune.artifacts.resolve.model_in", lambda target: f"{target}/checkpoint-2")  # fmt: skip
    monkeypatch.setattr("finetune.generation.load.open_model", lambda target, base: asked.append((target, base)) or opened)  # type: ignore[func-returns-value]  # fmt: skip
    chat = finetune.load(Path("run"), base="b")
    assert asked == [("run/checkpoint-2", "b")]
    assert (chat.model, chat.template) == (1, 2)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_replies_are_asked_for_as_is_said(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def generate(model: Any, template: Any, prompts: Any, **how: Any) -> list[Any]:
        given.update(how, prompts=prompts)
        return [SimpleNamespace(ids=n) for n in range(2)]

    calls = [
        Message("assistant", "<think>\nhm\n</think>\n\n{}", "f"),
        Message("assistant", "second"),
    ]
    said = {0: [Message("assistant", "hello")], 1: calls}
    monkeypatch.setattr("finetune.generation.generate.generate", generate)
    monkeypatch.setattr("finetune.generation.messages.reply_messages", lambda ids, template, tools: said[ids])  # fmt: skip
    template: Any = SimpleNamespace(prompts=lambda asked: [[index] for _, index in asked])
    rows = [[{"role": "user", "content": "hi"}], {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}]  # fmt: skip
    replies = api.Chat(None, template).replies(rows, max_new_tokens=3, temperature=temperature, seed=9, batch_size=4)  # type: ignore[arg-type]  # fmt: skip
    assert replies == [{"role": "assistant", "content": "hello"}, {"role": "assistant", "metadata": "f", "content": "{}"}]  # fmt: skip
    assert (given["prompts"], given["max_new_tokens"], given["batch_size"]) == ([[1], [3]], 3, 4)
    sampling = given["extras"].sampling
    assert (sampling and (sampling.how.temperature, sampling.seed)) == ((0.7, 9) if temperature else None)  # fmt: skip


def test_training_takes_a_file_or_a_mapping_with_what_wins_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    checked: list[Any] = []
    monkeypatch.setattr("finetune.cli.inputs.check_inputs", checked.append)
    monkeypatch.setattr("finetune.training.run.train", lambda config, callbacks: given.append((config, callbacks)) or {})  # type: ignore[func-returns-value]  # fmt: skip
    tree: dict[str, Any] = {"model": {"path": "a/b"}, "data": {"train": "x"}, "method": {"kind": "lora"}, "training": {"output_dir": "y"}}  # fmt: skip
    file = tmp_path / "x.yaml"
    file.write_text(str(tree))
    for config in (tree, file, str(file)):
        finetune.train(config, "training.seed=21", callbacks=["c"])
    assert [(config.training.seed, callbacks) for config, callbacks in given] == [(21, ["c"])] * 3
    assert len(checked) == 3


def test_only_a_dialogue_with_a_reply_has_a_loss_to_be_shown(tiny_chatglm: Path) -> None:
    with pytest.raises(DataError, match="the row is no dialogue"):
        finetune.render([{"role": "user", "content": "hi"}], tiny_chatglm)


def test_what_a_chat_takes_where_nothing_is_said_is_kept() -> None:
    import inspect

    taken = {name: one.default for name, one in inspect.signature(api.Chat.replies).parameters.items()}  # fmt: skip
    kept = {"max_new_tokens": 512, "temperature": 0.0, "seed": 0, "batch_size": 64}
    assert {name: taken[name] for name in kept} == kept
    asked: list[Any] = []

    class Told(api.Chat):
        def replies(self, rows: Any, **how: Any) -> list[dict[str, Any]]:  # type: ignore[override]
            asked.append((rows, how))
            return [{"role": "assistant", "content": "x"}]

    assert Told(None, None).reply({"messages": []}, seed=3) == {"role": "assistant", "content": "x"}  # type: ignore[arg-type]  # fmt: skip
    assert asked == [([{"messages": []}], {"seed": 3})]
    assert {name: getattr(finetune, name) for name in finetune.__all__} == {name: getattr(api, name) for name in finetune.__all__}  # fmt: skip


def test_a_row_is_told_by_where_it_comes_from_and_what_is_wrong_with_it(tiny_chatglm: Path) -> None:
    row = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the order"}]
    shown = finetune.render(row, tiny_chatglm)
    assert (shown.location, shown.format) == ("row", "python")
    with pytest.raises(DataError, match=r"correct it \(data/README.md has the forms\)") as caught:
        finetune.render(row[1:], tiny_chatglm)
    assert caught.value.__cause__ is not None
