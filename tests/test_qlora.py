"""QLoRA: four-bit layers under LoRA, from training over evaluation to a merged model."""

from __future__ import annotations

import importlib.util
import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pictures
import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from finetune.config.load import load_config
from finetune.config.schema import LoraMethod
from finetune.errors import ConfigError, ModelError
from finetune.models import load, quantization
from finetune.models.families import FAMILIES
from finetune.models.load import load_model

ROOT = Path(__file__).resolve().parent.parent
bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'glm4-finetune[qlora]'",
)
WIDE = {
    "glm": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32},
    "chatglm": {"hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 32},
}


def config_file(folder: Path, **changes: object) -> Path:
    data = runs.write_dialogues(folder / "train.jsonl", 16)
    path = folder / "config.json"
    settings = runs.config(folder / "model", data, folder / "run", **changes)
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method__kind": "full", "method__rank": None}, "method.kind full cannot train"),
        ({"deepspeed__zero_stage": 3}, "cannot be sharded by ZeRO-3"),
    ],
)
def test_what_four_bits_cannot_be_combined_with_is_refused_by_key(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = config_file(tmp_path, model__quantization="nf4", **changes)
    with pytest.raises(ConfigError, match=said):
        load_config(path, [])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is installed")
def test_without_bitsandbytes_the_error_says_what_to_install(tiny_glm: Path) -> None:
    with pytest.raises(ModelError, match=r"pip install 'glm4-finetune\[qlora\]'"):
        load_model(tiny_glm, quantization="nf4")


@bitsandbytes
def test_a_width_that_the_kernels_cannot_take_is_refused_on_a_cpu(tiny_glm: Path) -> None:
    with pytest.raises(ModelError, match=r"widths that 64 divides, but .*q_proj takes 32"):
        load_model(tiny_glm, dtype="float32", quantization="nf4")


SEEING = ["chatglm", "glm4v", "glm46v", "glm_ocr"]


def seeing(folder: Path, family: str) -> Path:
    """A tiny checkpoint with a vision encoder whose widths 64 does not divide, and a text whose it does."""
    if family == "chatglm":
        return pictures.save_model(folder, **WIDE["chatglm"])
    return pictures.save_grid_model(folder, family, width=64)


@pytest.mark.parametrize("family", SEEING)
def test_four_bits_are_meant_for_the_layers_of_the_text_alone(family: str, tmp_path: Path) -> None:
    kept = FAMILIES[family].unquantized
    model = load_model(seeing(tmp_path, family))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    meant = {name for name in linear if should_convert_module(name, list(kept))}
    assert meant == {n for n in linear if re.fullmatch(FAMILIES[family].lora_targets, n)}
    assert len(meant) < len(linear) - 5


@bitsandbytes
@pytest.mark.parametrize("family", SEEING)
def test_a_vision_encoder_beside_four_bits_is_whole(family: str, tmp_path: Path) -> None:
    narrow = load_model(seeing(tmp_path, family), quantization="nf4")
    held = {n for n, module in narrow.named_modules() if isinstance(module, quantization.FourBits)}
    assert held
    assert all(re.fullmatch(FAMILIES[family].lora_targets, name) for name in held)


@bitsandbytes
@pytest.mark.parametrize("stage", [None, 2])
@pytest.mark.parametrize("family", ["glm", "chatglm"])
def test_a_quantised_base_trains_is_evaluated_alike_and_merges(
    family: str, stage: int | None, tmp_path: Path
) -> None:
    from finetune.export.merge import merge
    from finetune.generation.load import open_model

    base = tiny.save_model(tmp_path / "model", family, **WIDE[family])
    changes = {"deepspeed__zero_stage": stage} if stage is not None else {}
    held_out = runs.write_dialogues(tmp_path / "dev.jsonl", 4, seed=1)
    path = config_file(
        tmp_path, model__quantization="nf4", model__dtype="float32", data__validation=str(held_out),
        evaluation__every_steps=6, **changes,
    )  # fmt: skip
    done = runs.run_command(json.loads(path.read_text(encoding="utf-8")), tmp_path, launcher=False)
    assert done.returncode == 0, done.stderr
    losses = runs.history(tmp_path / "run")
    assert losses[-1] < losses[0] - 0.1

    checkpoint = tmp_path / "run" / "checkpoint-6"
    opened = open_model(checkpoint).model
    quantised = [n for n, m in opened.named_modules() if isinstance(m, quantization.FourBits)]
    assert quantised, "the checkpoint is opened on the base in four bits, as it was trained"
    assert not any("lm_head" in name or "output_layer" in name for name in quantised)
    ids = torch.arange(40, 72).unsqueeze(0)
    in_four_bits = opened(ids).logits

    merged = tmp_path / "merged"
    merge(checkpoint, merged)
    names = load_file(base / "model.safetensors").keys()
    assert load_file(merged / "model.safetensors").keys() == names
    plain = load_model(merged, dtype="float32")(ids).logits
    together = torch.corrcoef(torch.stack([plain.flatten(), in_four_bits.flatten()]))[0, 1]
    assert 0.9 < together < 1 - 1e-4, "four bits are near, and not what was merged"


def narrow(folder: Path, *, checkpointing: bool) -> Any:
    """A model in 4 bits with adapters that are not zero, in training mode."""
    from finetune import methods
    from finetune.planning.subjects import ready

    torch.manual_seed(0)
    model = load_model(folder, dtype="float32", quantization="nf4")
    model = methods.attach(model, LoraMethod(dropout=0.0))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return ready(model, checkpointing=checkpointing)


def learnt(model: Any) -> list[torch.Tensor]:
    """Loss and gradients."""
    ids = torch.arange(40, 72).unsqueeze(0)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, weights)]


