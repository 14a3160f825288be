"""The report of 5,000 samples in a browser: how long until there is something to see, and to sort.

    python scripts/bench/report.py [--samples 5000] [--rounds 3] [--json]

Invented predictions of the base and five checkpoints, 60 words each. In headless Chromium, medians:

  first paint    from the start of loading the file to the first thing drawn (bar: 2 s)
  ready          the same to the end of the page's script
  sort           changing the order until the new cards stand in the page and are laid out (bar: 300 ms)
  search         typing a word until its samples are shown
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
BARS = {"first paint": 2.0, "sort": 0.3}

CHANGE = """
const [id, value] = arguments;
const box = document.getElementById(id);
const before = performance.now();
box.value = value;
box.dispatchEvent(new Event('change'));
document.getElementById('cards').getBoundingClientRect();
return (performance.now() - before) / 1000;
"""
SEARCH = """
const done = arguments[arguments.length - 1], box = document.getElementById('search');
const before = performance.now();
new MutationObserver((_, watch) => { watch.disconnect(); done((performance.now() - before) / 1000); }).observe(document.getElementById('cards'), { childList: true });
box.value = arguments[0];
box.dispatchEvent(new Event('input'));
"""
PAINT = """
const paint = performance.getEntriesByName('first-contentful-paint')[0];
const loaded = performance.getEntriesByType('navigation')[0];
return [paint ? paint.startTime / 1000 : null, loaded.domContentLoadedEventStart / 1000];
"""


def measure(samples: int, rounds: int) -> dict[str, float]:
    """Medians in seconds, and the size of the page in MB."""
    import browser as screens
    import evaluations

    from finetune.report.page import write_page

    with tempfile.TemporaryDirectory() as place:
        folder = evaluations.write_evaluation(
            Path(place) / "out", samples=samples, steps=(10, 20, 30, 40, 50), words=60
        )
        before = time.perf_counter()
        page = write_page(folder)
        figures = {"written": time.perf_counter() - before, "MB": page.stat().st_size / 1e6}
        found: dict[str, list[float]] = {}
        with screens.chromium(Path(place) / "profile") as driver:
            for _ in range(rounds):
                screens.look(driver, page)
                time.sleep(0.5)  # the paint is reported a frame later
                paint, ready = driver.execute_script(PAINT)
                found.setdefault("first paint", []).append(paint)
                found.setdefault("ready", []).append(ready)
                for order in ("worst", "gain", "longest", "data"):
                    found.setdefault("sort", []).append(
                        driver.execute_script(CHANGE, "sort", order)
                    )
                found.setdefault("search", []).append(
                    driver.execute_async_script(SEARCH, "valve turn")
                )
    return figures | {name: statistics.median(values) for name, values in found.items()}


def main() -> int:
    """Prints the figures; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description="Time the report's page in headless Chromium.")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        parser.error("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    figures = measure(options.samples, options.rounds)
    missed = [name for name, bar in BARS.items() if figures[name] > bar]
    if options.json:
        print(json.dumps({"samples": options.samples, **figures, "missed": missed}))
    else:
        for name, value in figures.items():
            print(f"{name:<12}{value:9.3f}{'' if name == 'MB' else ' s'}")
        print(f"MISSED: {', '.join(missed)}" if missed else f"all bars met: {BARS}")
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main())
