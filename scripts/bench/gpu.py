"""The stages of `gpu.sh`: what a GPU answers about the product, beside what was counted.

    python scripts/bench/gpu.py STAGE --answers FILE [--model FOLDER | --rehearse]

ceilings   matrix products, copies: the denominators of everything else
kernels    each fused kernel beside its torch form, in each number format (models/kernels/check.py)
correct    a product step of two layers against float64 on the CPU: loss and gradients, with and
           without kernels
attention  one row, documents by pieces and in one kernel, a prefix: milliseconds forward and backward
qlora      layers in 4 bits beside the same weights made wide; steps of the whole model (gpu_qlora.py)
step       LoRA, prefix and full on models that fit, ours and plain PEFT: milliseconds, memory, tokens/s
generate   new tokens a second for 16, 64 and 256 prompts at once
train      the command line as a user starts it: train, evaluate, save, resume
table      the answers so far as Markdown

Three warm and five timed steps, device events, medians; random data. Weights are drawn on the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/bench")]
WARM, TIMED = 3, 5
SMALL = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "kv_channels": 16, "padded_vocab_size": 512, "num_layers": 2, "pad_token_id": 0}  # fmt: skip


class Bench:
    """Where answers go, and on what they are found."""

    def __init__(self, asked: argparse.Namespace) -> None:
        import torch

        self.rehearses = asked.rehearse
        self.stage = asked.stage
        self.answers: Path = asked.answers
        self.torch = torch
        cuda = torch.cuda.is_available() and not asked.rehearse
        self.device = torch.device("cuda" if cuda else "cpu")
        self.machine = {"device": torch.cuda.get_device_name() if cuda else "CPU", "torch": torch.__version__}  # fmt: skip
        if cuda:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            self.machine["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()  # fmt: skip
        self.folder = Path(tempfile.mkdtemp(prefix="gpu-bench-"))
        config = json.loads((asked.model / "config.json").read_text()) if asked.model else SIZES
        (self.folder / "config.json").write_text(json.dumps(config | (SMALL if asked.rehearse else {})))  # fmt: skip

    def answer(self, name: str, **figures: Any) -> None:
        """Write one line, at once."""
        line = {"stage": self.stage, "name": name, **figures, **self.machine}
        with self.answers.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def milliseconds(self, work: Callable[[], Any]) -> float:
        """The median of five after three."""
        torch, found = self.torch, []
        for number in range(WARM + TIMED):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= WARM:
                found.append(1000 * (time.perf_counter() - begun))
        return round(statistics.median(found), 3)

    def model(self, method: Any, *, layers: int | None = None, checkpointing: bool = True) -> Any:
        """The product's model with random weights on the device, ready to train."""
        from finetune import methods
        from finetune.models.load import shape_of
        from finetune.planning.subjects import made_in, ready

        torch = self.torch
        with made_in(torch.bfloat16), torch.device(self.device):
            model = shape_of(self.folder, layers)
        draw(model)
        model = methods.attach(model, method)
        return ready(model.to(self.device), checkpointing=checkpointing)


SIZES = {
    "model_type": "chatglm", "num_layers": 40, "hidden_size": 4096, "ffn_hidden_size": 13696,
    "num_attention_heads": 32, "kv_channels": 128, "multi_query_attention": True,
    "multi_query_group_num": 2, "padded_vocab_size": 151552, "add_qkv_bias": True,
    "add_bias_linear": False, "rmsnorm": True, "layernorm_epsilon": 1.5625e-07, "seq_length": 131072,
    "rope_ratio": 500, "original_rope": True, "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": False,
    "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329,
}  # fmt: skip
"""GLM-4-9B-Chat's."""


