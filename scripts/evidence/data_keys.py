"""The table of keys and columns in data/README.md and its Chinese twin, from `finetune.data.dialogue.keys`.

python scripts/evidence/data_keys.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("data/README.md", "data/README_zh.md")
BEGIN, END = "<!-- keys -->", "<!-- end -->"


def with_table(page: str) -> str:
    """The page's text with the table as it should be."""
    from finetune.data.dialogue.keys import table

    lines = ["| key | what becomes of it |", "|---|---|", *(f"| {k} | {v} |" for k, v in table())]
    made = "\n".join([BEGIN, *lines, END])
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(f"{BEGIN}.*?{END}", lambda _: made, text, flags=re.DOTALL)


def main() -> None:
    """Write the pages; with --check only say, by exit code 1, that one is not current."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    sys.path.insert(0, str(ROOT))
    for page in PAGES:
        text = with_table(page)
        if not is_check:
            (ROOT / page).write_text(text, encoding="utf-8")
        elif text != (ROOT / page).read_text(encoding="utf-8"):
            raise SystemExit(f"{page}: run python scripts/evidence/data_keys.py")


if __name__ == "__main__":
    main()
