"""Does llama.cpp write the same tokens? A small model in the published layout through its own converter.

The model is random, with GLM-4's real tokenizer, which the converter knows by a hash of what it does.
The converter comes with the source distribution of llama-cpp-python; scripts/gguf_check.sh gets it.

    python scripts/gguf_check.py --llama-cpp FOLDER --tokenizer THUDM/glm-4-9b-chat
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llama_cpp
import numpy as np
import serve_models
import torch
from rich.console import Console
from rich.table import Table
from serve_check import Answer, Request, common, requests

from finetune.data.tokenizer import load_chat_tokenizer, local_folder, tokenizer_file
from finetune.evaluation.generate import generate
from finetune.evaluation.open import OpenedModel, open_model

NUM_TOKENS = 32
# Weights of 16 or 8 bits against ours of 32: logits, whose spread is 1, move by about this much.
ROUNDING = {"f16": 0.02, "q8_0": 0.2}
SIZES = {
    "num_layers": 4, "num_hidden_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384,
    "kv_channels": 32, "num_attention_heads": 4, "seq_length": 4096, "torch_dtype": "float32",
    "initializer_range": 128**-0.5, "vocab_size": 151552,
}  # fmt: skip


def make_model(folder: Path, published: Path) -> None:
    """A random model with the tokenizer and the settings of a published GLM-4 folder.

    Three things differ from that folder, and the converter needs each of them: tokenizer.json, which
    holds the merges; a tokenizer_config.json that runs no code; `vocab_size` in config.json.
    """
    folder.mkdir(parents=True)
    shutil.copyfile(tokenizer_file(published), folder / "tokenizer.json")
    settings = json.loads((published / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("auto_map", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["chat_template"] = load_chat_tokenizer(published).chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False))
    config = json.loads((published / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    serve_models.save_random(folder, config | SIZES)


def convert(folder: Path, kind: str, llama_cpp_folder: Path) -> Path:
    """The GGUF file that llama.cpp's converter makes of a model folder."""
    file = folder.with_suffix(f".{kind}.gguf")
    script = llama_cpp_folder / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(folder), "--outtype", kind, "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the converter failed:\n{done.stderr[-3000:]}")
    return file


def load(file: Path, **options: Any) -> llama_cpp.Llama:
    """The model of a GGUF file."""
    return llama_cpp.Llama(str(file), n_ctx=4096, n_batch=512, verbose=False, seed=0, **options)


def their_answer(model: llama_cpp.Llama, prompt: str, stops: set[int]) -> Answer:
    """llama.cpp's greedy answer, its own tokenizer included."""
    ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
    model.reset()
    reply: list[int] = []
    model.eval(ids)
    while len(reply) < NUM_TOKENS:
        token = int(np.argmax(last_logits(model)))
        if token in stops:
            return Answer(ids, reply, True, [])
        reply.append(token)
        model.eval([token])
    return Answer(ids, reply, False, [])


def last_logits(model: llama_cpp.Llama) -> np.ndarray:
    """Logits [V] after everything that was given so far."""
    pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(model.n_vocab(),))


def our_logits(opened: OpenedModel, ids: list[int]) -> np.ndarray:
    """Our logits [V] after `ids`."""
    with torch.no_grad():
        given = torch.tensor([ids])
        return opened.model(input_ids=given, use_cache=False).logits[0, -1].float().numpy()


def compare(
    opened: OpenedModel, model: llama_cpp.Llama, asked: list[Request]
) -> tuple[list[float], float]:
    """Gap of the logits at every first difference, infinite for a prompt; the largest difference."""
    prompts = opened.template.prompts(asked)
    stops = set(opened.template.stop_ids)
    ours = generate(
        opened.model, opened.template, prompts, max_new_tokens=NUM_TOKENS, batch_size=10
    )
    gaps, largest = [], 0.0
    for prompt, reply in zip(prompts, ours, strict=True):
        theirs = their_answer(model, opened.template.decode(prompt), stops)
        if theirs.prompt != list(prompt):
            gaps.append(float("inf"))
            continue
        model.reset()
        model.eval(theirs.prompt)
        moved = np.abs(last_logits(model) - our_logits(opened, theirs.prompt)).max()
        largest = max(largest, float(moved))
        if (theirs.reply, theirs.stopped) != (list(reply.ids), reply.stopped):
            place = common(theirs.reply, list(reply.ids))
            logits = our_logits(opened, [*prompt, *reply.ids[:place]])
            token = theirs.reply[place] if place < len(theirs.reply) else min(stops)
            gaps.append(float(logits.max() - logits[token]))
    return gaps, largest


def ends(model: llama_cpp.Llama, stops: list[int]) -> str:
    """Which of the stops end a reply in llama.cpp."""
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    return " ".join(
        f"{i} {'yes' if llama_cpp.llama_vocab_is_eog(vocabulary, i) else 'NO'}" for i in stops
    )


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
        stops = list(opened.template.stop_ids)
        for kind, rounding in ROUNDING.items():
            file = convert(folder, kind, given.llama_cpp.resolve())
            model = load(file)
            gaps, largest = compare(opened, model, asked)
            failed = failed or any(gap > rounding for gap in gaps)
            worst = f"{max(gaps):.2g}" if gaps else ""
            table.add_row(kind, f"{len(gaps)} of {len(asked)}", worst, f"{largest:.2g}", ends(model, stops))  # fmt: skip
        override = {"tokenizer.ggml.eom_token_id": stops[-1]}
        console.print(table)
        console.print(f"with --override-kv tokenizer.ggml.eom_token_id=int:{stops[-1]}: {ends(load(file, kv_overrides=override), stops)}")  # fmt: skip
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
