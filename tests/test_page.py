"""The endpoint's page in a real browser: models side by side, votes, rows, tools, pictures, keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import browser as screens
import httpx
import pages
import pictures
import pytest
import serving
from PIL import Image
from selenium.webdriver.common.keys import Keys

from finetune.cli import main
from finetune.data.preview.report import check
from finetune.evaluation.scores.votes import score_votes
from finetune.generation.load import open_model
from finetune.serving.page import html

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[serving.Served]:
    opened = open_model(serving.save_talkative(folder / "base"))
    seeing = open_model(pictures.save_model(folder / "glm4v"))
    models = {"base": opened, "tuned": opened, "eyes": seeing}
    with pages.served(models, folder / "saved") as running:
        yield running


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    with screens.chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(driver: object, server: serving.Served) -> Iterator[pages.Page]:
    opened = pages.Page(driver, server)
    opened.look()
    opened.open()
    yield opened
    assert opened.problems() == [], "nothing is said on the console"


def test_models_answer_side_by_side_in_markdown_with_code_and_formulas(page: pages.Page) -> None:
    page.send("How do I solve a quadratic equation?")
    assert page.names() == ["A · base", "B · tuned"]
    short, long = page.replies()
    assert short.startswith("Use the quadratic formula")
    assert "sign of" in long
    found = page.run("""
        const [one, two] = document.querySelectorAll('.answer');
        const count = (node, what) => node.querySelectorAll(what).length;
        return [count(one, 'strong'), count(one, 'math'), count(two, 'math[display=block]'), count(two, 'math mfrac'), count(two, 'td'),
                two.querySelector('pre code').textContent.split('\\n').length, two.querySelector('.code-head span').textContent,
                two.querySelector('pre .hljs-keyword')?.textContent, two.querySelector('details.thought').open, two.querySelector('.thought .plain').textContent]""")
    assert found[:8] == [1, 1, 1, 1, 4, 3, "python", "def"]
    assert found[8:] == [False, "It is a quadratic equation.\nThe discriminant decides."]
    assert "\\frac" not in long, "a formula's source is not shown beside it"
    assert "tokens" in page.run("return document.querySelector('.answer header small').textContent")
    for width, dark in ((1280, True), (390, False), (390, True)):
        page.look(width=width, dark=dark)
        wide, ground = page.run("return [document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]")  # fmt: skip
        assert wide == width, "nothing sticks out to the side"
        assert ground == ("rgb(19, 20, 21)" if dark else "rgb(246, 245, 242)")
    page.click("中文")
    assert "保留自己的对话" in page.run("return document.getElementById('empty').textContent")
    texts = page.run("return [...document.querySelectorAll('button')].map((node) => node.textContent)")  # fmt: skip
    assert {"发送", "新对话", "存为训练数据", "A 更好", "平局"} <= set(texts)
    assert page.run("return document.documentElement.lang") == "zh"


CONTRASTS = """
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgba = (css) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255); };
    const over = (front, back) => [0, 1, 2].map((i) => front[i] * front[3] + back[i] * (1 - front[3])).concat(1);
    const light = (c) => { const [r, g, b] = c.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const ground = (node) => node ? over(rgba(getComputedStyle(node).backgroundColor), ground(node.parentElement)) : [1, 1, 1, 1];
    const measured = (node, text, style) => {
      const back = ground(node), [a, b] = [light(over(rgba(style.color), back)), light(back)].sort((x, y) => y - x);
      const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && parseInt(style.fontWeight) >= 700);
      return [(a + 0.05) / (b + 0.05), large ? 3 : 4.5, `${text.trim().slice(0, 30)} (${node.tagName} ${node.className})`];
    };
    const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let text; (text = walker.nextNode()); ) {
      const node = text.parentElement;
      if (!text.data.trim() || !node.checkVisibility() || node.closest('script, style, :disabled')) continue;
      found.push(measured(node, text.data, getComputedStyle(node)));
    }
    for (const node of document.querySelectorAll('input, textarea')) {
      if (!node.checkVisibility()) continue;
      found.push(measured(node, node.value || node.id, getComputedStyle(node)));
      if (node.placeholder) found.push(measured(node, node.placeholder, getComputedStyle(node, '::placeholder')));
    }
    return found"""


def test_every_text_has_the_contrast_of_wcag_aa_in_light_and_in_dark(page: pages.Page) -> None:
    page.run("document.getElementById('settings').open = true; document.querySelector('main').scrollIntoView()")  # fmt: skip
    page.send("How do I solve a quadratic equation?")
    page.click("Tokens")
    page.until("return document.querySelector('.tokens .trained')")
    seen: set[str] = set()
    for step in ("tokens", "calls"):
        if step == "calls":
            page.write("tools", json.dumps([pages.WEATHER]))
            page.send("weather?")
            page.write("tools", "[")
            page.until("return document.getElementById('tools-told').className === 'bad'")
        page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        for dark in (False, True):
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
            found = page.run(CONTRASTS)
            faint = [f"{text}: {ratio:.2f}" for ratio, wanted, text in found if ratio < wanted]
            assert not faint, f"in the {'dark' if dark else 'light'}: {'; '.join(faint)}"
            seen |= {text.rpartition(" (")[2] for _, _, text in found}
    assert {"SPAN hljs-keyword)", "B )", "SPAN trained )", "SUMMARY )", "SMALL bad)"} <= seen, seen


def test_what_is_set_on_the_page_is_asked_of_the_server(page: pages.Page) -> None:
    """Sampling and system text as they are typed; what is left empty is not sent."""
    page.run("document.getElementById('settings').open = true")
    page.write("system", "Be short.")
    wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "seed": 11, "max_tokens": 50}  # fmt: skip
    for name, value in wanted.items():
        page.write(f"s-{name}", str(value))
    page.run("const real = window.fetch; window.sent = []; window.fetch = (path, more) => { sent.push(more.body); return real(path, more); }")  # fmt: skip
    page.send("hello")
    bodies = [json.loads(body) for body in page.run("return sent") if body and "messages" in body]
    assert [body["model"] for body in bodies] == ["base", "tuned"]
    for body in bodies:
        assert {name: body.get(name) for name in wanted} == wanted
        assert body["messages"][0] == {"role": "system", "content": "Be short."}
        assert "presence_penalty" not in body


def test_replies_come_token_by_token_and_can_be_stopped_retried_and_asked_otherwise(
    page: pages.Page, server: serving.Served
) -> None:
    for script in server.scripts.values():
        script.pause = 0.05
    page.write("draft", "count")
    page.press(Keys.ENTER)
    page.until("return document.querySelector('.said')?.textContent.startsWith('1 2 3')")
    assert page.run("return writing().length") == 2, "it is shown while it is written"
    assert page.run("return document.querySelector('.answer').ariaBusy") == "true"
    page.press(Keys.ESCAPE)
    page.wait()
    for script in server.scripts.values():
        script.pause = 0.0
    serving.until(lambda: server.engine.load == (0, 0))
    assert "was stopped" in page.run("return document.querySelector('.answer header').textContent")
    assert len(page.replies()[0]) < len(" ".join(map(str, range(1, 200))))
    page.click("Retry")
    page.wait()
    assert page.replies()[0].endswith(" 199")
    page.press("/" + Keys.ARROW_UP)
    assert page.run("return document.getElementById('draft').value") == "count"
    page.send("Hello")
    assert page.replies() == ["base answers.", "tuned answers."]
    assert page.run("return state.turns.length") == 1, "an edited message takes the place of the old one"  # fmt: skip


def test_a_call_is_a_card_with_a_box_whose_result_is_answered(page: pages.Page) -> None:
    page.run("document.getElementById('settings').open = true")
    page.write("tools", '[{"type": "function"')
    page.until("return document.getElementById('tools-told').className === 'bad'")
    page.write("draft", "weather?")
    page.press(Keys.ENTER)
    assert page.run("return [state.turns.length, document.activeElement.id]") == [0, "tools"]
    page.write("tools", json.dumps([pages.WEATHER]))
    page.until("return document.getElementById('tools-told').className === 'good'")
    assert page.run("return document.getElementById('tools-told').textContent").startswith("get_weather: ")  # fmt: skip
    page.send("weather?")
    cards = page.run("return [...document.querySelectorAll('.call')].map((node) => [node.querySelector('b').textContent, JSON.parse(node.querySelector('code').textContent).city])")  # fmt: skip
    assert cards == [["get_weather", "Beijing"], ["get_weather", "北京"]]
    for box in page.browser.find_elements("css selector", ".call textarea"):
        box.send_keys('{"sky": "clear"}')
    for _ in range(2):
        page.click("Send the results")
        page.wait()
    assert [text.rpartition("says: ")[2] for text in page.replies()] == ['{"sky": "clear"}'] * 2
    page.click("Save as training row")
    page.until("return document.querySelector('.actions .note')")
    row = pages.lines(page.server_folder / "rows.jsonl")[-1]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "tool", "assistant"]  # fmt: skip
    assert row["tools"] == [pages.WEATHER]


def test_votes_are_saved_with_hidden_names_and_scored(page: pages.Page, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    page.run("document.getElementById('settings').open = true")
    page.browser.find_element("id", "hidden").click()
    for number in range(3):
        page.send(f"question {number}")
        assert page.names() == ["A", "B"], "nobody can tell who is who"
        place = 0 if "tuned" in page.replies()[0] else 1
        page.run("document.activeElement.blur()")
        page.press("12"[place] if number < 2 else "0")
        page.until("return document.querySelector('.turn:last-child .voted')")
        assert page.names()[place] == f"{'AB'[place]} · tuned", "the vote shows it"
    votes = pages.lines(page.server_folder / "votes.jsonl")[-3:]
    assert [vote["winner"] for vote in votes] == ["tuned", "tuned", None]
    assert all(vote["hidden"] and set(vote["models"]) == {"base", "tuned"} for vote in votes)
    for vote in votes:
        assert vote["replies"] == [f"{name} answers." for name in vote["models"]]
    assert len({vote["dialogue"] for vote in votes}) == 1
    file = page.server_folder / "votes.jsonl"
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--votes", str(file)])
    assert end.value.code == 0
    assert "base : tuned" in capsys.readouterr().out
    [pair] = score_votes([file])
    assert (pair.a, pair.b, pair.wins, pair.losses, pair.ties) == ("base", "tuned", 0, 2, 1)


def test_a_dialogue_becomes_a_row_that_training_takes_and_shows_its_mask(page: pages.Page) -> None:
    page.run("document.getElementById('settings').open = true")
    page.write("system", "Be short.")
    page.send("one")
    page.send("two <|assistant|>")
    page.click("Tokens", 2)
    page.until("return document.querySelector('.tokens')")
    spans = page.run("return [...document.querySelectorAll('.tokens span')].map((node) => [node.textContent, node.classList.contains('trained'), node.classList.contains('control')])")  # fmt: skip
    text = "".join(text for text, _, _ in spans)
    assert text.startswith("[gMASK]<sop><|system|>⏎\nBe short.<|user|>⏎\none<|assistant|>")
    trained = "".join(text for text, is_trained, _ in spans if is_trained)
    assert trained == "⏎\nbase answers.<|user|>" * 2
    controls = [text for text, _, is_control in spans if is_control]
    assert controls.count("<|assistant|>") == 2, "what is typed is text"
    page.click("Save as training row", 3)
    page.until("return document.querySelector('.actions .note')")
    row = pages.lines(page.server_folder / "rows.jsonl")[-1]
    assert [m["content"] for m in row["messages"]] == ["Be short.", "one", "tuned answers.", "two <|assistant|>", "tuned answers."]  # fmt: skip


GIVE = """
        const data = new DataTransfer();
        const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
        data.items.add(new File([bytes], 'x.png', {type: arguments[2] ?? 'image/png'}));
        const more = arguments[1] === 'drop' ? {dataTransfer: data} : {clipboardData: data};
        document.dispatchEvent(new (arguments[1] === 'drop' ? DragEvent : ClipboardEvent)(arguments[1], {bubbles: true, cancelable: true, ...more}))"""
"""Pastes or drops a file: its bytes, how, and its kind."""


def test_a_picture_is_dropped_or_pasted_and_goes_with_the_first_message(
    page: pages.Page, folder: Path
) -> None:
    Image.new("RGB", (30, 20), "red").save(folder / "red.png")
    assert page.run("return document.getElementById('image-row').hidden"), "none of them sees"
    page.run("state.columns = ['eyes']; drawAll()")
    assert not page.run("return document.getElementById('image-row').hidden")
    url = serving.data_url((30, 20))
    for way in ("paste", "drop"):
        page.run(GIVE, url.partition(",")[2], way)
        page.until("return document.querySelector('.thumbnail')")
        if way == "paste":
            page.click("Remove the image")
    page.run(GIVE, url.partition(",")[2], "drop", "text/html")
    assert page.run("return document.getElementById('told').textContent") == "this is no image"
    page.send("what is it?")
    assert page.replies() == ["eyes answers."]
    page.click("Save as training row")
    page.until("return document.querySelector('.actions .note')")
    saved = page.server_folder
    [name] = pages.lines(saved / "rows.jsonl")[-1]["images"]
    with Image.open(saved / name) as image:
        assert image.size == (30, 20)
    assert check(str(saved / "rows.jsonl")).num_bad == 0, "data check takes every row"
    with pytest.raises(SystemExit) as end:
        main(["data", "check", str(saved / "rows.jsonl")])
    assert end.value.code == 0


def test_several_pictures_go_with_any_message_where_the_model_takes_them(page: pages.Page) -> None:
    page.run(
        "state.columns = ['eyes']; state.models.find((one) => one.name === 'eyes').images = 3; drawAll()"
    )
    url = serving.data_url((30, 20))
    for number in (1, 2):
        page.run(GIVE, url.partition(",")[2], "drop")
        page.until(f"return document.querySelectorAll('.thumbnail').length === {number}")
    sent = """
        state.turns.push({ text: 'q', pictures: state.pictures, answers: [newAnswer()] });
        return [messagesOf(0, 0)[0].content.map((part) => part.type), roomForPictures()]"""
    assert page.run(sent) == [["image_url", "image_url", "text"], 1]


def test_the_page_can_be_used_without_a_mouse_and_every_control_has_a_name(
    page: pages.Page,
) -> None:
    page.run("document.activeElement.blur()")
    page.press("/")
    assert page.run("return document.activeElement.id") == "draft"
    page.write("draft", "a" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "b" + Keys.ENTER)
    page.wait()
    assert page.run("return state.turns[0].text") == "a\nb"
    unnamed = page.run("""return [...document.querySelectorAll('select, input, textarea, button')]
        .filter((e) => !(e.closest('label') || e.ariaLabel || e.textContent.trim())).map((e) => e.outerHTML)""")
    assert unnamed == []
    page.press(Keys.ARROW_UP)
    page.press(Keys.ESCAPE)
    assert page.run("return [state.editing, document.getElementById('draft').value]") == [None, ""]


def test_the_key_is_in_no_address_and_in_no_storage(driver: object, folder: Path) -> None:
    key = "a secret of thirty characters!"
    opened = open_model(folder / "base")
    with pages.served({"base": opened}, None, key=key) as guarded:
        page = pages.Page(driver, guarded)
        page.browser.get(f"{guarded.url}/")
        page.until("return document.getElementById('told').className === 'bad'")
        assert page.run("return document.getElementById('settings').open"), "where the key is typed"
        page.write("key", key)
        page.press(Keys.TAB)
        page.until("return document.querySelectorAll('#models select').length > 0")
        page.send("hello")
        assert page.replies() == ["base answers."]
        kept = page.run("""return [location.href, JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie,
            performance.getEntriesByType('resource').map((e) => e.name).join(), document.documentElement.outerHTML].join()""")
        assert key not in kept
        assert not page.run("return [...document.querySelectorAll('button')].some((b) => b.textContent.startsWith('Save'))")  # fmt: skip
        assert page.problems() == []


def test_the_page_asks_its_own_server_only_and_its_libraries_are_named_with_licences(
    page: pages.Page,
) -> None:
    page.send("hi")
    asked = page.run("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert asked
    assert all(name.startswith((page.server.url, "data:")) for name in asked)
    text = httpx.get(f"{page.server.url}/", timeout=60).text
    outside = re.sub(r"<script.*?</script>|<style.*?</style>", "", text, flags=re.DOTALL)
    assert re.findall(r"(?:src|href)=[\"']([^\"']+)", outside) == ["data:,", "#draft"]
    table = (html.LIBRARIES / "README.md").read_text()
    for file in html.LIBRARIES.glob("*.js"):
        named = re.search(rf"\| {file.name} \|[^|]+\| (\S+) \|", table)
        assert named, file.name
        assert file.with_suffix(".LICENSE").is_file()
        head = file.read_text(encoding="utf-8")
        assert named[1] in (head[:400] if file.stem != "katex" else head), "the version is the one named"  # fmt: skip


@pytest.mark.usefixtures("server")  # which makes the models' folder
def test_serve_and_chat_open_the_page_with_what_the_command_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = []
    monkeypatch.setattr("finetune.serving.serve.serve", lambda *models, **more: opened.append((*models, more["options"])))  # fmt: skip
    base, save = str(folder / "base"), str(folder / "trials")
    for words in (["serve", base, f"tuned={base}", "--page", "--save-to", save], ["chat", base, f"tuned={base}", "--web", "--system", "Be kind.", "--temperature", "0.5"]):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
    (served, serving_options), (chatted, chat_options) = opened
    assert served == chatted == {"base": base, "tuned": base}
    assert serving_options.page == html.PageOptions(Path(save))
    assert chat_options.page == html.PageOptions(None, "Be kind.", {"temperature": 0.5, "top_p": 0.8, "max_tokens": 1024})  # fmt: skip
    assert chat_options.port == 0
    for words in (["serve", base, "--save-to", save], ["chat", base, "--save-to", save], ["chat", base, f"a={base}"]):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
    assert "for the page: add --web" in capsys.readouterr().err
