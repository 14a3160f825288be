"""The Chinese catalogue: `python scripts/docs/messages.py` gathers what it has to say.

Messages are collected from the code (what is raised, warned and collected as a problem), help texts from the
commands, descriptions of options from the schema. New ones are added to `finetune.po` without a translation,
those that the code no longer has are dropped. `--check` changes nothing and names what is missing, exit code 1.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

CATALOGUE = ROOT / "finetune/language/zh/LC_MESSAGES/finetune.po"
NOT_FOR_THE_TERMINAL = {  # for clients of the endpoint, or caught by ourselves
    "ApiError", "RefusedError", "SecurityError", "bad_request", "IndexError", "RuntimeError", "TypeError",
    "ModuleNotFoundError", "AttributeError", "NotImplementedError", "StopIteration",
}  # fmt: skip
NO_MESSAGES = re.compile(  # texts with words that are data all the same
    r"\{\} is \{\}$|thought\[|text: |call: |# Every option of the run|[{}\s/%x×:.,;()\[\]'\"-]*$|hf download|modelscope download| --repo-type"
)
WITH_CONSTANTS = [  # modules whose tables hold parts of messages
    "artifacts/adapter.py", "cli/floors.py", "config/extras.py", "config/problems.py", "data/dialogue/keys.py",
    "data/dialogue/strict_json.py", "data/reading/streams.py", "storage/files.py", "training/resume.py",
]  # fmt: skip
ALL_OF_IT = re.compile(  # modules whose every text is a message or a part of one, but for what is said in passing
    r"config/(load|problems|rules|yaml_text|extras)|cli/(__init__|inputs)|data/(reading|dialogue/messages|chat/template)|"
    r"data/(dialogue/formats|examples/preparation)|artifacts/|storage/|export/(folder|merge|push|convert_adapter)|models/load|"
    r"models/chatglm/configuration|distributed/watchdog|report/(requirements|sentences|page\.py)|training/(deepspeed|callbacks|resume)|generation/(generate|load)"
)
OF_ANY_LENGTH = re.compile(r"report/(sentences|page\.py)")
"""Modules whose messages may be of one word, such as `2 models`."""
IN_PASSING = re.compile(r"(console\.(say|table|progress)|logger\.\w+|Card|warnings\.\w+)$")
OF_TYPER = [  # typer's own words, some of which it looks up with gettext itself
    "Usage: {}", "Error: {}", "error: ", "warning: ", "Options", "Arguments", "Commands", "required", "default: {default}", "Show this message and exit.",
    "No such option: {}", "No such option: {} Did you mean {}?", "No such command {}.", "No such command {}. Did you mean {}?", "No such option: {} (Possible options: {})", "Missing command.",
    "Missing argument {}.", "Missing option {}.", "Invalid value: {}", "Invalid value for {}: {}", "Option {} requires an argument.", "Got unexpected extra argument(s) ({})",
    "Got unexpected extra argument ({})", "Got unexpected extra arguments ({})",
    "greater than {}", "at least {}", "less than {}", "at most {}", "Input should be greater than or equal to {}",
    "Input should be less than or equal to {}", "Input should be {}", "a valid integer, unable to parse string as an integer",
    "a valid number, unable to parse string as a number", "{} is not one of {}.", "{} is not a valid integer.", "{} is not a valid float.", "{} is not in the range {}.",
    "Try '{}' for help.", "The layout of the rows: {}.",
]  # fmt: skip


def main() -> None:
    """Brings the catalogue up to date, or says what it lacks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="Change nothing; exit code 1 when something is missing.")  # fmt: skip
    asked = parser.parse_args()
    from babel.messages import pofile

    with CATALOGUE.open("rb") as file:
        old = pofile.read_po(file, locale="zh")
    new = catalogue({str(message.id): str(message.string) for message in old if message.id})
    missing = [str(message.id) for message in new if message.id and not message.string]
    if not asked.check:
        CATALOGUE.write_bytes(written(new))
    for text in missing:
        print(f"not translated: {text!r}")
    print(f"{len(new)} texts, {len(missing)} not translated")
    sys.exit(bool(missing) and asked.check)


def catalogue(translations: dict[str, str]) -> Any:
    """Every text of the program with its places, translated where `translations` has it."""
    from babel.messages import Catalog

    made = Catalog(
        locale="zh", project="glm4-finetune", fuzzy=False, charset="utf-8",
        header_comment="# The Chinese texts of the command line. Made up to date by scripts/docs/messages.py.",
    )  # fmt: skip
    for text, places in texts().items():
        made.add(text, translations.get(text, ""), locations=[(place, None) for place in sorted(set(places))])  # fmt: skip
    return made


def written(made: Any) -> bytes:
    """The catalogue as a .po file, without the times of its making."""
    from babel.messages import pofile

    file = io.BytesIO()
    pofile.write_po(file, made, width=0, omit_header=False)
    return re.sub(rb'"(POT-Creation-Date|PO-Revision-Date|Generated-By)[^\n]*\n', b"", file.getvalue())  # fmt: skip


def texts() -> dict[str, list[str]]:
    """What there is to say -> the modules that say it."""
    found: dict[str, list[str]] = {}
    for text, place in (*messages(), *page_texts(), *help_texts(), *options()):
        found.setdefault(text, []).append(place)
    for text in OF_TYPER:
        found.setdefault(text, []).append("typer")
    return found


