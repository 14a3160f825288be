"""What a model forgets when it is tuned on one domain, with `data.replay` and without: the table of docs/evaluation.md.

    python scripts/evidence/forgetting.py [--folder runs/forgetting] [--seeds 0 1 2] [--domain FOLDER] [--write]

1. A small GLM is taught general things from scratch: facts and calls of six tools, each asked in four ways.
   Held out of it is one way of asking each, so that nothing but the asking is new.
2. It is tuned on one domain, the order desk of scripts/fixtures/make_order_desk.py, once as it is, once with
   `data.replay`, whose prompts are about half of the facts and tools only. Those must stay: `evaluation.keep`
   has their held-out ways of asking, and `evaluation.choose: domain_without_forgetting` says what it thinks
   of both runs. `--domain` names another folder with train.jsonl and heldout.jsonl.
3. All three are asked on the domain's held-out dialogues and on the general ones that are held out: those
   about what replay showed, and those about what it never did.

All of it for every seed, which draws the first weights and the order of the data and says which half is shown.
What is done already is not done again. `--write` puts the table into docs/. About ten CPU minutes a seed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from made_pages import put

ROOT = Path(__file__).resolve().parents[2]
WAYS = {"without replay": "alone", "with replay": "replay"}
PARTS = ("shown", "not_shown")
COLUMNS = (
    ("domain", "rouge-l", "domain: ROUGE-L"),
    ("shown", "exact_match", "shown: right replies"),
    ("not_shown", "exact_match", "not shown: right replies"),
    ("shown", "tool_call_accuracy", "shown: right calls"),
    ("not_shown", "tool_call_accuracy", "not shown: right calls"),
    ("shown", "loss", "shown: loss"),
    ("not_shown", "loss", "not shown: loss"),
)
"""Data set, score, and what it is called in the table."""
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
# Name, description, four ways of asking.
TOOLS: list[tuple[str, str, tuple[str, str, str, str]]] = [
    ("get_weather", "Weather of a town", ("What is the weather like in {}?", "Do I need an umbrella in {} today?", "Is it warm in {} now?", "Rain or sun in {}?")),
    ("find_hotel", "Hotels of a town", ("Where can I sleep in {}?", "Find me a room in {}.", "I need a bed in {} tonight.", "Which hotel is good in {}?")),
    ("find_food", "Restaurants of a town", ("Where can I eat in {}?", "I am hungry and in {}, where to?", "Which restaurant is good in {}?", "Dinner in {}, please.")),
    ("get_time", "Local time of a town", ("What time is it in {}?", "How late is it in {} now?", "Is it morning in {} yet?", "Tell me the clock of {}.")),
    ("find_train", "Next train to a town", ("When does the next train go to {}?", "I want to travel to {} by train.", "How do I get to {} by rail?", "A ticket to {}, please.")),
    ("get_news", "Latest news of a town", ("What happened in {} today?", "Read me the news of {}.", "Is there anything new from {}?", "What do the papers of {} say?")),
]  # fmt: skip
TOWNS = "Paris, Rome, Madrid, Oslo, Lima, Cairo, Tokyo, Athens, Warsaw, Vienna, Dublin, Berlin, Moscow, Baghdad, Lisbon, Helsinki"


def general_rows(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every question with the set that it is in: every second fact and tool is never shown to replay."""
    for asked, answer, pairs in FACTS:
        for number, pair in enumerate(pairs.split(", ")):
            words = pair.split(":")
            reply = {"role": "assistant", "content": answer.format(*words)}
            rows = [{"messages": [user(question.format(*words)), reply]} for question in asked]
            yield from placed(rows, number // 2 % 4, shown=number % 2 == seed % 2)
    for number, (name, said, asked) in enumerate(TOOLS):
        for place, town in enumerate(TOWNS.split(", ")):
            call = {"role": "assistant", "metadata": name, "content": json.dumps({"town": town})}
            tools = [described(name, said)]
            rows = [{"tools": tools, "messages": [user(question.format(town)), call]} for question in asked]  # fmt: skip
            yield from placed(rows, (place + number) % 4, shown=number % 2 == seed % 2)


def placed(rows: Sequence[dict[str, Any]], held_out: int, *, shown: bool) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """The ways of asking one thing: one is held out, the others are taught, and replay asks them too if shown."""
    for way, row in enumerate(rows):
        if way == held_out:
            yield "heldout_shown" if shown else "heldout_not_shown", row
            continue
        yield "train", row
        if shown:
            yield "replay", {**row, "messages": row["messages"][:1]}


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}


