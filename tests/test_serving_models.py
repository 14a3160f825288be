"""Several models in one process: each is asked by its name and answers as if it were alone."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import runs
import serving
import torch
from adapters import make_adapter
from serving import HELLO

from finetune.cli.inference_commands import _by_name
from finetune.errors import ConfigError
from finetune.generation.batch import Batch
from finetune.generation.load import OpenedModel, SideBySide, open_model, open_side_by_side
from finetune.serving import engine as engine_module
from finetune.serving.serve import ServeOptions, _assembled, _watch
from finetune.storage.manifest import seal


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = serving.save_talkative(folder / "base")
    data = runs.write_dialogues(folder / "train.jsonl", 4)
    prefix = runs.config(base, data, folder / "prefix", training__max_steps=1, training__save_every_steps=1)  # fmt: skip
    prefix["method"] = {"kind": "ptuning_v2", "num_virtual_tokens": 4}
    prefix["training"]["learning_rate"] = 1.0
    runs.run_here(prefix)
    return {
        "base": base,
        "lora": make_adapter(folder / "lora", base),
        "other": make_adapter(folder / "other", base, seed=5),
        "prefix": folder / "prefix" / "checkpoint-1",
        "another base": serving.save_talkative(folder / "published", "chatglm"),
    }


@pytest.fixture(scope="module")
def together(folders: dict[str, Path]) -> dict[str, OpenedModel]:
    return open_side_by_side(folders)


@pytest.fixture(scope="module")
def server(together: dict[str, OpenedModel]) -> Iterator[serving.Served]:
    with serving.served(together) as running:
        yield running


def test_checkpoints_of_a_training_run_are_picked_up_and_old_ones_let_go(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Each new one beside those before it; half-written ones wait, and what is answered stays."""
    options = ServeOptions()
    beside = SideBySide()
    _, engine, rules = _assembled({"base": beside.open(folders["base"])}, options, None)
    try:
        watch = _watch(tmp_path / "run", beside, engine, rules, options)
        watch.look()
        assert list(rules) == ["base"], "the run is not there yet"
        for number in range(1, 6):
            checkpoint = tmp_path / "run" / f"checkpoint-{number}"
            shutil.copytree(folders["prefix"], checkpoint)
            if number == 2:
                (checkpoint / "adapter_model.safetensors").write_bytes(b"half")
            watch.look()
        assert list(rules) == ["base", "run", "run@3", "run@4", "run@5"], "three, and no broken one"
        assert set(engine.writers) == {"base", "run@3", "run@4", "run@5"}
        assert rules["run"].name == "run@5"
        base = engine.writers["base"].lanes["short"].decoder
        new = engine.writers["run@5"].lanes["short"].decoder
        first, second = (one.batch._model for one in (base, new))
        kept = {parameter.data_ptr() for parameter in first.parameters()}
        assert kept <= {parameter.data_ptr() for parameter in second.parameters()}, (
            "one base in memory"
        )
        with pytest.raises(ConfigError, match="another model is called 'base'"):
            _watch(tmp_path / "base", beside, engine, rules, options)
        shutil.copytree(folders["base"], tmp_path / "whole" / "checkpoint-1")
        seal(tmp_path / "whole" / "checkpoint-1")
        with pytest.raises(ConfigError, match="is a whole model"):
            _watch(tmp_path / "whole", beside, engine, rules, options).look()
    finally:
        engine.close()


def replies(server: serving.Served, asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
    async def all_at_once() -> list[Any]:
        async with server.async_client as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.create(model=name, messages=HELLO, **how)
                    for name, how in asked
                )
            )

    return [made.choices[0].message.content for made in asyncio.run(all_at_once())]


