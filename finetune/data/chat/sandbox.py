"""Renders a chat template in a process of its own, with limits on time and memory.

A template comes from a model folder and is a program: jinja's sandbox keeps it away from Python's
internals, but not from loops without end or a string of 10 GB. This file is both sides. As a program
it reads one JSON request a line (the first is the template) and answers in one line; it imports
jinja2 only, may write no file and dies with its owner.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

SECONDS = 10.0
"""For one rendering; a large list of tools takes milliseconds."""
MEMORY = 1 << 30
"""Bytes of the process's address space; Python and jinja take a tenth of it."""
LONGEST = 16 << 20
"""Characters of an answer."""


class RefusedError(Exception):
    """The template cannot be rendered; the text says why."""


class Sandbox:
    """One template, ready to be rendered; its process starts when it is first needed."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._owner = 0
        self._process: subprocess.Popen[str] | None = None

    def render(self, values: dict[str, Any]) -> str:
        """The template with these variables, which must be JSON; RefusedError otherwise."""
        with self._lock:
            if self._process is None or self._owner != os.getpid():  # a fork has its parent's
                self._start()
            return self._ask(values)

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C and torchrun signal the whole group; it ends with its pipe
        )
        self._process, self._owner = process, os.getpid()
        weakref.finalize(self, _end, process, self._owner)
        self._ask(self._source)

    def _ask(self, request: Any) -> str:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            in_time, _, _ = select.select([process.stdout], [], [], SECONDS)
            line = process.stdout.readline(LONGEST) if in_time else ""
        except BrokenPipeError:
            in_time, line = [process.stdout], ""
        if not line.endswith("\n"):
            self._process = None
            _end(process, self._owner)
            raise RefusedError(
                "its process ended without an answer"
                if in_time
                else f"it takes longer than {SECONDS:g} s"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RefusedError(str(answer["error"]))
        return str(answer["text"])


def _end(process: subprocess.Popen[str], owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        # Closes its pipes, of which one may hold a request that nobody reads, and waits for it.
        with suppress(BrokenPipeError), process:
            pass


# --- the other side ------------------------------------------------------------------------------


def main() -> None:
    """Answers until the owner is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if isinstance(request, str):
                template, text = compiled(request), ""
            else:
                text = template.render(**request)
            answer = {"text": text}
            if len(text) > LONGEST // 8:
                answer = {"error": f"it writes {len(text):,} characters"}
        except Exception as error:  # whatever a template does, it is told
            answer = {"error": reason(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def reason(error: Exception) -> str:
    """What the template did, in words."""
    import jinja2

    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"it is not valid jinja: line {error.lineno}: {error}"
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY >> 20} MiB"
    if isinstance(error, jinja2.TemplateError):
        return str(error)
    return f"{type(error).__name__}: {error}"[:500]


def compiled(source: str) -> Any:
    """The template in jinja's immutable sandbox, with what transformers gives its templates."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks replies: renders what is inside."""

        tags = {"generation"}  # noqa: RUF012 (jinja declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse_private(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace takes no name with an underscore in front: {name!r}")

    class PublicNamespace(Namespace):
        """jinja's namespace without underscore names: they could reach Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # a template may pass `self=`
            names = dict(*args[1:], **kwargs)
            for name in names:
                refuse_private(name)
            Namespace.__init__(args[0], names)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_private(name)
            Namespace.__setitem__(self, name, value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["namespace"] = PublicNamespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)  # not the type
    return environment.from_string(source)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates write it: jinja's own filter would escape HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: str) -> NoReturn:
    """What a template calls to refuse a dialogue."""
    import jinja2

    raise jinja2.TemplateError(message)


if __name__ == "__main__":
    main()
