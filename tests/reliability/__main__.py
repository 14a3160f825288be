"""Trust that can be shown: faults of every kind, and how many of them a run survives.

    python -m tests.reliability [SUITE[:GROUP] ...] [--subset] [--stock] [--mutations] [--write-tables]

Prints `survived N of N` for every suite and the names of the cases that did not survive; ends with 1
when there are any, or when fewer cases survived than `totals.json` records.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Collection

from tests.reliability import attacks, promises
from tests.reliability.frame import ROOT, SUITES, Results, run_suite
from tests.reliability.mutations import MUTATIONS

for name, value in (("OMP_NUM_THREADS", "1"), ("DS_ACCELERATOR", "cpu"), ("HF_HUB_OFFLINE", "1"),
                    ("TOKENIZERS_PARALLELISM", "false"), ("CUDA_VISIBLE_DEVICES", "")):  # fmt: skip
    os.environ.setdefault(name, value)
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts/bench")]
os.environ["PYTHONPATH"] = str(ROOT)


def by_group(results: Results) -> dict[str, list[int]]:
    """Group -> [survived, of]."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for case, problem in results.items():
        counts[case.partition(":")[0]][0] += not problem
        counts[case.partition(":")[0]][1] += 1
    return dict(counts)


def mutations(suites: Collection[str]) -> int:
    """Take out one safeguard of these suites after the other; a case must fail each time."""
    import cells

    cells.import_libraries()  # once; every suite is a fork of this process
    unnoticed = 0
    for name, mutation in MUTATIONS.items():
        suite, _, group = mutation.cases.partition(":")
        if suite not in suites:
            continue
        os.environ["RELIABILITY_MUTATION"] = name
        results = run_suite(suite, groups=(group,), subset=True, stock=False, until_one_fails=True)
        os.environ.pop("RELIABILITY_MUTATION")
        failed = next((case for case, problem in results.items() if problem), "NO CASE")
        print(
            f"without {name}: {failed} fails, {len(results)} of {mutation.cases} tried", flush=True
        )
        unnoticed += failed == "NO CASE"
    return unnoticed


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE[:GROUP]", help=", ".join(SUITES))
    parser.add_argument("--subset", action="store_true", help="what the CI runs")
    parser.add_argument("--stock", action="store_true", help="with plain transformers.Trainer")
    parser.add_argument("--mutations", action="store_true", help="safeguards taken out in turn")
    parser.add_argument("--write-tables", action="store_true", help="renew totals and the tables")
    options = parser.parse_args()
    here = [suite for suite in SUITES if (ROOT / f"tests/reliability/{suite}.py").exists()]
    asked: dict[str, tuple[str, ...]] = dict.fromkeys(here, ()) if not options.suites else {}
    for text in options.suites:
        suite, _, group = text.partition(":")
        if suite not in here:
            parser.error(f"{suite} is none of {', '.join(here)}")
        asked[suite] = (*asked.get(suite, ()), group) if group else ()
    if options.mutations:
        return mutations(asked)
    problems = []
    names: dict[str, list[str]] = {}
    for suite, groups in asked.items():
        results = run_suite(suite, groups=groups, subset=options.subset, stock=options.stock)
        counts = by_group(results)
        survived = sum(not problem for problem in results.values())
        print(f"{suite}: survived {survived} of {len(results)}", flush=True)
        column = "stock" if options.stock else "subset" if options.subset else "all"
        if options.write_tables:
            promises.record(suite, column, counts, whole=not groups)
        if not (groups or options.subset or options.stock):
            names[suite] = [f"{suite} / {name}" for name in results]
        if not options.stock:
            problems += [f"{suite} / {name}: {why}" for name, why in results.items() if why]
            problems += promises.fallen(suite, column, counts, groups)
    problems += attacks.problems([name for found in names.values() for name in found], names)
    if options.write_tables:
        promises.write_tables()
    for problem in problems:
        print(f"FAILED {problem}", flush=True)
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
