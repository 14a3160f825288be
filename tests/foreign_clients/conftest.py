"""The addresses of the two endpoints of `server.py`."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def random() -> str:
    """The base URL of a tiny random model."""
    return os.environ["CLIENTS_RANDOM"] + "/v1"


@pytest.fixture(scope="session")
def obedient() -> str:
    """The base URL of a model that calls the first function and answers when it has the result."""
    return os.environ["CLIENTS_OBEDIENT"] + "/v1"
