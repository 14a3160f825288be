"""The key that kept replies and losses are found by: it changes with whatever decides them, and with nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import adapters
import pytest
from rows import turns, write_rows

from finetune.config.schema import DataSection, EvaluationSection
from finetune.evaluation import keys
from finetune.evaluation.keys import evaluation_key, model_key, tasks_key
from finetune.evaluation.options import Options
from finetune.evaluation.targets import Target
from finetune.generation.backends.choice import BackendChoice
from finetune.generation.settings import Placement, Settings
from finetune.generation.structured import Form
from finetune.storage.seen import SeenFiles


@dataclass
class Asked:
    """What one evaluation is made of."""

    target: Target
    settings: Settings
    options: Options = field(default_factory=Options)

    @property
    def key(self) -> str:
        seen = SeenFiles.of(Path(source.path) for source in self.settings.sources)
        return evaluation_key(self.target, self.settings, self.options, seen)

    def data(self, **changes: Any) -> None:
        """Other options of the data section."""
        data = self.settings.data.model_copy(update=changes)
        self.settings = replace(self.settings, data=data)

    def evaluation(self, **changes: Any) -> None:
        """Other options of the evaluation section."""
        section = self.settings.evaluation.model_copy(update=changes)
        self.settings = replace(self.settings, evaluation=section)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter of it."""
    place = tmp_path_factory.mktemp("keys")
    base = adapters.make_base(place / "base", shards=1)
    adapters.make_adapter(place / "adapter", base)
    return place


@pytest.fixture
def asked(made: Path, tmp_path: Path) -> Asked:
    place = Path(shutil.copytree(made, tmp_path / "models"))
    dev = write_rows(tmp_path / "dev.jsonl", [{"messages": turns("hi", "hello")}])
    section = DataSection(train=[], validation=[str(dev)])
    target = Target("one", str(place / "adapter"), "adapter", base=str(place / "base"))
    return Asked(target, Settings(section, EvaluationSection()))


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text("utf-8")
    assert old in text, file
    file.write_text(text.replace(old, new, 1), "utf-8")


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(bytes(data))


def folder(one: Asked) -> Path:
    return Path(one.target.path)


def optioned(**changes: Any) -> Callable[[Asked], None]:
    def change(one: Asked) -> None:
        one.options = replace(one.options, **changes)

    return change


def set_to(**changes: Any) -> Callable[[Asked], None]:
    def change(one: Asked) -> None:
        one.settings = replace(one.settings, **changes)

    return change


