"""When examples are made again, and by which process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from examples import LONG, dialogue, tiny_template

from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Conversation
from finetune.data.examples.dataset import LengthPolicy, prepare
from finetune.errors import DataError
from finetune.storage import cache


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return tiny_template(tmp_path_factory.mktemp("tokenizer"))


class Watched:
    """Dialogues that count how often they are read."""

    def __init__(self, *talks: Conversation) -> None:
        self.talks = talks
        self.reads = 0

    def __iter__(self):
        self.reads += 1
        return iter(self.talks)


def test_the_same_content_is_prepared_once(template, tmp_path):
    talks = Watched(dialogue(2))
    first = prepare(talks, template, LONG, key="k", cache_root=tmp_path)
    again = prepare(talks, template, LONG, key="k", cache_root=tmp_path)
    assert talks.reads == 1
    assert again[0].input_ids.tolist() == first[0].input_ids.tolist()
    assert again.counts == first.counts
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("key", "policy"),
    [
        ("other content", LONG),
        ("k", LengthPolicy(9_999)),
        ("k", LengthPolicy(10_000, train_on="last_reply")),
        ("k", LengthPolicy(10_000, on_too_long="drop")),
    ],
)
def test_another_content_or_policy_never_reads_the_entry(template, tmp_path, key, policy):
    talks = Watched(dialogue(2))
    first = prepare(talks, template, LONG, key="k", cache_root=tmp_path)
    other = prepare(talks, template, policy, key=key, cache_root=tmp_path)
    assert talks.reads == 2
    assert other.fingerprint != first.fingerprint


def test_another_template_never_reads_the_entry(template, tmp_path):
    from copy import copy

    talks = Watched(dialogue(2))
    prepare(talks, template, LONG, key="k", cache_root=tmp_path)
    other = copy(template)
    other.fingerprint = "another"
    prepare(talks, other, LONG, key="k", cache_root=tmp_path)
    assert talks.reads == 2


def damage_size(entry: Path) -> None:
    os.truncate(entry / "examples.arrow", 100)


def damage_bytes(entry: Path) -> None:
    file = entry / "examples.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_missing(entry: Path) -> None:
    (entry / "examples.arrow").unlink()


def damage_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text("{", encoding="utf-8")


def damage_no_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (damage_size, "has 100 bytes instead of"),
        (damage_bytes, "examples.arrow has other content"),
        (damage_missing, "examples.arrow is missing"),
        (damage_manifest, "manifest.json is damaged"),
        (damage_no_manifest, "manifest.json is missing"),
    ],
)
def test_a_damaged_entry_is_prepared_again_with_a_word(template, tmp_path, capsys, damage, word):
    talks = Watched(dialogue(2))
    expected = prepare(talks, template, LONG, key="k", cache_root=tmp_path)[0].input_ids.tolist()
    (entry,) = (tmp_path / "examples").glob("*/")
    damage(entry)
    dataset = prepare(talks, template, LONG, key="k", cache_root=tmp_path)
    assert talks.reads == 2
    assert dataset[0].input_ids.tolist() == expected
    warning = capsys.readouterr().err
    assert word in warning
    assert "preparing it again" in warning


def test_a_failure_half_way_leaves_no_entry(template, tmp_path):
    def failing():
        yield from (dialogue() for _ in range(1_500))
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        prepare(failing(), template, LONG, key="k", cache_root=tmp_path)
    root = tmp_path / "examples"
    assert [path.name for path in root.iterdir() if path.suffix != ".lock"] == []
    assert len(prepare([dialogue()], template, LONG, key="k", cache_root=tmp_path)) == 1


BUILDER = """
import sys, time
from pathlib import Path
from finetune.storage import cache

def build(folder):
    (folder / "content").write_text("whole")
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    deadline = time.monotonic() + 60
    while not Path(sys.argv[3]).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return {"by": sys.argv[4]}

print(cache.open_or_build(Path(sys.argv[1]), "key", build).facts["by"])
"""


def start_builder(root: Path, name: str, *, go: bool = True, **env: str) -> subprocess.Popen:
    """A process that builds the entry; without `go`, until there is a file of that name."""
    until = root if go else root / "go"
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(root), str(root / "log"), str(until), name],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **env},
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_two_processes_prepare_once_and_the_second_says_that_it_waits(tmp_path):
    first = start_builder(tmp_path, "one", go=False)
    wait_for(tmp_path / "log")
    second = start_builder(tmp_path, "two", PYTHONUNBUFFERED="1")
    assert second.stdout.readline().startswith("waiting for another process that is preparing")
    (tmp_path / "go").touch()
    assert first.communicate(timeout=60)[0].strip() == "one"
    assert second.communicate(timeout=60)[0].strip() == "one"
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_builder_leaves_nothing_that_is_read_and_nothing_that_blocks(tmp_path):
    killed = start_builder(tmp_path, "killed", go=False)
    wait_for(tmp_path / "log")
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert any(path.name.startswith(".staging-key") for path in tmp_path.iterdir())
    second = start_builder(tmp_path, "second")
    assert second.communicate(timeout=60)[0].strip() == "second"
    assert not any(path.name.startswith(".staging-key") for path in tmp_path.iterdir())


@pytest.mark.parametrize("damaged", [False, True])
def test_the_first_process_of_a_machine_prepares_even_when_it_comes_last(tmp_path, damaged):
    if damaged:
        (tmp_path / "key").mkdir()
    other = start_builder(tmp_path, "rank 1", RANK="1", LOCAL_RANK="1")
    time.sleep(1.0)
    assert not (tmp_path / "log").exists()
    first = start_builder(tmp_path, "rank 0", RANK="0", LOCAL_RANK="0")
    assert first.communicate(timeout=60)[0].strip() == "rank 0"
    assert other.communicate(timeout=60)[0].strip() == "rank 0"
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_process_prepares_by_itself_when_the_first_never_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_RANK_0_HEAD_START_SECONDS", 0.2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    entry = cache.open_or_build(tmp_path, "key", lambda folder: {"by": "rank 1"})
    assert entry.facts == {"by": "rank 1"}


def test_a_cache_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data\.cache_dir or FINETUNE_CACHE"):
        cache.open_or_build(tmp_path / "file" / "cache", "key", lambda folder: {})


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    assert cache.default_root() == tmp_path
    monkeypatch.delenv("FINETUNE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_root() == tmp_path / ".cache" / "glm4-finetune"