def messages() -> Iterator[tuple[str, str]]:
    """Every message of the code as a template, `{}` where a value goes, with its module."""
    for path in sorted((ROOT / "finetune").rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if place.removeprefix("finetune/") in WITH_CONSTANTS:
            tables = [
                line.value
                for line in tree.body
                if isinstance(line, ast.Assign | ast.AnnAssign) and line.value
            ]
            for node in (node for table in tables for node in ast.walk(table)):
                if (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and is_message(node.value)
                ):
                    yield node.value, place
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                name = place.removeprefix("finetune/")
                fewest = 1 if OF_ANY_LENGTH.match(name) else 3 if ALL_OF_IT.match(name) else 0
                for text in (*_said_in(function), *(_all_in(function, fewest) if fewest else ())):
                    if is_message(text):
                        yield text.strip(), place


def page_texts() -> Iterator[tuple[str, str]]:
    """The texts of the pages and of the report's exports, which stand in calls of `t` and `word`."""
    folder = ROOT / "finetune/report"
    for path in sorted(
        [*folder.glob("assets/*.html"), *folder.glob("assets/*.js"), *folder.glob("*.py")]
    ):
        text = path.read_text(encoding="utf-8")
        for found in re.findall(r"""\bt\("([^"]+)"\)|\bword\(["']([^"']+)["']\)""", text):
            yield "".join(found), path.relative_to(ROOT).as_posix()
    from finetune.serving.page.html import words

    for text in words():
        yield text, "finetune/serving/page"


def is_message(text: str) -> bool:
    """True for a sentence or a part of one."""
    words = re.findall(r"[A-Za-z]{2,}", text.replace("{}", ""))
    return bool(words) and " " in text.strip() and not NO_MESSAGES.match(text)


def _said_in(function: ast.FunctionDef) -> Iterator[str]:
    returns_text = function.returns is not None and "str" in ast.unparse(function.returns)
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if ast.unparse(node.exc.func).split(".")[-1] not in NOT_FOR_THE_TERMINAL:
                yield from _texts_of(node.exc.args[0], function)
        elif isinstance(node, ast.Call):
            for part in _message_of_call(node):
                yield from _texts_of(part, function)
        elif isinstance(node, ast.Yield | ast.Return) and node.value is not None:
            long = (template(node.value) or "").count(" ") > 2
            if long and (returns_text or isinstance(node, ast.Yield)):
                yield from _texts_of(node.value, function)


def _message_of_call(node: ast.Call) -> list[ast.expr]:
    """What a call says: a warning, a finding, or a problem that is collected with others."""
    called = ast.unparse(node.func)
    if called == "Finding":
        return node.args
    if called in ("console.warn", "console.warn_once"):
        return node.args[:1]
    collects = called.endswith((".append", ".problem")) and node.args
    return node.args[-1:] if collects and " " in (template(node.args[-1]) or "") else []


def _all_in(node: ast.AST, fewest: int) -> Iterator[str]:
    """Every text of so many words or more below a node, but for docstrings and what is said in passing."""
    for child in ast.iter_child_nodes(node):
        found = template(child) if isinstance(child, ast.expr) else None
        if found is not None and len(re.findall(r"[a-z]{2,}", found.replace("{}", ""))) >= fewest:
            yield found
        passing = isinstance(child, ast.Call) and IN_PASSING.search(ast.unparse(child.func))
        docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        if not passing and not docstring and found is None:
            yield from _all_in(child, fewest)
        elif found is not None:
            for part in ast.walk(child):
                if isinstance(part, ast.FormattedValue):
                    yield from _all_in(part, fewest)


def template(node: ast.expr) -> str | None:
    """The text of a literal, an f-string or a sum of them, `{}` for each value; None for others."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)  # fmt: skip
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = template(left), template(right)
            return None if first is None and second is None else (first or "{}") + (second or "{}")
    return None


def _texts_of(node: ast.expr, function: ast.FunctionDef, depth: int = 0) -> Iterator[str]:
    """The templates that an expression may be, those inside its values too; names are followed."""
    found = template(node)
    if found is not None:
        yield found
        inner = [part.value for part in ast.walk(node) if isinstance(part, ast.FormattedValue)]
    else:
        inner = list(_parts(node, function)) if depth < 4 else []
    for part in inner:
        yield from _texts_of(part, function, depth + 1)


def _parts(node: ast.expr, function: ast.FunctionDef) -> Iterable[ast.expr]:
    match node:
        case ast.IfExp(body=body, orelse=orelse):
            return body, orelse
        case ast.BoolOp(values=values):
            return values
        case ast.Call(func=ast.Attribute(attr="join"), args=args):
            return args
        case ast.GeneratorExp(elt=each) | ast.ListComp(elt=each):
            return (each,)
        case ast.Name(id=name):
            return [
                line.value
                for line in ast.walk(function)
                if (isinstance(line, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in line.targets))
                or (isinstance(line, ast.AugAssign) and isinstance(line.target, ast.Name) and line.target.id == name)
            ]  # fmt: skip
    return ()


def help_texts() -> Iterator[tuple[str, str]]:
    """What `--help` says of every command and option."""
    import typer

    from finetune.cli.commands import app

    def walk(command: Any) -> Iterator[str]:
        yield from (text for text in (command.help, command.epilog) if text)
        yield from (p.help for p in command.params if getattr(p, "help", None) and not p.hidden)
        for inner in getattr(command, "commands", {}).values():
            yield from walk(inner)

    for text in walk(typer.main.get_command(app)):
        if not text.startswith("The layout of the rows: "):  # the names follow
            yield text, "finetune/cli"


def options() -> Iterator[tuple[str, str]]:
    """What the reference page says of every section and option."""
    from finetune.config.reference import texts as page_texts

    for text in page_texts():
        yield text, "finetune/config/schema.py"


if __name__ == "__main__":
    main()
