"""The command line: `main` runs a command and turns errors into one message and an exit code.

Nothing heavy is imported before a command needs it: `--help` and a wrong configuration answer at once.
"""

from __future__ import annotations

import hashlib
import os
import re
import resource
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import console, launcher
from finetune.errors import (
    ConfigError,
    FinetuneError,
    OutOfMemoryError,
    SpaceError,
    is_out_of_memory,
)
from finetune.language import language
from finetune.language.help_pages import translate, usage_error

_INTERRUPTED = 130
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command line; always ends in SystemExit, except for an error that is ours to fix."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    console.open_missing_streams()
    for stream in (sys.stdout, sys.stderr):  # a terminal without Chinese shows \u4f60, no crash
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(_with_hub([word for word in words if word != "--debug"]))
    except Exception as error:
        problem = error if isinstance(error, FinetuneError) else _explained(error)
        if problem is None:
            raise
        if debug:
            traceback.print_exc()
        elif _speaks(str(problem)):
            console.error(_without_passwords(str(problem)))
        code = problem.exit_code
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = _BROKEN_PIPE  # `finetune data tokens … | head`; typer has seen to the rest
    finally:
        console.flush_at_exit()
    sys.exit(code)


def _with_hub(words: Sequence[str]) -> list[str]:
    """The words without `--hub NAME`, which every command takes, and the choice in the environment."""
    left, rest = [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != "--hub":
            left.append(word)
            continue
        os.environ["FINETUNE_HUB"] = value if equals else next(rest, "")
    return left


def _explained(error: Exception) -> FinetuneError | None:
    """What the machine refused, as a message: memory, the disk or a path. None for an error that is ours."""
    return _out_of_memory(error) or _disk_error(error) or _path_error(error)


def _disk_error(error: Exception) -> SpaceError | None:
    from finetune.storage.disk import is_disk_error

    if not is_disk_error(error):
        return None
    location = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    said = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
    return SpaceError(
        f"{location}the disk cannot be written or read ({said}); free some space, repair it or choose "
        "another place, and give the same command again"
    )


def _path_error(error: Exception) -> ConfigError | None:
    """What the system says of a path that no check foresaw, such as an output below /proc."""
    if isinstance(error, FileNotFoundError) and error.filename is None and _is_nowhere():
        return ConfigError(
            "the working directory is not there any more; change into another one, or make it again"
        )
    if not isinstance(error, OSError) or error.filename is None:
        return None
    return ConfigError(
        f"{os.fsdecode(error.filename)}: {error.strerror}; check the path, or choose another place "
        "(--debug shows where it was met)"
    )


def _is_nowhere() -> bool:
    """Whether the working directory was removed."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _out_of_memory(error: Exception) -> OutOfMemoryError | None:
    """What a command that trains nothing can do when that is what `error` says."""
    if not is_out_of_memory(error):
        return None
    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return OutOfMemoryError(
        f"out of memory: {first[:300]}\nThe most this process has used is {peak:.2f} GB of the "
        "machine's own memory. What needs less: a smaller --batch-size, fewer --max-new-tokens, "
        "shorter rows"
    )


def _without_passwords(text: str) -> str:
    """`https://name:secret@host` without what is before the host."""
    return re.sub(r"://[^/\s@]+@", "://…@", text)


def _run(words: Sequence[str]) -> int:
    import typer

    from finetune.cli.commands import app
    from finetune.cli.setup_commands import COMPLETION

    if COMPLETION in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    command = typer.main.get_command(app)
    translate(command)
    _check_demo_command(words, getattr(command, "commands", {}))
    try:
        code = command.main(_with_command(words), prog_name="finetune", standalone_mode=False)
    except usage_error as error:
        if _speaks(str(error)):
            _write_usage_error(error)
        return 2
    except typer.Abort:
        return _INTERRUPTED
    return code if isinstance(code, int) else 0


def _write_usage_error(error: Any) -> None:
    """Says it; the library's own words in English, ours in another language."""
    if language() == "en":
        error.show()
    else:
        sys.stderr.write(usage_error(error) + "\n")


def _check_demo_command(words: Sequence[str], commands: Mapping[str, Any]) -> None:
    """Answers `finetune.py DATA MODEL CONFIG.yaml [yes]`, the original demo's command, with ours."""
    given = [word for word in words if not word.startswith("-")]
    if not 3 <= len(given) <= 4 or not given[2].endswith((".yaml", ".yml")) or "=" in given[1]:
        return
    data, model, config = given[:3]
    # A folder may have the name of a command: `finetune.py data MODEL CONFIG.yaml`.
    if data in commands and model in getattr(commands[data], "commands", {model}):
        return
    raise ConfigError(
        f"`finetune.py {' '.join(given)}` is the original demo's command. Here the configuration names "
        f"data and model; type\n  finetune migrate {config} --data {data} --model {model} --output new.yaml\n"
        "  torchrun finetune.py new.yaml\n"
        "An interrupted run goes on by the same command; yes or a step is not needed"
    )


def _with_command(words: Sequence[str]) -> list[str]:
    """The words with `train` in front when they begin with a configuration, as under torchrun."""
    first = next((word for word in words if not word.startswith("-")), "")
    is_config = first.endswith((".yaml", ".yml")) or "/" in first or "=" in first
    return ["train", *words] if is_config else list(words)


def _speaks(text: str) -> bool:
    """True in the one process that should say this; several meet the same error under torchrun.

    The first process to say it does, since torchrun may end the others before they get to it.
    Without torchrun's folder for this attempt, rank 0 speaks.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if "RANK" not in os.environ or not error_file or error_file == os.devnull:
        return console.is_rank0() or not launcher.is_launched()
    said = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]
    try:
        Path(error_file).parent.with_name(f"said-{said}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return console.is_rank0()
    return True
