"""Scores of predictions that LLaMA-Factory's users have published, against the scores published beside them.

    python scripts/evidence/published_predictions.py FOLDER [FOLDER]

Each folder holds `generated_predictions.jsonl` and `predict_results.json` or `all_results.json` as
LLaMA-Factory writes them, such as a clone of a repository that published both. BLEU-4 and ROUGE under
`--definition llamafactory` have to be equal to every digit. Exit code 1 when some are not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

NAMES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
PUBLISHED = ("predict_results.json", "all_results.json")


def differing(folder: Path) -> tuple[int, list[str]]:
    """How many replies a folder holds, and the scores that are not those that were published."""
    from finetune.evaluation.evaluate import Options, evaluate
    from finetune.evaluation.scoring import Scoring

    options = Options(predictions=(str(folder / "generated_predictions.jsonl"),), scoring=Scoring("llamafactory"))  # fmt: skip
    ours = evaluate([], options=options)
    results = next(file for name in PUBLISHED if (file := folder / name).is_file())
    theirs = json.loads(results.read_text(encoding="utf-8"))
    pairs = {name: (ours["scores"][name], theirs[f"predict_{name}"]) for name in NAMES}
    return ours["replies"], [f"{name}: {one!r}, published {other!r}" for name, (one, other) in pairs.items() if one != other]  # fmt: skip


def main() -> int:
    """One line a folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    total, wrong = 0, False
    for folder in parser.parse_args().folders:
        number, found = differing(folder)
        total, wrong = total + number, wrong or bool(found)
        print(f"{folder}: {number:,} replies, {'; '.join(found) or 'equal to every digit'}")
    print(f"{total:,} replies")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
