"""report.html in a real browser: what it shows, how it is used, and that nothing in a reply can act."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser as screens
import evaluations
import pytest

from finetune.report.page import write_page

Browser = Any
SHAPES = Path(__file__).parent.parent / "data" / "shapes" / "images"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with screens.chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of three checkpoints and the base on 40 samples with a picture each."""
    place = tmp_path_factory.mktemp("reports")
    images = [*sorted(SHAPES.glob("held_out_*.png"))[:3], Path("gone.png")]
    made = evaluations.write_evaluation(place / "out", runs=("lora", "wide"), images=images)
    write_page(made)
    return made


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = evaluations.write_evaluation(tmp_path_factory.mktemp("evil") / "out", evil=True)
    return write_page(made)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def choose(browser: Browser, select: str, text: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", select)).select_by_visible_text(text)


def shown(browser: Browser) -> list[int]:
    """Numbers of the samples on the page, in order."""
    return [int(b.text[1:]) for b in browser.find_elements("css selector", ".card > header b")]


def press(browser: Browser, keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(keys).perform()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_window_and_the_console_stays_empty(
    browser: Browser, folder: Path, width: int, dark: bool
) -> None:
    screens.look(browser, folder / "report.html", width=width, dark=dark)
    assert browser.get_log("browser") == []
    script = "return [document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor, document.querySelectorAll('svg').length]"
    wide, ground, charts = browser.execute_script(script)
    assert wide == width  # nothing sticks out to the side
    assert ground == ("rgb(19, 20, 21)" if dark else "rgb(246, 245, 242)")
    assert charts >= 6


def test_every_text_can_be_told_from_what_is_behind_it(browser: Browser, folder: Path) -> None:
    for dark in (False, True):
        screens.look(browser, folder / "report.html", dark=dark)
        contrast = browser.execute_script("""
            const light = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).map((part) => { const c = part / 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            const style = getComputedStyle(document.documentElement);
            const rgb = (name) => { const d = document.createElement('i'); d.style.color = style.getPropertyValue(name); document.body.append(d); const c = getComputedStyle(d).color; d.remove(); return light(c); };
            const pairs = [['--ink', '--ground'], ['--ink', '--surface'], ['--soft', '--surface'], ['--soft', '--ground'], ['--good', '--surface'], ['--bad', '--surface'], ['--ink', '--extra'], ['--good', '--good-ground'], ['--bad', '--bad-ground']];
            return pairs.map(([a, b]) => { const [x, y] = [rgb(a), rgb(b)]; return [a + b, (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05)]; });
        """)
        assert {name: ratio for name, ratio in contrast if ratio < 4.5} == {}


def test_markup_in_data_is_only_text(browser: Browser, evil: Path) -> None:
    screens.look(browser, evil)
    assert browser.get_log("browser") == []
    found = browser.execute_script(
        "return [window.broken === undefined, document.images.length, document.scripts.length]"
    )
    assert found == [True, 0, 2]
    card = browser.find_element("css selector", ".card").text
    assert "<script>window.broken=1</script>" in card
    assert "{{ 7*7 }}" in card
    press(browser, "/")
    press(browser, "</script>")
    browser.execute_script("return new Promise((done) => setTimeout(done, 300))")
    assert shown(browser) == [1]
    assert browser.execute_script("return window.broken === undefined")


def test_a_script_that_got_in_would_not_run(browser: Browser, evil: Path, tmp_path: Path) -> None:
    """The page's policy names its own script: the second wall, should the first one have a hole."""
    text = evil.read_text(encoding="utf-8")
    hole = tmp_path / "hole.html"
    hole.write_text(text.replace("<main>", "<main><script>window.broken=1</script>"))
    screens.look(browser, hole)
    assert browser.execute_script("return window.broken === undefined")
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]


def test_the_page_asks_nobody_for_anything(browser: Browser, folder: Path) -> None:
    screens.look(browser, folder / "report.html")
    asked = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name).filter((n) => !n.startsWith('data:'))")  # fmt: skip
    assert asked == []
    links = browser.execute_script("return [...document.querySelectorAll('[href], [src]')].map((e) => e.getAttribute('href') || e.getAttribute('src')).filter((a) => !a.startsWith('#') && !a.startsWith('data:'))")  # fmt: skip
    assert links == []