@bitsandbytes
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "recomputed"])
def test_a_matrix_in_four_bits_is_made_wide_twice_a_step(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes.functional
    from bitsandbytes.nn import Linear4bit

    base = tiny.save_model(tmp_path / "model", "glm", **WIDE["glm"])
    made = []
    dequantize = bitsandbytes.functional.dequantize_4bit

    def noted(*given: Any, **options: Any) -> torch.Tensor:
        made.append(1)
        return dequantize(*given, **options)

    quantization._layer_class.cache_clear()
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", noted)
    model = narrow(base, checkpointing=checkpointing)
    matrices = [m for m in model.modules() if isinstance(m, Linear4bit)]
    found = learnt(model)
    # The first layer's input has no gradient before its first adapter: q, k and v are read once there.
    assert 2 * len(matrices) - 3 <= len(made) <= 2 * len(matrices)
    quantization._layer_class.cache_clear()

    monkeypatch.setattr(
        load, "take_over", lambda model: None
    )  # bitsandbytes' and PEFT's own products
    theirs = learnt(narrow(base, checkpointing=checkpointing))
    for ours, expected in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@bitsandbytes
def test_without_checkpoints_no_wide_matrix_waits_for_the_backward_pass(tmp_path: Path) -> None:
    model = narrow(tiny.save_model(tmp_path / "model", "glm", **WIDE["glm"]), checkpointing=False)
    frozen = {
        m.weight.quant_state.shape
        for m in model.modules()
        if hasattr(m, "support_avx512bf16_for_cpu")
    }
    saved: list[torch.Size] = []
    ids = torch.arange(40, 72).unsqueeze(0)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        model(input_ids=ids, labels=ids, use_cache=False)
    assert saved
    assert not frozen & set(saved)


@bitsandbytes
def test_evaluation_in_four_bits_leaves_training_what_it_was(tmp_path: Path) -> None:
    model = narrow(tiny.save_model(tmp_path / "model", "glm", **WIDE["glm"]), checkpointing=True)
    before = learnt(model)
    ids = torch.arange(40, 72).unsqueeze(0)
    with torch.inference_mode():
        evaluated = model.eval()(input_ids=ids, labels=ids, use_cache=False).loss
    assert torch.equal(evaluated, before[0])
    for one, other in zip(learnt(model.train()), before, strict=True):
        assert torch.equal(one, other)


@bitsandbytes
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "recomputed"])
def test_a_plan_in_four_bits_is_within_5_percent_of_what_a_real_step_allocates(
    checkpointing: bool, tmp_path: Path
) -> None:
    from test_plan import really_held

    from finetune.cli.inputs import planned
    from finetune.config.schema import RunConfig
    from finetune.planning.plan import Gpu

    # A wide MLP: torch's attention on a CPU holds a copy of its output, that on a GPU does not.
    sizes = WIDE["glm"] | {"intermediate_size": 512}
    folder = tiny.save_model(tmp_path / "model", "glm", **sizes)
    method = LoraMethod(dropout=0.0)
    config = RunConfig.model_validate(
        {
            "model": {
                "path": str(folder),
                "dtype": "float32",
                "kernels": "torch",
                "quantization": "nf4",
            },
            "data": {"train": "x.jsonl", "max_length": 256},
            "method": method.model_dump(),
            "training": {"output_dir": "x", "activation_checkpointing": checkpointing},
        }
    )
    model = load_model(folder, dtype="float32", quantization="nf4")
    real = really_held(model, method, checkpointing=checkpointing, shape=(1, 256), folder=folder)
    assert planned(config, Gpu())[1].memory_bytes == pytest.approx(real, rel=0.05)


@bitsandbytes
def test_the_stage_for_a_gpu_finds_the_numbers_of_wide_weights_and_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench"))
    import gpu

    answers = tmp_path / "answers.jsonl"
    gpu.qlora(gpu.Bench(Namespace(rehearse=True, stage="qlora", answers=answers, model=None)))
    same, learns, step = map(json.loads, answers.read_text().splitlines())
    assert same["loss_off"] < 1e-3
    assert same["worst_gradient_off"] < same["band"]
    assert learns["last"] < learns["first"] - 0.3
    assert learns["most_apart"] < 0.05
    assert step["ms"] > 0
    assert step["predicted_gb"] > 0
