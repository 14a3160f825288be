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


MODELS = {
    "advertisegen": "THUDM/glm-4-9b-chat", "glm4v_lora": "THUDM/glm-4v-9b", "glm4v_ptuning_v2": "THUDM/glm-4v-9b", "glm4v_sft": "THUDM/glm-4v-9b",
    "lora": "THUDM/glm-4-9b-chat", "lora_0414": "THUDM/GLM-4-9B-0414", "lora_1m": "THUDM/glm-4-9b-chat-1m", "lora_flash": "zai-org/GLM-4.7-Flash",
    "lora_hf": "THUDM/glm-4-9b-chat-hf", "pretrain": "THUDM/glm-4-9b", "ptuning_v2": "THUDM/glm-4-9b-chat", "quickstart": "runs/quickstart-model",
    "sft": "THUDM/glm-4-9b-chat",
}  # fmt: skip
METHODS = {"sft": "full", "glm4v_sft": "full", "pretrain": "full", "ptuning_v2": "ptuning_v2", "glm4v_ptuning_v2": "ptuning_v2"}  # fmt: skip
RATES = {"lora": (1e-4, 1e-3), "full": (1e-5, 5e-5), "ptuning_v2": (1e-2, 1e-2)}
"""Learning rates at which these methods are published to work."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_is_the_job_that_its_name_says(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    config = load(path).config
    processes = 2 if path.stem == "quickstart" else 8
    assert lines[0] == f"# torchrun --nproc_per_node={processes} finetune.py configs/{path.name}"
    (schema,) = re.findall(r"\$schema=(\S+)", lines[1])
    assert (path.parent / schema).is_file()
    assert config.training.output_dir == f"runs/{path.stem}", "two jobs never share a folder"
    assert config.model.path == MODELS[path.stem]
    kind = METHODS.get(path.stem, "lora")
    assert config.method.kind == kind
    least, most = RATES[kind]
    assert least <= config.training.learning_rate <= most
    assert config.data.validation is not None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_holds_what_its_comments_promise(path: Path) -> None:
    config = load(path).config
    method, training, evaluation = config.method, config.training, config.evaluation
    if path.stem == "quickstart":  # small enough for a CPU, and scored before as well
        assert (evaluation.at_start, evaluation.best_metric) == (True, "loss")
        assert (training.num_epochs, training.batch_size, config.data.max_length) == (1.25, 4, 512)
        assert (method.rank, method.alpha, method.dropout) == (16, 32, 0.0)  # type: ignore[union-attr]
        return
    assert config.model.dtype == "bfloat16"
    assert training.activation_checkpointing is True
    assert training.batch_size == 1
    assert training.save_every_steps % evaluation.every_steps == 0, "what is kept was scored"
    sees = path.stem.startswith("glm4v")
    assert config.model.freeze == (["vision"] if sees else [])
    assert bool(config.data.cache_image_features) is (sees and method.kind != "full")
    assert config.data.packing is (not sees and path.stem != "lora_1m")
    rows = {"lora_1m": 32768} | dict.fromkeys((n for n in MODELS if n.startswith("glm4v")), 2048)
    assert config.data.max_length == rows.get(path.stem, 4096)
    if method.kind == "lora":  # as in the original demo, but for long documents
        wanted = (16, 32, 0.0) if path.stem == "lora_1m" else (8, 32, 0.1)
        assert (method.rank, method.alpha, method.dropout) == wanted
    if method.kind == "ptuning_v2":
        assert method.num_virtual_tokens == 128
    stage = config.deepspeed.zero_stage if config.deepspeed else None
    assert stage == (3 if method.kind == "full" or path.stem == "lora_flash" else None)
    if method.kind == "full":
        assert training.keep_checkpoints == 1, "one of these has 130 GB"
    said = path.read_text(encoding="utf-8")
    if "of 280 short dialogues" in said:
        assert training.num_epochs == 10
        assert (ROOT / str(config.data.train)).read_text(encoding="utf-8").count("\n") == 280
