"""What is pushed and what its card says, without a hub and without a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.config.reference import option_keys
from finetune.errors import CheckpointError, ConfigError
from finetune.export import card, push

# --- pushing ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merged model that its manifest vouches for."""
    made = tmp_path / "merged"
    (made / "inner").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "manifest.json", "inner/file.txt"):
        (made / name).write_text(name)
    monkeypatch.setattr(push, "find_source", lambda path: (path, ["note"]))
    monkeypatch.setattr(push, "verify", lambda path: [])
    return made


class Api:
    """In the place of the hub's."""

    endpoint = "https://hub"

    def __init__(self, *, private: bool = True, error: Exception | None = None) -> None:
        self.private, self.error = private, error
        self.made: list[tuple[str, bool]] = []
        self.sent: list[str] = []

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.made.append((repo, private))

    def model_info(self, repo: str) -> Any:
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo: str, operations: Any, commit_message: str) -> Any:
        if self.error:
            raise self.error
        self.sent = [one.path_in_repo for one in operations]
        return SimpleNamespace(commit_url="https://hub/commit")


def pushed(folder: Path, api: Api, monkeypatch: pytest.MonkeyPatch, **how: Any) -> push.PushReport:
    monkeypatch.setattr(push, "HfApi", lambda: api)
    return push.push(folder, "me/x", **{"send": True, **how})


def test_a_model_goes_whole_but_for_its_manifest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = Api()
    report = pushed(folder, api, monkeypatch)
    assert api.sent == ["config.json", "inner/file.txt", "model.safetensors"] == list(report.files)
    assert (api.made, report.private, report.address) == ([("me/x", True)], True, "https://hub/commit")  # fmt: skip
    assert report.notes == ("note",)
    api = Api(private=False)
    with pytest.raises(ConfigError, match="is public"):
        pushed(folder, api, monkeypatch)
    assert api.sent == []
    report = pushed(folder, api, monkeypatch, public=True)
    assert (api.made[-1], report.private) == (("me/x", False), False)
    quiet = Api()
    assert pushed(folder, quiet, monkeypatch, send=False).address is None
    assert (quiet.made, quiet.sent) == ([], [])


def test_what_its_manifest_does_not_vouch_for_is_not_even_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "verify", lambda path: ["x is damaged"])
    for send in (True, False):
        with pytest.raises(CheckpointError, match="is not pushed: x is damaged"):
            pushed(folder, Api(), monkeypatch, send=send)


@pytest.mark.parametrize("error", [OSError("net"), RuntimeError("net"), ValueError("net"), push.HTTPError("net")])  # fmt: skip
def test_an_upload_that_fails_is_a_message_without_the_token(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "get_token", lambda: "hf_secret")
    error.args = ("no hf_secret here",)
    with pytest.raises(ConfigError, match=r"the upload to https://hub failed .no … here") as caught:
        pushed(folder, Api(error=error), monkeypatch)
    assert "hf_secret" not in str(caught.value)
    monkeypatch.setattr(push, "get_token", lambda: None)
    assert push._without_token("a hf_x") == "a hf_x"


def test_an_adapter_names_the_base_that_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"base_model_name_or_path": "owner/own", "r": 4}
    monkeypatch.setattr(push, "is_adapter", lambda path: True)
    monkeypatch.setattr(push, "adapter_config", lambda path: own)
    with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors"):
        pushed(folder, Api(), monkeypatch)
    (folder / "adapter_model.safetensors").write_text("x")
    (folder / "adapter_config.json").write_text(json.dumps(own))
    for base, named in ((None, "owner/own"), ("other/base", "other/base")):
        texts, files = push._adapter(folder, "me/x", base)
        assert json.loads(texts["adapter_config.json"]) == own | {"base_model_name_or_path": named}
        assert f"base_model: {named}" in texts["README.md"]
        assert list(files) == ["adapter_model.safetensors"]
    own["base_model_name_or_path"] = "/home/me/base"
    with pytest.raises(ConfigError, match="names its base as /home/me/base"):
        push._adapter(folder, "me/x", None)


