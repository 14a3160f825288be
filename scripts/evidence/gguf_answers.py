"""llama.cpp's greedy answers, in a process of their own: what fails in C ends that process only.

Reads from standard input {"file", "prompts", "stops", "num_tokens", "overrides"} and writes one line:
{"answers": [{"prompt", "reply", "stopped"}], "ends": [of each stop, whether it ends a reply]}. The
logits after each prompt go to <file>.npy.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import llama_cpp


def last_logits(model: llama_cpp.Llama) -> np.ndarray:
    """Logits [V] after everything that was given so far."""
    import llama_cpp

    pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(model.n_vocab(),)).copy()


def answer(model: llama_cpp.Llama, prompt: str, stops: list[int], num_tokens: int) -> Any:
    """The answer to a prompt that llama.cpp's own tokenizer reads, and the logits before it."""
    ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
    model.reset()
    model.eval(ids)
    first = logits = last_logits(model)
    reply: list[int] = []
    while len(reply) < num_tokens and int(logits.argmax()) not in stops:
        reply.append(int(logits.argmax()))
        model.eval(reply[-1:])
        logits = last_logits(model)
    return {"prompt": ids, "reply": reply, "stopped": len(reply) < num_tokens}, first


def without_repacking(default_params: Any) -> Any:
    """Default options, but weights stay as they are: AMX's kernel for Q8_0 crashed on our machine."""
    params = default_params()
    params.use_extra_bufts = False
    return params


def main() -> None:
    """Answer what is asked on standard input."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    import llama_cpp

    inner = llama_cpp.llama_cpp  # Llama() has no option for it
    inner.llama_model_default_params = partial(without_repacking, inner.llama_model_default_params)
    asked = json.load(sys.stdin)
    model = llama_cpp.Llama(
        asked["file"], n_ctx=4096, verbose=False, kv_overrides=asked["overrides"] or None
    )
    found = [answer(model, p, asked["stops"], asked["num_tokens"]) for p in asked["prompts"]]
    np.save(asked["file"] + ".npy", np.array([logits for _, logits in found]))
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    ends = [bool(llama_cpp.llama_vocab_is_eog(vocabulary, stop)) for stop in asked["stops"]]
    print(json.dumps({"answers": [said for said, _ in found], "ends": ends}))


if __name__ == "__main__":
    main()
