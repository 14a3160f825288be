"""Models and data sets of either hub: addresses, what is fetched, and what is said when it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import download_hubs
import pytest
import typer

from finetune import cli
from finetune.artifacts import hub, remote_files
from finetune.artifacts.hub import Repository
from finetune.artifacts.resolve import is_hub_id, local_folder
from finetune.cli import doctor
from finetune.cli.commands import app
from finetune.data.reading.files import expand
from finetune.data.reading.shards import ShardReader, StreamShard
from finetune.data.reading.sources import AS_IS, SourceSpec
from finetune.errors import ConfigError, DataError, ModelError

ROOT = Path(__file__).parent.parent
ROW = b'{"prompt": "Q", "response": "A"}\n'


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://a/b", Repository("huggingface", "a/b")),
        ("hf://datasets/a/b-c.d", Repository("huggingface", "a/b-c.d")),
        ("ms://a/b@v1.0", Repository("modelscope", "a/b", "v1.0")),
        ("ms://a/b@v1/data/*.jsonl", Repository("modelscope", "a/b", "v1", "data/*.jsonl")),
        ("a/b", Repository("huggingface", "a/b")),
        ("a", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("/a/b", None),
        ("https://a/b", None),
        ("hf://a", None),
    ],
)
def test_an_address_names_a_repository(address: str, expected: Repository | None) -> None:
    assert hub.repository(address) == expected


def test_the_environment_says_which_hub_a_plain_name_is_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FINETUNE_HUB", "modelscope")
    assert hub.repository("a/b") == Repository("modelscope", "a/b")
    assert hub.repository("hf://a/b") == Repository("huggingface", "a/b")
    monkeypatch.setenv("FINETUNE_HUB", "elsewhere")
    with pytest.raises(ConfigError, match="'elsewhere'; it is one of huggingface, modelscope"):
        hub.repository("a/b")


def test_every_command_takes_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for words in (["--hub", "modelscope"], ["--hub=modelscope"]):
        monkeypatch.setenv("FINETUNE_HUB", "huggingface")
        with pytest.raises(SystemExit):
            cli.main(["data", "check", str(tmp_path / "none"), *words])
        assert os.environ["FINETUNE_HUB"] == "modelscope"


def test_an_adapter_names_its_base_as_peft_looks_it_up() -> None:
    for path, known in (
        ("hf://a/b", "a/b"), ("ms://a/b", "ms://a/b"), ("a/b", "a/b"), ("/models/m", "/models/m")
    ):  # fmt: skip
        assert hub.known_to_peft(path) == known


def entries(**commits: tuple[str, int]) -> dict[str, dict[str, Any]]:
    return {
        path: {"Size": 1, "Sha256": path, "Revision": commit * 40, "CommittedDate": date}
        for path, (commit, date) in commits.items()
    }


def test_a_branch_of_modelscope_is_the_newest_commit_of_its_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def commit_of(there: dict[str, dict[str, dict[str, Any]]], revision: str | None) -> str | None:
        monkeypatch.setattr(
            remote_files, "_modelscope_entries", lambda name, content, asked: there[asked]
        )
        return remote_files.modelscope_commit("a/b", "dataset", revision)

    branch = entries(one=("a", 1), two=("b", 3), three=("c", 2))
    assert commit_of({"master": branch, "b" * 40: branch}, None) == "b" * 40
    assert commit_of({"v1": branch, "b" * 40: branch}, "v1") == "b" * 40
    assert commit_of({}, "f" * 40) == "f" * 40
    # Of two commits of the same second the one that has all files.
    same = entries(one=("a", 3), two=("b", 3))
    there = {"master": same, "a" * 40: entries(one=("a", 3)), "b" * 40: same}
    assert commit_of(there, None) == "b" * 40
    # Nothing is claimed that the hub does not confirm.
    assert commit_of({"master": branch, "b" * 40: entries(one=("a", 1))}, None) is None
    assert commit_of({"master": {"one": {"Size": 1}}}, None) is None


def fail(*_: Any) -> Path:
    raise OSError("no network")


def test_a_repository_that_cannot_be_fetched_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "_DOWNLOADS", dict.fromkeys(hub._DOWNLOADS, fail))
    with pytest.raises(DataError) as data:
        expand("ms://someone/rows")
    assert "someone/rows: no such folder here, and it cannot be fetched from modelscope" in str(
        data.value
    )
    for command in (
        "hf download someone/rows --repo-type dataset --local-dir FOLDER",
        "modelscope download --dataset someone/rows --local_dir FOLDER",
    ):
        assert command in str(data.value)
    with pytest.raises(ModelError) as model:
        local_folder("someone/model", "v2")
    assert "someone/model at v2: no such folder here" in str(model.value)
    assert "(OSError: no network)" in str(model.value)
    assert "hf download someone/model --local-dir FOLDER" in str(model.value)


def test_the_quickstarts_model_that_is_not_made_yet_names_the_script(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_network(*_: object) -> Path:
        raise OSError("no network")

    monkeypatch.setitem(hub._DOWNLOADS, "huggingface", no_network)
    with pytest.raises(ModelError, match=r"bash scripts/quickstart\.sh") as caught:
        hub.fetch("runs/quickstart-model", "model", ["*.json"])
    assert "hf download" not in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_download_shows_its_progress_once_though_the_libraries_are_quiet(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

    from finetune.models.library_logging import quiet_libraries

    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setenv("RANK", str(rank))
    try:
        quiet_libraries()
        assert are_progress_bars_disabled() is (rank > 0)
    finally:
        enable_progress_bars()


def test_without_its_library_modelscope_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError, match=r'pip install "glm4-finetune\[modelscope\]"'):
        local_folder("ms://someone/unseen")


def test_a_missing_path_that_looks_like_a_repository_is_told_how_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"is named hf://someone/rows or ms://someone/rows"):
        expand("someone/rows")
    with pytest.raises(DataError, match=r"is a URL; download .* hf://owner/name, ms://owner/name"):
        expand("https://example.org/a.jsonl")


def test_what_lies_here_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("a/b")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not is_hub_id("a/b")


_PROGRAM = """
import json
from finetune.artifacts import hub
from finetune.artifacts.resolve import local_folder
from finetune.data.preview.report import check
from finetune.data.reading.files import expand
found = {}
for address in ADDRESSES:
    folder = local_folder(address)
    found[address] = [sorted(p.name for p in folder.rglob("*") if p.is_file())]
    (source,) = check(address + "/data/*.jsonl").sources
    found[address] += [source.rows, len(expand(address + "/data/*.jsonl"))]
