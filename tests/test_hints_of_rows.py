"""One table: what is wrong with rows, files and folders -> the options that the message tells to set."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hints import options, said, unsaid
from row_parts import REPLY, SYSTEM, USER

from finetune.artifacts import base_record, hub, resolve, run_dir
from finetune.artifacts.base_record import BaseRecord
from finetune.config.schema import DataSection, ModelSection
from finetune.data.chat import tokenizer
from finetune.data.dialogue import calls_in_text, doubts
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.data.dialogue.formats import RowRules, detect, to_conversation
from finetune.data.examples import preparation, selection, stream
from finetune.data.examples.ahead import prepare_ahead
from finetune.data.examples.shards import of_shard
from finetune.data.preview import show
from finetune.data.reading import images, parts, section, split
from finetune.data.reading.sources import ConversationStream, Reading, SourceSpec
from finetune.data.reading.streams import BadRow
from finetune.storage import cache, folders, journal, manifest, outputs

BAD = BadRow("a.jsonl:2", "is no row")


def of_row(value: Any, **rules: Any) -> str:
    return said(to_conversation, value, rules=RowRules(**rules))


def of_messages(*messages: Any, **rules: Any) -> str:
    return of_row({"messages": list(messages)}, **rules)


def rows_texts() -> Iterator[tuple[str, str]]:
    """What is said of a row's content."""
    yield of_messages(REPLY), "data.turns:merge"
    yield of_messages(USER, SYSTEM, REPLY), "data.turns:merge"
    yield of_messages(USER, REPLY, REPLY), "data.turns:merge"
    yield of_messages(USER, USER, REPLY), "data.turns:merge"
    yield said(detect, [{"body": "x"}]), "data.columns"
    yield of_row({"prompt": "Q", "response": "A", "chosen": "x"}), "data.columns"
    yield of_row({"prompt": "Q", "response": "A", "message": "x"}), "data.ignore_columns"
    yield of_row({"prompt": "Q", "response": "A", "do_train": False}), "data.ignore_columns"
    yield of_messages(USER, {**REPLY, "compute_loss": False}), "data.ignore_columns"
    thought = {**REPLY, "reasoning_content": "why"}
    yield of_messages(USER, thought, thinks=False), "data.reasoning:drop"
    yield of_messages(USER, REPLY, reasoning="require"), "data.reasoning:require"
    for text in (doubts.THOUGHT_IN_TEXT, doubts.OTHER_THOUGHT, doubts.CALL_THOUGHT):
        yield text, "data.reasoning:drop"
    for text in (calls_in_text.CALL_IN_TEXT, calls_in_text.RESULT_IN_TEXT, calls_in_text.TOOLS_IN_TEXT):  # fmt: skip
        yield text, "data.calls_in_text:read"
    yield preparation.thought_notes(2, 1)[0], "data.reasoning:require"
    yield preparation.notes_of({"extra": 1}, {})[0], "data.ignore_columns"


def examples_texts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """What is said when examples are made."""
    tally = preparation.Tally()
    tally.refuse("a.jsonl:1: 9 tokens")
    yield said(tally.raise_if_refused, 8), "data.max_length data.on_too_long"
    yield said(tally.raise_if_nothing_is_left), "data.max_length"
    nothing = [np.array([0], np.int64)]
    yield said(selection.mixed, nothing, [0.1], selection.AS_STORED, 0), "data.train"
    with monkeypatch.context() as without:
        without.setitem(__import__("sys").modules, "datasketch", None)
        yield said(selection._near, None, None, 1), "data.deduplicate:near"
    model = ModelSection(path="m")
    streamed = DataSection(train="a", streaming=True)
    yield said(prepare_ahead, streamed, model, 0, None), "data.streaming"
    held_out = DataSection(train="a", validation="5%")
    yield said(prepare_ahead, held_out, model, 0, "1/2"), "--shard data.validation"
    yield said(of_shard, [], "1"), "--shard"
    yield said(of_shard, [], "1/2"), "--shard"
    yield said(stream.position_of, {}), "data.streaming"
    judge, settings = stream.ExampleStream._judge, SimpleNamespace(reading=Reading())
    some = preparation.ExampleCounts(rows=2000, bad=100)
    of = SimpleNamespace(settings=settings)
    yield said(judge, of, [BAD], some), "data.on_bad_row:skip"
    settings.reading = Reading("skip")
    yield said(judge, of, [BAD], some), "data.max_bad_rows"
    of = SimpleNamespace(position=stream.START, _of_pass=lambda _: ())
    yield said(next, stream.ExampleStream.items(of)), "data.max_length"  # type: ignore[arg-type]
    words = Conversation((Message("user", "Q"), Message("assistant", "A")), location="f:1")
    untaught = SimpleNamespace(examples=lambda *_: [[]])
    yield said(show.shown, words, untaught, "messages"), "--index"
    some_rows: Any = type("Rows", (list,), {"num_bad": 0})()
    yield said(show._at_index, some_rows, "a.jsonl", 3), "--index"


