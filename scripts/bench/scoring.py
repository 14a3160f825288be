"""How long the scores take beside the generation of the replies, on AdvertiseGen's dev set.

    python scripts/bench/scoring.py DEV.jsonl [--model FOLDER] [--samples 128] [--threads 1] [--json]

  generation     our own loop, 16 prompts at once, on the first `--samples` prompts, every reply as
                 long as its reference (as scripts/bench/generation.py does it)
  one process    every metric of all replies of the file, in one process
  processes      the same as `finetune evaluate` does it: on every core, from 500 replies a core on
  everything     `finetune evaluate --predictions` on them: scores, intervals, slices, the files
  comparison     the same for two files of replies: paired bootstrap and permutation tests too

The replies that are scored are the references of the next dialogues: text of the data's own kind and
length, whatever the model has learnt. Seconds of the clock per 1,000 replies, and their share of the
generation's. Without --model a small random GLM is asked, which is far faster than any real one, so
that the shares are the worst case.

Bar: the scores take at most 10 % of the generation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import generation

MOST = 0.1
BATCH = 16


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of the clock that `work` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def generating(options: argparse.Namespace) -> float:
    """Seconds per reply of our own generation."""
    import torch

    torch.set_num_threads(options.threads)
    model = generation.load_model(options.model)
    template, prompts, lengths = generation.questions(options)
    generation.here(model, template, prompts[:4], [3] * 4, BATCH)
    work = seconds_of(lambda: generation.here(model, template, prompts, lengths, BATCH))
    return work / len(prompts)


def scoring(data: Path, folder: Path) -> dict[str, float]:
    """Seconds per reply of what follows the generation."""
    from finetune.data.dialogue.conversation import Message
    from finetune.evaluation import scoring as scores
    from finetune.evaluation.evaluate import Options, evaluate
    from finetune.evaluation.predictions import Prediction, read_unscored
    from finetune.storage.files import json_line

    rows = [json.loads(line)["messages"] for line in data.read_text(encoding="utf-8").splitlines()]
    total = len(rows)
    answers = folder / "answers.jsonl"
    files = {shift: folder / f"replies-{shift}.jsonl" for shift in (1, 2)}
    with answers.open("w", encoding="utf-8") as file:
        for number, (user, reference) in enumerate(rows):
            reply = rows[(number + 1) % total][1]["content"]
            prediction = Prediction(
                Message("assistant", reply), Message("assistant", reference["content"]), True,
                location=f"dev.jsonl:{number + 1}", message=1, prompt=user["content"],
            )  # fmt: skip
            file.write(json_line(prediction.unscored_row))
    for shift, path in files.items():
        with path.open("w", encoding="utf-8") as file:
            for number, (user, reference) in enumerate(rows):
                reply = rows[(number + shift) % total][1]["content"]
                row = {
                    "prompt": user["content"],
                    "predict": reply,
                    "label": reference["content"],
                }
                file.write(json_line(row))
    scores.score(next(map(read_unscored, map(json.loads, answers.open()))), scores.Scoring())
    each, scores.LINES_PER_PROCESS = scores.LINES_PER_PROCESS, total + 1
    alone = seconds_of(lambda: scores.score_file(answers, folder / "alone.jsonl", scores.Scoring()))
    scores.LINES_PER_PROCESS = each
    several = seconds_of(
        lambda: scores.score_file(answers, folder / "several.jsonl", scores.Scoring())
    )
    assert (folder / "alone.jsonl").read_bytes() == (folder / "several.jsonl").read_bytes()
    found = {"one process": alone, "processes": several}
    for name, asked in (("everything", (1,)), ("comparison", (1, 2))):
        wanted = Options(predictions=tuple(str(files[shift]) for shift in asked))
        found[name] = seconds_of(
            lambda name=name, wanted=wanted: evaluate([], output=folder / name, options=wanted)
        ) / len(asked)
    return {name: value / total for name, value in found.items()}


def _check(data: Path, parser: argparse.ArgumentParser) -> None:
    """Ends with a usage error unless every row is one question and one reply."""
    for number, line in enumerate(data.read_text(encoding="utf-8").splitlines(), start=1):
        if [one["role"] for one in json.loads(line)["messages"]] != ["user", "assistant"]:
            parser.error(f"{data}:{number}: not one question and one reply")


def main() -> int:
    """Prints the figures; 1 when the bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="rows of `messages`, one question and one reply each")
    parser.add_argument("--model", help="a model folder; by default a small random GLM")
    parser.add_argument("--samples", type=int, default=128, help="prompts to generate for (128)")
    parser.add_argument("--threads", type=int, default=1, help="of torch while it generates (1)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    _check(Path(options.data), parser)
    options.variant = "here 16"
    os.environ.setdefault("FINETUNE_CACHE", tempfile.mkdtemp())
    with tempfile.TemporaryDirectory() as folder:
        found = scoring(Path(options.data), Path(folder))
    found = {"generation": generating(options)} | found
    shares = {name: value / found["generation"] for name, value in found.items()}
    missed = shares["processes"] > MOST
    if options.json:
        print(json.dumps({"seconds": found, "shares": shares, "bar": MOST, "missed": missed}))
        return int(missed)
    print(f"{'':<14}{'s per 1,000 replies':>20}{'share':>9}")
    for name, value in found.items():
        print(f"{name:<14}{1000 * value:>20.2f}{shares[name]:>9.2%}")
    print("MISSED  the scores take more than 10 %" if missed else f"bar met: at most {MOST:.0%}")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
