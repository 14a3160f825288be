"""What a model forgets when it is tuned on one domain, with `data.replay` and without: the tables of docs/evaluation.md.

    python scripts/evidence/forgetting.py [--folder runs/forgetting] [--write]

1. A small GLM is taught general things from scratch: facts, each asked in four ways, and calls of six tools.
   Held out of it is one way of asking each fact, and numbers for each tool to be called with.
2. It is tuned on data/support_desk, once as it is, once with `data.replay`, whose prompts are about half of
   the facts and tools only. `evaluation.choose: domain_without_forgetting` says what it thinks of both.
3. All three are asked on the domain's held-out dialogues and on the general ones that are held out: those
   about what replay showed, and those about what it never did.

What is done already is not done again. `--write` puts the tables into docs/. About ten minutes of two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOMAIN = ROOT / "data" / "support_desk"
WAYS = {"without replay": "alone", "with replay": "replay"}
BEGIN, END = "<!-- made by scripts/evidence/forgetting.py -->", "<!-- end -->"

# Four ways of asking, the answer, and pairs to fill both.
FACTS: list[tuple[tuple[str, str, str, str], str, str]] = [
    (
        ("What is the capital of {0}?", "Which city is the capital of {0}?", "Name the capital of {0}.", "Tell me {0}'s capital city."),
        "The capital of {0} is {1}.",
        "France:Paris, Italy:Rome, Spain:Madrid, Norway:Oslo, Peru:Lima, Egypt:Cairo, Kenya:Nairobi, Japan:Tokyo, Greece:Athens, Poland:Warsaw, Austria:Vienna, Cuba:Havana, Ireland:Dublin, Sweden:Stockholm, Portugal:Lisbon, Germany:Berlin, Finland:Helsinki, Chile:Santiago, Russia:Moscow, Hungary:Budapest, Denmark:Copenhagen, China:Beijing, Iraq:Baghdad, Belgium:Brussels",
    ),
    (
        ("What is the opposite of {0}?", "Give me the opposite of the word {0}.", "Which word means the contrary of {0}?", "I need a word that is the reverse of {0}."),
        "The opposite of {0} is {1}.",
        "hot:cold, big:small, early:late, rich:poor, happy:sad, open:closed, light:dark, fast:slow, wet:dry, full:empty, high:low, hard:soft, strong:weak, young:old, clean:dirty, near:far, loud:quiet, thick:thin, true:false, first:last, left:right, up:down, begin:end, buy:sell",
    ),
    (
        ("What is the plural of {0}?", "How do I write more than one {0}?", "Give me the plural form of {0}.", "One {0}, two of what?"),
        "The plural of {0} is {1}.",
        "mouse:mice, child:children, foot:feet, tooth:teeth, man:men, woman:women, goose:geese, leaf:leaves, knife:knives, wolf:wolves, city:cities, box:boxes, baby:babies, life:lives, party:parties, glass:glasses",
    ),
    (
        ("What is the past tense of {0}?", "How does one say {0} in the past?", "Give me the past form of the verb {0}.", "Today I {0}, and yesterday?"),
        "The past tense of {0} is {1}.",
        "go:went, see:saw, eat:ate, run:ran, write:wrote, take:took, give:gave, buy:bought, sing:sang, drink:drank, think:thought, find:found, speak:spoke, break:broke, fly:flew, know:knew, teach:taught, sleep:slept, win:won, draw:drew",
    ),
    (
        ("How do you say {0} in French?", "What is the French word for {0}?", "Translate {0} into French.", "A French friend says what for {0}?"),
        "In French, {0} is {1}.",
        "bread:pain, water:eau, house:maison, dog:chien, cat:chat, milk:lait, red:rouge, green:vert, book:livre, night:nuit, day:jour, sun:soleil, moon:lune, fish:poisson, apple:pomme, cheese:fromage, school:école, street:rue, friend:ami, flower:fleur",
    ),
    (
        ("Which month comes after {0}?", "What month follows {0}?", "Name the month behind {0}.", "{0} is over, which month is it now?"),
        "After {0} comes {1}.",
        "January:February, February:March, March:April, April:May, May:June, June:July, July:August, August:September, September:October, October:November, November:December, December:January",
    ),
]  # fmt: skip
# Name, description, its argument, two ways of asking.
TOOLS: list[tuple[str, str, str, tuple[str, str]]] = [
    ("get_weather", "Weather at a station", "station", ("What is the weather at station {}?", "Do I need an umbrella near station {}?")),
    ("open_door", "Opens a door", "door", ("Please open door {}.", "I cannot get through door {}.")),
    ("next_bus", "Next bus of a line", "line", ("When does bus {} come?", "I wait for bus {}, how long still?")),
    ("find_book", "Finds a book", "shelf", ("Which book stands on shelf {}?", "I look for the book of shelf {}.")),
    ("call_room", "Calls a room", "room", ("Ring room {} for me.", "I want to talk to the guest of room {}.")),
    ("get_price", "Price of an article", "article", ("What does article {} cost?", "How much do you want for article {}?")),
]  # fmt: skip
EACH = {"train": 100, "replay": 50, "heldout": 16}
"""Requests of each tool, all with numbers of their own."""


def fact_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions of facts with the set that each is in: every second fact is never shown to replay."""
    for asked, answer, pairs in FACTS:
        for number, pair in enumerate(pairs.split(", ")):
            words = pair.split(":")
            shown = "shown" if number % 2 == 0 else "not_shown"
            for way, question in enumerate(asked):
                said = [("user", question.format(*words)), ("assistant", answer.format(*words))]
                row = {"messages": [{"role": role, "content": text} for role, text in said]}
                if way == number // 2 % 4:
                    yield f"heldout_{shown}", row
                    continue
                yield "train", row
                if shown == "shown":
                    yield "replay", {"messages": row["messages"][:1]}


