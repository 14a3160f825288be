"""A base's own replies: by whom and of what they are made, where they are kept, what they are not written over."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rows import write_rows

from finetune.config.forgetting import ReplaySection
from finetune.errors import ConfigError, DataError
from finetune.generation import replay


def test_a_bases_replies_are_built_of_its_prompts_and_kept_where_the_cache_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    built: list[Any] = []

    def build(root: Path, key: str, make: Any) -> Any:
        built.append((root, make(Path("stage"))))
        return SimpleNamespace(folder=root / "entry", facts={"replies": 4, "cut": 2})

    monkeypatch.setattr(replay, "open_or_build", build)
    monkeypatch.setattr(replay, "local_folder", lambda model, revision: Path(f"{model} {revision}"))
    monkeypatch.setattr(replay, "is_folder", lambda name: False)
    monkeypatch.setattr(replay, "_build", lambda *given: given)
    section = ReplaySection(prompts=str(file), max_new_tokens=33)
    found = replay.replay_of(section, "m", "r", str(tmp_path / "cache"))
    root = tmp_path / "cache" / "replay"
    assert built == [(root, (Path("stage"), Path("m r"), [file], 33))]
    assert found == replay.ReplayFiles(root / "entry/train.jsonl", root / "entry/held_out.jsonl", 4, 2)  # fmt: skip
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "usual"))
    replay.replay_of(section, "m", "r")
    assert built[1][0] == tmp_path / "usual" / "replay"


def test_prompts_with_tools_are_for_those_who_take_tools_and_a_bad_row_is_named(
    tmp_path: Path,
) -> None:
    rows: list[dict[str, Any]] = [{"messages": []}, {"messages": [], "tools": [1]}, {"messages": [], "tools": []}]  # fmt: skip
    file = write_rows(tmp_path / "p.jsonl", rows)
    for takes, kept in ((True, rows), (False, [rows[0], rows[2]])):
        template: Any = SimpleNamespace(takes_tools=takes)
        assert list(replay._rows([file], template)) == kept
    file.write_text("{}\n{\n")
    with pytest.raises(DataError, match=r"p\.jsonl:2: "):
        list(replay._rows([file], template))


def test_a_file_without_prompts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "load_chat_tokenizer", str)
    monkeypatch.setattr(replay, "ChatTemplate", lambda _: SimpleNamespace(takes_tools=False))
    file = write_rows(tmp_path / "p.jsonl", [{"messages": [], "tools": [1]}])
    with pytest.raises(DataError, match=r"p\.jsonl hold no prompts; give a file that does"):
        replay._build(tmp_path, Path("m"), [file], 5)


def test_a_bases_replies_are_made_by_this_program_outside_of_any_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}  # fmt: skip
    for name in launched:
        monkeypatch.setenv(name, "1")
    done: list[Any] = []
    monkeypatch.setattr(replay.subprocess, "run", lambda command, **how: done.append((command, how)) or SimpleNamespace(returncode=0))  # type: ignore[func-returns-value]  # fmt: skip
    root = str(Path(replay.__file__).parents[2])
    for path, wanted in (("theirs", os.pathsep.join([root, "theirs"])), ("", root)):
        monkeypatch.setenv("PYTHONPATH", path)
        replay._predict(Path("m"), Path("p"), Path("o"), 33)
        command, how = done.pop()
        assert command == [sys.executable, "-m", "finetune", "predict", "m", "--data", "p", "--output", "o", "--max-new-tokens", "33"]  # fmt: skip
        assert how["env"]["PYTHONPATH"] == wanted
        assert not launched & how["env"].keys()


def test_replies_are_not_written_over_what_they_are_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "cache").mkdir()
    file = write_rows(tmp_path / "p.jsonl", [{"messages": []}])
    other = write_rows(tmp_path / "other.jsonl", [{"where": "x"}])
    section = ReplaySection(prompts=str(file))

    def check(output: Path, *, overwrite: bool = True) -> None:
        replay.check_replay_output(section, str(tmp_path / "model"), output, overwrite=overwrite)

    for output in (file, tmp_path / "model" / "r.jsonl", tmp_path / "cache" / "r.jsonl"):
        with pytest.raises(ConfigError):
            check(output)
    check(other)
    with pytest.raises(ConfigError):
        check(other, overwrite=False)
    check(tmp_path / "new.jsonl", overwrite=False)
