"""What happens to saved checkpoints: damage, rotation, left-overs, and kills at any moment."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability.frame import Case
from tests.reliability.tiny_runs import KINDS, STEPS, Bench, Kind, goes_on, half_written

WAYS = ("deleted", "emptied", "halved", "a bit flipped", "appended to", "from another step")
LAST = f"checkpoint-{STEPS}"


# --- damage --------------------------------------------------------------------------------------


def damages(bench: Bench, kinds: dict[str, Kind], subset: bool) -> Iterator[Case]:
    """Every file of the newest checkpoint, in every way."""
    for name, kind in kinds.items():
        newest = bench.whole(kind) / f"checkpoint-{STEPS - 1}"
        files = sorted(
            str(file.relative_to(newest)) for file in newest.rglob("*") if file.is_file()
        )
        pairs = [(file, way) for file in files for way in WAYS]
        step = 1 if name == "lora" else 7 if kind.processes == 1 else 13
        for file, way in pairs[:: step * 9 if subset else step]:
            if way != "from another step" or differs_by_step(bench, kind, file):
                run = partial(damaged, bench, kind, file, way)
                yield Case(f"damage: {name}, {file} {way}", run)
    if not kinds["lora"].stock:
        for way in WAYS[:: 3 if subset else 1]:
            yield Case(f"damage: a named checkpoint {way}", partial(named, bench, way))
        yield Case("damage: both checkpoints", partial(all_damaged, bench))


def differs_by_step(bench: Bench, kind: Kind, file: str) -> bool:
    """Whether a file says something else in another checkpoint."""
    here = bench.whole(kind) / f"checkpoint-{STEPS - 1}" / file
    other = a_step_before(here)
    return other.exists() and other.read_bytes() != here.read_bytes()


def a_step_before(file: Path) -> Path:
    """The same file of the checkpoint before; DeepSpeed's folder has the step in its name too."""
    now, before = str(STEPS - 1), str(STEPS - 2)
    text = str(file).replace(f"checkpoint-{now}", f"checkpoint-{before}")
    return Path(text.replace(f"global_step{now}", f"global_step{before}"))


