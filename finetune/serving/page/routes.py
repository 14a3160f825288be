"""Where the page is found, and what it asks for besides replies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from finetune.serving.page.html import PageOptions, make_page
from finetune.serving.page.saved import Saves, told_tokens
from finetune.serving.requests.body import read_body
from finetune.serving.requests.chat import image_folder
from finetune.serving.requests.rules import RequestRules


def add_page(
    app: FastAPI,
    models: Mapping[str, RequestRules],
    options: PageOptions,
    *,
    needs_key: bool,
    body_bytes: int,
) -> None:
    """Puts the page at `/`; it needs no key, what it asks for does."""
    page = make_page(options, needs_key=needs_key)

    @app.get("/")
    async def opened() -> Response:
        return HTMLResponse(page.text, headers=dict(page.headers))

    @app.post("/page/tokens")
    async def tokens(request: Request) -> dict[str, Any]:
        body = await read_body(request, body_bytes)
        with image_folder() as folder:
            return await asyncio.to_thread(told_tokens, body, models, Path(folder))

    if options.folder is None:
        return
    saves = Saves(options.folder, models)
    saving = asyncio.Lock()

    @app.post("/page/votes")
    async def votes(request: Request) -> dict[str, Any]:
        body = await read_body(request, body_bytes)
        async with saving:
            return await asyncio.to_thread(saves.vote, body)

    @app.post("/page/rows")
    async def rows(request: Request) -> dict[str, Any]:
        body = await read_body(request, body_bytes)
        async with saving:
            return await asyncio.to_thread(saves.row, body)