def reading_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """What is said when files are read."""
    policy = images.ImagePolicy(file_alone=True)
    alone = images.ImageFiles(policy)
    yield said(alone._path, "a.png", folder), "data.image_root data.streaming"
    yield said(images._under, folder, "../a.png"), "data.image_root --image-root"
    (folder / "out.png").symlink_to("/etc/hosts")
    yield said(images._under, folder, "out.png"), "data.image_root --image-root"
    (folder / "file").write_text("")
    kept = images.ImageFiles(images.ImagePolicy(cache_root=str(folder / "file")))
    yield said(kept._kept, "data:image;base64,QQ=="), "data.cache_dir FINETUNE_CACHE"
    part = parts.Part(0.1, held_out=True, group_by="who")
    yield part.nothing_left("a.jsonl", 3), "data.validation"
    words = Conversation((Message("user", "Q"),), location="f:1")
    yield said(part.takes, {}, words), "data.group_by"
    yield said(section.with_rows, section.AS_DEFAULT, options=["turns"]), "--rows"
    yield said(section.with_rows, section.AS_DEFAULT, options=["turns=x"]), "--rows"
    rows = ConversationStream([], reading=Reading(), purpose="train", seed=0)
    rows.bad_rows, rows.num_bad, rows.rows = [BAD], 1, 2
    yield rows.report(), "data.on_bad_row:skip"
    rows._reading = Reading("skip")
    yield rows.report(), "data.max_bad_rows"
    file = folder / "a.jsonl"
    file.write_text('{"prompt": "Q", "response": "A"}\n')
    chosen, out = [SourceSpec(str(file))], folder / "out"
    yield said(split.split, chosen, out, part, Reading()), "data.group_by"
    whole = parts.Part(1e-9, held_out=True)
    yield said(split.split, chosen, out, whole, Reading()), "--share"
    (out / split.TRAIN).write_text("x")
    yield said(split.split, chosen, out, whole, Reading()), "--overwrite --output"
    with monkeypatch.context() as nowhere:
        nowhere.setattr(tokenizer, "_cache_folders", lambda: iter(()))
        yield said(tokenizer._keep, "key", "{}"), "FINETUNE_CACHE"


