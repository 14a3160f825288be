"""`training.on_end`: whoever should know is told how a run ended, and a failure of that ends nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from config_text import MINIMAL

from finetune.config.load import load_config
from finetune.errors import ConfigError, SpaceError
from finetune.training.callbacks import on_end
from finetune.training.callbacks.on_end import told_at_the_end

WRITES = "import os, sys; open(sys.argv[1], 'w').write(os.environ['FINETUNE_RUN'] + ' ' + os.environ['FINETUNE_EXIT_CODE'])"


def command(target: Path) -> str:
    return f'{sys.executable} -c "{WRITES}" "{target}"'


@pytest.mark.parametrize(
    ("ending", "code"),
    [(None, 0), (SystemExit(143), 143), (SystemExit("text"), 1), (SpaceError("full"), 6), (KeyboardInterrupt(), 130), (ValueError(), 1)],
)  # fmt: skip
def test_the_command_learns_the_run_and_its_exit_code(
    ending: BaseException | None, code: int, tmp_path: Path
) -> None:
    target = tmp_path / "it's said; really"
    try:
        with told_at_the_end(command(target), "runs/x"):
            if ending is not None:
                raise ending
    except BaseException as error:
        assert error is ending  # noqa: PT017 - any of them must come through
    assert target.read_text() == f"runs/x {code}"


@pytest.mark.parametrize(
    ("failing", "said"),
    [("/no/such/program", "No such file"), (f"{sys.executable} -c 'raise SystemExit(3)'", "ended with 3"), ("false", "ended with 1")],
)  # fmt: skip
def test_a_command_that_fails_is_a_warning(
    failing: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with told_at_the_end(failing, "runs/x"):
        pass
    warned = capfd.readouterr().err
    assert warned.startswith(f"warning: training.on_end: {failing}: ")
    assert said in warned


def test_a_command_that_does_not_end_is_ended(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_end, "SECONDS", 0.2)
    with told_at_the_end("sleep 60", "runs/x"):
        pass
    assert "timed out" in capfd.readouterr().err


def test_the_command_has_the_users_environment_and_nothing_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_USER", "kept")
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(os.environ['OF_THE_USER'] + sys.stdin.read())"
    )
    with told_at_the_end(f'{sys.executable} -c "{code}" {tmp_path / "said"}', "runs/x"):
        pass
    assert (tmp_path / "said").read_text() == "kept"
    # Longer than a push notice over a slow line, shorter than a scheduler waits behind SIGTERM.
    assert 30 <= on_end.SECONDS <= 120


def test_only_the_leading_process_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with told_at_the_end(command(tmp_path / "said"), "runs/x"):
        pass
    assert not (tmp_path / "said").exists()


def test_a_command_with_an_open_quote_is_refused_with_the_config(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(MINIMAL + "  on_end: mail 'done\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"training\.on_end: is no command line \(No closing"):
        load_config(path)
