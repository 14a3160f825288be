"""`finetune evaluate --backend vllm` beside `--backend transformers`: the same replies, the same scores?

    python scripts/evidence/vllm_evaluation.py --vllm VLLM_ENV/bin/python TARGET [TARGET] --data FILE [--max-new-tokens 64]

The first is run by the Python of an environment that has vLLM (docs/serving.md says how it is made), the
second by this one. Every target's replies are compared text by text and its scores as the terminal shows
them. Exit code 1 when a score differs. On a CPU set VLLM_CPU_KVCACHE_SPACE=1 (GiB), or vLLM wants nearly
all memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def evaluated(python: str, given: argparse.Namespace, output: Path, *words: str) -> Any:
    """The evaluation of all targets by one backend."""
    from finetune.evaluation.schema import read_evaluation

    asked = ["--generate", "--max-new-tokens", str(given.max_new_tokens), "--output", str(output)]
    command = [python, "finetune.py", "evaluate", *given.targets, *asked, *words]
    command += [word for file in given.data for word in ("--data", file)]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return read_evaluation(output)


def replies(folder: Path, name: str) -> list[str]:
    """What a target replied, in the order of the data."""
    lines = (folder / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def main() -> int:
    """One line a target."""
    from finetune.evaluation.scores.metrics import metric

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="+", metavar="TARGET")
    parser.add_argument(
        "--vllm", required=True, metavar="PYTHON", help="of an environment with vLLM"
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    given = parser.parse_args()
    given.targets = [str(Path(one).resolve()) for one in given.targets]
    given.data = [str(Path(one).resolve()) for one in given.data]
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        here, there = Path(folder) / "transformers", Path(folder) / "vllm"
        ours = evaluated(sys.executable, given, here)
        theirs = evaluated(given.vllm, given, there, "--backend", "vllm")
        for one, other in zip(ours.targets, theirs.targets, strict=True):
            pairs = list(zip(replies(here, one.name), replies(there, other.name), strict=True))
            digits = {name: metric(name).digits for name in one.scores}
            differ = [
                f"{name} {score.value:.{digits[name]}f} and {found:.{digits[name]}f}"
                for name, score in one.scores.items()
                if score.value is not None
                and (found := other.scores[name].value) is not None
                and round(score.value, digits[name]) != round(found, digits[name])
            ]
            same = sum(mine == its for mine, its in pairs)
            print(f"{one.name}: {same} of {len(pairs)} replies equal; {len(one.scores)} scores, {'; '.join(differ) or 'all equal'}")  # fmt: skip
            wrong |= bool(differ)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
