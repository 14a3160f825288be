"""Chat templates that try to get out, to run for ever or to eat the memory: refused, and soon."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.reliability.frame import Case
from tests.reliability.places import command, tokenizer_folder

SECONDS = 1.0
MEMORY_MB = 300
WRITE = "open('LEFT', 'w')"

ESCAPES = {
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a class by attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "a class by item": "{{ ''['__class__'] }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__'] }}",
    "globals of strftime": "{{ strftime_now.__globals__['sys'] }}",
    "globals of the cycler": "{{ cycler.__init__.__globals__.os.system('touch LEFT') }}",
    "globals of the joiner": "{{ joiner.__init__.__globals__.os.popen('touch LEFT').read() }}",
    "globals of namespace": "{{ namespace.__init__.__globals__ }}",
    "a namespace's underscore": "{% set n = namespace(__class__=1) %}{{ n }}",
    "a namespace by item": "{% set n = namespace() %}{% set n.__dict__ = 1 %}{{ n }}",
    "dict.__class__": "{{ dict.__class__ }}",
    "the environment": "{{ self.__init__.__globals__ }}",
    "the context": "{{ self._TemplateReference__context.environment }}",
    "format with attributes": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "map with attribute": "{{ [1]|map(attribute='__class__')|list }}",
    "a generator's frame": "{% set g = (1, 2)|map('string') %}{{ g.gi_frame.f_back }}",
    "changing a message": "{{ messages.append({'role': 'user'}) }}{{ messages.__setitem__(0, 1) }}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "an include": "{% include '/etc/passwd' %}",
    "an extension": "{% debug %}",
    "do": f"{{% do {WRITE} %}}",
    "a builtin": "{{ __import__('os').system('touch LEFT') }}",
    "open": "{{ open('/etc/passwd').read() }}",
}
ENDLESS = {
    "three loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a huge range": "{{ range(10**12)|list }}",
    "a macro of itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a recursive loop": "{% for a in [[]] recursive %}{{ loop([[]]) }}{% endfor %}",
    "a power": "{{ 10**10**8 }}",
    "sorting a long text": "{{ ('ab' * 10**8)|list|sort|length }}",
}  # fmt: skip
LARGE = {
    "a product": "{{ 'a' * 10**10 }}",
    "a list": "{{ [0] * 10**10 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "replacing": "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
    "a wide format": "{{ '%10000000000d'|format(1) }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "centring": "{{ 'a'|center(10**10) }}",
    "indenting": "{{ messages|tojson(indent=10**10) }}",
    "joining": "{{ range(99999)|map('string')|join('x' * 10**6) }}",
    "a long answer": "{{ 'a' * 10**8 }}",
}  # fmt: skip
BROKEN = {
    "no end": "{% for m in messages %}",
    "another layout": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
    "nothing": "",
    "an unknown filter": "{{ messages|nothing }}",
    "an exception": "{{ raise_exception('no') }}",
}


def is_refused(template: str, codes: tuple[int, ...], folder: Path) -> None:
    """Exit 2 with one message, in seconds, without much memory; nothing was run, nothing shown.

    Where 0 is allowed the attempt may also come to nothing, which jinja writes as no text.
    """
    from finetune.data.chat import sandbox

    sandbox.SECONDS = SECONDS
    model = Path(shutil.copytree(tokenizer_folder(), folder / "model"))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, said = command("data", "tokens", folder / "rows.jsonl", "--model", model)
    assert "Traceback" not in said, said[-1500:]
    assert code in codes, (code, said[-500:])
    assert code == 0 or "chat template" in said, said[-500:]
    assert not any(
        f"<{what}" in said for what in ("class", "module", "function", "built-in", "frame")
    )
    assert time.monotonic() - began < 30
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEMORY_MB
    assert not Path("LEFT").exists()
    assert not (folder / "LEFT").exists()


def is_contained(template: str, codes: tuple[int, ...], folder: Path) -> None:
    """The same behind a whole template, so that only the attempt is what fails."""
    import os

    import tiny

    os.chdir(folder)
    is_refused(tiny.CHAT_TEMPLATE + template, codes, folder)


def a_dead_process_is_replaced(folder: Path) -> None:
    """A renderer that was killed from outside is started again."""
    import tiny

    from finetune.data.chat.sandbox import RefusedError, Sandbox

    renderer = Sandbox(tiny.CHAT_TEMPLATE)
    values = {"messages": [{"role": "user", "content": "q"}]}
    said = renderer.render(values)
    assert renderer._process is not None
    renderer._process.kill()
    renderer._process.wait()
    refused = False
    try:
        renderer.render(values)
    except RefusedError:
        refused = True
    assert refused
    assert renderer.render(values) == said


def cases() -> Iterator[Case]:
    """Every attempt."""
    tokenizer_folder()
    for name, template in ESCAPES.items():
        yield Case(f"templates: out by {name}", partial(is_contained, template, (0, 2)))
    for name, template in {**ENDLESS, **LARGE}.items():
        yield Case(f"templates: {name}", partial(is_contained, template, (2,)))
    for name, template in BROKEN.items():
        yield Case(f"templates: {name}", partial(is_refused, template, (2,)))
    yield Case("templates: a renderer that was killed", a_dead_process_is_replaced)