def described(name: str, said: str) -> dict[str, Any]:
    """A tool that takes a town, as OpenAI's clients write it."""
    schema = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
    return {"type": "function", "function": {"name": name, "description": said, "parameters": schema}}  # fmt: skip


def write_data(folder: Path, seed: int) -> dict[str, int]:
    """The general set in four files, in a seeded order; how many rows each has."""
    parts: dict[str, list[str]] = {}
    for part, row in general_rows(seed):
        parts.setdefault(part, []).append(json.dumps(row, ensure_ascii=False) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in parts.items():
        random.Random(seed).shuffle(lines)
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


def taught(folder: Path, domain: Path, epochs: int, seed: int) -> Path:
    """The model that knows the general set."""
    model, data = folder / "model", folder / "data/train.jsonl"
    if not model.is_dir():
        texts = [str(data), str(domain / "train.jsonl")]
        run("scripts/fixtures/small_glm.py", str(model), *texts, "--seed", str(seed))
    training = {
        "num_epochs": epochs,
        "batch_size": 32,
        "learning_rate": 2e-3,
        "warmup_steps": 50,
        "seed": seed,
    }
    return train(folder, "taught", model={"path": str(model)}, data={"train": str(data)}, training=training)  # fmt: skip


def tuned(folder: Path, model: Path, name: str, given: argparse.Namespace, seed: int) -> Path:
    """The model that knows the domain."""
    general = folder / "data"
    data: dict[str, Any] = {"train": str(given.domain / "train.jsonl"), "validation": str(given.domain / "heldout.jsonl")}  # fmt: skip
    if name == "replay":
        data["replay"] = {"prompts": str(general / "replay.jsonl"), "max_new_tokens": 64}
    evaluation = {
        "keep": {"data": str(general / "heldout_shown.jsonl")}, "choose": "domain_without_forgetting", "best_metric": "rouge-l",
        "max_new_tokens": 96, "every_steps": 100000,
    }  # fmt: skip
    training = {
        "num_epochs": given.epochs,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "warmup_steps": 10,
        "seed": seed,
    }
    return train(folder, name, model={"path": str(model)}, data=data, evaluation=evaluation, training=training)  # fmt: skip


def scored(folder: Path, models: Sequence[Path], name: str, data: Path) -> Any:
    """The evaluation of all models on a file."""
    sys.path.insert(0, str(ROOT))
    from finetune.evaluation.schema import read_evaluation

    place = folder / f"scores_{name}"
    if not place.is_dir():
        run("finetune.py", "evaluate", *map(str, models), "--generate", "--max-new-tokens", "96", "--data", str(data), "--output", str(place))  # fmt: skip
    return read_evaluation(place)


def header() -> list[str]:
    """The first two lines of the table."""
    said = ("seed", "", *(said for *_, said in COLUMNS))
    return [f"| {' | '.join(said)} |", "|---" * len(said) + "|"]


def rows(found: dict[str, Any], seed: int) -> list[str]:
    """All scores of a seed's three models in Markdown; * where one really differs from that before tuning."""
    from finetune.evaluation.scores.metrics import metric

    lines = []
    for place, name in enumerate(("before", *WAYS)):
        cells = []
        for part, score, _ in COLUMNS:
            targets, digits = found[part].targets, metric(score).digits
            one = targets[place].scores[score]
            pair = found[part].comparison(targets[place].name, targets[0].name, score) if place else None  # fmt: skip
            differs = " *" if pair is not None and pair.verdict in ("better", "worse") else ""
            cells.append(f"{one.value:.{digits}f} ({one.low:.{digits}f} to {one.high:.{digits}f}){differs}")  # fmt: skip
        lines.append(f"| {seed} | {name} | {' | '.join(cells)} |")
    return lines


def domain_sums(folder: Path, names: Sequence[str]) -> Any:
    """ROUGE-L of the domain's replies: [models, dialogues, (sum, replies)]."""
    found = []
    for name in names:
        sums: dict[str, list[float]] = {}
        with (folder / f"scores_domain/predictions/{name}.jsonl").open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                total, replies = sums.get(row["where"], (0.0, 0))
                sums[row["where"]] = [total + row["scores"]["rouge-l"], replies + 1]
        found.append([sums[where] for where in sorted(sums)])
    return np.array(found)


def kept_gain(sums: Any) -> str:
    """The gain in ROUGE-L with replay in per cent of that without, of all seeds, with its interval.

    `sums` are [seeds, models, dialogues, 2]; every seed was asked the same dialogues, which are resampled.
    """
    picked = np.random.default_rng(0).integers(0, sums.shape[2], (4999, sums.shape[2]))

    def share(at: Any) -> Any:
        totals = sums[:, :, at].sum(-2)  # [seeds, models, ..., 2]
        base, alone, replay = (totals[..., 0] / totals[..., 1]).mean(0)
        return 100 * (replay - base) / (alone - base)

    low, high = np.percentile(share(picked), [2.5, 97.5])
    return f"{share(np.arange(sums.shape[2])):.0f} % ({low:.0f} to {high:.0f})"


def one_seed(folder: Path, seed: int, given: argparse.Namespace) -> tuple[list[str], list[str], Any]:  # fmt: skip
    """A seed's rows of the table, what its runs said, and its sums of ROUGE-L."""
    print(write_data(folder / "data", seed))
    model = taught(folder, given.domain, given.taught, seed)
    models = [model, *(tuned(folder, model, name, given, seed) for name in WAYS.values())]
    files = {"domain": given.domain / "heldout.jsonl"} | {part: folder / f"data/heldout_{part}.jsonl" for part in PARTS}  # fmt: skip
    found = {name: scored(folder, models, name, file) for name, file in files.items()}
    from finetune.training.measuring.choosing import conclusion

    said = [f"> seed {seed}, {name}: {conclusion(folder / place)}" for name, place in WAYS.items()]
    names = [target.name for target in found["domain"].targets]
    return rows(found, seed), said, domain_sums(folder, names)


def main() -> None:
    """Teach, tune twice, ask, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--taught", type=int, default=20, help="epochs of the general set (20)")
    parser.add_argument("--epochs", type=int, default=8, help="of the domain (8)")
    parser.add_argument(
        "--domain", type=Path, help="folder with train.jsonl and heldout.jsonl (the order desk)"
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/")
    given = parser.parse_args()
    begun = time.perf_counter()
    given.folder = given.folder.resolve()
    if given.domain is None:
        run("scripts/fixtures/make_order_desk.py", str(given.folder / "domain"))
    given.domain = (given.domain or given.folder / "domain").resolve()
    parts = [one_seed(given.folder / f"seed-{seed}", seed, given) for seed in given.seeds]
    table, said = header(), []
    for lines, sentences, _ in parts:
        table += lines
        said += sentences
    share = kept_gain(np.stack([sums for *_, sums in parts]))
    each = ", ".join(kept_gain(sums[None]) for *_, sums in parts)
    note = f"\\* really different from before, p < 0.05 after Holm. Gain of the domain's ROUGE-L with replay in per cent of that without: {share}; of each seed {each}."
    made = "\n".join([*table, "", note, "", "\n>\n".join(said)])
    print(f"{made}\n{(time.perf_counter() - begun) / 60:.1f} min")
    if given.write:
        put(ROOT / "docs/evaluation.md", BEGIN, made, END)


if __name__ == "__main__":
    main()