def storage_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """What is said of folders that are written."""
    full = OSError(errno.ENOSPC, "No space left on device")

    def build(_: Path) -> Any:
        raise full

    yield said(cache.open_or_build, folder, "k", build), "data.cache_dir FINETUNE_CACHE"
    yield said(cache.open_or_build, folder / "file", "k", build), "data.cache_dir FINETUNE_CACHE"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(cache.tempfile, "gettempdir", lambda: str(folder))
        told: list[str] = []
        elsewhere.setattr(cache.console, "warn_once", told.append)
        private = cache.private_folder("no home")
        yield told[0], "FINETUNE_CACHE"
        private.chmod(0o777)
        yield said(cache.private_folder, "no home"), "FINETUNE_CACHE"
        elsewhere.setattr(cache.tempfile, "gettempdir", lambda: str(folder / "file"))
        yield said(cache.private_folder, "no home"), "FINETUNE_CACHE"
    step = folder / "checkpoint-1"
    yield said(folders.staged(step, is_rank0=False).__enter__), "training.output_dir"
    reason = str(folders._space_error(full, step, folder))
    yield reason, "training.keep_checkpoints training.output_dir"
    yield said(folders.refuse_others, folder, ["file"]), "--output --overwrite"
    (folder / "another").mkdir()
    (folder / "another/weights").write_text("x")
    manifest.seal(folder / "another")
    yield said(folders.refuse_another_result, folder / "another", lambda _: False), "--output"
    mine = folder / "mine.txt"
    mine.write_text("x")
    check = {"overwrite": False, "is_ours": lambda _: False}
    yield said(outputs.check_output, mine, [], **check), "--output --overwrite"
    yield said(outputs.check_output, mine, [folder], **check), "--output"
    yield said(outputs.check_output, mine, [mine], **check), "--output"
    (folder / "b.part").write_text("x")
    growing = journal.ResumableOutput(folder / "b", "id")
    yield said(growing.open, dict), "--output --overwrite"
    with monkeypatch.context() as busy:
        busy.setattr(journal, "try_lock", lambda _: None)
        yield said(growing.open, dict), "--output"


def artifacts_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """What is said of models, adapters and runs."""
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    yield said(resolve.model_base, adapter), "--base"
    yield said(resolve.check_no_adapter, adapter), "model.path model.adapter"
    run = folder / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    yield said(resolve.check_no_adapter, run), "model.path"
    BaseRecord("m", None, "f").write(adapter, method="lora")
    with monkeypatch.context() as other:
        other.setattr(base_record, "model_fingerprint", lambda _: "g")
        yield said(base_record.check_base, adapter, folder), "--base --force"
        yield base_record.check_base(adapter, folder, force=True)[0], "--force"
    with monkeypatch.context() as wrong:
        wrong.setenv(hub.CHOICE, "nohub")
        yield said(hub.repository, "a/b"), "FINETUNE_HUB --hub"
    theirs = "--local-dir --local_dir"  # of the hubs' own commands
    yield hub.how_to_get(hub.Repository("huggingface", "a/b"), "model"), f"{theirs} --model"
    of_data = hub.how_to_get(hub.Repository("huggingface", "a/b"), "dataset")
    yield of_data, f"{theirs} --dataset --repo-type"
    with run_dir.RunDirectory.open(folder / "busy"):
        yield said(run_dir.RunDirectory.open, folder / "busy"), "training.output_dir"
    (folder / "theirs").mkdir()
    (folder / "theirs/config.yaml").write_text("x")
    yield said(run_dir.RunDirectory.open, folder / "theirs"), "training.output_dir"
    yield said(run_dir.RunDirectory.open, folder / "theirs/config.yaml/x"), "training.output_dir"
    (run / "best.json").symlink_to("elsewhere")
    yield said(run_dir.RunDirectory.open, run), "training.output_dir"


def wrong(texts: list[tuple[str, str]]) -> dict[str, tuple[list[str], str]]:
    """Texts that name other options than they are to."""
    return {
        text: (sorted(options(text)), named)
        for text, named in texts
        if options(text) != set(named.split())
    }


def test_every_text_about_rows_names_the_options_that_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*rows_texts(), *examples_texts(monkeypatch), *reading_texts(tmp_path, monkeypatch)]
    assert wrong(texts) == {}
    of_keys = "what seems to say what is learned"  # a line of the reference page
    missing = unsaid("data", [text for text, _ in texts])
    assert [
        place for place in missing if of_keys not in place and "see `data.re" not in place
    ] == []


@pytest.mark.parametrize(("room", "made"), [("storage", storage_texts), ("artifacts", artifacts_texts)])  # fmt: skip
def test_every_text_about_folders_names_the_options_that_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str, made: Any
) -> None:
    (tmp_path / "file").write_text("")
    texts = list(made(tmp_path, monkeypatch))
    assert wrong(texts) == {}
    assert unsaid(room, [text for text, _ in texts]) == []
