"""`finetune merge` at the command line: weights, formats and bases as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import make_adapter, make_base, weights_of
from command_line import exit_code

from finetune.export.merge import merge


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters of it, one of whose names ends like a weight."""
    work = tmp_path_factory.mktemp("work")
    base = make_base(work / "base")
    make_adapter(work / "one", base)
    make_adapter(work / "two:3", base, seed=2, r=8)
    return work


def same(one: Path, other: Path) -> bool:
    pair = [weights_of(folder) for folder in (one, other)]
    return pair[0].keys() == pair[1].keys() and all(
        tensor.dtype == pair[1][name].dtype and torch.equal(tensor, pair[1][name])
        for name, tensor in pair[0].items()
    )


def test_adapters_are_added_up_with_the_weights_that_are_typed(work: Path, tmp_path: Path) -> None:
    one, two = work / "one", work / "two:3"
    out = str(tmp_path / "typed")
    assert exit_code("merge", f"{one}:0.25", f"{two}:-1.5", "--output", out, "--no-check") == 0
    merge([(one, 0.25), (two, -1.5)], tmp_path / "called", check="none")
    assert same(tmp_path / "typed", tmp_path / "called")
    assert exit_code("merge", str(two), "--output", str(tmp_path / "whole"), "--no-check") == 0
    merge(two, tmp_path / "weight-1", check="none")
    assert same(tmp_path / "whole", tmp_path / "weight-1")


def test_the_format_and_the_place_of_the_base_are_taken_as_typed(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    (work / "base").rename(moved)
    try:
        places = [str(work / "one"), "--output", str(tmp_path / "half")]
        assert exit_code("merge", *places) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "is not where it was" in said
        assert "Give its new place with --base" in said
        assert exit_code("merge", *places, "--base", str(moved), "--dtype", "float16") == 0
        assert {tensor.dtype for tensor in weights_of(tmp_path / "half").values()} == {
            torch.float16
        }
    finally:
        moved.rename(work / "base")


@pytest.mark.parametrize("weight", ["x", "", "0,5", "nan"])
def test_what_is_no_weight_is_refused(
    work: Path, tmp_path: Path, weight: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert exit_code("merge", f"{work / 'one'}:{weight}", "--output", out) == 2
    assert "the weight must be a" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
