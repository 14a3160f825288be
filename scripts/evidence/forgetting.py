"""What the quickstart's model forgets while it learns, with and without replay: the table of docs/evaluation.md.

    python scripts/evidence/forgetting.py [--steps 24] [--prompts 160] [--write docs/evaluation.md]

SmolLM2-135M re-laid as a GLM answers shipped prompts; two LoRA runs over the same dialogues of
data/support_desk follow, one with these replies mixed in. Both are measured on the replies that were
held out. About fifteen minutes on 2 CPU cores; what was done before is not done again.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = "runs/quickstart-model"
HOME = Path("runs/forgetting")
BEGIN, END = "<!-- made by scripts/evidence/forgetting.py -->", "<!-- end of forgetting -->"
LONGEST = 96
BATCH = 4


def main() -> None:
    """Both runs, and the table."""
    parser = argparse.ArgumentParser(description="What a model forgets, with and without replay.")
    parser.add_argument("--steps", type=int, default=24, help="of dialogues of the domain")
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--write", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    if not (ROOT / MODEL).is_dir():
        run("scripts/fixtures/quickstart_model.py", MODEL)
    (ROOT / HOME).mkdir(parents=True, exist_ok=True)
    prompts = english(options.prompts)
    replies = json.loads(run("finetune.py", "replay", MODEL, "--prompts", str(prompts), "--max-new-tokens", str(LONGEST), "--json"))  # fmt: skip
    train = len(Path(replies["train"]).read_text("utf-8").splitlines())
    domain = BATCH * options.steps
    rows = (ROOT / "data/support_desk/train.jsonl").read_text("utf-8").splitlines()[:domain]
    (ROOT / HOME / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    keep = f"evaluation.keep={{data: {replies['held_out']}}}"
    replay = f"data.replay={{prompts: {prompts}, max_new_tokens: {LONGEST}}}"
    steps = {"without": options.steps, "with": options.steps + -(-train // BATCH)}
    for name, extra in (("without", [keep]), ("with", ["evaluation.keep={}", replay])):
        if not (ROOT / HOME / name / "choices.jsonl").is_file():
            tune(name, steps[name], extra)
    made = table(steps, {"train": train, "all": replies["replies"]})
    print(made)
    for page in options.write:
        text = page.read_text(encoding="utf-8")
        page.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{made}\n{END}", text, flags=re.DOTALL), "utf-8")  # fmt: skip


def english(number: int) -> Path:
    """The first English prompts of the shipped ones, which this model understands."""
    lines = (ROOT / "finetune/generation/replay_prompts.jsonl").read_text("utf-8").splitlines()
    chosen = [line for line in lines if json.loads(line)["messages"][0]["content"].isascii()]
    file = HOME / "prompts.jsonl"
    (ROOT / file).write_text("\n".join(chosen[:number]) + "\n", encoding="utf-8")
    return file


def tune(name: str, steps: int, extra: list[str]) -> None:
    """One run over the domain's dialogues once, and the replayed replies once."""
    run(
        "finetune.py", "configs/quickstart.yaml", "deepspeed=null", f"data.train={HOME / 'train.jsonl'}",
        f"training.output_dir={HOME / name}", "training.num_epochs=null", f"training.max_steps={steps}",
        f"training.batch_size={BATCH}", "training.report_to=[]", "training.save_every_steps=1000",
        "evaluation.generate=false", "evaluation.choose=domain_without_forgetting", *extra,
    )  # fmt: skip


def table(steps: dict[str, int], replies: dict[str, int]) -> str:
    """The losses before and after in Markdown, and what was chosen."""
    lines = [
        "| | domain loss | change | general loss | change | chosen |",
        "|---|---|---|---|---|---|",
    ]
    changes: dict[str, float] = {}
    for name in ("without", "with"):
        [row] = [json.loads(line) for line in (ROOT / HOME / name / "choices.jsonl").read_text().splitlines()]  # fmt: skip
        scores = [json.loads(line) for line in (ROOT / HOME / name / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
        before, after = (one for one in scores if "eval_loss" in one)
        if name == "without":
            lines.append(f"| untuned | {before['eval_loss']:.3f} | | {before['eval_general_loss']:.3f} | | |")  # fmt: skip
        domain, general = row["criteria"]
        changes[name] = domain["difference"]
        lines.append(f"| {name} replay | {after['eval_loss']:.3f} | {change(domain)} | {after['eval_general_loss']:.3f} | {change(general)} | {'yes' if row['chosen'] else 'no'} |")  # fmt: skip
    kept = 100 * changes["with"] / changes["without"]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return "\n".join(
        [
            *lines,
            "",
            f"{kept:.0f} % of the domain gain is kept. {BATCH * steps['without']} dialogues of the domain once, and {replies['train']} of {replies['all']} replies once ({steps['without']} and {steps['with']} steps of {BATCH}); one seed; 2 CPU cores, no GPU; {packages}.",
        ]
    )


def change(one: dict[str, Any]) -> str:
    """A difference with its interval."""
    return f"{one['difference']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"


def run(*words: str) -> str:
    """What a script prints; ends with its exit code when it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)  # fmt: skip
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
