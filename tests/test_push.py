"""`finetune push` sends what merge, export and training vouch for, when asked, and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
from hub import TOKEN, Hub, hub

from finetune.errors import ConfigError
from finetune.export import push as pushing
from finetune.export.merge import merge
from finetune.storage.manifest import seal

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_chatglm: Path) -> Path:
    work = tmp_path_factory.mktemp("work")
    train = runs.write_dialogues(work / "train.jsonl", 6)
    runs.run_here(runs.config(tiny_chatglm, train, work / "run", training__max_steps=1))
    return work / "run"


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    merge(run, run.parent / "merged", check="none")
    return run.parent / "merged"


@pytest.fixture
def there() -> Iterator[Hub]:
    with hub() as state:
        yield state


def push(
    there: Hub, *arguments: str | Path, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": there.address,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # the hub here speaks LFS
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-m", "finetune", "push", *map(str, arguments)]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def test_every_byte_of_a_merged_model_arrives_in_one_commit_of_a_private_repository(
    merged: Path, there: Hub
) -> None:
    done = push(there, merged, "--repo", "me/tuned", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    sent = {f.name: f.read_bytes() for f in merged.iterdir() if f.name != "manifest.json"}
    assert there.files == sent
    assert "model.safetensors" in sent
    assert "README.md" in sent
    assert there.private == {"me/tuned": True}
    assert there.commits == 1
    assert json.loads(done.stdout)["address"].startswith(there.address)
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN in request for request in there.requests)


def test_without_yes_nothing_is_asked_of_the_hub_and_what_would_go_is_listed(
    merged: Path, there: Hub
) -> None:
    done = push(there, merged, "--repo", "me/tuned")
    assert done.returncode == 0
    assert "nothing was sent: add --yes" in done.stdout
    assert "model.safetensors" in done.stdout
    assert there.requests == []


def test_of_an_adapter_only_what_opens_it_goes_and_no_path_of_this_machine(
    run: Path, there: Hub
) -> None:
    refused = push(there, run, "--repo", "me/adapter", "--yes")
    assert refused.returncode == 2
    assert "--base THUDM/glm-4-9b-chat" in refused.stderr
    assert there.requests == []
    done = push(there, run, "--repo", "me/adapter", "--yes", "--base", "THUDM/glm-4-9b-chat")
    assert done.returncode == 0, done.stderr
    weights = run / "checkpoint-1/adapter_model.safetensors"
    assert set(there.files) == {"README.md", "adapter_config.json", weights.name}
    assert there.files[weights.name] == weights.read_bytes()
    config = json.loads(there.files["adapter_config.json"])
    own = json.loads((run / "checkpoint-1/adapter_config.json").read_text())
    assert config == own | {"base_model_name_or_path": "THUDM/glm-4-9b-chat"}
    card = there.files["README.md"].decode()
    assert "base_model: THUDM/glm-4-9b-chat" in card
    assert "library_name: peft" in card
    for content in (there.files["README.md"], there.files["adapter_config.json"]):
        assert str(run.parent).encode() not in content


def test_what_is_damaged_unfinished_or_holds_states_of_training_is_refused_before_any_request(
    merged: Path, tmp_path: Path, tiny_chatglm: Path, there: Hub
) -> None:
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", str(merged), str(damaged)], check=True)
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    train = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    settings = runs.config(tiny_chatglm, train, tmp_path / "full", training__max_steps=1)
    settings |= {"method": {"kind": "full"}}
    runs.run_here(settings)
    for folder, code, reason in (
        (damaged, 3, "is damaged"),
        (tiny_chatglm, 3, "manifest.json is missing"),
        (tmp_path / "full", 2, "optimizer.pt.*finetune merge"),
        (tmp_path / "nowhere", 2, "not a directory"),
    ):
        done = push(there, folder, "--repo", "me/tuned", "--yes")
        assert done.returncode == code, done.stderr
        assert re.search(reason, done.stderr), done.stderr
    assert there.requests == []


def test_a_public_repository_is_filled_only_when_public_is_said(merged: Path, there: Hub) -> None:
    there.private["me/open"] = False
    done = push(there, merged, "--repo", "me/open", "--yes")
    assert done.returncode == 2
    assert "is public" in done.stderr
    assert there.files == {}
    assert there.large == {}
    assert push(there, merged, "--repo", "me/open", "--yes", "--public").returncode == 0
    assert there.files


@pytest.mark.parametrize("location", ["create", "lfs/", "/commit/"])
def test_a_hub_that_refuses_is_told_without_a_traceback_and_without_the_token(
    merged: Path, there: Hub, location: str
) -> None:
    there.refuse = location
    done = push(there, merged, "--repo", "me/tuned", "--yes")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert there.address in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert there.files == {}
    there.refuse = ""
    assert push(there, merged, "--repo", "me/tuned", "--yes").returncode == 0
    assert there.files["model.safetensors"] == (merged / "model.safetensors").read_bytes()


def test_a_wrong_token_and_a_hub_that_is_not_there_are_told(merged: Path, there: Hub) -> None:
    done = push(there, merged, "--repo", "me/tuned", "--yes", token="hf_wrongOne123456")
    assert done.returncode == 2
    assert "hf_wrongOne123456" not in done.stderr
    gone = Hub(address="http://127.0.0.1:9")
    done = push(gone, merged, "--repo", "me/tuned", "--yes")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "state",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "rng_state_1.pth",
        "global_step2/x.pt",
        "trainer_state.json",
    ],
)
def test_a_model_beside_any_one_state_of_training_is_not_pushed(tmp_path: Path, state: str) -> None:
    folder = tmp_path / "model"
    (folder / state).parent.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / state).write_text("x")
    seal(folder)
    with pytest.raises(ConfigError, match="which only resuming needs"):
        pushing.push(folder, "me/tuned", send=False)
