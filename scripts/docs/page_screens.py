"""The pictures of docs/serving.md: `python scripts/docs/page_screens.py docs/images`.

The page is real, and so are server and browser; what the models say is written in tests/pages.py, so that a
picture shows everything that a reply may hold. Wants chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    """Writes the pictures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    import browser as screens
    import pages
    import serving

    from finetune.generation.load import open_model

    with tempfile.TemporaryDirectory() as place:
        opened = open_model(serving.save_talkative(Path(place) / "base"))
        models = {"base": opened, "tuned": opened}
        with pages.served(models, Path(place) / "saved") as server:
            for language, width, dark in (("en", 1280, False), ("zh", 1280, True)):  # fmt: skip
                with screens.chromium(Path(place) / f"profile-{language}-{width}") as driver:
                    show(pages.Page(driver, server), language, width, dark)
                    name = f"page-{language}{'-dark' if dark else ''}{'-narrow' if width < 600 else ''}.png"  # fmt: skip
                    screens.picture(driver, folder / name)
                    print(folder / name)


def show(page: object, language: str, width: int, dark: bool) -> None:
    """A dialogue with a formula, code, a thought and a call."""
    import json

    import pages

    assert isinstance(page, pages.Page)
    page.look(width=width, height=1180 if width > 600 else 1000, dark=dark)
    page.open()
    if language == "zh":
        page.click("中文")
    page.run("state.tools = arguments[0]", json.dumps([pages.WEATHER]))
    questions = {
        "en": ("How do I solve a quadratic equation?", "What is the weather?"),
        "zh": ("二次方程怎么解？", "北京天气怎么样？ (weather)"),
    }[language]
    for question in questions[: 2 if width > 600 else 1]:
        page.send(question)
    page.run("document.activeElement.blur(); window.scrollTo(0, 0)")


if __name__ == "__main__":
    main()
