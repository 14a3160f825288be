"""Runs the tests of transformers and PEFT on the model classes here, all of them.

    python -m tests.foreign [transformers] [peft] [--write] [--folder FOLDER]

Ends with 1 when a test fails, or skips without being listed in skips.json; `--write` writes the list
and the tables of docs/foreign_tests.md instead of comparing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.foreign import whole
from tests.foreign.sources import NoSourceError, source_of


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suites", nargs="*", choices=["transformers", "peft"], default=[])
    parser.add_argument("--write", action="store_true", help="the list and the tables anew")
    parser.add_argument(
        "--folder", type=Path, help="keeps what has been run, and goes on from what it keeps"
    )
    given = parser.parse_args()
    suites = given.suites or ["transformers", "peft"]
    try:
        for library in suites:
            print(f"{library}: {source_of(library)}", flush=True)
    except NoSourceError as error:
        print(error, file=sys.stderr)
        return 3
    found = whole.run_all(suites, given.folder)
    if given.write:
        whole.write(found)
        skips = whole.listed()
    else:
        skips = whole.listed()
    problems = whole.compare(found, skips)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
