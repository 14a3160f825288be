"""A save reads nothing back, outlasts the process timeout, and goes on beside training when asked to."""

from __future__ import annotations

import hashlib
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import outcome_of
from safetensors.torch import load_file, save

from finetune.distributed.background import Background
from finetune.errors import SpaceError
from finetune.methods.tensor_file import save_tensors
from finetune.storage import hashed
from finetune.storage.folders import seal, verify
from finetune.training.snapshot import host_copy

SCRIPT = Path(__file__).with_name("save_runs.py")
RUNS = ("run lora", "run full on 2", "run full on 2, ZeRO-2", "run lora on 2, ZeRO-3")
ALONE = {"beside on 2": "run full on 2", "beside on 2, ZeRO-2": "run full on 2, ZeRO-2"}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcome_of(SCRIPT, tmp_path_factory.mktemp("saves"), timeout=400)


@pytest.mark.parametrize("run", RUNS)
def test_a_save_and_its_rotation_read_nothing_of_a_checkpoint_but_its_manifest(
    found: dict[str, Any], run: str
) -> None:
    assert found[run]["codes"] == [0] * len(found[run]["codes"]), found[run].get("said")
    assert {Path(file).name for file in found[run]["read"]} <= {"manifest.json"}  # sizes and times
    assert found[run]["left"] == ["checkpoint-4"]  # rotated after each save, and whole


def test_a_save_longer_than_the_process_timeout_ends_well(found: dict[str, Any]) -> None:
    assert found["slow"]["codes"] == [0, 0], found["slow"]["said"]
    assert found["slow"]["left"] == ["checkpoint-4"]


@pytest.mark.parametrize("run", ALONE)
def test_training_goes_on_while_a_save_is_written_and_learns_the_same(
    found: dict[str, Any], run: str
) -> None:
    assert found[run]["codes"] == [0] * len(found[run]["codes"]), found[run].get("said")
    times = found[run]["times"]
    saves = [(begun, ended) for name, begun, ended in times if name == "_save"]
    steps = [(begun, ended) for name, begun, ended in times if name == "training_step"]
    assert len(saves) == 4
    # The step after each save begins and ends while that save is being written,
    for begun, ended in saves[:-1]:
        assert any(begun < step[0] and step[1] < ended for step in steps)
    # a save begins when the one before has ended, and the run ends with the last one written.
    assert all(one[1] <= other[0] for one, other in pairwise(saves))
    assert found[run]["left"] == ["checkpoint-4"]
    assert found[run]["weights"] == found[ALONE[run]]["weights"]


@pytest.mark.parametrize("run", ["dies 0 2", "dies 1 0"])
def test_a_crash_while_a_save_is_written_beside_leaves_the_last_checkpoint(
    found: dict[str, Any], run: str
) -> None:
    assert 9 in found[run]["codes"], found[run]["said"]
    assert 0 not in found[run]["codes"], found[run]["said"]
    assert found[run]["after"] == ["checkpoint-1"]
    assert found[run]["again"] == [0, 0]
    assert found[run]["left"] == ["checkpoint-4"]
    assert found[run]["weights"] == found["run full on 2"]["weights"]


def test_weights_alone_are_kept_beside_resumable_checkpoints_or_in_their_place(
    found: dict[str, Any],
) -> None:
    assert found["both"] == {
        "codes": [0],
        "left": ["checkpoint-3", "checkpoint-4", "weights-2", "weights-4"],
    }
    assert found["weights"] == {"codes": [0], "left": ["weights-2", "weights-4"]}
    assert found["again"]["codes"] != [0]
    assert "choose another training.output_dir" in found["again"]["said"]


# --- the parts ------------------------------------------------------------------------------------------


def test_what_is_hashed_while_it_is_written_is_what_lies_there(tmp_path: Path) -> None:
    pieces = [b"", b"a" * 100, os.urandom(3 << 20), bytearray(b"b" * (17 << 20))]
    with hashed.hashing(tmp_path) as written:
        (tmp_path / "sub").mkdir()
        with hashed.hashed_file(tmp_path / "sub/large") as file:
            assert [file.write(piece) for piece in pieces] == [len(piece) for piece in pieces]
        hashed.hashed_text(tmp_path / "text", "Grüße")
        hashed.hashed_copy(tmp_path / "sub/large", tmp_path / "copy")
    whole = b"".join(pieces)
    digest = hashlib.sha256(whole).hexdigest()
    assert written == {
        "sub/large": (len(whole), digest), "copy": (len(whole), digest),
        "text": (7, hashlib.sha256("Grüße".encode()).hexdigest()),
    }  # fmt: skip
    seal(tmp_path, written)
    assert verify(tmp_path) == []
    with hashed.hashed_file(tmp_path / "later") as file:
        file.write(b"x")
    assert "later" not in written


def test_a_file_that_could_not_be_written_is_not_known(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        with hashed.hashed_file(path) as file:
            file.write(b"half")
            raise SpaceError("no room")

    with hashed.hashing(tmp_path) as written:
        with pytest.raises(SpaceError):
            half(tmp_path / "file")
        assert written == {}


def test_tensors_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5), "a": torch.randn(7, 2).bfloat16().T, "c": torch.arange(5),
        "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.0).half(), "yes": torch.tensor([True]),
        "bytes": torch.arange(9, dtype=torch.uint8), "größe": torch.randn(2, dtype=torch.float64),
        "i": torch.arange(3, dtype=torch.int32),
    }  # fmt: skip
    save_tensors(tensors, tmp_path / "ours")
    expected = save({n: t.contiguous() for n, t in tensors.items()}, metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == expected
    for name, tensor in load_file(tmp_path / "ours").items():
        assert torch.equal(tensor, tensors[name])


def test_a_host_copy_shares_what_was_shared_and_nothing_with_the_original() -> None:
    flat = torch.arange(12.0)
    value = {"flat": flat, "part": flat[3:7], "list": [flat.view(3, 4).T, 7], "none": None}
    copied = host_copy(value, {})
    flat.add_(100)
    assert torch.equal(copied["flat"], torch.arange(12.0))
    assert torch.equal(copied["part"], torch.arange(3.0, 7.0))
    assert torch.equal(copied["list"][0], torch.arange(12.0).view(3, 4).T)
    copied["flat"][3] = -1.0
    assert copied["part"][0] == -1.0
    assert (copied["list"][1], copied["none"]) == (7, None)


def test_what_work_beside_the_run_raises_is_raised_where_it_is_waited_for() -> None:
    beside = Background("test")
    beside.wait()
    beside.start(lambda: (_ for _ in ()).throw(SpaceError("full")))
    with pytest.raises(SpaceError, match="full"):
        beside.wait()
    beside.wait()
