"""Do two checkouts of this project give the same results? A table; exit code 1 when they differ.

    python scripts/evidence/same_results.py                        this checkout against a008844
    python scripts/evidence/same_results.py --base-commit COMMIT   against another commit
    python scripts/evidence/same_results.py --base OLD --head NEW  two folders
    python scripts/evidence/same_results.py --only losses.lora merge

Both run the same commands on the same tiny random models and data, one process each, one thread, on
the CPU. Ids, replies and scores of words must be equal. Losses, gradient norms and merged weights
may differ by the rounding of float32 (`ROUNDING`, relative), where sums are taken in another order:
the table says "rounding" and how much. Rows that changed on purpose are named with the reason
(`ON_PURPOSE`). Only the command line is used, so modules may
move and be renamed between the two. Models and data are made by this checkout, once for both; the
rows named quickstart read each checkout's own data and configs/quickstart.yaml. `GLM4_ASSETS` names
the folder with the published tokenizer and the golden dialogues.

All rows take about four minutes of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from checkout import ROOT, RUNS, STEPS, Checkout, Inputs, NoResultError, assets, commit_folder
from safetensors.torch import load_file


@dataclass(frozen=True)
class Finding:
    """What one checkout gave in one row of the table."""

    text: str
    """For the table."""
    value: Any
    """Plain JSON, compared to the last bit."""


ROUNDING = 2e-6
"""Largest relative difference of two float32 results of 20 steps: 16 units in the last place."""

ADDED = ("json_match", "json_schema_validity", "json_validity")
"""Scores that the first releases did not have."""

ON_PURPOSE = {
    "golden.chat_template_z1": (
        "each reply of a thinking checkpoint is now an example behind its own prompt"
    ),
}
"""Rows that are meant to differ from the first releases, and why."""


def golden(checkout: Checkout, name: str) -> Finding:
    """Ids and trained spans of the golden dialogues."""
    model = assets() / "assets/glm-4-9b-chat"
    if name == "chat_template_z1":
        model = checkout.inputs.z1_tokenizer()
    return tokens(checkout, model, assets() / f"golden/{name}.jsonl")


def quickstart_tokens(checkout: Checkout, file: str) -> Finding:
    """Ids and trained spans of the data that the quickstart trains on."""
    data = checkout.folder / "data/support_desk" / file
    return tokens(checkout, checkout.inputs.model("quickstart"), data)


BY_WORDS = {f"eval_{name}" for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "corpus_bleu", "repetition_rate")}  # fmt: skip
"""Scores in training that are over words, which are cut by script now."""


def tokens(checkout: Checkout, model: Path, file: Path) -> Finding:
    """What `finetune data tokens` prints."""
    rows = json_lines(checkout.run("data", "tokens", file, "--model", model), f"tokens of {file}")
    num_tokens = sum(len(row["input_ids"]) for row in rows)
    num_trained = sum(end - start for row in rows for start, end in row["trained_spans"])
    if not num_trained:
        raise NoResultError(f"no token of {file} carries loss")
    return Finding(f"{len(rows)} rows, {num_trained:,} of {num_tokens:,} trained", rows)


def losses(checkout: Checkout, run: str) -> Finding:
    """Loss, gradient norm and learning rate of every step."""
    steps = [row for row in metrics(checkout.trained(run)) if "loss" in row]
    if [row["step"] for row in steps] != list(range(1, STEPS + 1)):
        raise NoResultError(f"metrics.jsonl does not hold the losses of steps 1 to {STEPS}")
    values = [{key: row[key] for key in ("loss", "grad_norm", "learning_rate")} for row in steps]
    if not all(math.isfinite(number) for value in values for number in value.values()):
        raise NoResultError("a loss or gradient norm is not finite")
    return Finding(f"{values[0]['loss']:.4f} to {values[-1]['loss']:.4f}", values)


def training_scores(checkout: Checkout, run: str) -> Finding:
    """Validation loss and scores before the first step and after the last."""
    evaluations = [
        {
            key: value
            for key, value in row.items()
            if key == "step" or (key.startswith("eval_") and key not in BY_WORDS)
        }
        for row in metrics(checkout.trained(run))
        if "eval_loss" in row
    ]
    if [row["step"] for row in evaluations] != [0, STEPS]:
        raise NoResultError(f"metrics.jsonl does not hold the evaluations of steps 0 and {STEPS}")
    last = evaluations[-1]
    return Finding(f"loss {last['eval_loss']:.4f}, chrf {last['eval_chrf']:.2f}", evaluations)


def merge(checkout: Checkout) -> Finding:
    """The weights that `finetune merge` writes."""
    checkout.run("merge", checkout.trained("lora").name, "--output", "merged")
    files = sorted((checkout.work / "merged").glob("*.safetensors"))
    if not files:
        raise NoResultError("finetune merge wrote no .safetensors file")
    tensors = {
        name: tensor.double().flatten().tolist()
        for file in files
        for name, tensor in load_file(file).items()
    }
    return Finding(f"{sum(file.stat().st_size for file in files):,} bytes", tensors)


def prediction_scores(checkout: Checkout) -> Finding:
    """Scores of a file of replies made elsewhere."""
    return scores(checkout, "--predictions", checkout.inputs.replies())


def evaluate(checkout: Checkout) -> Finding:
    """Scores of the LoRA run, evaluated afterwards."""
    return scores(checkout, checkout.trained("lora").name)


def scores(checkout: Checkout, *words: str | Path) -> Finding:
    """What `finetune evaluate` gives, the intervals too."""
    output = f"evaluation-{len(words)}"
    # Words as they were cut before; both checkouts know the option by this name.
    words = (*words, "--bleu-unit", "word")
    answer = json.loads(checkout.run("evaluate", *words, "--output", output, "--json"))
    listed = [answer["scores"], *(target["scores"] for target in answer["targets"])]
    value = {"scores": [{k: v for k, v in one.items() if k not in ADDED} for one in listed]}
    numbers = {name: number for name, number in answer["scores"].items() if number is not None}
    return Finding(f"{len(numbers)} scores, bleu-4 {numbers['bleu-4']:.2f}", value)


def predict(checkout: Checkout) -> Finding:
    """Greedy replies of the LoRA run."""
    files = checkout.inputs.rows("text")["validation"]
    data = [word for file in files for word in ("--data", file)]
    run = checkout.trained("lora").name
    checkout.run("predict", run, *data, "--output", "replies.jsonl", "--max-new-tokens", "12")
    rows = json_lines((checkout.work / "replies.jsonl").read_text("utf-8"), "replies.jsonl")
    replies = [{key: row[key] for key in ("messages", "stopped")} for row in rows]
    texts = {reply["messages"][-1]["content"] for reply in replies}
    return Finding(f"{len(replies)} replies, {len(texts)} different ones", replies)


CHECKS: dict[str, Callable[[Checkout], Finding]] = {
    "golden.chat_template": partial(golden, name="chat_template"),
    "golden.chat_template_z1": partial(golden, name="chat_template_z1"),
    "quickstart.train": partial(quickstart_tokens, file="train.jsonl"),
    "quickstart.heldout": partial(quickstart_tokens, file="heldout.jsonl"),
    **{f"losses.{run}": partial(losses, run=run) for run in RUNS},
    **{f"scores.{run}": partial(training_scores, run=run) for run in RUNS},
    "merge": merge,
    "predictions": prediction_scores,
    "evaluate": evaluate,
    "predict": predict,
}


def json_lines(text: str, what: str) -> list[Any]:
    """The rows of a JSONL text.

    Raises:
        NoResultError: there is none.
    """
    rows = [json.loads(line) for line in text.splitlines()]
    if not rows:
        raise NoResultError(f"{what}: nothing was written")
    return rows


def metrics(run: Path) -> list[dict[str, Any]]:
    """What a run logged."""
    return json_lines((run / "metrics.jsonl").read_text("utf-8"), "metrics.jsonl")


@dataclass(frozen=True)
class Difference:
    """Two values of one place that are not equal."""

    place: str
    base: Any
    head: Any
    scale: float = 0.0
    """The largest number of the tensor that they are from; 0: they stand alone."""

    @property
    def relative(self) -> float:
        """How far apart two numbers are, as a share of the larger; infinite for all else."""
        if not (isinstance(self.base, float) and isinstance(self.head, float)):
            return math.inf
        return abs(self.base - self.head) / max(abs(self.base), abs(self.head), self.scale)

    def __str__(self) -> str:
        return f"{self.place}: {self.base!r} in the base, {self.head!r} in the head"


def differences(base: Any, head: Any, place: str = "") -> Iterator[Difference]:
    """Every place where two JSON values differ."""
    if isinstance(base, dict) and isinstance(head, dict) and set(base) == set(head):
        for key in base:
            yield from differences(base[key], head[key], f"{place}.{key}")
    elif isinstance(base, list) and isinstance(head, list) and len(base) == len(head):
        pairs = list(enumerate(zip(base, head, strict=True)))
        if all(isinstance(value, float) for value in (*base, *head)):
            scale = max(map(abs, (*base, *head)), default=0.0)
            unequal = [(number, left, right) for number, (left, right) in pairs if left != right]
            yield from (Difference(f"{place}[{n}]", *both, scale) for n, *both in unequal)
            return
        for number, (left, right) in pairs:
            yield from differences(left, right, f"{place}[{number}]")
    elif isinstance(base, dict) and isinstance(head, dict):
        yield Difference(f"{place}, the keys", sorted(base), sorted(head))
    elif isinstance(base, list) and isinstance(head, list):
        yield Difference(f"{place}, the length", len(base), len(head))
    elif type(base) is not type(head) or base != head:
        yield Difference(place, base, head)


def verdict(name: str, base: Any, head: Any) -> tuple[str, list[str]]:
    """What the table says of one row, and the notes below it: none when nothing is wrong."""
    found = list(differences(base, head, name))
    if not found:
        return "yes", []
    largest = max(found, key=lambda difference: difference.relative)
    if largest.relative <= ROUNDING:
        return f"rounding, {largest.relative:.0e}", []
    if name in ON_PURPOSE:
        return "changed on purpose", [f"{name}: {ON_PURPOSE[name]}"]
    return "no", [f"{largest}; {len(found)} differences"]


def found(check: Callable[[Checkout], Finding], checkout: Checkout) -> Finding | str:
    """A finding, or why there is none: the other rows are wanted all the same."""
    try:
        return check(checkout)
    except NoResultError as error:
        return f"{checkout.name}: {error}"
    except (KeyError, TypeError, ValueError, OSError) as error:  # a file of another layout
        return f"{checkout.name}: it wrote something else than what is compared here: {error!r}"


def cell(finding: Finding | str) -> str:
    """A finding in the table, with the first digits of its value's SHA-256."""
    if isinstance(finding, str):
        return "failed"
    text = json.dumps(finding.value, sort_keys=True)
    return f"{finding.text} ({hashlib.sha256(text.encode()).hexdigest()[:6]})"


