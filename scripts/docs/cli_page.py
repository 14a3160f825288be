"""The reference page of the command line, in the language of `$FINETUNE_LANG`.

python scripts/docs/cli_page.py > docs/reference/cli.md
FINETUNE_LANG=zh python scripts/docs/cli_page.py > docs/reference/cli_zh.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from finetune.language import language
from finetune.language.help_pages import translate

WORDS = {
    "en": {
        "head": "# The command line\n\n[简体中文](cli_zh.md)\n\nMade of the commands themselves by `scripts/docs/cli_page.py`; "
        "`finetune COMMAND --help` says the same. `--debug` and `--hub NAME` may stand anywhere. What a command "
        "ends with: [exit codes](exit_codes.md).",
        "table": "| argument or option | meaning | default |",
        "required": "required",
    },
    "zh": {
        "head": "# 命令行\n\n[English](cli.md)\n\n由 `scripts/docs/cli_page.py` 从命令本身生成；`finetune COMMAND --help` 说的相同。"
        "`--debug` 和 `--hub NAME` 可写在任何位置。命令以什么结束：[退出码](exit_codes_zh.md)。",
        "table": "| 参数或选项 | 含义 | 默认 |",
        "required": "必填",
    },
}


def page() -> str:
    """The page as Markdown."""
    import typer

    from finetune.cli.commands import app

    command = typer.main.get_command(app)
    translate(command)
    words = WORDS[language()]
    return "\n".join([words["head"], *_commands(command, "finetune", words)]) + "\n"


def _commands(group: Any, path: str, words: dict[str, str]) -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        if command.hidden:
            continue
        location = f"{path} {name}"
        if hasattr(command, "commands"):
            yield from _commands(command, location, words)
            continue
        context = command.make_context(name, [], resilient_parsing=True)
        pieces = " ".join(command.collect_usage_pieces(context))
        yield f"\n## `{location}`\n\n{' '.join(command.help.split())}\n\n```text\n{location} {pieces}\n```\n"
        yield f"{words['table']}\n|---|---|---|"
        yield from (_row(each, context, words) for each in command.params if _is_shown(each))


def _is_shown(parameter: Any) -> bool:
    return not parameter.hidden and parameter.name != "help"


def _row(parameter: Any, context: Any, words: dict[str, str]) -> str:
    term = parameter.get_help_record(context)[0]
    if parameter.param_type_name == "argument":
        term = parameter.metavar or parameter.name.upper()
    default = parameter.default
    shown = f"`{default}`" if _is_value(default) else ""
    cells = [f"`{term}`", parameter.help or "", words["required"] if parameter.required else shown]
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _is_value(default: Any) -> bool:
    return default is not None and default is not False and default is not ... and not callable(default)  # fmt: skip


def main() -> None:
    """Prints it."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()  # fmt: skip
    sys.stdout.write(page())


if __name__ == "__main__":
    main()
