"""What a merge or an export writes, byte by byte, without a model: folders, files, and what is found wrong."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from export_parts import stored

from finetune.errors import ConfigError, ModelError, SpaceError
from finetune.export import folder as folder_module
from finetune.export import shards
from finetune.export.adapter import Update
from finetune.export.checks import ProductCheck
from finetune.export.folder import FolderPlan, carried, check_output, written
from finetune.export.numbers import STORAGE, is_finite, rounded
from finetune.export.shards import CancelledError, Output, ShardPlan, make_header, write_shard
from finetune.storage import folders

RANDOM = np.random.default_rng(3)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return RANDOM.standard_normal(shape).astype(np.float32)


def update(rows: int, columns: int, *, dora: bool = False) -> Update:
    magnitude = np.abs(floats(rows)) + 1 if dora else None
    return Update(floats(2, columns), floats(rows, 2), np.float32(0.7), magnitude)


def plan_of(*outputs: Output, name: str = "model.safetensors") -> ShardPlan:
    return ShardPlan(name, make_header(outputs, {}), outputs)


def write(plan: ShardPlan, file: Path) -> bytes:
    told: list[int] = []
    size, digest = write_shard(plan, file, stop=threading.Event(), advance=told.append)
    content = file.read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    assert size == plan.size == sum(told)
    return content


# --- files beside the weights --------------------------------------------------------------------

KEPT = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "modeling.py", "vocab.txt", "tokenizer.model", "qwen.tiktoken", "LICENSE", "LICENSE.txt",
    "NOTICE", "NOTICE.md", "model.safetensors.index.json",
]  # fmt: skip
LEFT = [
    "manifest.json", "adapter_config.json", "adapter_model.safetensors", "finetune.json", "run.json",
    "trainer_state.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors", "optimizer.pt", "README.md",
]  # fmt: skip


@pytest.mark.parametrize("name", KEPT + LEFT)
def test_what_opens_a_model_comes_along_and_what_belongs_to_a_run_does_not(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("x")
    (tmp_path / "folder.json").mkdir()
    assert carried(tmp_path) == ({name: tmp_path / name} if name in KEPT else {})


def test_an_output_may_not_be_there_nor_lie_in_what_is_read(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    for out, reason in (
        (base, "exists already"), (tmp_path / "lost", "exists already"), (tmp_path / "link" / "new", "lies inside"),
        (base / "inner" / ".." / "new", "lies inside"), (tmp_path / ("x" * 254), "cannot be made"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{reason}.*choose another --output"):
            check_output(out, {base})
    check_output(tmp_path / "based", {base})


@pytest.mark.parametrize(("missing", "fits"), [(0, True), (1, False)])
def test_there_must_be_room_for_all_bytes_and_some_more(
    missing: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = FolderPlan((plan_of(Output("a", "F32", (4,), constant=bytes(16))),), {}, {})
    assert plan.size == sum(shard.size for shard in plan.shards) > 16
    free = plan.size + (16 << 20) - missing
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if fits:
        with written(plan, tmp_path / "out", "made"):
            pass
        assert folders.verify(tmp_path / "out") == []
        return
    with pytest.raises(SpaceError, match="nothing was written"), written(plan, tmp_path / "out", "made"):  # fmt: skip
        pass
    assert list(tmp_path.iterdir()) == []


def test_texts_copies_and_weights_are_sealed_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\x00")
    plan = FolderPlan((plan_of(Output("a", "F32", (1,), constant=bytes(4))),), {"config.json": "{é}"}, {"tokenizer.json": tmp_path / "tokenizer.json"})  # fmt: skip
    with written(plan, tmp_path / "out", "made") as stage:
        assert not (tmp_path / "out").exists()
        assert stage.parent == tmp_path
    assert folders.verify(tmp_path / "out") == []
    assert (tmp_path / "out/config.json").read_text("utf-8") == "{é}"
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"\xff\x00"
    (tmp_path / "out/model.safetensors").write_bytes(b"x")
    assert folders.verify(tmp_path / "out"), "the weights are in the manifest"


def test_the_error_that_made_the_others_give_up_is_the_one_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Barrier(2, timeout=60)

    def fail(plan: ShardPlan, file: Path, *, stop: threading.Event, advance: Any) -> Any:
        begun.wait()
        if plan.name == "b":
            raise ValueError("the cause")
        assert stop.wait(60), "nobody said so"
        raise CancelledError

    monkeypatch.setattr(folder_module, "write_shard", fail)
    plan = FolderPlan(tuple(ShardPlan(name, b"", ()) for name in "ab"), {}, {})
    with pytest.raises(ValueError, match="the cause"):
        folder_module._write(plan, tmp_path, "made")


def test_an_interrupt_stops_the_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stops: list[bool] = []

    def waiting(plan: ShardPlan, file: Path, *, stop: threading.Event, advance: Any) -> Any:
        stops.append(stop.wait(60))
        raise CancelledError

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "write_shard", waiting)
    monkeypatch.setattr(folder_module, "wait", interrupted)
    plan = FolderPlan((ShardPlan("a", b"", ()),), {}, {})
    with pytest.raises(KeyboardInterrupt):
        folder_module._write(plan, tmp_path, "made")
    assert stops == [True]


# --- reading back --------------------------------------------------------------------------------


def damaged(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x55
    file.write_bytes(content)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("row", [0, 1, 5, 6])
def test_the_first_and_the_last_rows_of_a_merged_matrix_are_read_back(
    row: int, dora: bool, tmp_path: Path
) -> None:
    source = stored(tmp_path / "base.safetensors", w=("F32", floats(7, 8)))["w"]
    plan = plan_of(Output("w", "F32", (7, 8), (source,), update(7, 8, dora=dora), checked=True))
    file = tmp_path / "model.safetensors"
    write(plan, file)
    assert folder_module._check_written(plan, file) == 1
    damaged(file, len(plan.header) + row * 32 + 3)  # the exponent of a number
    with pytest.raises(ModelError, match="W \\+ scale"):
        folder_module._check_written(plan, file)


@pytest.mark.parametrize("place", [0, 3, 4, 131, 132, 195, 324, 387])
def test_both_ends_of_all_that_was_copied_are_read_back(place: int, tmp_path: Path) -> None:
    found = stored(tmp_path / "base.safetensors", a=("F32", floats(32)), b=("F32", floats(64)))
    plan = plan_of(
        Output("c", "U8", (4,), constant=b"1234"),
        Output("ab", "F32", (96,), (found["a"], found["b"])),
    )
    file = tmp_path / "model.safetensors"
    content = write(plan, file)
    assert content[len(plan.header) :] == b"1234" + b"".join(
        t.file.read_bytes()[t.start : t.end] for t in found.values()
    )
    assert folder_module._check_written(plan, file) == 2
    damaged(file, len(plan.header) + place)
    with pytest.raises(ModelError, match="was not written as planned"):
        folder_module._check_written(plan, file)


def test_a_tensor_too_many_too_few_or_of_another_kind_is_found(tmp_path: Path) -> None:
    a, b = (Output(name, "F32", (4,), constant=bytes(16)) for name in "ab")
    file = tmp_path / "model.safetensors"
    write(plan_of(a, b), file)
    for wrong in ((a,), (a, b, replace(b, name="c")), (a, replace(b, dtype="I32")), (a, replace(b, shape=(2, 2)))):  # fmt: skip
        with pytest.raises(ModelError, match=r"^[abc] was not written as planned"):
            folder_module._check_written(plan_of(*wrong), file)


@pytest.mark.parametrize("checked", [True, False])
def test_a_folder_is_read_back_unless_nobody_wants_it(
    checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(folder_module, "_check_written", lambda plan, file: read.append(file.name))
    plan = FolderPlan((plan_of(Output("a", "F32", (1,), constant=bytes(4))),), {}, {})
    with written(plan, tmp_path / "out", "made", check=checked):
        pass
    assert read == ["model.safetensors"] * checked


# --- writing -------------------------------------------------------------------------------------


def test_a_write_that_takes_a_part_only_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stored(tmp_path / "base.safetensors", a=("F32", floats(3000)))
    plan = plan_of(Output("a", "F32", (3000,), (found["a"],)))
    whole = write(plan, tmp_path / "whole")
    some = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: some(descriptor, data[:1000]))
    assert write(plan, tmp_path / "parts") == whole


def test_tensors_that_begin_anywhere_cross_the_buffers_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {"u": ("U8", np.arange(3, dtype=np.uint8)), "f": ("F32", floats(3000)), "h": ("BF16", rounded(floats(999), "BF16")), "i": ("I64", np.arange(777))}  # fmt: skip
    found = stored(tmp_path / "base.safetensors", **arrays)  # type: ignore[arg-type]
    monkeypatch.setattr(shards, "_BUFFER", 4096)
    plan = plan_of(*(Output(n, t.dtype, t.shape, (t,)) for n, t in found.items()))
    assert write(plan, tmp_path / "out") == (tmp_path / "base.safetensors").read_bytes()


def test_a_file_is_durable_before_it_is_closed_and_never_another_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for name in ("write", "fsync", "close"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, call=call, name=name: (told.append(name), call(*given))[1])  # fmt: skip
    plan = plan_of(Output("a", "F32", (1,), constant=bytes(4)))
    write(plan, tmp_path / "out")
    assert told[-2:] == ["fsync", "close"]
    assert told.count("write") == 1
    with pytest.raises(FileExistsError):
        write(plan, tmp_path / "out")


@pytest.mark.parametrize(("number", "direct", "again"), [(errno.EINVAL, True, True), (errno.EINVAL, False, False), (errno.EIO, True, False)])  # fmt: skip
def test_only_a_file_system_without_direct_writes_is_asked_again(
    number: int, direct: bool, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def refuse(descriptor: int, data: Any) -> int:
        asked.append(len(data))
        if len(asked) == 1:
            raise OSError(number, "no")
        return len(data)

    monkeypatch.setattr(os, "write", refuse)
    sink: Any = SimpleNamespace(_descriptor=1, _direct=direct, _set_direct=lambda wanted: None)
    if again:
        assert shards._Sink._write(sink, memoryview(b"abcd")) == 4
        return
    with pytest.raises(OSError, match="no"):
        shards._Sink._write(sink, memoryview(b"abcd"))
    assert len(asked) == 1


def test_what_is_given_up_ends_at_its_next_buffer(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    plan = plan_of(Output("a", "F32", (1,), constant=bytes(4)))
    with pytest.raises(CancelledError):
        write_shard(plan, tmp_path / "out", stop=stop, advance=lambda size: None)


def test_a_source_that_became_shorter_is_said(tmp_path: Path) -> None:
    found = stored(tmp_path / "base.safetensors", a=("F32", floats(100)))["a"]
    os.truncate(tmp_path / "base.safetensors", found.end - 8)
    with pytest.raises(ModelError, match="became shorter"):
        write(plan_of(Output("a", "F32", (100,), (found,))), tmp_path / "out")


NAN = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]  # rounded as a number it would be 0


@pytest.mark.parametrize("value", [NAN, np.float32("inf"), np.float32("-inf"), -NAN])
@pytest.mark.parametrize("target", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("updated", [False, True])
def test_a_base_with_a_number_that_is_none_is_never_written(
    value: Any, target: str, updated: bool, tmp_path: Path
) -> None:
    values = floats(3, 4)
    values[2, 1] = value
    source = stored(tmp_path / "base.safetensors", w=("F32", values))["w"]
    output = Output("w", target, (3, 4), (source,), update(3, 4) if updated else None)
    with pytest.raises(ModelError, match="not finite"):
        write(plan_of(output), tmp_path / "out")


@pytest.mark.parametrize("dora", [False, True])
def test_a_matrix_is_the_same_in_one_block_and_row_by_row(
    dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, change = floats(9, 5), update(9, 5, dora=dora)
    source = stored(tmp_path / "base.safetensors", w=("F32", values))["w"]
    plan = plan_of(Output("w", "F32", (9, 5), (source,), change, checked=True))
    whole = write(plan, tmp_path / "whole")
    monkeypatch.setattr(shards, "_BLOCK", 10)
    monkeypatch.setattr(folder_module, "_BACK", 1)
    assert np.allclose(
        np.frombuffer(write(plan, tmp_path / "rows")[len(plan.header) :], np.float32),
        np.frombuffer(whole[len(plan.header) :], np.float32), rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    wanted = values + change.scale * change.b @ change.a
    if change.magnitude is not None:
        wanted *= (change.magnitude / np.linalg.norm(wanted, axis=1))[:, None]
    found = np.frombuffer(whole[len(plan.header) :], np.float32).reshape(9, 5)
    assert np.allclose(found, wanted, rtol=1e-4, atol=1e-5)


# --- the checks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("dora", [False, True])
def test_rounding_passes_the_check_and_a_spacing_of_one_number_in_ten_does_not(
    dtype: str, dora: bool
) -> None:
    rows, columns = 40, 64
    values, change = floats(rows, columns), update(rows, columns, dora=dora)
    merged, scratch = values.copy(), np.empty_like(values)
    factors = change.apply(slice(0, rows), merged, scratch)
    from finetune.export.numbers import SPACING, to_float32

    seen = to_float32(rounded(merged, dtype).tobytes(), dtype, merged.shape)
    check = ProductCheck("w", change, dtype)
    for first in (0, 10, 30):  # each block has its own place in the change
        part = slice(first, first + 10)
        own = None if factors is None else factors[part]
        check.after(first, check.before(values[part]), seen[part], own)
        wrong = seen[part].copy()
        wrong[3] += 40 * max(SPACING[dtype], 64**0.5 * SPACING["F32"]) * np.abs(wrong[3]) * check._x
        with pytest.raises(ModelError, match=f"rows {first} to {first + 9} "):
            check.after(first, check.before(values[part]), wrong, own)


@pytest.mark.parametrize("dtype", list(STORAGE))
@pytest.mark.parametrize("place", [0, 4])
def test_a_number_that_is_none_is_seen_wherever_it_stands(dtype: str, place: int) -> None:
    for value in (np.inf, -np.inf, np.nan, -np.nan):
        values = np.zeros(5, np.float32)
        assert is_finite(rounded(values, dtype), dtype)
        values[place] = value
        assert not is_finite(rounded(values, dtype), dtype)
    largest = {"BF16": 3.3895e38, "F16": 65504.0, "F32": 3.4e38}[dtype]
    assert is_finite(rounded(np.array([largest, -largest], np.float32), dtype), dtype)


@pytest.mark.parametrize(("dtype", "passes"), [("F16", True), ("F32", False)])
def test_the_smallest_numbers_of_float16_are_further_apart(dtype: str, passes: bool) -> None:
    values = np.full((10, 16), 3e-7, np.float32)
    change = Update(np.zeros((1, 16), np.float32), np.zeros((10, 1), np.float32), np.float32(1))
    check = ProductCheck("w", change, dtype)
    seen = values + np.float32(2.0**-26) * check._x
    if passes:
        check.after(0, check.before(values), seen)
        return
    with pytest.raises(ModelError, match="W \\+ scale"):
        check.after(0, check.before(values), seen)


def test_a_file_system_without_direct_writes_is_written_through_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, plain = [], fcntl.fcntl

    def refused(descriptor: int, command: int, flags: int = 0) -> Any:
        if command == fcntl.F_SETFL:
            asked.append(flags & os.O_DIRECT)
            raise OSError(errno.EINVAL, "no")
        return plain(descriptor, command, flags)

    monkeypatch.setattr(shards.fcntl, "fcntl", refused)
    plan = plan_of(Output("a", "F32", (1,), constant=bytes(4)))
    assert write(plan, tmp_path / "out")[-4:] == bytes(4)
    assert asked[0] == os.O_DIRECT
