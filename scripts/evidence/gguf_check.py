"""Does llama.cpp write the same tokens? A small model in the published layout through its own converter.

The model is random, with GLM-4's real tokenizer, which the converter knows by a hash of what it does.
The converter comes with the source distribution of llama-cpp-python; scripts/evidence/gguf_check.sh gets it.

    python scripts/evidence/gguf_check.py --llama-cpp FOLDER --tokenizer THUDM/glm-4-9b-chat
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

import numpy as np
import serve_models
import torch
from rich.console import Console
from rich.table import Table
from serve_check import common, requests
from without_code import write_settings

from finetune.artifacts.resolve import local_folder
from finetune.generation.generate import Reply, generate
from finetune.generation.load import OpenedModel, open_model

NUM_TOKENS, EOM = 32, "tokenizer.ggml.eom_token_id"
# Weights of 16 or 8 bits against ours of 32: logits, whose spread is 1, move by about this much.
ROUNDING = {"f16": 0.02, "q8_0": 0.2}
SIZES = {
    "num_layers": 4, "num_hidden_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384,
    "kv_channels": 32, "num_attention_heads": 4, "seq_length": 4096, "torch_dtype": "float32",
    "initializer_range": 128**-0.5,
}  # fmt: skip


def make_model(folder: Path, published: Path) -> None:
    """A small random model with the tokenizer of a published GLM-4 folder, for the converter."""
    folder.mkdir(parents=True)
    write_settings(published, folder, **SIZES)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    serve_models.save_random(folder, settings)


def convert(folder: Path, kind: str, llama_cpp_folder: Path) -> Path:
    """The GGUF file that llama.cpp's converter makes of a model folder."""
    file = folder.with_suffix(f".{kind}.gguf")
    script = llama_cpp_folder / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(folder), "--outtype", kind, "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the converter failed:\n{done.stderr[-3000:]}")
    return file


def llama(
    file: Path, prompts: list[str], stops: list[int], **overrides: int
) -> tuple[list[dict[str, Any]], list[bool]]:
    """llama.cpp's answers, and of each stop whether it ends a reply there."""
    asked = {"file": str(file), "prompts": prompts, "stops": stops}
    asked |= {"num_tokens": NUM_TOKENS, "overrides": overrides}
    script = Path(__file__).with_name("gguf_answers.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(asked), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"llama.cpp failed:\n{done.stderr[-3000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return said["answers"], said["ends"]


def our_logits(opened: OpenedModel, ids: list[int]) -> np.ndarray:
    """Our logits [V] after `ids`."""
    with torch.no_grad():
        given = torch.tensor([ids])
        return opened.model(input_ids=given, use_cache=False).logits[0, -1].float().numpy()


def compare(
    opened: OpenedModel, ours: list[Reply], prompts: list[list[int]], file: Path
) -> tuple[list[float], float, list[bool]]:
    """Gap of our logits at every first difference, infinite for a prompt that is read otherwise.

    Also the largest difference of the logits after the prompts, and which stops end a reply.
    """
    stops = list(opened.template.stop_ids)
    texts = [opened.template.decode(prompt) for prompt in prompts]
    theirs, ends = llama(file, texts, stops)
    moved = 0.0
    gaps = []
    for prompt, reply, said, logits in zip(
        prompts, ours, theirs, np.load(f"{file}.npy"), strict=True
    ):
        if said["prompt"] != list(prompt):
            gaps.append(float("inf"))
            continue
        moved = max(moved, float(np.abs(logits - our_logits(opened, prompt)).max()))
        if (said["reply"], said["stopped"]) != (list(reply.ids), reply.stopped):
            place = common(said["reply"], list(reply.ids))
            own = our_logits(opened, [*prompt, *reply.ids[:place]])
            token = said["reply"][place] if place < len(said["reply"]) else stops[0]
            gaps.append(float(own.max() - own[token]))
    return gaps, moved, ends


def words(stops: list[int], ends: list[bool]) -> str:
    """Which stops end a reply, for the table."""
    pairs = zip(stops, ends, strict=True)
    return ", ".join(f"{stop} {'yes' if end else 'NO'}" for stop, end in pairs)


def main() -> None:
    """Print a table; exit with 1 when a difference is more than the number format explains."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, help="its sources")
    parser.add_argument("--tokenizer", required=True, help="a published GLM-4 folder or hub id")
    given = parser.parse_args()
    console, failed = Console(width=130), False
    table = Table("GGUF", "differences", "largest gap", "largest logit difference", "stops end it")
    asked = requests("data/support_desk/heldout.jsonl")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_model(folder, local_folder(given.tokenizer))
        opened = open_model(folder)
        prompts = opened.template.prompts(asked)
        ours = generate(
            opened.model, opened.template, prompts, max_new_tokens=NUM_TOKENS, batch_size=10
        )
        stops = list(opened.template.stop_ids)
        for kind, rounding in ROUNDING.items():
            file = convert(folder, kind, given.llama_cpp.resolve())
            gaps, moved, ends = compare(opened, ours, prompts, file)
            failed = failed or any(gap > rounding for gap in gaps)
            worst = f"{max(gaps):.2g}" if gaps else ""
            table.add_row(kind, f"{len(gaps)} of {len(asked)}", worst, f"{moved:.2g}", words(stops, ends))  # fmt: skip
        console.print(table)
        _, ends = llama(file, [], stops, **{EOM: stops[-1]})
        console.print(f"with --override-kv {EOM}=int:{stops[-1]}: {words(stops, ends)}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
