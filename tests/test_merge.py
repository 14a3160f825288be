"""Merging: what the adapter computes becomes the weights, and everything else stays as it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import logits, make_adapter, make_base, peft_merged, weights_of
from closeness import LARGEST_LOGIT, additions, assert_close, rounding
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from finetune.artifacts import checkpoint
from finetune.artifacts.resolve import find_source
from finetune.artifacts.weights import read_shard, tensors
from finetune.errors import CheckpointError, ConfigError, ModelError
from finetune.export.merge import merge
from finetune.export.numbers import STORAGE, is_finite, narrow, widen
from finetune.models.load import load_model
from finetune.storage import folders

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "scale of a power of two": {"r": 8, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 7},
        "alpha_pattern": {"down_proj": 3},
    },
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved whole": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
}


# PEFT rounds an embedding's update to bfloat16 before adding it; ours is rounded once, see below.
SAME_AS_PEFT = [
    pytest.param(kind, dtype, id=f"{kind}-{name}")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    for kind in KINDS
    if (kind, name) != ("embedding", "bf16")
]


@pytest.mark.parametrize(("kind", "dtype"), SAME_AS_PEFT)
def test_the_merged_weights_are_those_of_peft_up_to_one_rounding(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    merge(adapter, tmp_path / "out", check="none")
    expected = peft_merged(base, adapter, dtype)
    found = weights_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    before, changed = weights_of(base), 0
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        if torch.equal(expected[name], before[name]):
            assert torch.equal(tensor, before[name]), name
            continue
        # NumPy and torch add up to 9 numbers in float32, perhaps across a border of `dtype`.
        atol = rounding(9, float(expected[name].abs().max()))
        rtol = torch.finfo(dtype).eps
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=atol, msg=name)
        changed += 1
    assert changed


def exact(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The changed tensors in float64, by the definition of LoRA and DoRA."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    parts = {k: v.double() for k, v in load_file(adapter / "adapter_model.safetensors").items()}
    weights, found = weights_of(base), {}
    for key in parts:
        module, dot, _ = key.partition(".lora_A.weight")
        if dot:
            a, b = parts[key], parts[f"{module}.lora_B.weight"]
        elif key.endswith(".lora_embedding_A"):
            module = key.removesuffix(".lora_embedding_A")
            a, b = parts[f"{module}.lora_embedding_B"].T, parts[key].T
        else:
            continue
        rank = a.shape[0]
        scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
        name = module.removeprefix("base_model.model.") + ".weight"
        merged = weights[name].double() + scale * (b @ a)
        if config["use_dora"]:
            length = parts[f"{module}.lora_magnitude_vector"]
            merged *= (length / merged.norm(dim=1))[:, None]
        found[name] = merged
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"target_modules": ["embed_tokens"]}, {"r": 32, "use_rslora": True}],
    ids=["dora", "embedding", "rank 32"],
)
def test_the_merged_weights_are_as_near_to_the_exact_ones_as_peft_s(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    merge(adapter, tmp_path / "out", check="none")
    ours, theirs = weights_of(tmp_path / "out"), peft_merged(base, adapter, dtype)
    wanted = exact(base, adapter)
    assert wanted
    # One rounding to the number format, and before it those of up to 32 products in float32.
    for name, tensor in wanted.items():
        nearest = (tensor.to(dtype).double() - tensor).abs()
        error = (ours[name].double() - tensor).abs()
        slack = rounding(32) * tensor.abs().clamp(min=1)
        assert (error <= nearest + slack).all(), name
        if dtype != torch.float32:  # there both errors are those of an order of additions
            assert error.mean() <= (theirs[name].double() - tensor).abs().mean() * 1.01, name


@pytest.mark.parametrize("family", ["chatglm", "glm", "glm4"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_the_merged_model_answers_as_base_and_adapter_do(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", family=family)
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    report = merge(adapter, tmp_path / "out", check="full")
    before = logits(PeftModel.from_pretrained(load_model(base), str(adapter)).eval())
    merged = load_model(tmp_path / "out")
    after, sums = logits(merged), additions(merged.config, 30)
    assert_close(before, after, sums)
    assert report.largest_difference is not None
    assert report.largest_difference < rounding(sums, LARGEST_LOGIT)
    assert (after - logits(load_model(base))).abs().max() > 0.1


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head", "q_proj"], ["q_proj"]], ids=str)
def test_a_tied_model_keeps_one_matrix_only_while_one_can_serve_both_ends(
    tmp_path: Path, targets: list[str]
) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=targets)
    report = merge(adapter, tmp_path / "out")
    before = logits(PeftModel.from_pretrained(load_model(base), str(adapter)).eval())
    merged = load_model(tmp_path / "out")
    assert_close(before, logits(merged), additions(merged.config, 30))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert report.untied == (targets != ["q_proj"])
    assert config["tie_word_embeddings"] == (not report.untied)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) == report.untied
    stored = tensors(tmp_path / "out")
    assert {name: info.file.name for name, info in stored.items()} == index["weight_map"]
    assert sum(info.size for info in stored.values()) == index["metadata"]["total_size"]


def test_all_but_the_changed_tensors_is_carried_over_byte_for_byte(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16, family="chatglm")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["query_key_value"])
    merge(adapter, tmp_path / "out", check="none")
    out, names = tmp_path / "out", {file.name for file in base.iterdir()}
    assert {f.name for f in out.iterdir()} == names - {"pytorch_model.bin"} | {
        "manifest.json",
        "README.md",
    }
    for name in names - {"pytorch_model.bin"}:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (base / name).read_bytes(), name
            continue
        before, after = (base / name).read_bytes(), (out / name).read_bytes()
        shard = read_shard(base / name)
        assert after[: len(shard.header)] == shard.header
        for tensor in shard.tensors:
            part = slice(tensor.start, tensor.end)
            is_target = tensor.name.endswith("query_key_value.weight")
            assert (before[part] != after[part]) == is_target, tensor.name
    assert folders.verify(out) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_adapters_add_up_as_in_peft_s_add_weighted_adapter(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base = make_base(tmp_path / "base", dtype)
    kinds: list[tuple[dict[str, Any], float]] = [({"r": 4}, 0.5), ({"r": 8, "use_rslora": True}, -0.3)]  # fmt: skip
    folders = [
        make_adapter(tmp_path / f"adapter-{seed}", base, seed=seed, **options)
        for seed, (options, _) in enumerate(kinds)
    ]
    weights = [weight for _, weight in kinds]
    merge(list(zip(folders, weights, strict=True)), tmp_path / "out")  # with its own check
    model = PeftModel.from_pretrained(load_model(base), str(folders[0]), adapter_name="0")
    model.load_adapter(str(folders[1]), adapter_name="1")
    model.add_weighted_adapter(["0", "1"], weights, "sum", combination_type="cat")
    model.set_adapter("sum")
    expected, found = model.merge_and_unload().state_dict(), weights_of(tmp_path / "out")
    changed = 0
    for name, tensor in found.items():
        eps, atol = torch.finfo(dtype).eps, rounding(12, float(tensor.abs().max()))
        torch.testing.assert_close(tensor, expected[name].to(dtype), rtol=eps, atol=atol, msg=name)
        changed += not torch.equal(tensor, weights_of(base)[name])
    assert changed == 12  # six matrices in two layers


def test_one_adapter_may_be_weakened_and_what_cannot_be_added_up_is_refused(
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path / "base")
    plain, dora = make_adapter(tmp_path / "a", base), make_adapter(tmp_path / "d", base, use_dora=True)  # fmt: skip
    whole = make_adapter(tmp_path / "w", base, modules_to_save=["lm_head"])
    merge([(plain, 0.5)], tmp_path / "half")
    merge(plain, tmp_path / "full")
    merge([(plain, 0.0)], tmp_path / "none")
    for name, tensor in weights_of(base).items():
        none, half, full = (weights_of(tmp_path / f)[name] for f in ("none", "half", "full"))
        assert torch.equal(none, tensor)
        assert_close(half, (tensor + full) / 2, 4)
    for one in (dora, whole):
        with pytest.raises(ModelError, match="cannot be added up"):
            merge([(plain, 1.0), (one, 1.0)], tmp_path / "out")
    with pytest.raises(ConfigError, match="whole model"):
        merge([(plain, 1.0), (base, 1.0)], tmp_path / "out")
    with pytest.raises(ConfigError, match="given twice"):
        merge([(plain, 1.0), (plain, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["lora", "dora", "several", "full"])
def test_another_number_format_is_written_on_request(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base")
    source: Any = base
    if kind != "full":
        source = make_adapter(tmp_path / "adapter", base, use_dora=kind == "dora")
    if kind == "several":
        source = [(source, 0.5), (make_adapter(tmp_path / "other", base, seed=2), 2.0)]
    merge(source, tmp_path / "plain", check="none")
    merge(source, tmp_path / "small", dtype="bfloat16")
    plain, small = weights_of(tmp_path / "plain"), weights_of(tmp_path / "small")
    assert plain.keys() == small.keys()
    for name, tensor in small.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, plain[name].to(torch.bfloat16)), name
    assert json.loads((tmp_path / "small/config.json").read_text())["dtype"] == "bfloat16"
    assert folders.verify(tmp_path / "small") == []
    with pytest.raises(ConfigError, match="--dtype 'int8'"):
        merge(source, tmp_path / "other", dtype="int8")


def test_a_run_means_its_best_good_checkpoint_else_the_newest_good_one(tmp_path: Path) -> None:
    base, run = make_base(tmp_path / "base"), tmp_path / "run"
    run.mkdir()
    for step in (1, 2, 3):
        with folders.staged(run / f"checkpoint-{step}") as stage:
            make_adapter(stage, base, seed=step)
            (stage / "optimizer.pt").write_bytes(b"state")
    source, notes = find_source(run)
    assert (source.name, notes) == (
        "checkpoint-3",
        [f"took checkpoint-3, the newest good one of {run}"],
    )
    checkpoint.set_best(run, run / "checkpoint-1", "loss", 0.5)
    assert find_source(run)[0].name == "checkpoint-1"
    (run / "checkpoint-1/optimizer.pt").write_bytes(b"other")
    (run / "checkpoint-3/finetune.json").unlink()
    source, notes = find_source(run)
    assert source.name == "checkpoint-2"
    assert "checkpoint-3: finetune.json is missing" in notes[0]
    with pytest.raises(CheckpointError, match=r"optimizer\.pt has other content"):
        merge(run / "checkpoint-1", tmp_path / "out")
    report = merge(run, run / "merged", check="none")
    assert folders.verify(report.output) == []


def test_of_a_fully_tuned_checkpoint_the_model_alone_is_taken(tmp_path: Path) -> None:
    base, run = make_base(tmp_path / "base"), tmp_path / "run"
    run.mkdir()
    with folders.staged(run / "checkpoint-5") as stage:
        shutil.copytree(base, stage, dirs_exist_ok=True)
        for name in ("optimizer.pt", "rng_state.pth", "run.json", "trainer_state.json"):
            (stage / name).write_text("{}")
    report = merge(run, tmp_path / "out")
    assert (report.num_updated, report.largest_difference) == (0, None)
    kept = {f.name for f in base.iterdir()} - {"pytorch_model.bin"}
    kept |= {"manifest.json", "README.md"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == kept
    assert torch.equal(logits(load_model(base)), logits(load_model(tmp_path / "out")))


MEASURE = """
import resource, sys
from pathlib import Path
import numpy
import finetune.console
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from finetune.export.merge import merge
merge(Path(sys.argv[1]), Path(sys.argv[2]), check="none")
heavy = {"torch", "transformers", "peft", "safetensors"} & set(sys.modules)
assert not heavy, heavy
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_merging_takes_little_memory_and_no_torch(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=1, intermediate_size=1 << 18)  # 200 MB of MLPs
    adapter = tmp_path / "adapter"
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in tensors(base).items() if "mlp" in n}
    parts = {}
    for name, (rows, columns) in shapes.items():
        module = "base_model.model." + name.removesuffix(".weight")
        parts[f"{module}.lora_A.weight"] = torch.randn(4, columns)
        parts[f"{module}.lora_B.weight"] = torch.randn(rows, 4)
    adapter.mkdir()
    save_file(parts, adapter / "adapter_model.safetensors")
    config = LoraConfig(r=4, lora_alpha=8, base_model_name_or_path=str(base)).to_dict()
    (adapter / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", **{k: config[k] for k in ("r", "lora_alpha")}}
            | {
                "base_model_name_or_path": str(base),
                "target_modules": ["gate_up_proj", "down_proj"],
            }
        )
    )
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(adapter), str(tmp_path / "out")],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    weights = sum(t.size for t in tensors(base).values())
    held = sum(part.numel() * 4 for part in parts.values())
    assert weights > 180e6
    assert int(result.stdout.split()[-1]) * 1024 < held * 2 + 60e6


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even() -> None:
    # 1 + 2^-8 lies halfway between 1 and 1 + 2^-7; 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6.
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8)], np.float32)
    out, back = np.empty(4, np.uint16), np.empty(4, np.float32)
    narrow(values, "BF16", out, np.empty(4, np.uint32))
    widen(out, "BF16", back)
    assert back.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -1.0]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 1001, 1 << 16])
def test_bfloat16_rounds_as_torch_does_on_any_bits(size: int) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, size, dtype=np.uint32)
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000  # ties
    bits[4::7] = 0
    values = bits.view(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(1))
    out = np.empty(values.size, np.uint16)
    narrow(values.copy(), "BF16", out, np.ones(values.size, np.uint32))
    wanted = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy()
    assert (out.view(np.int16) == wanted).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
def test_what_is_no_finite_number_is_seen_in_every_format(dtype: str, bad: float) -> None:
    values = np.array([0.0, -0.0, 65504.0, -65504.0, 1e-7, -1.0], np.float32)
    stored = np.empty(values.size, STORAGE[dtype])
    narrow(values.copy(), dtype, stored, np.empty(values.size, np.uint32))
    assert is_finite(stored, dtype)
    values[3] = bad
    narrow(values, dtype, stored, np.empty(values.size, np.uint32))
    assert not is_finite(stored, dtype)
