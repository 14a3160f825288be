"""What a merge costs beside `cp`: wall time, processor time and peak memory, in alternation.

python scripts/bench/merge.py --gigabytes 4 --rounds 3 [--directory FOLDER] [--cold] [--only NAME]...
                              [--llamafactory ENV/bin/python]

Makes a synthetic sharded GLM in bfloat16 with a LoRA adapter on all attention and MLP matrices (as
training does by default), then runs one after the other, each in a process of its own, as often as asked:
`cp`; `cp` + `sync`, which is as durable as our output; a copy that is durable and hashed (two files at
a time, none read twice), which is what our output promises without computing anything; `finetune merge`
as it is typed, and with less and more checking; PEFT's merge_and_unload + save; LLaMA-Factory's export,
from an environment of its own. Threads of torch are not limited.
--cold drops the inputs from the file cache before each, as for a checkpoint that was not just used.
--directory keeps the inputs for another time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import Process
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, FFN, HEADS, GROUPS, HEAD, VOCAB = 2048, 6848, 16, 2, 128, 16384
SHARD_BYTES = 1 << 30
RANK = 8

PROMISE = """
import hashlib, os, sys
from concurrent.futures import ThreadPoolExecutor
source, target = sys.argv[1:]
os.mkdir(target)
def copy(name):
    buffer, digest = memoryview(bytearray(8 << 20)), hashlib.sha256()
    with open(f"{source}/{name}", "rb", 0) as old, open(f"{target}/{name}", "xb", 0) as new:
        while count := old.readinto(buffer):
            digest.update(buffer[:count])
            new.write(buffer[:count])
        os.fsync(new)
    return f"{digest.hexdigest()}  {name}"
with ThreadPoolExecutor(2) as pool:
    sums = list(pool.map(copy, os.listdir(source)))
open(target + "/sums", "x").write("\\n".join(sums))
"""
PEFT = """
import sys, json
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = json.load(open(sys.argv[1] + "/adapter_config.json"))["base_model_name_or_path"]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, sys.argv[1]).merge_and_unload()
model.save_pretrained(sys.argv[2], max_shard_size="1GB")
"""
LLAMA_FACTORY = """
import sys, json
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
import transformers, datasets, peft, trl
try:
    import torchaudio
except Exception:  # needed for sound only, and none fits a torch without CUDA
    sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))
from llamafactory.train.tuner import export_model
base = json.load(open(sys.argv[1] + "/adapter_config.json"))["base_model_name_or_path"]
export_model({
    "model_name_or_path": base, "adapter_name_or_path": sys.argv[1], "template": "default",
    "finetuning_type": "lora", "export_dir": sys.argv[2], "export_size": 1, "export_device": "cpu",
    "infer_dtype": "bfloat16",
})
"""
NOTHING = "import numpy"


def main() -> None:
    """Print one row per way, with its ratio to `cp`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--llamafactory", help="python of an environment that has it")
    parser.add_argument("--only", action="append", help="a way's name; repeatable")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.directory or Path(folder)
        if not (work / "adapter").is_dir():
            # In a process of its own: what is started later would count its memory as its own.
            maker = Process(target=make, args=(work, options.gigabytes))
            maker.start()
            maker.join()
        size = sum(file.stat().st_size for file in (work / "base").glob("*.safetensors"))
        idle = run([sys.executable, "-c", NOTHING])[2]
        print(
            f"{size / 1e9:.2f} GB, {options.rounds} rounds, {'cold' if options.cold else 'warm'} cache"
        )
        known = ways(work)
        if options.llamafactory:
            command = [options.llamafactory, "-c", LLAMA_FACTORY, str(work / "adapter")]
            known["LLaMA-Factory"] = [*command, str(work / "llamafactory")]
        chosen = {name: way for name, way in known.items() if name in (options.only or known)}
        report(measure(chosen, work, options), idle)


def make(work: Path, gigabytes: float) -> None:
    """The base and its adapter."""
    make_model(work / "base", gigabytes)
    make_adapter(work / "adapter", work / "base")