# --- the card --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [("method.rank", 4, True), ("training.seed", 0, True), ("model.adapter", "a", True), ("model.freeze", ["vision"], True), ("model.quantization", "nf4", True), ("data.packing", True, True), ("deepspeed.zero_stage", 3, True),
     ("model.path", "/home", False), ("training.extra", {"a": 1}, False), ("training.output_dir", "x", False), ("data.train", "x", False), ("data.cache_dir", "x", False), ("data.image_root", "x", False),
     ("training.on_end", "x", False), ("training.report_to", ["x"], False), ("deepspeed.config", "x", False), ("method.bias", None, False), ("data.packing", False, False), ("model.freeze", [], False)],
)  # fmt: skip
def test_the_card_shows_what_shapes_the_result_and_no_place(
    key: str, value: Any, shown: bool
) -> None:
    assert card._is_shown(key, value) is shown


@pytest.mark.parametrize(
    ("score", "said"),
    [({"value": 1.23456, "low": 1, "high": 2.5, "n": 9}, ("1.235", "1 to 2.5", "9")), ({"value": 1, "low": None, "high": 2}, ("1", "", "")), ({"value": 1, "low": 2, "high": None}, ("1", "", "")), ({"value": None}, ("", "", ""))],
)  # fmt: skip
def test_an_interval_has_both_ends_or_none(score: dict[str, Any], said: tuple[str, ...]) -> None:
    assert card._interval(score) == said


def test_scores_of_training_are_those_of_the_very_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-4"
    folder.mkdir(parents=True)
    log = [{"step": 2, "eval_loss": 3.0}, {"step": 4, "eval_loss": 2.0}, {"step": 5, "loss": 1.0}]
    assert "| loss | 2 |" in card._scores(folder, {"log_history": log, "global_step": 4})
    for state in ({"log_history": log, "global_step": 6}, {"log_history": log[:1], "global_step": 4}, {}):  # fmt: skip
        assert card._scores(folder, state) == ""


