"""`finetune data check | show | tokens`: what a file holds, and what training would see of it."""

from __future__ import annotations

from typing import Annotated

import typer

data_app = typer.Typer(no_args_is_help=True, help="Look at data as training would see it.")

Json = Annotated[
    bool, typer.Option("--json", help="JSON on standard output, all else on standard error.")
]