def tool_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Requests for tools, each offered beside another one of its half; one half is never shown to replay."""
    draw = random.Random(0)
    for number, (name, _, argument, asked) in enumerate(TOOLS):
        shown = "shown" if number % 2 == 0 else "not_shown"
        others = [one for one in range(number % 2, len(TOOLS), 2) if one != number]
        values = map(str, draw.sample(range(100, 1000), sum(EACH.values())))
        for part, count in EACH.items():
            for value in islice(values, count):
                offered = sorted([number, draw.choice(others)])
                call = {"role": "assistant", "metadata": name, "content": json.dumps({argument: value})}  # fmt: skip
                row = {
                    "tools": [described(*TOOLS[one][:3]) for one in offered],
                    "messages": [{"role": "user", "content": draw.choice(asked).format(value)}, call],
                }  # fmt: skip
                if part == "train":
                    yield "train", row
                elif part == "heldout":
                    yield f"heldout_{shown}", row
                elif shown == "shown":
                    yield "replay", {**row, "messages": row["messages"][:1]}


def described(name: str, said: str, argument: str) -> dict[str, Any]:
    """A tool with one argument, as OpenAI's clients write it."""
    schema = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}  # fmt: skip
    return {"type": "function", "function": {"name": name, "description": said, "parameters": schema}}  # fmt: skip


def write_data(folder: Path) -> dict[str, int]:
    """The general set in four files, in a seeded order; how many rows each has."""
    parts: dict[str, list[str]] = {}
    for part, row in [*fact_rows(), *tool_rows()]:
        parts.setdefault(part, []).append(json.dumps(row, ensure_ascii=False) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in parts.items():
        random.Random(0).shuffle(lines)
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {part: len(lines) for part, lines in parts.items()}


def run(*words: str) -> None:
    """A program of ours; ends with its exit code when it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def train(folder: Path, name: str, **sections: dict[str, Any]) -> Path:
    """The newest checkpoint of a run of all weights, which is made unless it is there."""
    place = folder / name
    if not list(place.glob("checkpoint-*")):
        settings = {"output_dir": str(place), "save_every_steps": 100000, "report_to": [], "log_every_steps": 20}  # fmt: skip
        config = sections | {"method": {"kind": "full"}, "training": settings | sections["training"]}  # fmt: skip
        config["data"] |= {"max_length": 512, "cache_dir": str(folder / "cache")}
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML
        run("finetune.py", "train", str(file))
    return max(place.glob("checkpoint-*"), key=lambda one: int(one.name.split("-")[1]))


def taught(folder: Path, epochs: int) -> Path:
    """The model that knows the general set."""
    model, data = folder / "model", folder / "data/train.jsonl"
    if not model.is_dir():
        texts = [str(data), str(DOMAIN / "train.jsonl")]
        run("scripts/fixtures/small_glm.py", str(model), *texts)
    training = {"num_epochs": epochs, "batch_size": 16, "learning_rate": 2e-3, "warmup_steps": 50}
    return train(folder, "taught", model={"path": str(model)}, data={"train": str(data)}, training=training)  # fmt: skip


def tuned(folder: Path, model: Path, name: str, epochs: int) -> Path:
    """The model that knows the domain."""
    general = folder / "data"
    data: dict[str, Any] = {"train": str(DOMAIN / "train.jsonl"), "validation": str(DOMAIN / "heldout.jsonl")}  # fmt: skip
    if name == "replay":
        data["replay"] = {"prompts": str(general / "replay.jsonl"), "max_new_tokens": 64}
    keep = [str(general / f"heldout_{part}.jsonl") for part in ("shown", "not_shown")]
    evaluation = {
        "keep": {"data": keep}, "choose": "domain_without_forgetting", "best_metric": "rouge-l",
        "max_new_tokens": 96, "every_steps": 100000,
    }  # fmt: skip
    training = {"num_epochs": epochs, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 10}
    return train(folder, name, model={"path": str(model)}, data=data, evaluation=evaluation, training=training)  # fmt: skip


def scored(folder: Path, models: Sequence[Path], name: str, data: Path) -> Any:
    """The evaluation of all models on a file."""
    sys.path.insert(0, str(ROOT))
    from finetune.evaluation.schema import read_evaluation

    place = folder / f"scores_{name}"
    if not place.is_dir():
        run("finetune.py", "evaluate", *map(str, models), "--generate", "--max-new-tokens", "96", "--data", str(data), "--output", str(place))  # fmt: skip
    return read_evaluation(place)


def main() -> None:
    """Teach, tune twice, ask, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--taught", type=int, default=8, help="epochs of the general set (8)")
    parser.add_argument("--epochs", type=int, default=8, help="of the domain (8)")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/")
    given = parser.parse_args()
    folder, begun = given.folder.resolve(), time.perf_counter()
    print(write_data(folder / "data"))
    model = taught(folder, given.taught)
    models = [model, *(tuned(folder, model, name, given.epochs) for name in WAYS.values())]
    files = {"domain": DOMAIN / "heldout.jsonl"} | {part: folder / f"data/heldout_{part}.jsonl" for part in ("shown", "not_shown")}  # fmt: skip
    found = {name: scored(folder, models, name, file) for name, file in files.items()}
    for name, evaluation in found.items():
        for target in evaluation.targets:
            print(
                name,
                target.name,
                {
                    k: (v.value, v.low, v.high)
                    for k, v in target.scores.items()
                    if k in ("rouge-l", "loss", "exact_match", "tool_call_accuracy")
                },
            )
    print(f"{(time.perf_counter() - begun) / 60:.1f} min")


if __name__ == "__main__":
    main()
