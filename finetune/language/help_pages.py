"""Help pages and usage errors in the user's language."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from finetune.language import language, sentence, width, word


def translate(command: Any) -> None:
    """Puts the help of a command, its options and inner commands into the user's language."""
    context = command.context_class
    english = getattr(context.formatter_class, "english", context.formatter_class)
    context.formatter_class = english if language() == "en" else _chinese(english)
    if language() == "en":
        return
    for each in _all_in(command):
        if each.help:
            each.help = word(each.help)
            each.short_help = each.help.partition("\n")[0]
        if each.epilog:
            each.epilog = word(each.epilog)
        for parameter in each.params:
            if getattr(parameter, "help", None):
                parameter.help = sentence(parameter.help)


def usage_error(error: Any) -> str:
    """What is wrong with a command line, as the program says it: the usage, and the error."""
    lines = []
    if error.ctx is not None:
        lines.append(error.ctx.get_usage())
        lines.append(sentence(f"Try '{error.ctx.command_path} --help' for help."))
    return "\n".join([*lines, "", word("Error: {}").format(sentence(error.format_message()))])


def _all_in(command: Any) -> Iterator[Any]:
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from _all_in(inner)


def _chinese(formatter: type) -> type:
    """The writer of help pages, for lines whose characters take two columns."""

    class Formatter(formatter):
        english = formatter

        def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
            super().write_usage(prog, args, word("Usage: {}").replace("{}", " "))

        def write_heading(self, heading: str) -> None:
            super().write_heading(word(heading))

        def write_dl(self, rows: Sequence[tuple[str, str]], *rest: Any, **named: Any) -> None:
            column = min(max((width(term) for term, _ in rows), default=0), 32) + 2
            indent = " " * self.current_indent
            for term, said in rows:
                lines = wrapped(_extras(word(said)), self.width - self.current_indent - column)
                first = f"{term}{' ' * (column - width(term))}" if width(term) < column else ""
                if not first:
                    self.write(f"{indent}{term}\n")
                for line in lines or [""]:
                    self.write(f"{indent}{first or ' ' * column}{line}".rstrip() + "\n")
                    first = ""

    return Formatter


def _extras(text: str) -> str:
    """What the library puts behind an option's help."""
    found = re.sub(r"\[default: ", f"[{word('default: {default}').partition('{')[0]}", text)
    return re.sub(r"\brequired\]$", f"{word('required')}]", found)


def wrapped(text: str, columns: int) -> list[str]:
    """The text in lines of at most so many columns, cut between words or Chinese characters."""
    lines, line = [], ""
    for piece in re.findall(r"\s+|[\u2e80-\uffef]|[^\s\u2e80-\uffef]+", " ".join(text.split())):
        if line and width(line) + width(piece) > columns and piece not in "，。；：、）":
            lines.append(line.rstrip())
            line = ""
        line += piece if line or piece.strip() else ""
    return [*lines, line.rstrip()] if line.strip() else lines