def test_samples_are_ordered_by_worst_gain_and_loss(browser: Browser, folder: Path) -> None:
    screens.look(browser, folder / "report.html")
    score = [row["scores"]["rouge-l"] for row in rows(folder, "lora-60")]
    base = [row["scores"]["rouge-l"] for row in rows(folder, "base-None")]
    assert shown(browser) == list(range(1, 11))
    for order, key in (
        ("worst first", lambda i: score[i]),
        ("best first", lambda i: -score[i]),
        ("largest gain first", lambda i: base[i] - score[i]),
        ("largest loss first", lambda i: score[i] - base[i]),
    ):
        choose(browser, "sort", order)
        assert shown(browser) == [i + 1 for i in sorted(range(40), key=key)][:10], order
    choose(browser, "subject", "wide 20")
    choose(browser, "rival", "lora 60")
    wide = [row["scores"]["rouge-l"] for row in rows(folder, "wide-20")]
    assert shown(browser) == [i + 1 for i in sorted(range(40), key=lambda i: wide[i] - score[i])][:10]  # fmt: skip


def test_search_and_slices_narrow_what_is_shown(browser: Browser, folder: Path) -> None:
    screens.look(browser, folder / "report.html")
    every = rows(folder, "base-None")
    choose(browser, "slice", "Kind: With tools")
    tools = [i + 1 for i, row in enumerate(every) if row["slices"]["kind"] == "tool"]
    assert shown(browser) == tools[:10]
    assert browser.find_element("id", "count").text == f"{len(tools)} of 40 samples"
    choose(browser, "slice", "all samples")
    browser.find_element("id", "search").send_keys("heldout.JSONL:17")
    browser.execute_script("return new Promise((done) => setTimeout(done, 300))")
    assert shown(browser) == [17]