def draw(model: Any) -> None:
    """Weights as wide as a trained model's; never zeros, which a GPU multiplies faster."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.02)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)


def ceilings(bench: Bench) -> None:
    """What the device reaches where nothing is in the way."""
    torch, size = bench.torch, 256 if bench.rehearses else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
        spent = bench.milliseconds(lambda a=a, b=b: a @ b)
        bench.answer(f"{str(dtype)[6:]} product", ms=spent, tflops=2 * size**3 / spent / 1e9)
    many = torch.empty(size * size * 4, dtype=torch.uint8, device=bench.device)
    spent = bench.milliseconds(lambda: many.clone())
    bench.answer("copy", ms=spent, terabytes_per_second=2 * many.numel() / spent / 1e9)


def kernels(bench: Bench) -> None:
    """Which fused kernels are right here."""
    from finetune.models.kernels import NAMES, check

    torch = bench.torch
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        begun = time.perf_counter()
        verdict = check.compare(bench.device, dtype)
        seconds = round(time.perf_counter() - begun, 2)
        bench.answer(str(dtype)[6:], used=verdict.used, refused=verdict.refused, of=NAMES, seconds=seconds)  # fmt: skip


def batch_of(bench: Bench, length: int, rows: int = 1) -> dict[str, Any]:
    """Random tokens that are all learnt."""
    from finetune.models.loss import for_model

    ids = bench.torch.randint(0, 500, (rows, length))
    return for_model({"input_ids": ids, "labels": ids}, bench.device)


def correct(bench: Bench) -> None:
    """Loss and gradients of two layers against float64."""
    from finetune.config.schema import LoraMethod
    from finetune.models.kernels import check
    from finetune.models.loss import SupervisedHead

    torch = bench.torch
    torch.manual_seed(0)
    method = LoraMethod(dropout=0.0)
    model = bench.model(method, layers=2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    batch = batch_of(bench, 64 if bench.rehearses else 512)
    trained = {n: w for n, w in model.named_parameters() if w.requires_grad}

    def outcome() -> tuple[Any, list[Any]]:
        loss = model(**batch, use_cache=False).loss
        return loss.detach(), list(torch.autograd.grad(loss, list(trained.values())))

    found = {}
    for setting in ("torch", "auto"):
        check.choose(setting, bench.device, torch.bfloat16)
        found[setting] = outcome()
    check.choose("torch", bench.device, torch.bfloat16)
    model = model.double().cpu()
    for head in (m for m in model.modules() if isinstance(m, SupervisedHead)):
        head.__class__ = torch.nn.Linear  # its loss is float32
    inner = model.get_base_model()
    hidden = inner.base_model(input_ids=batch["input_ids"].cpu(), use_cache=False).last_hidden_state
    logits = inner.get_output_embeddings()(hidden)[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:].cpu())
    exact = torch.autograd.grad(loss, [w for w in model.parameters() if w.requires_grad])
    for setting, (ours, gradients) in found.items():
        off = [
            float((a.double().cpu() - b).norm() / b.norm())
            for a, b in zip(gradients, exact, strict=True)
        ]
        bench.answer(
            f"kernels {setting}",
            loss_off=abs(float(ours) - float(loss)) / float(loss),
            worst_gradient_off=max(off), median_gradient_off=statistics.median(off), band=1e-2,
        )  # fmt: skip


def attention(bench: Bench) -> None:
    """Milliseconds of attention alone."""
    from finetune.models.kernels import running

    for length in (256,) if bench.rehearses else (1024, 8192, 32768):
        ways = _attentions(bench, length)
        for name, way in ways.items():
            bench.answer(f"{name}, {length:,}", ms=bench.milliseconds(way))
        if bench.device.type == "cuda":
            with running(("varlen_attention",), "cuda"):
                spent = bench.milliseconds(ways["documents in pieces"])
            bench.answer(f"documents in one kernel, {length:,}", ms=spent)


def _attentions(bench: Bench, length: int) -> dict[str, Callable[[], None]]:
    """Forward and backward passes through one layer's attention."""
    from finetune.models.packed_attention import Documents, grouped_sdpa, in_documents

    torch = bench.torch
    heads, groups, size = (4, 2, 16) if bench.rehearses else (32, 2, 128)

    def random(number: int) -> Any:
        drawn = torch.randn(1, number, length, size, device=bench.device)
        return drawn.to(torch.bfloat16).requires_grad_()

    q, k, v = random(heads), random(groups), random(groups)
    longer = [torch.cat([t[:, :, :128], t], dim=2).detach().requires_grad_() for t in (k, v)]
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[:, :: max(64, length // 24)] = True
    documents = Documents.of(starts).to(bench.device)
    attend = in_documents(grouped_sdpa)

    def both(forward: Callable[[], Any]) -> Callable[[], None]:
        return lambda: forward().float().sum().backward()

    return {
        "causal": both(lambda: grouped_sdpa(None, q, k, v, None, scaling=0.1)[0]),
        "documents in pieces": both(lambda: attend(None, q, k, v, None, documents, scaling=0.1)[0]),
        "prefix of 128": both(lambda: grouped_sdpa(None, q, *longer, None, scaling=0.1)[0]),
    }


def step(bench: Bench) -> None:
    """Whole steps, ours and plain PEFT's, measured beside the roofline and the counted peak."""
    from count_peers import peer

    from finetune.config.schema import FullMethod, LoraMethod, PTuningV2Method
    from finetune.models.kernels import NAMES, check
    from finetune.planning.step import Shape, Subject, count_step
    from finetune.planning.subjects import own

    torch = bench.torch
    used = check.choose("auto", bench.device, torch.bfloat16).used
    short, long = (32, 64) if bench.rehearses else (1024, 4096)
    layers = 2 if bench.rehearses else 8  # of a full tuning that one card holds
    cases: list[tuple[str, Any, int, bool, int | None]] = [
        ("ours", LoraMethod(), short, True, None), ("ours", LoraMethod(), long, True, None),
        ("ours", LoraMethod(), long, False, None), ("peft_trainer", LoraMethod(), long, True, None),
        ("ours", PTuningV2Method(), long, True, None), ("ours", FullMethod(), long, True, layers),
    ]  # fmt: skip
    for name, method, length, checkpointing, depth in cases:
        if name == "ours":
            subject: Subject = own(bench.folder, method, checkpointing=checkpointing, kernels=used or NAMES if bench.device.type == "cuda" else ())  # fmt: skip
        else:
            subject = peer(bench.folder, method, checkpointing=checkpointing, liger=False)
        if depth is not None:
            subject = replace(subject, layers=depth)
        cost = count_step(subject, Shape(1, length))
        figures = measured(bench, subject, length)
        bench.answer(
            f"{name}, {method.kind}, {length:,}{'' if checkpointing else ', all kept'}{f', {depth} layers' if depth else ''}",
            **figures, predicted_gb=cost.peak_bytes / 1e9, roofline_ms=round(cost.milliseconds, 1),
            tokens_per_second=round(1000 * length / figures["ms"]),
        )  # fmt: skip
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def measured(bench: Bench, subject: Any, length: int, model: Any = None) -> dict[str, Any]:
    """Milliseconds and memory of a subject's step on a row of `length`; its model is drawn where none is given."""
    torch = bench.torch
    kind = bench.device.type
    if model is None:
        with torch.device(bench.device):
            model = subject.build(subject.layers)
        draw(model)
        model = model.to(bench.device).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    ids = torch.randint(0, 500, (1, length), device=bench.device)
    places = torch.arange(length - 1, device=bench.device)

    def one() -> None:
        with torch.autocast(kind, dtype=subject.autocast, enabled=subject.autocast is not None):
            loss = subject.loss(model, ids, ids, places)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"ms": bench.milliseconds(one)}
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {
            "allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            "device_gb": (total - free) / 1e9,
        }
    return found


def qlora(bench: Bench) -> None:
    """LoRA on weights in 4 bits."""
    import gpu_qlora

    gpu_qlora.qlora(bench)


def generate(bench: Bench) -> None:
    """New tokens a second, with an adapter that is not merged."""
    from types import SimpleNamespace

    from finetune.config.schema import LoraMethod
    from finetune.generation.generate import generate as reply

    model = bench.model(LoraMethod(), layers=2 if bench.rehearses else None).eval()
    template = SimpleNamespace(stop_ids=(), pad_id=0)
    number, new = (4, 4) if bench.rehearses else (256, 64)
    prompts = bench.torch.randint(1, 500, (number, 64)).tolist()
    for size in (4,) if bench.rehearses else (16, 64, 256):
        begun = time.perf_counter()
        found = reply(model, template, prompts, max_new_tokens=new, batch_size=size)
        spent = time.perf_counter() - begun
        bench.answer(f"{size} at once", tokens_per_second=round(sum(len(r.ids) for r in found) / spent))  # fmt: skip


def train(bench: Bench) -> None:
    """The program as it is started: two steps, and on to four from the checkpoint."""
    from tests import runs, tiny

    model = tiny.save_model(bench.folder / "tiny", "chatglm")
    data = runs.write_dialogues(bench.folder / "train.jsonl", 24)
    config = runs.config(model, data, bench.folder / "run", training__max_steps=2)
    config["model"]["dtype"] = "bfloat16" if bench.device.type == "cuda" else "float32"
    file = bench.folder / "run.yaml"
    file.write_text(json.dumps(config))
    for steps in (2, 4):
        begun = time.perf_counter()
        command = [sys.executable, str(ROOT / "finetune.py"), str(file), f"training.max_steps={steps}", "--json"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")  # fmt: skip
        summary = json.loads(done.stdout.splitlines()[-1])
        bench.answer(f"to step {steps}", seconds=round(time.perf_counter() - begun, 1), loss=summary["train_loss"], resumed=bool(summary["resumed_from"]))  # fmt: skip


def table(answers: Path) -> str:
    """All answers; what a stage said about itself last."""
    lines = ["| stage | | figures |", "|---|---|---|"]
    for line in map(json.loads, answers.read_text(encoding="utf-8").splitlines()):
        stage, name = line.pop("stage"), line.pop("name", "")
        figures = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items())  # fmt: skip
        lines.append(f"| {stage} | {name} | {figures} |")
    return "\n".join(lines)


STAGES: dict[str, Callable[[Bench], None]] = {
    "ceilings": ceilings, "kernels": kernels, "correct": correct, "attention": attention,
    "qlora": qlora, "step": step, "generate": generate, "train": train,
}  # fmt: skip


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], epilog=(__doc__ or "").partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("stage", choices=[*STAGES, "table"])
    parser.add_argument("--answers", type=Path, required=True, help="a file of JSON lines")
    parser.add_argument("--model", type=Path, help="a folder with GLM-4-9B's config.json")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU")
    asked = parser.parse_args()
    if asked.stage == "table":
        print(table(asked.answers))
        return
    STAGES[asked.stage](Bench(asked))


if __name__ == "__main__":
    main()
