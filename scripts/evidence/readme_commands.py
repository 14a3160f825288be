"""Every command of the README as a new user types it: a fresh clone, a fresh environment, an empty home; the time of each.

    python scripts/evidence/readme_commands.py --folder /tmp/new [--tiny] [--tests] [--json times.json]

A command ends well, or says in a few lines which command gets what it needs (a model that no hub in reach has, a run
that is not there yet). Those that want GLM-4-9B and eight GPUs are then typed once more with a small random model and
two processes. `--tests` includes `scripts/test.sh`, twenty minutes; `--tiny` takes the quickstart's small form.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
KEPT = ("PIP_", "UV_", "SSL_", "REQUESTS_CA", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")  # fmt: skip
"""Variables of the machine's network; all others are left out."""
REMEDY = re.compile(r"add it to|hf download|modelscope download|pip install|choose another|give a run|run scripts/|finetune status|not a directory|does not exist")  # fmt: skip
LONGEST_ERROR = 12
STANDS_IN = [
    ("THUDM/glm-4-9b-chat", "runs/tiny-model"),
    ("finetune launch", "finetune launch --processes 2"),
    ("configs/lora.yaml", "configs/lora.yaml model.path=runs/tiny-model model.dtype=float32 evaluation.max_new_tokens=8 evaluation.max_samples=8"),
    ("training.num_epochs=3", "training.num_epochs=null training.max_steps=3"),
    ("--include-base", "--include-base --max-samples 8 --max-new-tokens 8"),
]  # fmt: skip


class Typed(NamedTuple):
    """A command and how it ended."""

    command: str
    seconds: float
    code: int
    said: str
    """The end of standard error."""

    @property
    def outcome(self) -> str:
        """In a word; anything but these two is a fault."""
        if self.code == 0:
            return "done"
        lines = self.said.strip().splitlines()
        is_short = len(lines) <= LONGEST_ERROR and "Traceback" not in self.said
        return "says what it needs" if is_short and REMEDY.search(self.said) else "FAILED"


def main() -> None:
    """Types them, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, required=True, help="A new folder for clone and home."
    )
    parser.add_argument("--tiny", action="store_true", help="The quickstart with a random model.")
    parser.add_argument("--tests", action="store_true", help="scripts/test.sh, too.")
    parser.add_argument("--json", type=Path, help="Write the times here.")
    asked = parser.parse_args()
    clone = asked.folder / "clone"
    (asked.folder / "home").mkdir(parents=True)
    done = [typed(f"git clone -q {ROOT} {clone}", asked.folder, asked.folder)]
    for command in readme():
        if "scripts/test.sh" in command and not asked.tests:
            continue
        done.append(typed(f"{command} --tiny" if asked.tiny and "quickstart" in command else command, clone, asked.folder))  # fmt: skip
        if command.startswith("bash scripts/quickstart"):
            own_data(clone)
    done += [
        typed(f"finetune train {name} --dry-run", clone, asked.folder) for name in configs(clone)
    ]
    done.append(typed("python scripts/fixtures/quickstart_model.py runs/tiny-model --tiny", clone, asked.folder))  # fmt: skip
    shutil.rmtree(clone / "runs/lora", ignore_errors=True)
    (clone / "my.yaml").unlink(missing_ok=True)
    done += [typed(stood_in(command), clone, asked.folder) for command in readme() if stood_in(command) != command or "merge" in command]  # fmt: skip
    for one in done:
        print(f"{one.outcome:<18} {one.seconds:7.1f} s  {one.command}")
    if asked.json:
        asked.json.write_text(json.dumps([one._asdict() for one in done], indent=1) + "\n", encoding="utf-8")  # fmt: skip
    sys.exit(any(one.outcome == "FAILED" for one in done))


def readme() -> list[str]:
    """The commands in README's blocks, without their remarks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)  # fmt: skip
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]  # fmt: skip


def configs(clone: Path) -> list[str]:
    """The shipped configurations."""
    return sorted(path.relative_to(clone).as_posix() for path in clone.glob("configs/*.yaml"))


def own_data(clone: Path) -> None:
    """`my/`: the rows that a reader brings; here the repair desk's."""
    (clone / "my").mkdir(exist_ok=True)
    for mine, theirs in (("train", "train"), ("dev", "heldout")):
        shutil.copyfile(clone / f"data/support_desk/{theirs}.jsonl", clone / f"my/{mine}.jsonl")


def stood_in(command: str) -> str:
    """The command with what any machine has."""
    for name, small in STANDS_IN:
        command = command.replace(name, small)
    return command


def typed(command: str, folder: Path, home: Path) -> Typed:
    """Runs it in a shell that knows nothing but this folder and its environment."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    base = Path(sys.base_prefix) / "bin"
    environment = {**kept, "HOME": str(home / "home"), "PATH": f"{base}:/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}  # fmt: skip
    entered = "[ ! -f .venv/bin/activate ] || . .venv/bin/activate; "
    begun = time.monotonic()
    print(f"$ {command}", flush=True)
    ran = subprocess.run(
        ["bash", "-c", entered + command], cwd=folder, env=environment,
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    sys.stderr.write(ran.stderr)
    return Typed(command, round(time.monotonic() - begun, 1), ran.returncode, ran.stderr[-3000:])


if __name__ == "__main__":
    main()