CHANGES: dict[str, Callable[[Asked], object]] = {
    "weights of the adapter": lambda one: flip(folder(one) / "adapter_model.safetensors", -1),
    "options of the adapter": lambda one: rewrite(folder(one) / "adapter_config.json", '"lora_alpha": 6', '"lora_alpha": 7'),
    "weights of its base": lambda one: flip(Path(one.target.base or "") / "model-00001-of-00001.safetensors", -1),
    "tokenizer of its base": lambda one: rewrite(Path(one.target.base or "") / "tokenizer_config.json", "{", "{ "),
    "chat template": lambda one: (folder(one) / "chat_template.jinja").write_text("another"),
    "content of the data": lambda one: rewrite(Path(one.settings.sources[0].path), "hello", "hullo"),
    "layout of the rows": lambda one: one.data(format="messages"),
    "their images": lambda one: one.data(image_root="pictures"),
    "bad rows": lambda one: one.data(on_bad_row="skip"),
    "turns": lambda one: one.data(turns="as_is"),
    "ignored columns": lambda one: one.data(ignore_columns=["x"]),
    "max_length": lambda one: one.data(max_length=64),
    "train_on": lambda one: one.data(train_on="last_reply"),
    "on_too_long": lambda one: one.data(on_too_long="drop"),
    "generate": lambda one: one.evaluation(generate=False),
    "replies": lambda one: one.evaluation(replies="last_reply"),
    "max_new_tokens": lambda one: one.evaluation(max_new_tokens=7),
    "max_samples": lambda one: one.evaluation(max_samples=3),
    "batch_size": lambda one: one.evaluation(batch_size=2),
    "temperature": optioned(temperature=0.5),
    "a schema": optioned(form=Form("{}")),
    "calls": optioned(form=Form(must_call=True)),
    "vLLM": optioned(by=BackendChoice("vllm")),
    "4 bits": optioned(placement=Placement(quantization="nf4")),
    "rows of the loss": set_to(loss_batch_size=3),
    "seed of the data": set_to(seed=5),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_decides_the_replies_or_losses_changes_the_key(asked: Asked, what: str) -> None:
    before = asked.key
    assert asked.key == before
    CHANGES[what](asked)
    assert asked.key != before


def test_the_seed_counts_where_tokens_are_drawn(asked: Asked) -> None:
    found = set()
    for seed in (0, 1):
        asked.options = Options(temperature=0.5, seed=seed)
        found.add(asked.key)
    assert len(found) == 2


@pytest.mark.parametrize(
    "what",
    ["the device", "the packages", "another version of what is generated"],
)
def test_what_computes_changes_the_key(
    asked: Asked, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = asked.key
    if what == "the device":
        monkeypatch.setattr(keys.hardware, "likely_kind", lambda: "an accelerator")
    elif what == "the packages":
        monkeypatch.setattr(keys, "versions", dict.fromkeys)
    else:
        monkeypatch.setattr(keys, "FORMAT", keys.FORMAT + 1)
    assert asked.key != before


def test_nothing_depends_on_where_the_model_lies_or_what_else_is_asked(
    asked: Asked, tmp_path: Path
) -> None:
    before = asked.key
    moved = Path(shutil.copytree(folder(asked).parent, tmp_path / "moved"))
    (moved / "adapter" / "README.md").write_text("a card")
    asked.target = replace(asked.target, name="two", path=str(moved / "adapter"), base=str(moved / "base"))  # fmt: skip
    asked.options = Options(with_base=True, overwrite=True, general=("g.jsonl",), tasks=("mmlu",))
    asked.data(cache_dir=str(tmp_path))
    asked.data(cache_dir=None)
    assert asked.key == before


def test_a_base_counts_in_the_number_format_of_the_checkpoint_it_stands_beside(
    asked: Asked, made: Path, tmp_path: Path
) -> None:
    like = Path(shutil.copytree(made / "adapter", tmp_path / "checkpoint-2"))
    asked.target = Target("base", str(made / "base"), "base", like=str(like))
    keys = set()
    for model in ("", ", dtype: float32", ", dtype: bfloat16", ", quantization: nf4", ", attention: eager", ", kernels: torch"):  # fmt: skip
        (like / "config.yaml").write_text(
            f"model: {{path: m{model}}}\ndata: {{train: d}}\nmethod: {{kind: lora}}\n"
            "training: {output_dir: r}\n"
        )
        keys.add(asked.key)
    assert len(keys) == 6


def test_what_may_change_unseen_is_never_taken_from_before(asked: Asked) -> None:
    asked.options = Options(by=BackendChoice(endpoint="openai:m@http://localhost:1/v1"))
    assert asked.key != asked.key
    asked.options = Options()
    seen = SeenFiles.of([])
    hub = Target("hub", "somebody/model", "base")
    found = {evaluation_key(hub, asked.settings, asked.options, seen) for _ in range(2)}
    assert len(found) == 2


def test_an_adapter_whose_base_is_not_on_this_disk_has_no_key_of_its_own(made: Path) -> None:
    assert model_key(str(made / "adapter"), "somebody/model") is None
    found = model_key(str(made / "adapter"), None)
    assert found is not None
    assert found["base"] == model_key(str(made / "base"), None)
    assert model_key("somebody/model", None) is None


def test_the_key_of_tasks_changes_with_what_is_asked_of_how_much_and_from_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("task: own\n")
    questions = tmp_path / "calls"
    (questions / "possible_answer").mkdir(parents=True)
    for file in (questions / "BFCL_v3_simple.json", questions / "possible_answer/BFCL_v3_simple.json"):  # fmt: skip
        file.write_text("{}\n")
    names = ("mmlu", str(own), f"calls:{questions}")
    before = tasks_key(names, 10)
    assert tasks_key(names, 10) == before
    assert tasks_key(names, 11) != before
    assert tasks_key(names, None) != before
    assert tasks_key(names[1:], 10) != before
    assert tasks_key(names, 10, str(tmp_path)) != before
    assert tasks_key(("text:mmlu", *names[1:]), 10) != before
    for file in (own, *sorted(questions.rglob("*.json"))):
        text = file.read_text()
        file.write_text(json.dumps("another"))
        assert tasks_key(names, 10) != before, file
        file.write_text(text)
    assert tasks_key((f"calls:{questions}",), 10) == tasks_key((f"calls:{questions}",), 10)
    beside = tasks_key((str(own),), None)
    (tmp_path / "utils.py").write_text("def right(row): ...\n")
    assert tasks_key((str(own),), None) != beside, "a task's functions lie beside it"
    for ending in (".yml", ".yaml", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt"):
        (tmp_path / f"rows{ending}").write_text("1")
        now = tasks_key((str(own),), None)
        (tmp_path / f"rows{ending}").write_text("2")
        assert tasks_key((str(own),), None) != now, ending
    (tmp_path / "notes.log").write_text("…")
    after = tasks_key((str(own),), None)
    (tmp_path / "notes.log").write_text("… more")
    assert tasks_key((str(own),), None) == after
    monkeypatch.setattr(keys, "harness_version", lambda: "another")
    assert tasks_key((str(own),), None) != after
