"""Merging refuses what it cannot do right, and never leaves half of anything behind."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter, make_base
from safetensors.torch import load_file, save_file

from finetune.errors import ConfigError, ModelError, SpaceError
from finetune.export import folder as folder_writer
from finetune.export import shards
from finetune.export.adapter import Update
from finetune.export.convert import export
from finetune.export.merge import merge
from finetune.export.parity import check_parity
from finetune.storage import folders


def test_a_base_that_is_not_the_adapters_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    other = make_base(tmp_path / "other", seed=7)
    narrower = make_base(tmp_path / "narrower", num_hidden_layers=1)
    adapter = make_adapter(tmp_path / "adapter", base)
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="was trained on"):
        merge(adapter, out, base=other)
    with pytest.raises(ModelError, match="is not there"):
        merge(adapter, out, base=narrower, force=True)
    assert not out.exists()
    report = merge(adapter, out, base=other, force=True, check="none")
    assert "--force" in report.notes[0]
    (adapter / "finetune.json").unlink()
    report = merge(adapter, tmp_path / "foreign", check="none")
    assert "only shapes were compared" in report.notes[0]


def test_outputs_that_would_touch_what_is_read_or_there_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    (tmp_path / "taken").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = fingerprints(tmp_path)
    for out in (
        base,
        adapter,
        base / "new",
        adapter / "new",
        tmp_path / "taken",
        tmp_path / "link",
    ):
        with pytest.raises(ConfigError, match="choose another --output"):
            merge(adapter, out)
    assert fingerprints(tmp_path) == before


def fingerprints(folder: Path) -> dict[str, str]:
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "cannot be merged .*from_pretrained"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"r": 5}, "has rank 4"),
        ({"base_model_name_or_path": None}, "--base"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_an_adapter_that_cannot_be_merged_exactly_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=reason):
        merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_and_bases_in_pickles_are_not_opened(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        merge(adapter, tmp_path / "out")
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    for file in [*base.glob("*.safetensors"), *base.glob("*.index.json")]:
        file.unlink()
    with pytest.raises(ModelError, match="pickle"):
        merge(adapter, tmp_path / "out", force=True)


@pytest.mark.parametrize("buffer", [4096, 1 << 20])
@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_is_the_same_through_the_cache_and_past_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, buffer: int
) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base)
    merge(adapter, tmp_path / "whole", check="none")
    monkeypatch.setattr(shards, "_BUFFER", buffer)
    write = os.write

    def refusing(descriptor: int, data: Any) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "this file system has a cache only")
        return write(descriptor, data)

    if not direct:
        monkeypatch.setattr(os, "write", refusing)
    merge(adapter, tmp_path / "out", check="none")
    assert folders.verify(tmp_path / "out") == []
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=str)
def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, value: float) -> None:
    base = make_base(tmp_path / "base", torch.float16)
    adapter = make_adapter(tmp_path / "adapter", base)
    parts = load_file(adapter / "adapter_model.safetensors")
    next(part for name, part in parts.items() if "lora_B" in name)[0, 0] = value
    save_file(parts, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        merge(adapter, tmp_path / "out", check="none")
    assert [f.name for f in tmp_path.iterdir() if "out" in f.name] == []


def wrong_scale(self: Update, rows: slice, weights: Any, scratch: Any, apply: Any) -> Any:
    return apply(
        Update(self.a, self.b, self.scale * np.float32(1.2), self.magnitude), rows, weights, scratch
    )


def nothing_added(self: Update, rows: slice, weights: Any, scratch: Any, apply: Any) -> Any:
    return None


def other_columns(self: Update, rows: slice, weights: Any, scratch: Any, apply: Any) -> Any:
    moved = Update(np.roll(self.a, 1, axis=1), self.b, self.scale, self.magnitude)
    return apply(moved, rows, weights, scratch)


def one_row_left_out(self: Update, rows: slice, weights: Any, scratch: Any, apply: Any) -> Any:
    kept = weights[-1].copy()
    factors = apply(self, rows, weights, scratch)
    weights[-1] = kept
    return factors


MISTAKES = [wrong_scale, nothing_added, other_columns, one_row_left_out]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merge_that_is_not_w_plus_b_a_is_found_while_it_is_written_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Any, dtype: torch.dtype
) -> None:
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", base)
    apply = Update.apply
    monkeypatch.setattr(Update, "apply", lambda self, *rest: mistake(self, *rest, apply))
    with pytest.raises(ModelError, match=r"are not W \+ scale \* B A"):
        merge(adapter, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir() if "out" in f.name] == []
    merge(adapter, tmp_path / "unchecked", check="none")


def test_tensors_in_each_others_places_are_found_when_they_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    write = folder_writer.write_shard

    def mixed(plan: Any, target: Path, **rest: Any) -> Any:
        """The header's order is not the order of what is written."""
        norms = [o for o in plan.outputs if "norm" in o.name]
        if len(norms) < 2:
            return write(plan, target, **rest)
        other = {norms[0].name: norms[1], norms[1].name: norms[0]}
        order = tuple(other.get(o.name, o) for o in plan.outputs)
        return write(replace(plan, outputs=order), target, **rest)

    monkeypatch.setattr(folder_writer, "write_shard", mixed)
    stored = {file: load_file(file) for file in base.glob("*.safetensors")}
    for file, tensors in stored.items():  # norms of a fresh model are all ones
        save_file({n: t * (1 + torch.rand_like(t)) for n, t in tensors.items()}, file)
    with pytest.raises(ModelError, match=r"norm.*was not written as planned"):
        merge(adapter, tmp_path / "out", force=True)
    assert [f.name for f in tmp_path.iterdir() if "out" in f.name] == []


