"""Write pictures of coloured shapes with a question and its answer each: colour, kind, count, place.

Every picture holds one to four shapes of one kind and colour on a 2 x 2 grid, drawn at odd sizes on
a light background. No question can be answered without looking: the best guess is right for one in
six colours, four kinds, four counts and four places.

    python scripts/make_shapes.py data/shapes --train 48 --held-out 24     # the sample that is shipped
    python scripts/make_shapes.py runs/shapes --train 4000 --held-out 400
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40), "green": (40, 150, 60), "blue": (40, 80, 210),
    "yellow": (240, 200, 20), "purple": (140, 50, 170), "black": (25, 25, 25),
}  # fmt: skip
KINDS = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
QUESTIONS = {
    "colour": "What colour?",
    "kind": "Which shape?",
    "count": "How many?",
    "place": "Where is it?",
}
SIZE = 112


def draw_shape(draw: ImageDraw.ImageDraw, kind: str, box: tuple[int, ...], fill: Any) -> None:
    """One shape that fills the box (left, top, right, bottom)."""
    left, top, right, bottom = box
    third = (right - left) // 3
    if kind == "circle":
        draw.ellipse(box, fill=fill)
    elif kind == "square":
        draw.rectangle(box, fill=fill)
    elif kind == "triangle":
        draw.polygon([(left, bottom), ((left + right) // 2, top), (right, bottom)], fill=fill)
    else:
        draw.rectangle((left + third, top, right - third, bottom), fill=fill)
        draw.rectangle((left, top + third, right, bottom - third), fill=fill)


def make_picture(chooser: random.Random, subject: str) -> tuple[Image.Image, str]:
    """A picture for a question about `subject`, and the answer."""
    count = 1 if subject == "place" else chooser.randint(1, 4)
    colour, kind = chooser.choice(list(COLOURS)), chooser.choice(KINDS)
    cells = chooser.sample(range(4), count)
    paper = chooser.randint(225, 255)
    image = Image.new("RGB", (SIZE, SIZE), (paper, paper, paper))
    draw = ImageDraw.Draw(image)
    half = SIZE // 2
    for cell in cells:
        size = chooser.randint(26, 44)
        left = cell % 2 * half + chooser.randint(4, half - size - 4)
        top = cell // 2 * half + chooser.randint(4, half - size - 4)
        draw_shape(draw, kind, (left, top, left + size, top + size), COLOURS[colour])
    answers = {"colour": colour, "kind": kind, "count": str(count), "place": PLACES[cells[0]]}
    return image, answers[subject]


def write_set(folder: Path, name: str, count: int, seed: int) -> None:
    """`folder/<name>.jsonl` and its pictures; the four subjects in turn."""
    chooser = random.Random(f"{name} {seed}")
    subjects = list(QUESTIONS)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        subject = subjects[number % len(subjects)]
        image, answer = make_picture(chooser, subject)
        path = images / f"{name}_{number}.png"
        image.quantize(16).save(path, optimize=True)
        messages = [
            {"role": "user", "content": QUESTIONS[subject], "image": f"images/{path.name}"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write both sets."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_set(arguments.folder, "train", arguments.train, arguments.seed)
    write_set(arguments.folder, "held_out", arguments.held_out, arguments.seed)
    print(f"{arguments.folder}: {arguments.train} and {arguments.held_out} questions")


if __name__ == "__main__":
    main()
