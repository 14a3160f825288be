"""Every file of configs/ starts from a clone, or says which command gets what it lacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.artifacts import hub
from finetune.cli.inputs import _data_problems
from finetune.config.load import load
from finetune.config.schema import held_out_share

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def sources(path: Path) -> list[str]:
    data = load(path).config.data
    held_out = None if held_out_share(data.validation) is not None else data.validation
    listed = [
        source
        for side in (data.train, held_out or [])
        for source in ([side] if isinstance(side, str) else side)
    ]
    return [source if isinstance(source, str) else source.path for source in listed]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_data_of_a_shipped_config_is_here_or_its_error_names_the_command(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object) -> str:
        raise OSError("no network")

    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(hub._DOWNLOADS, "huggingface", no_network)
    loaded = load(path)
    fetched = [source for source in sources(path) if source.startswith("hf://")]
    problems = _data_problems(loaded.config.data, loaded)
    assert len(problems) == len(fetched)
    text = path.read_text(encoding="utf-8")
    for source, problem in zip(fetched, problems, strict=True):
        name = "/".join(source.removeprefix("hf://").split("/")[:2])
        assert f"hf download {name} --repo-type dataset" in problem
        assert f"#   hf download {name} --repo-type dataset --local-dir " in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_says_how_to_name_data_of_ones_own(path: Path) -> None:
    if path.name in ("quickstart.yaml", "advertisegen.yaml"):  # those are about their data
        return
    assert re.search(r"yours: (data\.train=\S+|a folder)", path.read_text(encoding="utf-8"))
