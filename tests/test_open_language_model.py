"""What the harness asks of an open model, and what is asked of the harness; no harness is needed for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.data.dialogue.conversation import Conversation, Message
from finetune.errors import ConfigError, DataError
from finetune.evaluation.tasks import harness
from finetune.evaluation.tasks.harness import Asking
from finetune.evaluation.tasks.plan import Task
from finetune.generation.load import Models


@pytest.fixture(scope="module")
def asks(tiny_glm: Path) -> Any:
    """A model as tasks ask it, its class standing on an empty one where the harness is not installed."""
    name = "finetune.evaluation.tasks.language_model"
    opened = Models().open(str(tiny_glm))
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, name, raising=False)
        for part in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
            patch.setitem(sys.modules, part, ModuleType(part))
        sys.modules["lm_eval.api.model"].LM = type("LM", (), {})  # type: ignore[attr-defined]
        made = importlib.import_module(name)
        del sys.modules[name]
    return lambda size=3: made.OpenLanguageModel(opened.model, opened.template, batch_size=size)


def asked(*args: Any) -> Any:
    """A request of the harness."""
    return SimpleNamespace(args=args)


def ids_of(one: Any, text: str) -> list[int]:
    return list(one._template.tokenizer.plain.encode(text, add_special_tokens=False).ids)


def chat(one: Any, *messages: Message) -> list[int]:
    return list(map(int, one._template.prompt(Conversation(messages), len(messages))))


def begin(one: Any) -> list[int]:
    """The ids that begin every text."""
    ids = chat(one, Message("user", "x"))
    return ids[: ids.index(one._template.user_id)]


def logprobs(one: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = one._model(input_ids=torch.tensor([ids])).logits[0].float()
    return found.log_softmax(-1)


def alone(one: Any, context: list[int], continuation: list[int]) -> float:
    found = logprobs(one, context + continuation)[len(context) - 1 : -1]
    return float(found.gather(1, torch.tensor(continuation)[:, None]).double().sum())


def test_continuations_have_the_probability_that_the_model_gives_them(asks: Any) -> None:
    one = asks()
    shown = one.apply_chat_template([{"role": "user", "content": "Which?"}])
    pairs = [(shown, " A"), (shown, " B"), (shown, "a longer one"), ("Once upon ", "a time"), ("x", "y"), ("", "z")]  # fmt: skip
    asked_in_chat, start = chat(one, Message("user", "Which?")), begin(one)
    upon = ids_of(one, "Once upon")
    expected = [
        *(alone(one, asked_in_chat, ids_of(one, f"\n{text}")) for text in ("A", "B", "a longer one")),
        alone(one, start + upon, ids_of(one, "Once upon a time")[len(upon) :]),
        alone(one, start + ids_of(one, "x"), ids_of(one, "xy")[len(ids_of(one, "x")) :]),
        alone(one, start, ids_of(one, "z")),
    ]  # fmt: skip
    for size in (1, 2, 8):
        found = asks(size)
        found._chats.update(one._chats)
        answers = found.loglikelihood([asked(*pair) for pair in pairs])
        assert [value for value, _ in answers] == pytest.approx(expected, abs=1e-3)


def test_a_continuation_is_the_likeliest_one_when_every_token_of_it_is(asks: Any) -> None:
    one = asks()
    context = begin(one) + ids_of(one, "Once")
    greedy: list[int] = []
    for _ in range(3):
        greedy.append(int(logprobs(one, context + greedy)[-1].argmax()))
    for place in (None, 0, 1, 2):
        tokens = [token if at != place else (token + 1) % 300 for at, token in enumerate(greedy)]
        one._scored = lambda *_, tokens=tokens: one_scored(one, context, tokens)
        [(_, is_likeliest)] = one.loglikelihood([asked("", "")])
        assert is_likeliest is (place is None), place


def one_scored(one: Any, context: Sequence[int], tokens: Sequence[int]) -> Any:
    scored = type(one)._scored(one, "Once", "x")
    return scored._replace(context=tuple(context), continuation=tuple(tokens))


def test_choices_that_differ_in_their_last_token_are_one_row(asks: Any) -> None:
    one, rows = asks(8), []
    forward = one._logprobs
    one._logprobs = lambda batch, by_row: rows.append(len(batch)) or forward(batch, by_row)
    one.loglikelihood([asked("Once", text) for text in ("A", "B", "C", "A")])
    assert rows == [1]


def test_a_context_that_is_too_long_loses_its_beginning(asks: Any) -> None:
    one = asks()
    one._room = 12
    context = "word " * 40 + "end"
    whole = begin(one) + ids_of(one, context)
    continuation = ids_of(one, f"{context} of it")[len(ids_of(one, context)) :]
    # The last token of the continuation is not read: 12 read and one more.
    kept = whole[-(13 - len(continuation)) :]
    [(found, _)] = one.loglikelihood([asked(context, " of it")])
    assert found == pytest.approx(alone(one, kept, continuation), abs=1e-3)


def test_the_probability_of_a_whole_text_is_taken_window_by_window(asks: Any) -> None:
    one = asks()
    text = "a longer text of more than one window, " * 3
    ids, start = ids_of(one, text), begin(one)
    [whole] = one.loglikelihood_rolling([asked(text)])
    assert whole == pytest.approx(alone(one, start, ids), abs=1e-3)
    one._room = len(start) + 7
    parts = [ids[at : at + 7] for at in range(0, len(ids), 7)]
    found = one.loglikelihood_rolling([asked(text), asked("short")])
    assert found[0] == pytest.approx(sum(alone(one, start, part) for part in parts), abs=1e-3)
    assert found[1] == pytest.approx(alone(one, start, ids_of(one, "short")), abs=1e-3)


def test_answers_end_where_the_task_says_and_stand_in_the_order_of_the_questions(asks: Any) -> None:
    one = asks(2)
    shown = one.apply_chat_template([{"role": "user", "content": "Tell"}])
    contexts = ["Once", shown, "Once upon a time there was", "x"]

    def answers(options: dict[str, Any], model: Any = one) -> list[str]:
        return list(model.generate_until([asked(text, options) for text in contexts]))

    whole = answers({"max_gen_toks": 12})
    for place, context in enumerate(contexts):
        [single] = one.generate_until([asked(context, {"max_gen_toks": 12})])
        assert single == whole[place]
    end = next(char for text in whole for char in text[len(text) // 2 :] if char.strip())
    cut = answers({"max_gen_toks": 12, "until": end})
    assert cut == [text.split(end)[0] for text in whole]
    assert answers({"max_gen_toks": 12, "until": [end, ""]}) == cut
    request = one._request("Once", {"until": [end], "max_gen_toks": 12})
    ended = [request.on_token(token) for token in ids_of(one, f"ab{end}c")]
    assert ended.count(True) >= 1
    assert ended[0] is False or len(ended) == 1
    long_end = "a b c d e f g h"
    enough = one._request("Once", {"until": ["never", long_end]}).on_token
    assert [enough(token) for token in ids_of(one, f"x {long_end}")][-1], "of many tokens"
    assert one._request("Once", {}).on_token is None
    assert one._request("Once", {}).decoding.max_new_tokens == 1024
    one._room = 20
    long = one._request("word " * 40, {"max_gen_toks": 12})
    assert list(long.prompt) == (begin(one) + ids_of(one, "word " * 40))[-8:]


def test_as_many_are_answered_at_once_as_their_keys_and_values_have_room(
    asks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, rooms = asks(4), list[int]()
    namespace = type(one).generate_until.__globals__
    monkeypatch.setitem(namespace, "write_replies", lambda _, __, asked, slots: rooms.append(slots) or [SimpleNamespace(ids=[]) for _ in asked])  # fmt: skip
    longest = len(one._context_ids("Once")) + 12
    for room in (longest - 1, 2 * longest, 3 * longest - 1, 99 * longest):
        monkeypatch.setitem(namespace, "cache_tokens", lambda _, room=room: room)
        one.generate_until([asked("Once", {"max_gen_toks": 12}), asked("x", {"max_gen_toks": 3})])
    assert rooms == [1, 2, 2, 4]
    assert one.generate_until([]) == []


def test_a_chat_is_known_by_what_it_is_shown_as(asks: Any) -> None:
    one = asks()
    history = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi <|user|>"},
    ]
    shown = one.apply_chat_template(history)
    messages = [Message(row["role"], row["content"]) for row in history]  # type: ignore[arg-type]
    assert list(one._context_ids(shown)) == chat(one, *messages)
    begun = one.apply_chat_template([*history, {"role": "assistant", "content": "So"}], False)
    assert list(one._context_ids(begun)) == list(one._chats[shown]) + ids_of(one, "\nSo")
    assert list(one._context_ids("other")) == begin(one) + ids_of(one, "other")
    assert one._room == one._model.config.max_position_embeddings


def test_what_goes_on_behind_a_begun_reply_is_scored_as_it_is(asks: Any) -> None:
    one = asks()
    history = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "So"}]
    begun = one.apply_chat_template(history, False)
    found = one._scored(begun, " it is")
    assert list(found.context + found.continuation) == list(one._chats[begun]) + ids_of(one, " it is")  # fmt: skip
    opened = one.apply_chat_template(history[:1])
    assert list(one._scored(opened, " it is").continuation) == ids_of(one, "\nit is")
    assert one.tokenizer_name == one.chat_template() == one._template.fingerprint


def test_a_layouts_own_opening_stands_before_a_plain_reply(asks: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    one = asks()
    assert one._opened("A") == ids_of(one, "\nA")
    header = one._template.tokenizer.control_ids["<|user|>"]
    monkeypatch.setattr(one._template.layout, "lead", "<|user|>\n")
    assert one._opened("<|user|>") == [header, *ids_of(one, "\n"), *ids_of(one, "<|user|>")]


def test_a_call_in_a_chat_is_its_name_and_its_arguments(asks: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    one = asks()
    shown = one.apply_chat_template([{"role": "user", "content": "Tell"}])
    said = {"name": Message("assistant", '{"a": 1}', "f"), "none": Message("assistant", "so. end")}
    monkeypatch.setattr(type(one._template), "parse", lambda _, ids: said[ids])
    assert one._said(shown, "name", []) == 'f\n{"a": 1}'
    assert one._said(shown, "none", ["end", "."]) == "so"


def test_an_adapted_model_is_asked_with_its_adapter(asks: Any) -> None:
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    one = asks()
    adapted = get_peft_model(deepcopy(one._model), LoraConfig(target_modules="all-linear", init_lora_weights=False))  # fmt: skip
    adapted.eval()
    [(plain, _)] = one.loglikelihood([asked("Once", " upon a time")])
    one._model = adapted
    [(found, _)] = one.loglikelihood([asked("Once", " upon a time")])
    context = begin(one) + ids_of(one, "Once")
    expected = alone(one, context, ids_of(one, "Once upon a time")[len(ids_of(one, "Once")) :])
    assert found == pytest.approx(expected, abs=1e-3)
    assert abs(found - plain) > 1e-2


# --- what the harness is asked -----------------------------------------------------------------


class Harness:
    """Stands in the place of the package: keeps what it was asked, answers with one score."""

    def __init__(self, patch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.known = ["mmlu", "own", "many"]
        self.failure = failure
        package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
        package.__spec__ = ModuleSpec("lm_eval", None)
        package.simple_evaluate = self.evaluate  # type: ignore[attr-defined]
        tasks.TaskManager = self.manager  # type: ignore[attr-defined]
        model = ModuleType("finetune.evaluation.tasks.language_model")
        model.OpenLanguageModel = lambda *_, batch_size: f"rows {batch_size}"  # type: ignore[attr-defined]
        for module in (package, tasks, model):
            patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(harness, "version", lambda _: "1.2")

    def manager(self, include_path: Any) -> Any:
        self.paths = include_path
        entry = SimpleNamespace(tags=["many"])
        return SimpleNamespace(all_tasks=self.known, all_tags=["many"], task_index={"own": entry})

    def evaluate(self, model: Any, **options: Any) -> dict[str, Any]:
        self.asked.append({"model": model, **options})
        if self.failure:
            raise self.failure
        names = options["tasks"]
        rows = [{"doc_id": n, "filter": "none", "acc": n % 2} for n in range(4)]
        rows += [{"doc_id": n, "filter": "strict", "acc": 0} for n in range(4)]
        return {
            "results": {name: {"acc,none": 0.5} for name in (*names, "own")},
            "group_subtasks": {}, "samples": {"own": rows, "mmlu": rows}, "n-shot": dict.fromkeys((*names, "own"), 5),
        }  # fmt: skip


def test_tasks_are_asked_with_their_template_their_rows_and_their_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand = Harness(monkeypatch)
    tasks = [Task("mmlu", "text"), Task("folder/own.yaml", "chat"), Task("4k", "needle")]
    found = harness.run_tasks(None, None, tasks, Asking(7, max_samples=4))  # type: ignore[arg-type]
    chats, texts = stand.asked
    assert (chats["tasks"], chats["apply_chat_template"]) == (["own"], True)
    assert (texts["tasks"], texts["apply_chat_template"]) == (["mmlu"], False)
    assert chats["model"] == "rows 7"
    assert (chats["limit"], chats["bootstrap_iters"]) == (4, 0)
    assert chats["task_manager"].all_tasks is stand.known
    assert chats["confirm_run_unsafe_code"] is False
    assert stand.paths is None, "of the last, which is no file"
    harness.run_tasks(None, None, [Task("folder/own.yml", "chat")], Asking(7))  # type: ignore[arg-type]
    assert stand.paths == ["folder"]
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    harness.run_tasks(None, None, [Task("mmlu", "chat")], Asking(7))  # type: ignore[arg-type]
    assert stand.asked[-1]["confirm_run_unsafe_code"] is True
    assert {name: one.signature for name, one in found.items()} == {
        "own/acc": "lm-evaluation-harness 1.2, chat template, 5-shot, mean over questions in per cent",
        "mmlu/acc": "lm-evaluation-harness 1.2, plain text, 5-shot, mean over questions in per cent",
    }
    assert found["own/acc"].values == (0.0, 100.0, 0.0, 100.0), "of its own filter alone"
    many = harness.run_tasks(None, None, [Task("many", "chat")], Asking(1))  # type: ignore[arg-type]
    assert many["many/acc"].ids == ("own:0", "own:1", "own:2", "own:3"), (
        "the tasks that carry a tag"
    )


def test_a_task_that_is_not_known_or_has_no_data_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Harness(monkeypatch)
    with pytest.raises(ConfigError, match="has no nothing;"):
        harness.run_tasks(None, None, [Task("nothing", "chat")], Asking(1))  # type: ignore[arg-type]
    for failure, said in (
        (OSError("gone\nmore"), "OSError: gone;"),
        (ValueError(), "ValueError: ;"),
    ):
        Harness(monkeypatch, failure)
        with pytest.raises(DataError, match=f"--tasks mmlu: {said}"):
            harness.run_tasks(None, None, [Task("mmlu", "chat")], Asking(1))  # type: ignore[arg-type]


def test_data_sets_are_read_from_a_folder_that_has_them_and_from_the_hub_afterwards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda path, *names, **options: (path, names, options))  # fmt: skip
    load = datasets.load_dataset
    here = tmp_path / "cais" / "mmlu"
    here.mkdir(parents=True)
    with harness._local_data(str(tmp_path)):
        assert datasets.load_dataset("cais/mmlu", "law", split="test") == (str(here), ("law",), {"split": "test"})  # fmt: skip
        assert datasets.load_dataset("some/other")[0] == "some/other"
    assert datasets.load_dataset is load
    with pytest.raises(OSError, match="gone"), harness._local_data(str(tmp_path)):
        raise OSError("gone")
    assert datasets.load_dataset is load
    with harness._local_data(None):
        assert datasets.load_dataset is load
