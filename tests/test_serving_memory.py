"""A dialogue that comes back with one more question is not computed from its beginning."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pictures
import pytest
import runs
import serving
import torch
from serving import data_url, showing

from finetune.distributed.map_batches import evaluating
from finetune.generation.batch import Batch, SharedPrefix
from finetune.generation.load import OpenedModel, open_model
from finetune.serving import serve as serve_module
from finetune.serving.memory import KeptPrompts

LONG = "the dog and the order of the customer " * 4


@pytest.fixture(scope="module", params=["glm", "chatglm", "ptuning_v2"])
def opened(tmp_path_factory: pytest.TempPathFactory, request: Any) -> OpenedModel:
    folder = tmp_path_factory.mktemp("model")
    if request.param != "ptuning_v2":
        return open_model(serving.save_talkative(folder / "base", request.param))
    base = serving.save_talkative(folder / "base")
    data = runs.write_dialogues(folder / "train.jsonl", 4)
    settings = runs.config(base, data, folder / "run", training__max_steps=1)
    settings["method"] = {"kind": "ptuning_v2", "num_virtual_tokens": 4}
    settings["training"]["learning_rate"] = 1.0
    runs.run_here(settings)
    return open_model(folder / "run" / "checkpoint-1")


def talk(server: serving.Served, turns: int, **how: Any) -> list[str]:
    messages: list[Any] = [{"role": "system", "content": LONG}]
    said = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"question {turn}"})
        made = server.client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=10, **how
        )
        said.append(made.choices[0].message.content or "")
        messages.append({"role": "assistant", "content": said[-1]})
    return said


def test_a_dialogue_goes_on_as_without_memory_and_computes_only_what_is_new(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    prefill = Batch.prefill

    def counted(batch: Batch, prompts: Sequence[Any], prefix: Any = None) -> torch.Tensor:
        computed.append(len(prompts[0]) - (len(prefix.ids) if prefix else 0))
        return prefill(batch, prompts, prefix)

    monkeypatch.setattr(Batch, "prefill", counted)
    with serving.served(opened) as server:
        remembered = talk(server, 4)
        counts = httpx.get(f"{server.url}/metrics", timeout=60).text
    with_memory, computed[:] = list(computed), []
    monkeypatch.setattr(KeptPrompts, "beginning_of", lambda *_: None)
    with serving.served(opened) as server:
        assert talk(server, 4) == remembered
    assert computed[0] == with_memory[0] > 40  # the system text
    assert max(with_memory[1:]) < 30
    saved = sum(computed) - sum(with_memory)
    assert f"finetune_remembered_prompt_tokens_total {saved}\n" in counts


def test_what_is_remembered_gives_the_logits_of_the_whole_prompt(opened: OpenedModel) -> None:
    first, second = list(range(40, 75)), [*range(40, 75), 7, 8, 9, 21, 22]
    with evaluating(opened.model):
        whole = Batch(opened.model, SharedPrefix(opened.model, [])).prefill([second])
        batch = Batch(opened.model, SharedPrefix(opened.model, []))
        batch.prefill([[5, 6, 7], first])  # beside a shorter row, whose columns are masked
        batch.step([9, 7])
        batch.step([9, 8])
        taken = batch.taken(1, [*first, 7, 8, 9])
        assert taken.ids == [*first, 7, 8]  # the last token has not been computed
        behind = Batch(opened.model, SharedPrefix(opened.model, [])).prefill([second], taken)
        shorter = Batch(opened.model, SharedPrefix(opened.model, [])).prefill(
            [second], taken.first(20)
        )
    torch.testing.assert_close(behind, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shorter, whole, atol=1e-4, rtol=1e-4)


def test_the_oldest_is_forgotten_first_and_what_goes_on_takes_the_place_of_its_beginning() -> None:
    memory = KeptPrompts(most_tokens=100)
    one, two, three = ([number] * 40 for number in (1, 2, 3))
    memory.keep(SharedPrefix.kept(one, []))
    memory.keep(SharedPrefix.kept(two, []))
    found = memory.beginning_of([*one, 9])  # used last
    assert found is not None
    assert found.ids == one
    memory.keep(SharedPrefix.kept(three, []))
    assert memory.beginning_of([*two, 9]) is None
    assert memory.beginning_of([*one, 9]) is not None
    memory.keep(SharedPrefix.kept([*one, *[9] * 19], []))
    assert [len(kept.ids) for kept in memory._kept] == [40, 59]
    memory.keep(SharedPrefix.kept([4] * 101, []))  # more than all that may be kept
    assert memory.beginning_of([4] * 101) is None
    same = memory.beginning_of(three)  # one token must be computed
    assert same is not None
    assert len(same.ids) == 39
    assert memory.beginning_of([*three[:15], 8]) is None  # too few to be worth it
    assert memory.used_tokens == 40 + 40 + 39


def test_a_prompt_with_an_image_is_never_remembered(tmp_path: Path) -> None:
    with serving.served(open_model(pictures.save_model(tmp_path / "glm4v"))) as server:
        for colour in ("red", "blue"):
            server.client.chat.completions.create(
                model="tiny", messages=showing(data_url(colour=colour), LONG), max_tokens=2
            )
        assert server.engine.remembered_tokens == 0


def test_the_collector_passes_over_libraries_while_the_endpoint_answers(
    tiny_glm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def answer(app: Any, engine: Any, listener: Any) -> None:
        held.append(gc.get_freeze_count())
        engine.close()

    monkeypatch.setattr(serve_module, "_run", answer)
    before = gc.get_freeze_count()
    serve_module.serve({"tiny": str(tiny_glm)}, options=serve_module.ServeOptions(port=0))
    assert held[0] > before + 10_000
