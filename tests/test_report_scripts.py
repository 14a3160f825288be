"""The functions of report.html's script, each on a table of made-up data, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import browser as screens
import evaluations
import pytest
from test_report_page import choose, press, shown

from finetune.report.page import asset, write_page

Browser = Any


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A page of the base and two steps of one run on 21 samples: two whole pages of cards and one card."""
    made = evaluations.write_evaluation(
        tmp_path_factory.mktemp("scripts") / "out", samples=21, steps=(20, 40)
    )
    page = write_page(made)
    with screens.chromium(tmp_path_factory.mktemp("profile")) as driver:
        screens.look(driver, page)
        yield driver


@pytest.fixture
def page(browser: Browser) -> Browser:
    browser.refresh()
    return browser


def ask(browser: Browser, script: str, *values: Any) -> Any:
    return browser.execute_script(f"return {script}", *values)


def sample(scores: list[list[float | None]], replies: list[str], **more: Any) -> dict[str, Any]:
    return {"where": "d.jsonl:1", "prompt": "asked", "reference": "", "slices": {}, "scores": scores, "replies": replies} | more  # fmt: skip


SAMPLES = [  # of two targets and the scores `up`, which is better when higher, and `down`
    sample([[5, 5], [7, 7]], ["a", "aaa"]),
    sample([[None, None], [9, 9]], ["aaaa", ""]),
    sample([[1, 1], [1, 1]], ["aa", "aaaaa"]),
    sample([[9, 9], [2, 2]], ["aaa", "a"]),
    sample([[5, 5], [None, None]], ["a", "aaaa"]),
]
DATA = {"metrics": ["up", "down"], "lower": ["down"], "neither": ["odd"], "samples": SAMPLES}


