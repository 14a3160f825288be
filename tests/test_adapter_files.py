from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter, make_base
from safetensors.torch import load_file, save_file

from finetune.artifacts.adapter import check_config, read_lora
from finetune.artifacts.regex import match_names
from finetune.errors import ModelError
from finetune.export.merge import merge
from finetune.methods import lora, ptuning_v2
from finetune.models.load import load_model

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CATASTROPHE = r"(([a-z0-9._]*)*)*!"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("adapter-files") / "base")


@pytest.fixture(scope="module")
def good(base: Path) -> Path:
    return make_adapter(base.parent / "adapter", base)


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def opened(base: Path, adapter: Path) -> None:
    lora.load_adapter(load_model(base), adapter)


def merged(base: Path, adapter: Path) -> None:
    merge(adapter, adapter.parent / "merged", base=base, check="none")


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], Any], str]] = {
    "missing": (lambda tensors, name: tensors.pop(name), r"has no lora_|has nothing for"),
    "without the prefix": (
        lambda tensors, name: tensors.update({name.removeprefix("base_model.model."): tensors.pop(name)}),
        r"is not named base_model\.model\.",
    ),
    "misnamed": (
        lambda tensors, name: tensors.update({name.replace("layers", "blocks"): tensors.pop(name)}),
        r"has no lora_|no place in|is not there|has nothing for",
    ),
    "of another shape": (
        lambda tensors, name: tensors.update({name: tensors[name].repeat(2, 2)}),
        r"do not fit|has rank|and not|is \(",
    ),
    "not finite": (
        lambda tensors, name: tensors[name].view(-1)[-1:].fill_(float("nan")),
        r"not finite",
    ),
    "of integers": (
        lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}),
        r"is I8, not one of",
    ),
    "beside a head that nothing adapts": (
        lambda tensors, name: tensors.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}),
        r"lm_head\.weight is of a kind that is not known",
    ),
    "beside another": (
        lambda tensors, name: tensors.update({name.replace("lora_", "lora_extra_"): torch.ones(2)}),
        r"is of a kind that is not known",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("way", [opened, merged])
def test_a_tensor_that_is_not_as_it_was_trained_is_refused_by_name(
    base: Path, adapter: Path, damage: str, way: Callable[[Path, Path], None]
) -> None:
    spoil, reason = DAMAGES[damage]
    names = sorted(load_file(adapter / WEIGHTS))
    name = names[len(names) // 2]
    change_tensors(adapter, lambda tensors: spoil(tensors, name))
    with pytest.raises(ModelError, match=reason) as caught:
        way(base, adapter)
    module = name.removeprefix("base_model.model.").rpartition(".lora")[0]
    if damage.startswith("beside a head"):
        return
    assert module in str(caught.value) or module.replace("layers", "blocks") in str(caught.value)


@pytest.mark.parametrize("damage", sorted(set(DAMAGES) - {"not finite", "misnamed"}))
def test_any_tensor_may_be_the_one(adapter: Path, damage: str) -> None:
    whole = load_file(adapter / WEIGHTS)
    for name in whole:
        tensors = dict(whole)
        DAMAGES[damage][0](tensors, name)
        save_file(tensors, adapter / WEIGHTS)
        with pytest.raises(ModelError):
            read_lora(adapter)


def test_a_whole_module_that_is_missing_is_missed(base: Path, adapter: Path) -> None:
    def without(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1.mlp.down_proj" in name]:
            del tensors[name]

    change_tensors(adapter, without)
    for way in (opened, merged):
        with pytest.raises(ModelError, match=r"nothing for model\.layers\.1\.mlp\.down_proj"):
            way(base, adapter)


SETTINGS: dict[str, dict[str, Any]] = {
    "negative rank": {"r": -1},
    "rank of a text": {"r": "8"},
    "rank without end": {"r": 10**9},
    "alpha that is no number": {"lora_alpha": float("nan")},
    "alpha of a text": {"lora_alpha": "much"},
    "dropout": {"lora_dropout": 7},
    "corda": {"init_lora_weights": "corda"},
    "pissa": {"init_lora_weights": "pissa"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "target_parameters": {"target_parameters": ["experts.weight"]},
    "layers_pattern": {"layers_pattern": "blocks", "layers_to_transform": [1]},
    "megatron_config": {"megatron_config": {"a": 1}},
    "megatron_core": {"megatron_core": "os"},
    "layer_replication": {"layer_replication": [[0, 1]] * 200_000},
    "use_dora": {"use_dora": True},
    "dora of a text": {"use_dora": "yes"},
    "bias": {"bias": "some"},
    "task": {"task_type": "SEQ_CLS"},
    "no targets": {"target_modules": None},
    "rank pattern": {"rank_pattern": {"q_proj": 0}},
    "alpha pattern": {"alpha_pattern": {"q_proj": "x"}},
    "a pattern that is no regex": {"rank_pattern": {"(": 4}},
    "of a later PEFT": {"use_new_lora": True},
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_is_not_understood_is_refused_by_name(adapter: Path, setting: str) -> None:
    change_config(adapter, **SETTINGS[setting])
    key = next(iter(SETTINGS[setting]))
    told = "lora_magnitude" if setting == "use_dora" else key if key != "r" else "r|rank"
    with pytest.raises(ModelError, match=told) as caught:
        read_lora(adapter)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"]
)
def test_a_regex_without_end_is_given_up(
    base: Path, adapter: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.artifacts.regex.SECONDS", 0.3)
    change_config(adapter, **{key: {CATASTROPHE: 4} if key.endswith("pattern") else CATASTROPHE})
    started = time.perf_counter()
    with pytest.raises(ModelError, match=f"{key}: matching"):
        read_lora(adapter).misfits([f"{'a' * 40}.weight"])
    assert time.perf_counter() - started < 60  # without a limit it is hours


def test_a_pattern_matches_as_re_does() -> None:
    names = ["model.layers.0.q_proj", "model.layers.10.q_proj", "lm_head"]
    found = match_names([r".*\.\d\.q_proj", "lm_head", "nothing"], names, location="x")
    assert found == {
        r".*\.\d\.q_proj": {names[0]}, "lm_head": {"lm_head"}, "nothing": frozenset()
    }  # fmt: skip
    assert match_names(["lm.head"], names, location="x") == {"lm.head": {"lm_head"}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_virtual_tokens": 3}, "says num_virtual_tokens 3"),
        ({"num_virtual_tokens": 10**12}, "num_virtual_tokens=1000000000000"),
        ({"num_layers": "many"}, "num_layers='many'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type"),
        ({"odd": 1}, "odd=1"),
    ],
)
def test_a_prefix_that_is_not_what_its_config_says_is_refused(
    base: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = tmp_path / "prefix"
    folder.mkdir()
    model = load_model(base)
    heads, size = ptuning_v2._key_value_shape(model)
    width = model.config.num_hidden_layers * 2 * heads * size
    save_file({"prompt_embeddings": torch.ones(4, width)}, folder / WEIGHTS)
    config = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    (folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    ptuning_v2.load_adapter(model, folder)
    change_config(folder, **change)
    with pytest.raises(ModelError, match=reason):
        ptuning_v2.load_adapter(load_model(base), folder)


def test_a_prefix_with_numbers_that_are_not_finite_or_another_tensor_is_refused(
    tmp_path: Path,
) -> None:
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    good = torch.ones(2, 4)
    broken = good.clone()
    broken[1, 3] = float("inf")
    for tensors, reason in (
        ({"prompt_embeddings": broken}, "not finite"),
        ({"prompt_embeddings": good, "other": good.clone()}, "nothing else"),
        ({"prompt_embedding": good}, "nothing else"),
        ({"prompt_embeddings": torch.ones(3, 4)}, "there are 3"),
        ({"prompt_embeddings": good.to(torch.int32)}, "one matrix"),
    ):
        save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(ModelError, match=reason):
            ptuning_v2._flat_weights(tmp_path)


def test_settings_that_change_nothing_are_taken(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    change_config(folder, megatron_core="megatron.core", eva_config={"rho": 2}, loftq_config={})
    assert check_config(folder)["r"] == 4
    assert read_lora(folder).scale("model.layers.0.self_attn.q_proj") == 6 / 4
