from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from finetune.artifacts import names, resolve
from finetune.artifacts.plain_files import check_folder, read_json
from finetune.errors import ConfigError, FinetuneError, ModelError
from finetune.report.runs import read_run
from finetune.storage.manifest import seal, verify

PRODUCT = Path(names.__file__).parents[1]
HOMES = {PRODUCT / "artifacts/names.py", PRODUCT / "storage/manifest.py"}


def write(path: Path, value: object = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One folder of each kind, and the folder above them as the working directory."""
    for folder in ("base", "merged", "full", "run/checkpoint-1"):
        write(tmp_path / folder / "config.json", {})
    write(tmp_path / "merged/manifest.json")
    write(tmp_path / "full/finetune.json", {})
    write(tmp_path / "adapter/adapter_config.json", {"peft_type": "LORA"})
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["base", "merged", "full", "adapter", "run", "nothing"])
def test_a_folder_is_told_by_the_files_in_it(kinds: Path, kind: str) -> None:
    assert resolve.kind_of(kind) == kind


@pytest.mark.parametrize(
    ("path", "is_id"),
    [
        ("THUDM/glm-4-9b-chat", True),
        ("a/b", True),
        ("glm-4-9b", False),
        ("a/b/c", False),
        ("./b", False),
        ("../b", False),
        ("~/b", False),
        ("/b", False),
        ("a/b ", False),
        ("run/checkpoint-1", False),  # it is a folder here
    ],
)
def test_a_hub_id_is_owner_and_name_and_nothing_of_that_name_lies_here(
    kinds: Path, path: str, is_id: bool
) -> None:
    assert resolve.is_hub_id(path) is is_id


def test_a_name_that_no_file_system_takes_is_answered_in_words(tmp_path: Path) -> None:
    for path in ("x" * 5000, f"{tmp_path}/{'x' * 300}", "a/" + "y" * 300 + "/z"):
        assert resolve.kind_of(path) == "nothing"
        with pytest.raises(ModelError, match="no such checkpoint folder"):
            resolve.local_folder(path)
        with pytest.raises(ConfigError, match="not a directory"):
            resolve.find_source(Path(path))


def test_a_run_is_not_opened_but_one_of_its_checkpoints(kinds: Path) -> None:
    with pytest.raises(
        ModelError, match=r"is a run; give one of its checkpoints, such as run/checkpoint-1"
    ):
        resolve.check_openable("run")
    with pytest.raises(ModelError, match=r"has neither config.json nor adapter_config.json"):
        resolve.check_openable("nothing")
    resolve.check_openable("run/checkpoint-1")


def test_the_base_is_what_was_given_else_what_the_adapter_names(tmp_path: Path) -> None:
    config = write(
        tmp_path / "adapter_config.json",
        {"peft_type": "LORA", "base_model_name_or_path": "a/b", "revision": "r"},
    )
    assert resolve.model_base(tmp_path) == resolve.Weights("a/b", "r")
    assert resolve.model_base(tmp_path, "there") == resolve.Weights("there")
    write(config, {"peft_type": "LORA"})
    with pytest.raises(ModelError, match="names no base model"):
        resolve.model_base(tmp_path)
    with pytest.raises(ModelError, match="leave the base out"):
        resolve.model_base("c/d", "there")


@pytest.mark.parametrize("odd", ["pipe", "link to a device", "link out", "link to nothing", "loop"])
def test_a_file_that_is_none_is_refused_and_never_waited_for(tmp_path: Path, odd: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    file = folder / "config.json"
    write(tmp_path / "private.json", {"secret": 1})
    if odd == "pipe":
        os.mkfifo(file)
    else:
        targets = {"link to a device": "/dev/zero", "link out": "../private.json", "loop": file}
        file.symlink_to(targets.get(odd, "gone.json"))
    for opening in (lambda: read_json(file), lambda: check_folder(folder)):
        with pytest.raises(ModelError, match=r"config\.json"):
            opening()


def test_links_inside_the_folder_and_those_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "m/real.json", {"a": 1})
    (tmp_path / "m/config.json").symlink_to("real.json")
    write(tmp_path / "models--a--b/blobs/0f", {"a": 1})
    snapshot = tmp_path / "models--a--b/snapshots/main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/0f")
    for folder in (tmp_path / "m", snapshot):
        check_folder(folder)
        assert read_json(folder / "config.json") == {"a": 1}


def test_a_file_name_is_written_in_one_place() -> None:
    known = {value for name, value in vars(names).items() if name.isupper()}
    found = []
    for file in sorted(PRODUCT.rglob("*.py")):
        if file in HOMES:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in known:
                found.append(f"{file.relative_to(PRODUCT)}:{node.lineno}: {node.value!r}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "data.json", "best.json"])
def test_a_pipe_in_a_run_directory_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("data: {}\n")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(FinetuneError, match=f"{name}|no run directory"):
        read_run(run)


def test_a_manifest_that_is_a_pipe_is_damage(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    assert verify(tmp_path) == ["manifest.json is not a file"]


def test_a_run_among_targets_stands_for_its_good_checkpoints_and_says_which_it_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for name in ("checkpoint-10", "checkpoint-2", "checkpoint-1", "weights-10", "weights-3"):
        write(run / name / names.ADAPTER_CONFIG, {"peft_type": "LORA"})
        seal(run / name)
    (run / "checkpoint-2" / names.ADAPTER_CONFIG).write_text("{}")
    found = resolve.models_in([str(run), "owner/name", str(run / "weights-10")])
    good = [str(run / name) for name in ("checkpoint-1", "weights-3", "checkpoint-10")]
    assert found == [*good, "owner/name", str(run / "weights-10")]
    said = capsys.readouterr()
    assert "passed over checkpoint-2: " in said.err + said.out