@pytest.mark.parametrize(
    ("sort", "up", "down"),
    [
        ("data", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        (
            "worst",
            [2, 0, 4, 3, 1],
            [3, 0, 4, 2, 1],
        ),  # without a score last, equal ones as they came
        ("best", [3, 0, 4, 2, 1], [2, 0, 4, 3, 1]),
        ("gain", [3, 2, 0, 1, 4], [0, 2, 3, 1, 4]),
        ("loss", [0, 2, 3, 1, 4], [3, 2, 0, 1, 4]),
        ("longest", [1, 3, 2, 0, 4], [1, 3, 2, 0, 4]),
    ],
)
def test_every_order_knows_which_way_a_score_is_better(
    browser: Browser, sort: str, up: list[int], down: list[int]
) -> None:
    for metric, places in (("up", up), ("down", down)):
        view = {"sort": sort, "metric": metric, "subject": 0, "rival": 1, "search": "", "slice": None}  # fmt: skip
        assert ask(browser, "ordered(arguments[0], arguments[1])", DATA, view) == places, metric
    nobody = ask(browser, "ordered(arguments[0], arguments[1])", DATA, view | {"metric": "gone"})
    assert nobody == (up if sort in ("data", "longest") else [0, 1, 2, 3, 4])


def test_search_looks_into_place_prompt_reference_and_replies(browser: Browser) -> None:
    one = sample([[]], ["first Reply", "second"], where="D.jsonl:7", reference="Wanted")
    for text, is_there in (("d.jsonl:7", True), ("asked", True), ("wanted", True), ("first reply", True), ("second", True), ("", True), ("none", False)):  # fmt: skip
        found = ask(browser, "matches({samples: [arguments[0]]}, 0, arguments[1])", one, text)
        assert found is is_there, text
    pieces = "found(arguments[0], arguments[1]).map((one) => typeof one === 'string' ? one : [one.textContent])"
    assert ask(browser, pieces, "aXaaxA", "xa") == ["a", ["Xa"], "a", ["xA"], ""]
    assert ask(browser, pieces, "aaa", "aa") == ["", ["aa"], "a"]
    assert ask(browser, pieces, "İx", "x") == ["İx"], "lower case is longer"
    assert ask(browser, pieces, "abc", "") == ["abc"]


def test_a_prompt_is_shown_turn_by_turn(browser: Browser) -> None:
    prompt = "[gMASK]<sop><|system|>\nbe brief<|user|>\nhi<|assistant|>\n<|observation|>\n{}"
    turns = [["system", "be brief"], ["user", "hi"], ["observation", "{}"]]
    assert ask(browser, "turnsOf(arguments[0])", prompt) == turns
    assert ask(browser, "turnsOf(' plain ')") == [["", "plain"]]


@pytest.mark.parametrize(
    ("metric", "value", "signed", "text"),
    [
        ("rouge-l", 4.25, False, "4.3"), ("rouge-l", -4.0, False, "−4.0"), ("loss", 1.23456, False, "1.235"),
        ("general_loss", 2, True, "+2.000"), ("perplexity", 3.14159, True, "+3.14"), ("rouge-l", 0, True, "+0.0"),
        ("rouge-l", -1, True, "−1.0"), ("rouge-l", None, True, "–"),
    ],
)  # fmt: skip
def test_a_number_has_the_places_of_its_score_and_a_true_minus(
    browser: Browser, metric: str, value: float | None, signed: bool, text: str
) -> None:
    assert ask(browser, "number(...arguments)", metric, value, signed) == text


def cards(browser: Browser, **view: Any) -> list[list[str]]:
    """The chips beside the name of every target of one sample."""
    view = {"metric": "up", "subject": 1, "rival": 0, "search": "", "marks": True} | view
    data = DATA | {"targets": [{"name": "base", "colour": 0}, {"name": "lora", "colour": 1}]}
    script = "[0, 1].map((target) => [...replyOf(arguments[0], arguments[1], arguments[2], target).querySelectorAll('.chip')].map((chip) => chip.className + ' ' + chip.textContent))"
    one = sample([[5, 5], [7.5, 7.5]], ["one two three", "entirely else"], reference="one two three")  # fmt: skip
    found: list[list[str]] = ask(browser, script, data, view, one)
    return found


def test_a_card_says_by_how_much_a_reply_is_better_than_the_rivals(browser: Browser) -> None:
    assert cards(browser) == [
        ["chip up 5.0"],
        ["chip up 7.5", "chip up +2.5", "chip little in common, not marked"],
    ]
    assert cards(browser, metric="down", marks=False)[1] == ["chip down 7.5", "chip down +2.5"]
    assert cards(browser, rival=1)[0] == ["chip up 5.0", "chip down −2.5"]
    assert cards(browser, metric="gone", marks=False) == [[], []]


def table(browser: Browser, script: str, data: dict[str, Any], metric: str) -> list[list[str]]:
    """Class and text of the cells of every row."""
    read = (
        "[...document.querySelectorAll(arguments[2] + ' tbody tr')].map((row) => "
        "[...row.querySelectorAll('td')].map((cell) => cell.className + ' ' + cell.textContent))"
    )
    place = {"showSlices": "#slice-table", "showPairs": "#pair-table"}[script]
    browser.execute_script(f"{script}(arguments[0], arguments[1])", data, metric)
    found: list[list[str]] = ask(browser, read.replace("arguments[2]", f"'{place}'"))
    return found


def test_slices_are_shaded_by_the_distance_to_the_best_of_the_row(page: Browser) -> None:
    targets = [{"name": name, "colour": 0} for name in "abcde"]
    values = dict(zip("abcd", (10, 13, 30, 40), strict=True))
    scores = {name: {metric: {"value": value, "low": None, "high": None, "n": 10 + value} for metric in ("up", "down", "odd")} for name, value in values.items()}  # fmt: skip
    data = DATA | {"targets": targets, "slices": {"kind": {"tool": scores}}}
    _, up = table(page, "showSlices", data, "up")
    assert up == [" 50", "shade3 10.0", "shade3 13.0", "shade1 30.0", "top 40.0", " –"]
    _, down = table(page, "showSlices", data, "down")
    assert down == [" 50", "top 10.0", "shade1 13.0", "shade2 30.0", "shade3 40.0", " –"]
    _, odd = table(page, "showSlices", data, "odd")
    assert odd[1:] == [" 10.0", " 13.0", " 30.0", " 40.0", " –"]


def test_every_two_models_are_shown_from_both_sides(page: Browser) -> None:
    data = {
        "targets": [{"name": name, "colour": 0} for name in "abc"],
        "comparisons": [
            [1, 0, "up", 2.5, "better", "b is better."], [2, 0, "up", -1, "worse", "c is worse."],
            [2, 1, "up", None, "no real difference", "level"], [1, 0, "down", 9, "worse", "other"],
        ],
    }  # fmt: skip
    assert table(page, "showPairs", data, "up") == [
        ["none ", "worse −2.5", "better +1.0"],
        ["better +2.5", "none ", "no-real-difference "],
        ["worse −1.0", "no-real-difference ", "none "],
    ]
    assert table(page, "showPairs", data, "down")[0][1] == "better −9.0"


def test_marks_join_to_both_texts_and_are_left_out_where_they_would_not_help(browser: Browser) -> None:  # fmt: skip
    def compare(reference: str, reply: str) -> Any:
        return ask(browser, "differences(arguments[0], arguments[1])", reference, reply)

    assert compare("a b", "b") == [["missing", "a "], ["same", "b"]]
    assert compare("b", "a b") == [["extra", "a "], ["same", "b"]]
    assert [kind for kind, _ in compare("one two", "one  two")] == ["same"] * 3, (
        "only space differs"
    )
    assert compare("a " + "b " * 20, "a") is None, "little of the reference is in the reply"
    assert compare("one two " * 800, "one 2 " * 800) is None, "too long for a table"
    assert compare("one two " * 300, "one 2 " * 300) is not None
    assert compare("a a a", "a") == [["same", "a"], ["missing", " a a"]]
    assert compare("a", "a " + "b " * 20) is None, "little of the reply is in the reference"
    for one, other, common in (
        ("a b c d e f", "a c b d x f", 4), ("p q r s", "p r q s t", 3), ("一二三四", "一三二四", 3),
        ("a b c d e", "c d e a b", 3), ("c d e a b", "a b c d e", 3),
    ):  # fmt: skip
        runs = compare(one, other)
        said, wanted = ("".join(text for kind, text in runs if kind != gone) for gone in ("missing", "extra"))  # fmt: skip
        assert (said, wanted.replace(" ", "")) == (other, one.replace(" ", ""))
        same = sum(len(text.replace(" ", "")) for kind, text in runs if kind == "same")
        assert same == common, "as much as can be is the same"


def test_the_best_is_shown_beside_the_base_or_beside_another(page: Browser) -> None:
    chosen = "[at('subject').value, at('rival').value, at('metric').value]"
    start = "(() => { const at = (id) => document.getElementById(id); startSamples(Object.assign(JSON.parse(at('data').textContent), arguments[0]), at); return CHOSEN; })()".replace("CHOSEN", chosen)  # fmt: skip
    assert ask(page, start, {}) == ["2", "0", "rouge-l"]
    assert ask(page, start, {"base": None, "best": 0, "headline": "bleu-4"}) == ["0", "1", "bleu-4"]
    assert ask(page, start, {"base": None, "best": 2}) == ["2", "0", "rouge-l"]


def test_pages_are_turned_to_both_ends_and_begin_anew_with_another_order(page: Browser) -> None:
    def ends() -> list[bool]:
        return [page.find_element("id", name).is_enabled() for name in ("previous", "next")]

    assert page.find_element("id", "page").text == "page 1 of 3"
    assert ends() == [False, True]
    page.find_element("id", "next").click()
    assert ends() == [True, True]
    press(page, "n")
    assert shown(page) == [21]
    assert ends() == [True, False]
    for held in ("ctrlKey", "metaKey", "altKey"):
        page.execute_script("document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'p', bubbles: true, [arguments[0]]: true}))", held)  # fmt: skip
        assert shown(page) == [21], "the browser's own keys are not ours"
    choose(page, "sort", "longest reply first")
    assert page.find_element("id", "page").text == "page 1 of 3"


def test_marks_can_be_taken_off_and_a_link_finds_what_a_search_hides(page: Browser) -> None:
    assert page.find_elements("css selector", "#cards mark, #cards del")
    page.find_element("id", "marks").click()
    assert not page.find_elements("css selector", "#cards mark, #cards del")
    page.find_element("id", "search").send_keys("heldout.jsonl:3")
    page.execute_script("return new Promise((done) => setTimeout(done, 300))")
    assert shown(page) == [3]
    page.execute_script("location.hash = '#sample-17'")
    page.execute_script("return new Promise((done) => setTimeout(done, 50))")
    assert 17 in shown(page)
    page.execute_script("location.hash = ''")


def test_the_pairs_can_be_chosen_by_every_score_that_is_compared(page: Browser) -> None:
    options = "[...document.querySelectorAll('#pair-metric option')].map((one) => one.value)"
    assert ask(page, options) == list(evaluations.METRICS)


def test_the_board_renews_its_panels_at_its_pace_and_says_when_it_is_old(browser: Browser) -> None:
    script = asset("board.js").replace('"use strict";', "")
    frame = """
        document.body.innerHTML = '<p id="when" class="stale"></p><div id="panels"></div>';
        document.body.dataset.every = arguments[0];
        const paces = [];
        const run = new Function("fetch", "setInterval", arguments[1] + "; return renew;");
        const renew = run(async () => { if (arguments[2] === null) throw 0; return { text: async () => arguments[2] }; }, (_, pace) => paces.push(pace));
        const done = arguments[3];
        renew().then(() => done([paces, document.getElementById("when").className, document.getElementById("panels").innerHTML]));
    """
    renewed = browser.execute_async_script(frame, "2.5", script, "<b>new</b>")
    assert renewed == [[2500], "", "<b>new</b>"]
    assert browser.execute_async_script(frame, "0", script, None) == [[], "stale", ""]
    browser.refresh()


def test_parts_of_the_data_are_called_as_people_call_them(browser: Browser) -> None:
    names = {
        "source": "Source", "category": "Category", "turns": "Turns", "prompt_length": "Length of the prompt", "kind": "Kind", "language": "Language",
        "my_own": "my own",
    }  # fmt: skip
    assert {name: ask(browser, "sliceName(arguments[0])", name) for name in names} == names
    values = {
        ("kind", "plain"): "Plain reply", ("kind", "tool"): "With tools", ("kind", "odd"): "odd", ("language", "chinese"): "Chinese",
        ("language", "japanese"): "Japanese", ("language", "korean"): "Korean", ("language", "latin script"): "Latin script",
        ("language", "cyrillic script"): "Cyrillic script", ("language", "arabic script"): "Arabic script", ("language", "other"): "Other",
        ("turns", "4 or more"): "≥ 4", ("turns", "2"): "2", ("prompt_length", "over 4096 tokens"): "> 4096 tokens",
        ("prompt_length", "65-256 tokens"): "65-256 tokens", ("source", "over 9 or more"): "over 9 or more", ("source", "plain"): "plain",
    }  # fmt: skip
    assert {key: ask(browser, "sliceValue(...arguments)", *key) for key in values} == values
    assert ask(browser, "inSlice({slices: {a: '1'}}, arguments[0])", ["a", "1"])
    assert not ask(browser, "inSlice({slices: {a: '1'}}, arguments[0])", ["a", "2"])
    assert ask(browser, "inSlice({slices: {}}, null)")
    found = [{"slices": {"b": "2", "a": "1"}}, {"slices": {"a": "1"}}, {"slices": {"a": "0"}}]
    assert ask(browser, "slicesOf(arguments[0])", found) == [["a", "0"], ["a", "1"], ["b", "2"]]


def test_a_card_shows_one_sample_whole(browser: Browser) -> None:
    targets = [{"name": "base", "colour": 0}, {"name": "lora", "colour": 3}]
    data = DATA | {"targets": targets, "pictures": ["data:image/webp;base64,QQ=="]}
    view = {"metric": "up", "subject": 1, "rival": 0, "search": "one", "marks": True}
    one = sample([[None, None], [7.0, 7.0]], ["", "one two"], number=17, reference="one three", prompt="<|user|>\nSay one", slices={"kind": "tool"}, images=[0, "gone.png"])  # fmt: skip
    told = ask(
        browser,
        """(() => { const made = card(arguments[0], arguments[1], 0); const all = (what, how) => [...made.querySelectorAll(what)].map(how);
            return { id: made.id, name: made.getAttribute("aria-label"), stop: made.tabIndex, head: all("header > *", (one) => one.textContent), link: all("header a", (one) => one.getAttribute("href"))[0],
                roles: all(".role", (one) => one.textContent), picture: all("img", (one) => [one.getAttribute("src"), one.alt, one.loading])[0], empty: all(".empty", (one) => one.textContent),
                marked: all("mark.found", (one) => one.textContent), gone: all("del", (one) => [one.textContent, one.title]), extra: all("mark:not(.found)", (one) => [one.textContent, one.title]),
                replies: all(".reply", (one) => one.className), chips: all(".chip", (one) => one.textContent) }; })()""",
        data | {"samples": [one]},
        view,
    )
    assert told == {
        "id": "sample-17", "name": "Sample 17", "stop": -1, "head": ["#17", "d.jsonl:1", "Kind: With tools"], "link": "#sample-17",
        "roles": ["user", "reference"], "picture": ["data:image/webp;base64,QQ==", "The picture of the prompt", "lazy"],
        "empty": ["gone.png", "an empty reply"], "marked": ["one"] * 3, "gone": [["three", "only in the reference"]], "extra": [["two", "not in the reference"]],
        "replies": ["reply c0", "reply c3 subject"], "chips": ["up –", "up 7.0"],
    }  # fmt: skip


def test_a_cell_of_a_table_says_its_interval_or_its_verdict(page: Browser) -> None:
    targets = [{"name": name, "colour": 0} for name in "ab"]
    score = {"up": {"value": 10, "low": 9.5, "high": 10.5, "n": 7}}
    data = DATA | {"targets": targets, "slices": {"kind": {"tool": {"a": score, "b": {"up": {"value": 1, "low": None, "high": None, "n": 3}}}}}}  # fmt: skip
    page.execute_script("showSlices(arguments[0], 'up')", data)
    titles = "[...document.querySelectorAll(arguments[0] + ' tbody td')].map((cell) => cell.getAttribute('title'))"
    assert ask(page, titles, "#slice-table") == [None, "9.5 … 10.5, n = 7", None]
    heads = "[...document.querySelectorAll(arguments[0] + ' th')].map((cell) => cell.textContent)"
    assert ask(page, heads, "#slice-table") == ["slice", "n", "a", "b", "Kind", "With tools"]
    pairs = {"targets": targets, "comparisons": [[1, 0, "up", 2.5, "better", "b is better."]]}
    page.execute_script("showPairs(arguments[0], 'up')", pairs)
    assert ask(page, titles, "#pair-table") == [None, "b is better.", "b is better.", None]
    assert ask(page, heads, "#pair-table") == ["row minus column", "a", "b", "a", "b"]
    made = "(() => { const one = element('p', {a: true, b: false, c: null, d: 0}, null, 'x', undefined); return one.outerHTML; })()"
    assert ask(page, made) == '<p a="" d="0">x</p>'
