"""Registries: packages of others that are broken are reported and take nothing else down."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from clframe import registry as registry_module
from clframe.errors import UnknownNameError
from clframe.registry import Registry


def exits():
    raise SystemExit(3)


def fails():
    raise ImportError("no module\nof that name")


def test_an_entry_point_that_exits_or_fails_on_import_is_reported(monkeypatch):
    points = [
        SimpleNamespace(name="a", value="quits", load=exits),
        SimpleNamespace(name="b", value="fails", load=fails),
        SimpleNamespace(name="c", value="works", load=lambda: 7),
    ]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points)
    found: Registry[int] = Registry("shape", group="shapes", load=lambda point: iter([(point.name, point.load())]))
    assert found.names() == ("c",)
    assert found.not_loaded == (
        "entry point a = quits (exits with 3 when it is imported)",
        "entry point b = fails (no module of that name)",
    )
    with pytest.raises(UnknownNameError, match="not loaded: entry point a = quits"):
        found.get("a")


def test_an_interruption_while_loading_is_not_swallowed(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(
        registry_module, "entry_points", lambda group: [SimpleNamespace(name="a", value="a", load=interrupted)]
    )
    found: Registry[int] = Registry("shape", group="shapes", load=lambda point: iter([(point.name, point.load())]))
    with pytest.raises(KeyboardInterrupt):
        found.names()