def test_a_card_of_ours_is_kept_and_one_of_others_is_not(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# theirs\n")
    (tmp_path / "config.json").write_text("{}")
    assert "theirs" not in card.exported_card(tmp_path, "new", "done.", "owner/base")
    (tmp_path / "manifest.json").write_text("{}")
    assert card.exported_card(tmp_path, "new", "done.", "owner/base") == "# theirs\n\ndone.\n"


def test_the_base_that_is_said_goes_before_the_recorded_one(tmp_path: Path) -> None:
    (tmp_path / "finetune.json").write_text(json.dumps({"base": {"path": "/home/me/base"}}))
    text = card.model_card("t", "done", "/x/y", [(tmp_path, 1.0)], named="owner/base")
    assert "base_model: owner/base" in text
    assert "| base | owner/base" in text
    text = card.model_card("t", "done", "/x/y", [(tmp_path, 1.0)])
    assert "base_model" not in text
    assert "| base | base |" in text
    assert "/home" not in text
    rows = card._data([{"path": "/home/me/a.jsonl", "weight": 2}, "/x/b.jsonl"], {"examples": 2000, "rows": 2100})  # fmt: skip
    assert rows == "a.jsonl, b.jsonl: 2,000 examples of 2,100 rows"
    assert card._value("a|b") == '`"a\\|b"`'


PLACES = ("data.train", "data.validation", "data.image_root", "data.cache_dir", "training.output_dir", "training.on_end", "training.extra", "deepspeed.config")  # fmt: skip
OF_ROWS = ("data.format", "data.columns", "data.on_bad_row", "data.ignore_columns", "data.max_overlap", "data.group_by", "data.max_bad_rows")  # fmt: skip
OF_THE_MACHINE = (
    "data.loader_workers", "data.cache_image_features", "training.log_every_steps", "training.save_every_steps", "training.keep_checkpoints",
    "training.on_full_disk", "training.resume", "training.report_to", "training.process_timeout_minutes",
)  # fmt: skip


@pytest.mark.parametrize("key", [*PLACES, *OF_ROWS, *OF_THE_MACHINE, "method.kind", "evaluation.every_steps"])  # fmt: skip
def test_the_card_tells_no_place_and_nothing_that_shapes_no_weight(key: str) -> None:
    assert not card._is_shown(key, "said")
    assert key in option_keys(), "there is such an option"


def test_options_of_every_kind_that_shape_the_weights_are_on_the_card() -> None:
    told = {key for key in option_keys() if card._is_shown(key, "said")}
    wanted = {
        "method.rank", "method.alpha", "training.learning_rate", "training.seed", "training.batch_size", "training.weight_decay",
        "data.max_length", "data.packing", "data.train_on", "data.deduplicate", "deepspeed.zero_stage", "model.freeze", "model.adapter", "model.quantization",
    }  # fmt: skip
    assert wanted <= told


@pytest.mark.parametrize(
    ("run", "state", "rows"),
    [
        ({}, {}, {"base": "base", "method": "lora, rank 4, alpha 6"}),
        ({"config": {"method.kind": "full"}}, {}, {"base": "base", "method": "full"}),
        ({"facts": {"global_batch": 16, "deepspeed": "zero-3, offload"}}, {"global_step": 7}, {"base": "base", "method": "lora, rank 4, alpha 6", "steps": "7, 16 examples each, zero-3"}),
        ({"facts": {"global_batch": 16, "deepspeed": "none"}}, {"global_step": 7}, {"base": "base", "method": "lora, rank 4, alpha 6", "steps": "7, 16 examples each"}),
        (
            {"config": {"data.train": "/x/a.jsonl", "data.validation": ["/x/b.jsonl"]}}, {},
            {"base": "base", "method": "lora, rank 4, alpha 6", "trained on": "a.jsonl: 9 examples, 1,500 of 2,500 tokens carry loss (fingerprint `0123456789abcdef`)", "held out": "b.jsonl"},
        ),
    ],
)  # fmt: skip
def test_the_card_tells_of_base_method_steps_and_data(
    run: dict[str, Any], state: dict[str, Any], rows: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    for name, value in (
        ("run.json", run), ("trainer_state.json", state), ("adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 6}),
        ("../data.json", {"train": {"examples": 9, "supervised_tokens": 1500, "tokens": 2500, "fingerprint": "0123456789abcdefXX"}}),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(value))
    text = card._about(folder, {}, "/home/me/base")
    table = [line.strip("| ").split(" | ") for line in text.partition("###")[0].splitlines()[2:] if line]  # fmt: skip
    assert {row[0]: row[1] for row in table} == rows
    (folder / "adapter_config.json").unlink()
    if not run:
        assert "| method | full |" in card._about(folder, {}, "b")
        assert "| method | ptuning_v2 |" in card._about(folder, {"method": "ptuning_v2"}, "b")


def test_a_card_does_without_files_that_cannot_be_read_and_says_who_wrote_it(
    tmp_path: Path,
) -> None:
    from importlib.metadata import version

    import finetune

    for name, text in (("run.json", "{"), ("trainer_state.json", "[1]"), ("finetune.json", "3")):
        (tmp_path / name).write_text(text)
    said = card.model_card("t", "done.", "owner/base", [(tmp_path, 1.0)], library="peft")
    assert said.startswith("---\nbase_model: owner/base\nlibrary_name: peft\npipeline_tag: text-generation\ntags: [glm-4]\n---\n")  # fmt: skip
    assert said.endswith(f"Written by glm4-finetune {finetune.__version__} (transformers {version('transformers')}).\n")  # fmt: skip
    assert "## Training\n" in said
    (tmp_path / "finetune.json").write_text("{}")
    for name, library in (("config.json", "transformers"), ("adapter_config.json", "peft")):
        (tmp_path / name).write_text("{}")
        told = card.exported_card(tmp_path, "new", "done.", "owner/base")
        assert f"library_name: {library}\n" in told
        assert "## Training\n" in told
    (tmp_path / "finetune.json").unlink()
    assert "## Training\n" not in card.exported_card(tmp_path, "new", "done.", "owner/base")