print(json.dumps([found, hub.fetched]))
"""


def run_with_hub(program: str, there: download_hubs.Hub, folder: Path) -> Any:
    """What a program prints last, as JSON, with both hubs on loopback."""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": there.address,
            "HF_HOME": str(folder / "hf"), "MODELSCOPE_ENDPOINT": there.address,
            "MODELSCOPE_CACHE": str(folder / "ms"), "HF_HUB_OFFLINE": "0",
        },
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_models_and_data_come_from_a_mirror(scheme: str, tmp_path: Path) -> None:
    if scheme == "ms":
        pytest.importorskip("modelscope", reason="the extra `modelscope` is not installed")
    files = {
        "data/a.jsonl": ROW, "config.json": b"{}", "evil.py": b"1", "model.bin": b"1",
        "model.safetensors": b"1",
    }  # fmt: skip
    with download_hubs.downloads(files) as there:
        program = f"ADDRESSES = ['{scheme}://owner/name']{_PROGRAM}"
        found, fetched = run_with_hub(program, there, tmp_path)
    names, rows, num_files = found[f"{scheme}://owner/name"]
    assert {"config.json", "model.safetensors"} <= set(names)
    assert not {"evil.py", "model.bin"} & set(names)
    assert (rows, num_files) == (1, 1)
    hub_name = {"hf": "huggingface", "ms": "modelscope"}[scheme]
    assert fetched == {f"{hub_name}:owner/name": download_hubs.COMMIT}
    if scheme == "ms":
        assert any("/api/v1/" in request for request in there.requests)
        asked = [r for r in there.requests if "FilePath" in r]
        assert asked
        assert all(f"Revision={download_hubs.COMMIT}" in r for r in asked)


_STREAM = """
import json, sys
from pathlib import Path
from finetune.artifacts import hub
from finetune.data.reading.blocks import BlockOptions, Blocks
from finetune.data.reading.shards import ShardReader, shards_of
from finetune.data.reading.sources import AS_IS, SourceSpec
sources = [SourceSpec(sys.argv[1])]
root = Path(sys.argv[2])
shards = shards_of(sources)
def blocks(**start):
    reader = ShardReader(shards, sources, AS_IS, root)
    return Blocks(shards, range(len(shards)), sources, reader, BlockOptions(0, 10), **start)
