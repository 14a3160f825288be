"""BLEU-4 and ROUGE of unrelated, similar and equal sentences in 26 languages, as a table.

    python scripts/evidence/languages.py [--definition default] [--write docs/metrics.md]

`languages.jsonl` has for each language a sentence, another way to say it, and a sentence about
something else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from made_pages import put

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = Path(__file__).with_name("languages.jsonl")
SCORES = ("bleu-4", "rouge-1", "rouge-l")
BEGIN, END = "<!-- languages -->", "<!-- end of languages -->"


def scores_of(reply: str, reference: str, definition: str = "default") -> dict[str, float]:
    """The scores of a pair of texts."""
    from finetune.data.dialogue.conversation import Message
    from finetune.evaluation.predictions import Prediction
    from finetune.evaluation.scores.metrics import numbers_of

    one, other = Message("assistant", reply), Message("assistant", reference)
    scores, _ = numbers_of(Prediction(one, other), definition)
    return {name: scores[name] or 0.0 for name in SCORES}


def table(definition: str) -> str:
    """A line for each language: the three scores of the unrelated and of the similar sentence."""
    lines = [
        "| language | unrelated: BLEU-4, ROUGE-1, ROUGE-L | said otherwise: the same three |",
        "|---|---|---|",
    ]
    for line in SENTENCES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        cells = [
            ", ".join(f"{score:.1f}" for score in scores_of(row[kind], row["text"], definition).values())
            for kind in ("other", "paraphrase")
        ]  # fmt: skip
        lines.append(f"| {row['language']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it between its marks in a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--definition", default="default", choices=("default", "demo"))
    parser.add_argument(
        "--write", type=Path, help="the page that holds the table; its Chinese twin gets it too"
    )
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    made = table(options.definition)
    print(made)
    if options.write:
        put(options.write, BEGIN, made, END)


if __name__ == "__main__":
    main()
