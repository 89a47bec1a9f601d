"""Fixtures for the judge's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rewards.judge import Chat
from tests.rewards.judge.server import Script, Server


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no proxy, and short waits before retries."""
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("rewards.judge.client.FIRST_WAIT_S", 0.01)


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Server]]:
    """Start scripted servers; they are closed after the test."""
    servers: list[Server] = []

    def start(script: Script) -> Server:
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def chat() -> Callable[..., Chat]:
    """A client of a server, in haste."""

    def build(server: Server, **options: Any) -> Chat:
        return Chat("m", server.url, **{"timeout": 5.0, "retries": 2, **options})

    return build
