"""Writes the counted tables of docs/gpu.md and README.md between their marks.

    python scripts/bench/gpu_page.py [--check]

GLM-4-9B-Chat's and GLM-4V-9B's published sizes are below, so that no model is needed. About two minutes
on one core. --check says whether the pages are current and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/bench")]

VISION = {
    "dropout_prob": 0.0, "hidden_act": "gelu", "hidden_size": 1792, "image_size": 1120,
    "in_channels": 3, "intermediate_size": 15360, "layer_norm_eps": 1e-6, "num_heads": 16,
    "num_hidden_layers": 63, "num_positions": 6401, "patch_size": 14, "scaling_factor": 8.0,
}  # fmt: skip
GB = 1e9


def folder_of(sizes: dict[str, Any]) -> Path:
    """A folder with nothing but that config.json."""
    folder = Path(tempfile.mkdtemp(prefix="sizes-"))
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


def steps(model: Path) -> str:
    """What a step costs, ours and peers'."""
    import count

    def rows(*words: str) -> list[dict[str, Any]]:
        before, sys.argv = sys.argv, ["count.py", "--model", str(model), *words]
        try:
            return count.rows(count.arguments())
        finally:
            sys.argv = before

    found = rows("--method", "lora", "--length", "4096", "--peers")
    found += rows("--method", "lora", "--length", "4096", "--checkpointing", "--four-bits", "--peers")  # fmt: skip
    found += rows(
        "--method", "ptuning_v2", "full", "--length", "4096", "--checkpointing", "--peers"
    )
    found += rows("--method", "lora", "ptuning_v2", "--length", "32768", "--checkpointing")
    return count.table(found)


def planned(folder: Path, method: dict[str, Any], **options: Any) -> Any:
    """A plan, from a configuration that says no more than this."""
    from finetune.cli.inputs import planned
    from finetune.config.schema import RunConfig
    from finetune.planning.plan import Gpu

    section = {
        "model": {"path": str(folder), "dtype": "bfloat16"} | options.get("model", {}),
        "data": {"train": "x", "max_length": options["length"]},
        "method": method,
        "training": {
            "output_dir": "x",
            "batch_size": options.get("batch", 1),
            "activation_checkpointing": options.get("checkpointing", True),
        },
        "deepspeed": options.get("deepspeed"),
    }
    gpu = Gpu(number=options.get("gpus", 1))
    return planned(RunConfig.model_validate(section), gpu)[1]


def needs(text: Path, image: Path) -> str:
    """GB of a GPU by method and length, with what others have published beside it."""
    lora, prefix, full = {"kind": "lora"}, {"kind": "ptuning_v2"}, {"kind": "full"}
    four = {"model": {"quantization": "nf4"}}
    zero = {"deepspeed": {"zero_stage": 3}, "gpus": 8}
    lengths = (1024, 4096, 32768)
    rows = [
        ("LoRA", text, lora, {}, "22.6 (GLM-4's demo, 1 K)"),
        ("LoRA, all activations kept", text, lora, {"checkpointing": False}, ""),
        ("QLoRA (nf4)", text, lora, four, "about 10 (LLaMA-Factory)"),
        ("P-Tuning v2, 128 tokens", text, prefix, {}, "22.4 (GLM-4's demo, 512 tokens)"),
        ("full, ZeRO-3 on 8 GPUs", text, full, zero, "84.9 (GLM-4's demo, 4 x 1 K)"),
        ("GLM-4V-9B, LoRA, without the images", image, lora, {"model": {"freeze": ["vision"]}}, "79 (GLM-4's demo)"),
    ]  # fmt: skip
    head = " | ".join(f"{length:,} tokens" for length in lengths)
    lines = [f"| GB of each GPU | {head} | published |", "|---|---|---|---|---|"]
    for name, model, method, options, published in rows:
        cells = []
        for length in lengths:
            found = planned(model, method, length=length, **options)
            cells.append(f"{found.memory_bytes / GB:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {published} |")
    return "\n".join(lines)


def put(page: Path, name: str, table: str) -> bool:
    """Put a table between a page's marks; whether it was there already."""
    text = page.read_text(encoding="utf-8")
    pattern = rf"(<!-- {name} -->\n\n).*?(\n\n<!-- /{name} -->)"
    changed, number = re.subn(pattern, lambda m: m[1] + table + m[2], text, flags=re.DOTALL)
    if number != 1:
        raise SystemExit(f"{page}: the marks of {name} are not there once")
    page.write_text(changed, encoding="utf-8")
    return changed == text


def main() -> int:
    """Write the pages, or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a page is not current")  # fmt: skip
    asked = parser.parse_args()
    from gpu import SIZES

    warnings.filterwarnings("ignore", category=FutureWarning)
    text, image = folder_of(SIZES), folder_of(SIZES | {"vision_config": VISION, "boi_token_id": 151339, "eoi_token_id": 151340})  # fmt: skip
    tables = {"steps": steps(text), "needs": needs(text, image)}
    places = [("docs/gpu.md", "steps"), ("docs/gpu.md", "needs"), ("docs/gpu_zh.md", "steps"), ("docs/gpu_zh.md", "needs"), ("README.md", "needs"), ("README_zh.md", "needs")]  # fmt: skip
    before = {page: (ROOT / page).read_text(encoding="utf-8") for page, _ in places}
    current = [put(ROOT / page, name, tables[name]) for page, name in places]
    if asked.check:
        for page, content in before.items():
            (ROOT / page).write_text(content, encoding="utf-8")
    print("current" if all(current) else "not current" if asked.check else "written")
    return int(asked.check and not all(current))


if __name__ == "__main__":
    raise SystemExit(main())
