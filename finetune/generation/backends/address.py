"""An endpoint that speaks OpenAI's API: a body in, its answer out, asked again while it is only busy."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self
from urllib.parse import urlsplit

from finetune.errors import ConfigError, DataError

TRIES = 4
TIMEOUT = 120.0
"""Seconds until an answer."""
_FORM = re.compile(r"openai:(?P<model>[^\s]+)@(?P<url>https?://\S+)")


@dataclass(frozen=True, slots=True)
class Address:
    """A model of an endpoint."""

    model: str
    url: str
    """Of the endpoint, up to `/v1`."""
    option: str
    """Of the command line, that named it."""

    @classmethod
    def of(cls, text: str, option: str) -> Self:
        """The model that `openai:MODEL@URL` names; ConfigError when it names none."""
        found = _FORM.fullmatch(text)
        if not found or not _is_address(found["url"]):
            raise ConfigError(
                f"{option} {text!r}: write openai:MODEL@URL, such as openai:gpt-4o@https://api.openai.com/v1"
            )
        if urlsplit(found["url"]).username is not None:
            raise ConfigError(
                f"{option}: the address holds a name or a password, which is not sent; set OPENAI_API_KEY "
                "and leave it out"
            )
        return cls(found["model"], found["url"].rstrip("/"), option)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to `body` at `path`, read from JSON.

        Raises:
            DataError: It does not answer, or refuses.
        """
        request = urllib.request.Request(
            f"{self.url}/{path}",
            json.dumps({"model": self.model, **body}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"},
        )  # fmt: skip
        for attempt in range(TRIES):
            time.sleep(0.2 * 4 ** (attempt - 1) if attempt else 0)
            try:
                with _opener().open(request, timeout=TIMEOUT) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                said = error.read(300).decode("utf-8", "replace")
                problem = f"{error.code} {error.reason}: {said}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    break  # asking again would not help
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{self.option}: {self.url} does not answer ({problem}); what it answered so far is kept. See "
            "that the address is right up to /v1 and OPENAI_API_KEY is set, and give the same command again"
        )


def _is_address(url: str) -> bool:
    """Whether a URL names a host, and a port that there can be."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Prompts and the key go to the address that the user named, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        """None: the redirect is an error."""


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirects)
