"""The page of the endpoint with models whose replies are written here, for tests and screenshots."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import serving

from finetune.data.dialogue.conversation import Message
from finetune.generation.load import OpenedModel
from finetune.serving.page.html import PageOptions

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip
ROOTS = r"""The equation $ax^2 + bx + c = 0$ has two roots:

$$x_{1,2} = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}$$

| sign of $b^2 - 4ac$ | roots |
|---|---|
| positive | two real ones |
| zero | one |

```python
def roots(a, b, c):
    d = (b * b - 4 * a * c) ** 0.5
    return (-b + d) / (2 * a), (-b - d) / (2 * a)
```
"""
SHORT = "Use the **quadratic formula**: \\(x = \\frac{-b \\pm \\sqrt{b^2-4ac}}{2a}\\)."
THOUGHT = "<think>\nIt is a quadratic equation.\nThe discriminant decides.\n</think>\n\n"


def answer(name: str, prompt: str) -> list[Message]:
    """What the model of that name says behind a prompt."""
    question = prompt.rpartition("<|user|>")[2]
    if "<|observation|>" in question:
        result = question.rpartition("<|observation|>")[2].partition("<|assistant|>")[0].strip()
        return [Message("assistant", f"The tool says: {result}")]
    if "weather" in question and "get_weather" in prompt:
        city = json.dumps({"city": "Beijing" if name == "base" else "北京"}, ensure_ascii=False)
        return [Message("assistant", city, "get_weather")]
    if "echo:" in question:
        said = question.partition("echo:")[2].partition("<|assistant|>")[0].strip()
        return [Message("assistant", json.loads(said) if said.startswith('"') else said)]
    if "count" in question:
        return [Message("assistant", " ".join(map(str, range(1, 200))))]
    if re.search("quadratic|二次", question):
        return [Message("assistant", SHORT if name == "base" else THOUGHT + ROOTS)]
    return [Message("assistant", f"{name} answers.")]


@contextmanager
def served(models: dict[str, OpenedModel], folder: Path | None, **options: Any) -> Iterator[serving.Served]:  # fmt: skip
    """The endpoint with its page, its models replaced by `answer`."""
    with serving.served(models, page=PageOptions(folder), **options) as server:
        server.folder = folder
        for name, writer in server.engine.writers.items():
            written = serving.Scripted(
                models[name].template, lambda prompt, name=name: answer(name, prompt)
            )
            for lane in writer.lanes.values():
                written.put_in_place(lane.decoder)
            server.scripts[name] = written
        yield server


def lines(file: Path) -> Sequence[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


class Page:
    """The page in a browser, as a reader uses it."""

    def __init__(self, browser: Any, server: serving.Served) -> None:
        self.browser = browser
        self.server = server
        self.server_folder = server.folder or Path("saves nothing")

    def look(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """A window of that size, in the light or the dark."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def open(self) -> None:
        """The page anew, with its models."""
        self.browser.get(f"{self.server.url}/")
        self.until("return document.querySelectorAll('#models select').length > 0")

    def run(self, script: str, *values: Any) -> Any:
        """What a script finds in the page."""
        return self.browser.execute_script(script, *values)

    def until(self, script: str, *values: Any) -> None:
        """Waits until a script finds what must come."""
        serving.until(lambda: bool(self.run(script, *values)))

    def write(self, name: str, text: str) -> None:
        """Types into a box by its id, in place of what it holds."""
        from selenium.webdriver.common.keys import Keys

        box = self.browser.find_element("id", name)
        if box.get_property("value"):
            box.send_keys(Keys.CONTROL + "a" + Keys.DELETE)
        box.send_keys(text)

    def send(self, text: str) -> None:
        """Sends a message and waits for the replies."""
        self.write("draft", text)
        self.press("\ue007")
        self.wait()

    def wait(self) -> None:
        """Until nobody writes any more."""
        self.until("return state.turns.length > 0 && writing().length === 0")

    def press(self, keys: str) -> None:
        """Keys, whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(keys).perform()

    def click(self, text: str, number: int = 0) -> None:
        """A button by what stands on it."""
        found = [b for b in self.browser.find_elements("css selector", "button") if b.text == text]
        self.run("arguments[0].scrollIntoView({block: 'center'})", found[number])
        found[number].click()

    def replies(self) -> list[str]:
        """The texts of the last turn's replies, as they stand side by side."""
        script = "return [...document.querySelectorAll('.turn:last-child .answer .steps')].map((node) => node.innerText)"
        return [str(text).strip() for text in self.run(script)]

    def names(self) -> list[str]:
        """What the last turn's replies are called."""
        script = "return [...document.querySelectorAll('.turn:last-child .answer header b')].map((node) => node.textContent)"
        return list(map(str, self.run(script)))

    def problems(self) -> list[Any]:
        """What the browser had to say since the last look."""
        return list(self.browser.get_log("browser"))