def test_the_page_can_be_used_without_a_mouse(browser: Browser, folder: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    screens.look(browser, folder / "report.html")
    focused = "return [document.activeElement.id, document.activeElement.getAttribute('aria-label'), document.activeElement.className]"
    press(browser, Keys.TAB)
    assert browser.execute_script(focused)[2] == "skip"
    press(browser, "/")
    assert browser.execute_script(focused)[0] == "search"
    press(browser, Keys.ESCAPE + "jj")
    assert browser.execute_script(focused)[1] == "Sample 2"
    press(browser, "k")
    assert browser.execute_script(focused)[1] == "Sample 1"
    press(browser, "n")
    assert shown(browser) == list(range(11, 21))
    assert browser.execute_script(focused)[1] == "Sample 11"
    press(browser, "p")
    assert shown(browser) == list(range(1, 11))
    unnamed = browser.execute_script("return [...document.querySelectorAll('select, input')].filter((e) => !e.closest('label')).length")  # fmt: skip
    assert unnamed == 0


def test_what_a_screen_reader_meets_has_a_name(browser: Browser, folder: Path) -> None:
    screens.look(browser, folder / "report.html")
    nameless = """return [...document.querySelectorAll('svg, img, nav, [role=region], [role=img], button, a, select, input')]
        .filter((e) => !e.closest('[hidden], svg *') && !(e.getAttribute('aria-label') || e.getAttribute('alt') || e.textContent.trim() || e.closest('label')))
        .map((e) => e.outerHTML.slice(0, 80))"""
    assert browser.execute_script(nameless) == []
    drawn = "return [...document.querySelectorAll('figure > svg')].map((e) => [e.getAttribute('role'), e.getAttribute('aria-label').length > 3])"
    charts = browser.execute_script(drawn)
    assert charts
    assert all(found == ["img", True] for found in charts)
    headless = "return document.querySelectorAll('table th:not([scope])').length"
    assert browser.execute_script(headless) == 0
    assert browser.execute_script("return document.documentElement.lang") == "en"


def test_a_link_to_a_sample_opens_the_page_it_is_on(browser: Browser, folder: Path) -> None:
    browser.get("about:blank")
    browser.get((folder / "report.html").as_uri() + "#sample-17")
    assert 17 in shown(browser)
    place = "return document.getElementById('sample-17').getBoundingClientRect().top"
    assert 0 <= browser.execute_script(place) < 400
    [link] = browser.find_elements("css selector", "#sample-17 header b a")
    assert link.get_attribute("href").endswith("#sample-17")


def test_on_paper_the_controls_are_gone_and_texts_are_whole(browser: Browser, folder: Path) -> None:
    screens.look(browser, folder / "report.html")
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        gone = [browser.execute_script(style, name, "display") for name in ("nav", ".controls", ".pager")]  # fmt: skip
        assert gone == ["none"] * 3
        assert browser.execute_script(style, ".reply .text", "maxHeight") == "none"
        assert browser.execute_script(style, ".wide", "overflowX") == "visible"
        assert browser.execute_script(style, "body", "backgroundColor") == "rgb(255, 255, 255)"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_differences_to_the_reference_are_marked_word_by_word(
    browser: Browser, folder: Path
) -> None:
    screens.look(browser, folder / "report.html")

    def compare(reference: str, reply: str) -> Any:
        return browser.execute_script("return differences(arguments[0], arguments[1])", reference, reply)  # fmt: skip

    assert compare("turn the lever right", "turn the lever left") == [
        ["same", "turn the lever "], ["missing", "right"], ["extra", "left"],
    ]  # fmt: skip
    assert compare("价格很好", "价格不好") == [["same", "价格"], ["missing", "很"], ["extra", "不"], ["same", "好"]]  # fmt: skip
    assert compare("one two three four", "one 2 3 four") == [
        ["same", "one "], ["missing", "two three"], ["extra", "2 3"], ["same", " four"],
    ]  # fmt: skip
    assert compare("a b c d", "entirely other words here") is None
    assert compare("same", "same") == [["same", "same"]]
    for row in rows(folder, "lora-40"):
        runs = compare(row["reference"], row["prediction"])
        if runs is not None:
            said = "".join(text for kind, text in runs if kind != "missing")
            assert said == row["prediction"]
            wanted = "".join(text for kind, text in runs if kind != "extra")
            assert wanted.split() == row["reference"].split()


def test_pictures_are_in_the_page_and_missing_ones_are_named(
    browser: Browser, folder: Path
) -> None:
    screens.look(browser, folder / "report.html")
    script = "return [...document.querySelectorAll('.card')].slice(0, 4).map((card) => { const image = card.querySelector('img'); return image ? image.naturalWidth > 0 : card.querySelector('.asked .empty').textContent; })"
    browser.execute_script("for (const image of document.images) image.loading = 'eager'; return Promise.all([...document.images].map((image) => image.decode()))")  # fmt: skip
    found = browser.execute_script(script)
    assert found[:3] == [True, True, True]
    assert found[3] == "gone.png (this folder keeps no picture of it)"


def test_tables_follow_the_chosen_score(browser: Browser, folder: Path) -> None:
    screens.look(browser, folder / "report.html")
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    for metric in ("rouge-l", "bleu-4"):
        choose(browser, "slice-metric", metric)
        found = browser.execute_script("return [...document.querySelectorAll('#slice-table tbody tr')].map((row) => [...row.children].map((cell) => cell.textContent))")  # fmt: skip
        (row,) = [cells for cells in found if cells[0] == "With tools"]
        scores = evaluation["slices"]["kind"]["tool"]
        wanted = [f"{scores[target['name']][metric]['value']:.1f}" for target in evaluation["targets"]]  # fmt: skip
        assert row[2:] == wanted
    pair = browser.execute_script("return document.querySelector('#pair-table tbody tr:nth-child(1) td:nth-child(3)').textContent")  # fmt: skip
    values = [target["scores"]["rouge-l"]["value"] for target in evaluation["targets"]]
    assert pair == f"{values[0] - values[1]:.1f}".replace("-", "−")


def test_a_page_of_losses_alone_has_no_samples_and_no_errors(
    browser: Browser, tmp_path: Path
) -> None:
    made = evaluations.write_evaluation(tmp_path / "out", samples=2)
    found = json.loads((made / "evaluation.json").read_text(encoding="utf-8"))
    (made / "evaluation.json").write_text(json.dumps(found | {"data": [], "slices": {}}))
    for file in (made / "predictions").iterdir():
        file.write_text("")
    screens.look(browser, write_page(made))
    assert browser.get_log("browser") == []
    assert browser.find_element("css selector", "h1").text == "4 models by their loss"
    assert browser.find_elements("id", "samples") == []


def test_five_thousand_samples_put_ten_cards_into_the_page(
    browser: Browser, tmp_path: Path
) -> None:
    made = evaluations.write_evaluation(tmp_path / "out", samples=5000, steps=(20,), words=6)
    screens.look(browser, write_page(made))
    assert browser.find_element("id", "page").text == "page 1 of 500"
    assert browser.execute_script("return document.querySelectorAll('*').length") < 1500
    score = [row["scores"]["rouge-l"] for row in rows(made, "lora-20")]
    choose(browser, "sort", "worst first")
    assert shown(browser) == [i + 1 for i in sorted(range(5000), key=lambda i: score[i])][:10]
    assert browser.get_log("browser") == []
