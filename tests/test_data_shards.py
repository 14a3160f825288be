"""Data that several machines prepare, file by file, is the data that one prepares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
import yaml
from command_line import exit_code

from finetune.config.schema import RunConfig
from finetune.data.examples import dataset
from finetune.data.examples.dataset import PreparedDataset
from finetune.data.examples.shards import of_shard
from finetune.errors import ConfigError
from finetune.training.loading.prepare_data import load_run_data


@pytest.fixture
def settings(tiny_glm: Path, tmp_path: Path) -> dict:
    """A run on five files of two sources, the second of them weighed."""
    (tmp_path / "many").mkdir()
    for name, count, seed in (("a", 4, 0), ("b", 2, 1), ("c", 3, 2), ("d", 1, 3)):
        runs.write_dialogues(tmp_path / f"many/{name}.jsonl", count, seed=seed)
    runs.write_dialogues(tmp_path / "one.jsonl", 3, seed=4)
    sources = [{"path": str(tmp_path / "many")}, {"path": str(tmp_path / "one.jsonl"), "weight": 2.0}]  # fmt: skip
    return runs.config(tiny_glm, tmp_path, tmp_path / "run", data__train=sources)


def prepared(settings: dict, cache: Path) -> PreparedDataset:
    config = RunConfig.model_validate(settings | {"data": settings["data"] | {"cache_dir": str(cache)}})  # fmt: skip
    found = load_run_data(config.data, config.training, config.model).train
    assert isinstance(found, PreparedDataset)
    return found


def test_shards_make_the_examples_of_one_preparation_and_nothing_is_tokenised_again(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    whole = prepared(settings, tmp_path / "alone")
    file, cache = tmp_path / "run.yaml", tmp_path / "shared"
    settings["data"]["cache_dir"] = str(cache)
    file.write_text(yaml.safe_dump(settings))
    rows = []
    for shard in ("2/2", "1/2"):
        assert exit_code("data", "prepare", str(file), "--shard", shard, "--json") == 0
        rows.append(json.loads(capfd.readouterr().out.splitlines()[-1])["rows"])
    assert rows == [3, 10]  # b and d, then a, c and the other source

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(dataset, "write_examples", refused)
    joined = prepared(settings, cache)
    assert joined.counts == whole.counts
    assert joined.fingerprint == whole.fingerprint
    assert len(joined) == len(whole) == 16
    for number in range(len(whole)):
        assert joined.location(number) == whole.location(number)
        assert joined[number].input_ids.tolist() == whole[number].input_ids.tolist()
        assert joined[number].labels.tolist() == whole[number].labels.tolist()


def test_a_shard_that_is_missing_leaves_the_work_to_the_run(settings: dict, tmp_path: Path) -> None:
    whole = prepared(settings, tmp_path / "alone")
    settings["data"]["cache_dir"] = str(tmp_path / "shared")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert exit_code("data", "prepare", str(file), "--shard", "2/2") == 0
    assert prepared(settings, tmp_path / "shared").fingerprint == whole.fingerprint


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/2/3"])
def test_what_is_no_shard_is_refused(shard: str) -> None:
    with pytest.raises(ConfigError, match="is not i/n"):
        of_shard([Path("a")] * 9, shard)


def test_fewer_files_than_shards_are_refused_with_how_to_split_them() -> None:
    with pytest.raises(ConfigError, match="split -n"):
        of_shard([Path("a")], "1/2")


def test_rows_that_are_chosen_among_all_cannot_be_prepared_file_by_file(
    settings: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings["data"]["validation"] = "10%"
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert exit_code("data", "prepare", str(file), "--shard", "1/2") == 2
    assert "--shard takes files one by one" in capfd.readouterr().err