def lying():
    return sum(path.suffix == ".jsonl" and path.stat().st_nlink > 0 for path in root.rglob("*@*/**/*"))
stream, seen, most, places = blocks(), [], 0, []
while block := stream.next():
    places.append((stream.cursors, stream.opened))
    seen.append([placed.row.location for placed in block])
    most = max(most, lying())
again = blocks(cursors=places[1][0], opened=places[1][1])
resumed = [placed.row.location for placed in again.next()]
left = [path.name for path in (root / "streams").rglob("*.jsonl")]
print(json.dumps([seen, most, resumed, hub.fetched, len(shards), left]))
"""


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_shards_of_a_hub_lie_here_only_while_they_are_read(scheme: str, tmp_path: Path) -> None:
    if scheme == "ms":
        pytest.importorskip("modelscope", reason="the extra `modelscope` is not installed")
    files = {f"data/{number:02}.jsonl": ROW * 7 for number in range(12)} | {
        "README.md": b"Read me."
    }
    with download_hubs.downloads(files) as there:
        program = _STREAM.replace("sys.argv[1]", repr(f"{scheme}://owner/name"))
        program = program.replace("sys.argv[2]", repr(str(tmp_path / "cache")))
        seen, most, resumed, fetched, shards, left = run_with_hub(program, there, tmp_path)
    assert (shards, sum(map(len, seen))) == (12, 84)
    assert len({location for block in seen for location in block}) == 84
    assert seen[0][0] == f"{scheme}://owner/name@{download_hubs.COMMIT}/data/00.jsonl:1"
    assert most <= 4
    assert resumed == seen[2]
    assert list(fetched.values()) == [download_hubs.COMMIT]
    assert len(left) <= 8  # those that the second, unfinished reading has open


def test_readers_of_one_shard_fetch_it_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Repository("huggingface", "owner/name", download_hubs.COMMIT)
    shard = StreamShard(0, "hf://owner/name/a.jsonl", len(ROW), there, "a.jsonl")
    inside, most = [], []

    def fetched(_: Repository, path: str, folder: Path) -> Path:
        """As the hub's library does where the file lies in its cache: a copy over what is not whole."""
        if (folder / path).is_file() and (folder / path).stat().st_size == len(ROW):
            return folder / path
        inside.append(path)
        most.append(len(inside))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")
        time.sleep(0.05)
        (folder / path).write_bytes(ROW)
        inside.pop()
        return folder / path

    monkeypatch.setattr(hub, "fetch_file", fetched)
    others = [StreamShard(0, str(tmp_path), 0)] * 4  # so that each reader's link has its own name
    readers = [ShardReader([*others[:n], shard], [SourceSpec("x")], AS_IS, tmp_path) for n in range(4)]  # fmt: skip
    with ThreadPoolExecutor(4) as threads:
        rows = list(threads.map(lambda n: len(list(readers[n].open(n, 0))), range(4)))
    assert max(most) == 1
    assert rows == [1] * 4


def test_no_command_has_an_option_of_a_name_that_all_commands_take() -> None:
    """Else its own would never arrive: `main` takes `--hub NAME` and `--debug` out of every command line."""
    taken = {"--hub", "--debug"}
    everywhere = typer.main.get_command(app)
    assert taken <= {option for parameter in everywhere.params for option in parameter.opts}
    for name, command in everywhere.commands.items():  # type: ignore[attr-defined]
        for inner in (command, *getattr(command, "commands", {}).values()):
            assert not taken & {o for parameter in inner.params for o in parameter.opts}, name


def test_doctor_asks_the_hub_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def asking() -> Iterator[doctor.Finding]:
        asked.append("hub")
        yield doctor.Finding("hub", "there")

    monkeypatch.setattr(doctor, "_hub", asking)
    for words, expected in (([], []), (["--online"], ["hub"])):
        with pytest.raises(SystemExit):
            cli.main(["doctor", "--json", *words])
        assert asked == expected
