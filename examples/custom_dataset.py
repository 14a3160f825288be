"""A dataset of your own: any program that writes rows. Here, answered tickets of a SQLite database.

python examples/custom_dataset.py tickets.db my/train.jsonl
finetune data check my/train.jsonl
"""

import json
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any


def rows(database: Path) -> Iterator[dict[str, Any]]:
    """A dialogue for every ticket with an answer; a good rating doubles the weight of its loss."""
    with closing(sqlite3.connect(database)) as connection:
        found = connection.execute(
            "SELECT question, answer, rating FROM tickets WHERE answer != ''"
        )
        for question, answer, rating in found:
            yield {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer, "weight": 2.0 if rating >= 4 else 1.0},
                ]
            }


def main(database: str, output: str) -> int:
    """How many rows were written."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows(Path(database)))
    with Path(output).open("w", encoding="utf-8") as file:
        return sum(file.write(line) > 0 for line in lines)


if __name__ == "__main__":
    print(main(*sys.argv[1:3]), "rows")