def test_the_full_check_finds_logits_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    apply = Update.apply
    monkeypatch.setattr(Update, "apply", lambda self, *rest: wrong_scale(self, *rest, apply))
    merge(adapter, tmp_path / "wrong", check="none")
    with pytest.raises(ModelError, match="differ from those before"):
        check_parity(base, [(adapter, 1.0)], tmp_path / "wrong")


def test_too_small_a_disk_is_said_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(folders, "staged", None)
    with pytest.raises(SpaceError, match="nothing was written") as caught:
        merge(adapter, tmp_path / "out")
    assert caught.value.exit_code == 6


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    calls = iter(range(1000))
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if next(calls) > 5:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:1000])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SpaceError, match="no room to write"):
        merge(adapter, tmp_path / "out", check="none")
    assert [f.name for f in tmp_path.iterdir() if "out" in f.name] == []


@pytest.mark.parametrize("kind", ["lora", "several", "full", "export", "export adapter"])
def test_what_is_killed_at_any_point_leaves_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(shards, "_BUFFER", 8192)  # many writes although the model is tiny
    base = make_base(tmp_path / "base", shards=2)
    adapter = make_adapter(tmp_path / "adapter", base)
    other = make_adapter(tmp_path / "other", base, seed=2)
    sources = {"lora": adapter, "several": [(adapter, 0.5), (other, 2.0)], "full": base}

    def write(out: Path) -> None:
        if kind.startswith("export"):
            source = str(adapter if kind == "export adapter" else base)
            export(source, out, layout="published", check="none")
        else:
            merge(sources[kind], out, dtype="bfloat16" if kind == "full" else None, check="none")

    write(tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    out, survived = tmp_path / "out", 0
    for last in range(1000):
        if (child := os.fork()) == 0:
            die_at_call(last)
            write(out)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if out.exists():
            assert folders.verify(out) == []
            survived += 1
            if code != 0:
                shutil.rmtree(out)
        if code == 0:
            break
    assert last >= (10 if kind == "export adapter" else 40)
    assert survived >= 2  # some die after the rename
    assert contents(out) == wanted
    left = {"base", "adapter", "other", "whole", "out"}
    assert {f.name for f in tmp_path.iterdir()} == left


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the card, which names the folder, and the manifest, which has the card's sum."""
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.name not in ("README.md", "manifest.json")
    }


def die_at_call(last: int) -> None:
    """End this process in place of the call number `last` that changes the disk."""
    count = iter(range(last + 1))
    for name in ("write", "fsync", "rename", "mkdir", "unlink", "rmdir"):
        call = getattr(os, name)

        def counted(*args: Any, call: Any = call, **options: Any) -> Any:
            if next(count, last) == last:
                os._exit(9)
            return call(*args, **options)

        setattr(os, name, counted)


@pytest.mark.parametrize(
    "name", ["a", "ab", "abc", "abcd", "abcde", "abcdef", "abcdefg", "abcdefgh", "重"]
)
def test_tensors_begin_at_a_multiple_of_eight_bytes(name: str) -> None:
    header = shards.make_header(
        [shards.Output(name, "F32", (2, 3), constant=bytes(24))], {"format": "pt"}
    )
    assert len(header) % 8 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert json.loads(header[8:])[name]["data_offsets"] == [0, 24]