def damage(file: Path, way: str) -> None:
    """Damage it."""
    data = bytearray(file.read_bytes())
    if way == "deleted":
        file.unlink()
    elif way == "emptied":
        file.write_bytes(b"")
    elif way == "halved":
        file.write_bytes(data[: len(data) // 2])
    elif way == "a bit flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif way == "appended to":
        file.write_bytes(data + b"\n")
    else:
        shutil.copy(a_step_before(file), file)


def damaged(bench: Bench, kind: Kind, file: str, way: str, folder: Path) -> str:
    """The newest checkpoint is damaged: the one before is taken, and that is said with the reason."""
    run_dir = bench.begin(kind, folder, [STEPS - 2, STEPS - 1])
    damage(run_dir / f"checkpoint-{STEPS - 1}" / file, way)
    return goes_on(bench, kind, folder, f"checkpoint-{STEPS - 1} is passed over", file)


def named(bench: Bench, way: str, folder: Path) -> str:
    """A checkpoint that was named is refused when it is damaged, never replaced by another."""
    kind = KINDS["lora"]
    run_dir = bench.begin(kind, folder, [STEPS - 2, STEPS - 1])
    newest = run_dir / f"checkpoint-{STEPS - 1}"
    damage(newest / "optimizer.pt", way)
    ended = bench.start(kind, folder, training__resume=str(newest))
    if ended.codes != [3] or "optimizer.pt" not in ended.said:
        return f"{ended.codes}: {ended.said[-300:]}"
    return "it went on" if (run_dir / LAST).exists() else goes_on(bench, kind, folder)


def all_damaged(bench: Bench, folder: Path) -> str:
    """No good checkpoint is left: the run begins anew, and says which it passed over."""
    kind = KINDS["lora"]
    run_dir = bench.begin(kind, folder, [1, 2])
    for step in (1, 2):
        damage(run_dir / f"checkpoint-{step}/optimizer.pt", "halved")
    return goes_on(
        bench, kind, folder, "checkpoint-1 is passed over", "checkpoint-2 is passed over"
    )


# --- rotation and left-overs ---------------------------------------------------------------------


def rotations(bench: Bench) -> Iterator[Case]:
    """What is never deleted, and deletions that are cut short."""
    for way in WAYS[:5]:
        yield Case(f"rotation: the newest is {way}", partial(rotated_when_damaged, bench, way))
    yield Case("rotation: the best one stays", partial(best_stays, bench))
    yield Case("rotation: best.json is damaged", partial(best_damaged, bench))
    yield Case("rotation: the only one stays", partial(only_one, bench))


def rotated_when_damaged(bench: Bench, way: str, folder: Path) -> str:
    """A save that is damaged before the rotation looks: the good one before it stays."""
    kind = KINDS["lora"]
    run_dir = bench.begin(kind, folder, [STEPS - 1])

    def before(rank: int) -> None:
        from finetune.storage import folders

        commit = folders.commit

        def broken(stage: Path, final: Path, **options: Any) -> None:
            commit(stage, final, **options)
            damage(final / "optimizer.pt", way)

        folders.commit = broken  # type: ignore[assignment]

    ended = bench.start(kind, folder, before, training__keep_checkpoints=1)
    if not (run_dir / f"checkpoint-{STEPS - 1}").exists():
        return "the only good checkpoint was deleted"
    if "older checkpoints are kept" not in ended.said:
        return f"nothing was said: {ended.said[-300:]}"
    return goes_on(bench, kind, folder, f"{LAST} is passed over", training__keep_checkpoints=1)


def best_stays(bench: Bench, folder: Path) -> str:
    """The best checkpoint outlives `keep_checkpoints`, also after a resume."""
    from finetune.artifacts import checkpoint

    kind = KINDS["lora"]
    run_dir = bench.begin(kind, folder, [1])
    checkpoint.set_best(run_dir, run_dir / "checkpoint-1", "loss", 0.0)
    problem = goes_on(bench, kind, folder, training__keep_checkpoints=1)
    left = sorted(path.name for path in checkpoint.checkpoints(run_dir))
    return problem or ("" if left == ["checkpoint-1", LAST] else f"left are {left}")


def best_damaged(bench: Bench, folder: Path) -> str:
    """A torn best.json is refused at the start, and nothing is deleted meanwhile."""
    kind = KINDS["lora"]
    run_dir = bench.begin(kind, folder, [1, 2])
    (run_dir / "best.json").write_text('{"checkpoint": "check')
    ended = bench.start(kind, folder, training__keep_checkpoints=1)
    if ended.codes != [3] or "best.json is damaged" not in ended.said:
        return f"{ended.codes}: {ended.said[-300:]}"
    if not (run_dir / "checkpoint-1").exists():
        return "a checkpoint was deleted that may be the best"
    (run_dir / "best.json").unlink()
    return goes_on(bench, kind, folder, training__keep_checkpoints=1)


def only_one(bench: Bench, folder: Path) -> str:
    """With one checkpoint to keep there is one at every moment."""
    kind = KINDS["lora"]
    run_dir = bench.begin(kind, folder, [1])
    ended = bench.start(kind, folder, training__keep_checkpoints=1)
    left = [path.name for path in run_dir.glob("checkpoint-*")]
    return bench.differs(kind, folder) if ended.well and left == [LAST] else f"left are {left}"


def left_overs(bench: Bench) -> Iterator[Case]:
    """What interrupted saves and deletions of any age leave behind."""
    for what in (
        "a staging folder", "a staging folder that is whole", "a staging file", "a nested staging folder",
        "a link for a staging folder", "trash", "a replaced checkpoint", "a replaced checkpoint beside its replacement",
    ):  # fmt: skip
        yield Case(f"left_over: {what}", partial(left_over, bench, what))


def left_over(bench: Bench, what: str, folder: Path) -> str:
    """It is tidied away or put back, said, and the run goes on."""
    kind = KINDS["lora"]
    run_dir = bench.begin(kind, folder, [2, 3])
    three, staging = run_dir / "checkpoint-3", run_dir / f".staging-{LAST}"
    outside = folder / "outside"
    shutil.copytree(three, outside)
    said = "left over"
    if what == "a staging folder":
        shutil.copytree(three, staging)
        (staging / "manifest.json").unlink()
    elif what == "a staging folder that is whole":
        shutil.copytree(three, staging)
    elif what == "a staging file":
        (run_dir / ".staging-best.json").write_text("{")
    elif what == "a nested staging folder":
        (staging / "a/b").mkdir(parents=True)
        (staging / "a/b/c").write_text("x")
    elif what == "a link for a staging folder":
        staging.symlink_to(outside)
    elif what == "trash":
        three.rename(run_dir / ".trash-checkpoint-3")
        (run_dir / ".trash-checkpoint-3/optimizer.pt").unlink()
    elif what == "a replaced checkpoint":
        three.rename(run_dir / ".replaced-checkpoint-3")
        said = "put back checkpoint-3"
    else:
        shutil.copytree(three, run_dir / ".replaced-checkpoint-3")
        said = ""
    problem = goes_on(bench, kind, folder, said)
    odd = [path.name for path in run_dir.glob(".*-*")]
    kept = sorted(file.name for file in outside.iterdir())
    if len(kept) != len(list((bench.whole(kind) / "checkpoint-3").iterdir())):
        problem = problem or "what a link led to was deleted"
    return problem or (f"still there: {odd}" if odd else "")


# --- at any moment -------------------------------------------------------------------------------


def random_kills(bench: Bench, number: int) -> Iterator[Case]:
    """A real run killed again and again at moments that a seed chooses."""
    for seed in range(number):
        name = ("lora", "full", "prefix", "lora on 2")[seed % 4]
        yield Case(
            f"random: {name}, seed {seed}", partial(killed_at_random, bench, KINDS[name], seed)
        )


def killed_at_random(bench: Bench, kind: Kind, seed: int, folder: Path) -> str:
    """Two starts killed (all processes, as a machine that goes down), the third one ends."""
    draw = random.Random(seed)
    begun = time.monotonic()
    (folder / "timed").mkdir()
    bench.start(kind, folder / "timed")
    usual = time.monotonic() - begun
    for _ in range(2):
        if (child := os.fork()) == 0:
            os.setpgid(0, 0)
            bench.start(kind, folder)
            os._exit(0)
        time.sleep(draw.uniform(0.2, 1.0) * usual)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        problem = half_written(kind, folder / "run")
        if problem not in ("", "no checkpoint is left"):
            return problem
    return goes_on(bench, kind, folder)