def test_each_model_says_what_it_says_alone(
    server: serving.Served, folders: dict[str, Path]
) -> None:
    asked = [(name, {"max_tokens": 12 + turn}) for turn in range(3) for name in folders]
    said = replies(server, asked)
    for name, folder in folders.items():
        with serving.served({name: open_model(folder)}) as alone:
            own = [how for other, how in asked if other == name]
            assert replies(alone, [(name, how) for how in own]) == [
                text for text, (other, _) in zip(said, asked, strict=True) if other == name
            ]
    assert len(set(said[: len(folders)])) == len(folders)


def test_a_base_lies_in_memory_once(together: dict[str, OpenedModel]) -> None:
    def places(model: Any) -> set[int]:
        return {weight.data_ptr() for weight in model.parameters() if weight.numel() > 200}

    base = places(together["base"].model)
    for name in ("lora", "other", "prefix"):
        assert base <= places(together[name].model), name
    assert not base & places(together["another base"].model)


def test_every_model_is_listed_and_another_one_is_refused(server: serving.Served) -> None:
    listed = [model.id for model in server.client.models.list()]
    assert listed == ["base", "lora", "other", "prefix", "another base"]
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here, 'base' and 'lora'"):
        server.client.chat.completions.create(model="gpt", messages=HELLO)


def test_what_goes_wrong_with_one_model_harms_no_other(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_side_by_side({name: folders[name] for name in ("base", "lora")})

    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no more")

    with serving.served(opened) as server:
        monkeypatch.setattr(
            server.engine.writers["lora"].lanes["short"].decoder.batch, "step", broken
        )
        create = server.client.chat.completions.create
        with pytest.raises(openai.InternalServerError):
            create(model="lora", messages=HELLO, max_tokens=5)
        assert create(model="base", messages=HELLO, max_tokens=5).choices[0].message.content
        assert create(model="lora", messages=HELLO, max_tokens=5).choices[0].message.content


def test_models_are_named_on_the_command_line(folders: dict[str, Path]) -> None:
    base, lora = str(folders["base"]), str(folders["lora"])
    assert _by_name(base, None, [f"a={lora}"]) == {"base": base, "a": lora}
    assert _by_name(base, "b", [f"base={lora}"]) == {"b": base, "base": lora}
    for more, reason in (
        (lora, "NAME=TARGET"),
        (f"={lora}", "NAME=TARGET"),
        (f"base={lora}", "--name"),
    ):
        with pytest.raises(ConfigError, match=reason):
            _by_name(base, None, [more])


def test_rows_of_a_base_and_of_plain_adapters_are_one_pass_and_each_as_alone(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA on all layers and on some, and a prefix; DoRA and another base have passes of their own."""
    base = folders["base"]
    targets = {
        **folders,
        "narrow": make_adapter(
            tmp_path / "narrow", base, seed=9, r=8, target_modules=["v_proj", "o_proj"]
        ),
        "dora": make_adapter(tmp_path / "dora", base, seed=7, use_dora=True),
    }
    passes: list[int] = []
    step = Batch.step

    def counting(batch: Batch, tokens: Any) -> Any:
        passes.append(len(tokens))
        return step(batch, tokens)

    monkeypatch.setattr(Batch, "step", counting)
    monkeypatch.setattr(engine_module, "GATHER_SECONDS", 20)  # until all of them wait
    asked = [(name, {"max_tokens": 14, "logprobs": True, "top_logprobs": 1}) for name in targets]
    with serving.served(open_side_by_side(targets), batch_size=len(asked)) as server:
        writers = server.engine.writers
        shared = {name for name, one in writers.items() if one is writers["base"]}
        said = replies(server, asked)
    assert shared == {"base", "lora", "other", "prefix", "narrow"}
    assert passes.count(5) >= 10, "five models, one pass"
    monkeypatch.setattr(engine_module, "GATHER_SECONDS", 0.0)
    for name, folder in targets.items():
        with serving.served({name: open_model(folder)}) as alone:
            own = {other: text for (other, _), text in zip(asked, said, strict=True)}
            assert replies(alone, [(name, {"max_tokens": 14})]) == [own[name]], name
    assert len(set(said)) == len(said)
