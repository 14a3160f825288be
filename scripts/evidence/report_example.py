"""Three methods, three checkpoints each, one report: what `docs/report.md` shows.

    python scripts/evidence/report_example.py [--tiny] [train] [evaluate] [document]

Tunes SmolLM2-135M as a GLM (made by scripts/fixtures/quickstart_model.py) on data/support_desk with LoRA,
P-Tuning v2 and all weights, scores the base and every checkpoint on the held-out dialogues, writes
the report, takes its pictures with headless Chromium and puts them and the table into docs/.
Whatever is done already is not done again: an interrupted run goes on, answers are kept. Without
names all parts run, about 20 minutes on 2 CPU cores; `--tiny` takes a random model and leaves docs/ alone.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from made_pages import put

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = "data/support_desk/heldout.jsonl"
PARTS = ("train", "evaluate", "document")
METHODS = {
    "lora": ["training.learning_rate=1e-3"],
    "ptuning_v2": ["method={kind: ptuning_v2}", "training.learning_rate=1e-1"],
    "full": ["method={kind: full}", "training.learning_rate=1e-4"],
}  # fmt: skip
STEPS = [
    "deepspeed=null", "training.num_epochs=null", "training.max_steps=45", "training.save_every_steps=15",
    "training.keep_checkpoints=3", "training.batch_size=4", "training.report_to=[]",
    "evaluation.every_steps=15", "evaluation.at_start=true", "evaluation.generate=false",
]  # fmt: skip
TINY = ["model.path=runs/tiny-model", "data.max_length=1024", "evaluation.max_new_tokens=8"]
BEGIN, END = "<!-- made by scripts/evidence/report_example.py -->", "<!-- end -->"


def main() -> None:
    """The parts that are asked for, one after another."""
    parser = argparse.ArgumentParser(description="Tune three ways, evaluate, and write the report.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="|".join(PARTS))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    home = Path("runs/report-tiny" if options.tiny else "runs/report")
    parts = options.parts or PARTS
    if "train" in parts:
        for method, changes in METHODS.items():
            if (home / method / "checkpoint-45").is_dir():
                continue
            extra = TINY if options.tiny else []
            place = f"training.output_dir={home / method}"
            finetune("configs/quickstart.yaml", *STEPS, *changes, *extra, place)
    if "evaluate" in parts:
        runs = [str(home / method) for method in METHODS]
        finetune("evaluate", *runs, "--include-base", "--generate", "--data", HELD_OUT, "--output", str(home / "evaluation"))  # fmt: skip
    if "document" in parts:
        finetune("report", str(home / "evaluation"))
        document(home / "evaluation", Path(tempfile.mkdtemp()) if options.tiny else ROOT / "docs")


def finetune(*words: str) -> None:
    """Runs a command; ends with its exit code when it fails."""
    done = subprocess.run([sys.executable, "finetune.py", *words], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def document(folder: Path, docs: Path) -> None:
    """Pictures of the page into docs/images, the table into docs/report.md and its Chinese twin."""
    (docs / "images").mkdir(exist_ok=True)
    pictures(ROOT / folder / "report.html", docs / "images")
    put(docs / "report.md", BEGIN, table(ROOT / folder), END)
    print(f"wrote {docs}")


def table(folder: Path) -> str:
    """The scores in Markdown, and the answer in words."""
    sys.path.insert(0, str(ROOT))
    from finetune.evaluation.schema import Score, read_evaluation
    from finetune.evaluation.scores.metrics import METRICS, metric
    from finetune.report import sentences

    evaluation = read_evaluation(folder)
    metrics = [evaluation.headline, *(one.name for one in METRICS if one.shown != "page" and one.name in evaluation.metrics and one.name != evaluation.headline)]  # fmt: skip
    lines = [
        f"| | {' | '.join(metric(name).label for name in metrics)} |",
        "|---" * (len(metrics) + 1) + "|",
    ]
    for target in evaluation.targets:
        cells = []
        for name in metrics:
            score = target.scores.get(name, Score())
            between = f" ({sentences.interval(name, score)})" if name == evaluation.headline else ""
            arrow = sentences.arrow(evaluation, target, name)
            cells.append(f"{arrow} {sentences.number(name, score.value)}{between}".strip())
        lines.append(f"| {target.name} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {number}" for name, number in evaluation.versions.items())
    settings: dict[str, Any] = evaluation.settings
    said = " ".join(sentences.conclusion(evaluation, evaluation.headline))
    asked = f"{evaluation.num_samples} replies, {settings['decoding']}, at most {settings['max_new_tokens']} new tokens"
    return "\n".join(
        [
            *lines,
            "",
            f"> {said}",
            "",
            f"{asked}; 2 CPU cores, no GPU; {versions}.",
            *seconds(folder),
        ]
    )


def seconds(folder: Path) -> list[str]:
    """How long the models took."""
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    total = sum(target["seconds"] for target in found["targets"])
    return [f"Asking all models took {total:.0f} s, on a machine that other work shared."]


def pictures(page: Path, images: Path) -> None:
    """The page's parts as small PNG files."""
    sys.path.insert(0, str(ROOT / "tests"))
    import browser as screens

    with tempfile.TemporaryDirectory() as profile, screens.chromium(Path(profile)) as driver:
        screens.look(driver, page, height=1180)
        save(driver.get_screenshot_as_png(), images / "report.png")
        driver.execute_script("document.getElementById('sort').value = 'gain'; document.getElementById('sort').dispatchEvent(new Event('change')); document.getElementById('samples').scrollIntoView()")  # fmt: skip
        save(driver.get_screenshot_as_png(), images / "report_samples.png")
        screens.look(driver, page, height=1180, dark=True)
        save(driver.get_screenshot_as_png(), images / "report_dark.png")
        screens.look(driver, page, width=390, height=844)
        save(driver.get_screenshot_as_png(), images / "report_narrow.png")


def save(png: bytes, file: Path) -> None:
    """A screenshot with few colours, a third of the bytes."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    main()