def ways(work: Path) -> dict[str, list[str]]:
    """The command of each way; the last word is where its output goes."""
    base, adapter = str(work / "base"), str(work / "adapter")
    ours = [sys.executable, "-m", "finetune", "merge", adapter]
    synced = 'cp -r "$0" "$1" && sync "$1"/*'
    return {
        "cp": ["cp", "-r", base, str(work / "cp")],
        "cp + sync": ["sh", "-c", synced, base, str(work / "synced")],
        "copy + sync + SHA-256": [sys.executable, "-c", PROMISE, base, str(work / "promise")],
        "finetune merge": [*ours, "--output", str(work / "ours")],
        "finetune merge --no-check": [*ours, "--no-check", "--output", str(work / "unchecked")],
        "finetune merge --check full": [*ours, "--check", "full", "--output", str(work / "full")],
        "PEFT": [sys.executable, "-c", PEFT, adapter, str(work / "peft")],
    }  # fmt: skip


def measure(
    commands: dict[str, list[str]], work: Path, options: argparse.Namespace
) -> dict[str, list[tuple[float, float, float]]]:
    """(wall s, processor s, peak MB) of each way and round."""
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            subprocess.run(["sync"], check=True)  # nothing of the last one still being written
            if options.cold:
                forget(work / "base")
            results[name].append(run(command))
            shutil.rmtree(command[-1])
    return results


def run(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak MB of one command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{command} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, spent, usage.ru_maxrss / 1024


def report(results: dict[str, list[tuple[float, float, float]]], idle: float) -> None:
    """A table of medians; memory is above an interpreter with numpy."""
    base = [wall for wall, _, _ in results["cp"]]
    print(f"{'':28} {'wall s':>8} {'x cp':>6} {'CPU s':>8} {'peak MB above idle':>20}")
    for name, rows in results.items():
        wall, spent = (median(row[place] for row in rows) for place in (0, 1))
        ratio = median(row[0] / one for row, one in zip(rows, base, strict=True))
        above = max(0.0, max(row[2] for row in rows) - idle)
        print(f"{name:28} {wall:8.2f} {ratio:6.2f} {spent:8.2f} {above:20.0f}")


def make_model(folder: Path, gigabytes: float) -> int:
    """A GLM of about that size with random bfloat16 weights; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    per_layer = sum(2 * rows * columns for rows, columns in layer_shapes(0).values())
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / per_layer))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        shapes |= layer_shapes(layer)
        shapes |= {
            f"model.layers.{layer}.{name}.weight": (HIDDEN,)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    config = {
        "model_type": "glm", "architectures": ["GlmForCausalLM"], "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS, "head_dim": HEAD, "vocab_size": VOCAB, "attention_bias": False,
        "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": [0], "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder)
    return write_shards(folder, shapes)


def make_tokenizer(folder: Path) -> None:
    """One that knows a word; LLaMA-Factory does not export without."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<|endoftext|>": 0, "word": 1}
    Tokenizer(WordLevel(words, "<|endoftext|>")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def layer_shapes(layer: int) -> dict[str, tuple[int, int]]:
    """The matrices of one layer."""
    at = f"model.layers.{layer}."
    return {
        at + "self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
        at + "self_attn.k_proj.weight": (GROUPS * HEAD, HIDDEN),
        at + "self_attn.v_proj.weight": (GROUPS * HEAD, HIDDEN),
        at + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        at + "mlp.gate_up_proj.weight": (2 * FFN, HIDDEN),
        at + "mlp.down_proj.weight": (HIDDEN, FFN),
    }


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """Write random weights, one shard after the other."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * int(np.prod(shape)) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * int(np.prod(shape))
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_safetensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """One file of random bfloat16 numbers around 0.01; returns the bytes of its weights."""
    entries, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    noise = np.random.default_rng(0)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for shape in shapes.values():
            values = noise.standard_normal(int(np.prod(shape)), dtype=np.float32) * 0.02
            stream.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
    return position


def make_adapter(folder: Path, base: Path) -> None:
    """A LoRA adapter on every matrix of every layer."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    noise = np.random.default_rng(1)
    parts = {}
    for layer in range(layers):
        for name, (rows, columns) in layer_shapes(layer).items():
            module = "base_model.model." + name.removesuffix(".weight")
            for part, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                values = noise.standard_normal(shape, dtype=np.float32) * 0.02
                parts[f"{module}.lora_{part}.weight"] = values
    save_file(parts, folder / "adapter_model.safetensors")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32,
        "target_modules": modules, "base_model_name_or_path": str(base),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def forget(folder: Path) -> None:
    """Drop the files of ``folder`` from the file cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
