"""scripts/evidence/audit.sh: exceptions have a date, after which they count no longer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AUDIT = '#!/bin/sh\necho "$@"\n'
"""In place of pip-audit: says what it was asked."""


def audited(folder: Path, *exceptions: str) -> subprocess.CompletedProcess[str]:
    text = (ROOT / "scripts/evidence/audit.sh").read_text(encoding="utf-8")
    assert text.count("EXCEPTIONS='\n'") == 1
    text = text.replace("EXCEPTIONS='\n'", "EXCEPTIONS='\n" + "\n".join(exceptions) + "\n'")
    for name, content in (("scripts/evidence/audit.sh", text), ("venv/bin/pip-audit", AUDIT)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(content)
    (folder / "venv/bin/pip-audit").chmod(0o755)
    return subprocess.run(
        ["bash", str(folder / "scripts/evidence/audit.sh"), "--dry-run"], capture_output=True, text=True,
        env={**os.environ, "AUDIT_VENV": str(folder / "venv")},
    )  # fmt: skip


def test_the_pinned_versions_are_audited_and_what_cannot_be_looked_up_counts(
    tmp_path: Path,
) -> None:
    done = audited(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "--strict --no-deps --disable-pip -r constraints.txt --dry-run\n"


def test_an_exception_is_passed_on_until_its_date(tmp_path: Path) -> None:
    done = audited(tmp_path, "PYSEC-1 2999-01-31 only the server is affected")
    assert done.returncode == 0, done.stderr
    assert "--ignore-vuln PYSEC-1" in done.stdout


def test_an_exception_out_of_date_fails_and_says_why_there_was_one(tmp_path: Path) -> None:
    done = audited(tmp_path, "PYSEC-1 2020-01-31 only the server is affected")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "PYSEC-1 (only the server is affected) ended on 2020-01-31" in done.stderr
