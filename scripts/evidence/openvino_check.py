"""Does OpenVINO write the same tokens? A merged model through optimum-intel, 20 prompts of each family.

    python -m venv ov && ov/bin/pip install torch==2.13.0 'optimum-intel[openvino]==2.2.0' transformers==5.0.0
    ov/bin/pip uninstall --yes torchvision    # beside a torch without CUDA PyPI's one does not import
    python scripts/evidence/openvino_check.py ov

Here: a tiny random base, a LoRA adapter merged into it by `finetune merge` (of the published layout also
`finetune export --layout hf`), and our greedy replies. In the environment: optimum-intel's own
export, its OVModelForCausalLM, the tokenizer as transformers opens it. Prints a line a family, and ends with 1
where prompt ids differ, or a reply differs at two logits that are not as close as rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
NEW_TOKENS = 32
ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
ROUNDING = 1e-3
"""Of float32 logits of size 10."""
THERE = """
import json, sys
import transformers
from importlib.metadata import version
from optimum.intel import OVModelForCausalLM

folder, asked = sys.argv[1], json.load(open(sys.argv[2]))
model = OVModelForCausalLM.from_pretrained(folder, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
import torch
answers = []
for messages in asked["dialogues"]:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")["input_ids"]
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=asked["new"], do_sample=False, eos_token_id=asked["stops"], pad_token_id=asked["pad"])
    answers.append([ids[0].tolist(), made[0, ids.shape[1]:].tolist()])
versions = ", ".join(f"{name} {version(name)}" for name in ("optimum-intel", "openvino", "transformers"))
json.dump({"answers": answers, "versions": versions}, open(sys.argv[3], "w"))
"""


def merged(folder: Path, family: str) -> Path:
    """A merged model in transformers' layout."""
    import serving
    from adapters import make_adapter

    from finetune.export.convert import export
    from finetune.export.merge import merge

    base = serving.save_talkative(folder / "base", family)
    adapter = make_adapter(folder / "adapter", base)
    found = merge(adapter, folder / "merged").output
    if family == "chatglm":
        found = export(str(found), folder / "hf", layout="hf").output
    return Path(found)


def dialogues() -> list[list[dict[str, str]]]:
    """20 of one to three turns."""
    found = []
    for number in range(20):
        messages = [{"role": "system", "content": "Answer in short."}] if number % 3 == 0 else []
        for turn in range(number % 3):
            messages.append({"role": "user", "content": f"question {number}.{turn}"})
            messages.append({"role": "assistant", "content": f"the answer {turn}"})
        messages.append({"role": "user", "content": f"你好, the dog and order {number}"})
        found.append(messages)
    return found


def exported(model: Path, environment: Path) -> Path:
    """What optimum-intel makes of a model."""
    out = model.with_name("openvino")
    command = [str(environment / "bin/optimum-cli"), "export", "openvino", "--model", str(model), "--task", "text-generation-with-past", "--weight-format", "fp32", str(out)]  # fmt: skip
    done = subprocess.run(command, env=ALONE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return out


def compare(family: str, folder: Path, environment: Path) -> tuple[bool, str]:
    """Whether all is as here, and a line about it."""
    from finetune.data.dialogue.conversation import Conversation, Message
    from finetune.generation.generate import generate
    from finetune.generation.load import open_model

    model = merged(folder, family)
    opened = open_model(model)
    asked = dialogues()
    prompts = []
    for messages in asked:
        said = tuple(Message(one["role"], one["content"]) for one in messages)  # type: ignore[arg-type]
        prompts.append(opened.template.prompt(Conversation(said), len(said)))
    ours = generate(opened.model, opened.template, prompts, max_new_tokens=NEW_TOKENS, batch_size=8)
    stops, pad = list(opened.template.stop_ids), opened.template.pad_id
    question, answer = folder / "asked.json", folder / "answers.json"
    question.write_text(json.dumps({"dialogues": asked, "new": NEW_TOKENS, "stops": stops, "pad": pad}))  # fmt: skip
    out = exported(model, environment)
    done = subprocess.run([str(environment / "bin/python"), "-c", THERE, str(out), str(question), str(answer)], env=ALONE, capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"OpenVINO failed on {family}:\n{done.stderr[-3000:]}")
    found = json.loads(answer.read_text())
    same_ids = sum(list(map(int, prompt)) == ids for prompt, (ids, _) in zip(prompts, found["answers"], strict=True))  # fmt: skip
    gaps, tokens = [], 0
    for prompt, reply, (_, other) in zip(prompts, ours, found["answers"], strict=True):
        other = other[:-1] if other and other[-1] in stops else other
        tokens += len(reply.ids)
        if list(reply.ids) != other:
            gaps.append(gap(opened, list(map(int, prompt)), list(reply.ids), other, stops))
    line = f"{family}: {same_ids} of 20 prompts with equal ids, {20 - len(gaps)} of 20 replies equal ({tokens} tokens)"
    line += f", largest logit gap where they differ {max(gaps):.1e}" if gaps else ""
    return same_ids == 20 and max(gaps, default=0) < ROUNDING, f"{line}; {found['versions']}"


def gap(opened: Any, prompt: list[int], ours: list[int], other: list[int], stops: list[int]) -> float:  # fmt: skip
    """How far apart our two logits are where the replies part."""
    ends = [*ours, stops[0]], [*other, stops[0]]
    place = next(n for n, (a, b) in enumerate(zip(*ends, strict=False)) if a != b)
    with torch.no_grad():
        logits = opened.model(torch.tensor([prompt + ours[:place]])).logits[0, -1]
    return float((logits[ends[0][place]] - logits[ends[1][place]]).abs())


def main() -> int:
    """Every family in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("environment", type=Path, help="a virtual environment with optimum-intel")
    parser.add_argument("--only", nargs="*", default=["glm", "glm4", "chatglm"])
    options = parser.parse_args()
    well = True
    for family in options.only:
        with tempfile.TemporaryDirectory() as folder:
            is_same, line = compare(family, Path(folder), options.environment.absolute())
        print(line, flush=True)
        well = well and is_same
    return int(not well)


if __name__ == "__main__":
    raise SystemExit(main())
