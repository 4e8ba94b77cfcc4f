"""A server on this machine in the place of those that publish data sets."""

from __future__ import annotations

import pytest
from published_sets import Server


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.close()