def compare(names: list[str], base: Checkout, head: Checkout) -> bool:
    """Print the table; True when no row differs by more than it may."""
    rows, notes = [("what", "base", "head", "equal")], []
    for name in names:
        started = time.monotonic()
        left, right = found(CHECKS[name], base), found(CHECKS[name], head)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        if isinstance(left, Finding) and isinstance(right, Finding):
            equal, why = verdict(name, left.value, right.value)
        else:
            equal, why = (
                "no",
                [f"{name}: {side}" for side in (left, right) if isinstance(side, str)],
            )
        notes += why
        rows.append((name, cell(left), cell(right), equal))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print(
            " | ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        )
    verdicts = Counter(row[3].split(",")[0] for row in rows[1:])
    print("\n" + ", ".join(f"{verdicts[kind]} {kind}" for kind in verdicts), *notes, sep="\n")
    return "no" not in verdicts


def chosen(only: list[str]) -> list[str]:
    """The rows whose name begins with one of `only`; all of them when it is empty.

    Raises:
        SystemExit: one of them begins no name.
    """
    unknown = [word for word in only if not any(name.startswith(word) for name in CHECKS)]
    if unknown:
        print(f"no row is called {', '.join(unknown)}; there are {', '.join(CHECKS)}", file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    return [name for name in CHECKS if not only or name.startswith(tuple(only))]


def run(names: list[str], base: Path, head: Path, work: Path) -> bool:
    """Compare two folders; `work` is where both write."""
    inputs = Inputs(work)
    checkouts = []
    for name, folder in (("base", base), ("head", head)):
        (work / name).mkdir()
        checkouts.append(Checkout(name, folder.resolve(), work / name, inputs))
    return compare(names, *checkouts)


def main() -> None:
    """Compare; exit code 1 when something differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="the checkout to compare with")
    parser.add_argument(
        "--base-commit", metavar="COMMIT", default="a008844",
        help="without --base, a worktree of it is made; by default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--head", type=Path, metavar="FOLDER", default=ROOT, help="by default this checkout"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="the rows whose names begin so"
    )
    given = parser.parse_args()
    names = chosen(given.only)
    with tempfile.TemporaryDirectory(prefix="same-results-") as folder:
        work = Path(folder).resolve()
        try:
            if given.base is None:
                with commit_folder(given.base_commit, work / "base-commit") as base:
                    equal = run(names, base, given.head, work)
            else:
                equal = run(names, given.base, given.head, work)
        except NoResultError as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from None
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
