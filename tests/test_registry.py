"""Registries: packages of others that are broken are reported and take nothing else down."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from clframe import registry as registry_module
from clframe.errors import ClframeError, ConfigError, UnknownNameError
from clframe.registry import Registry, call_problem


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


def net(input_shape, *, width: int = 8, mode: str):
    """A function as a backbone is one."""


@pytest.mark.parametrize(
    "entry, problem",
    [
        (net, ""),
        (lambda input_shape, *, width: 0, "option 'width' has no annotation; write its type, such as width: int = 8"),
        (lambda input_shape, width=8: 0, "found the signature <lambda>(input_shape, width=8); expected (input_shape)"),
        (lambda: 0, "found the signature <lambda>(); expected (input_shape)"),
        (lambda one, two: 0, "found the signature <lambda>(one, two); expected (input_shape)"),
        (7, "found 7, which is not a function; expected (input_shape)"),
        (dict, ""),  # a built-in without a signature that Python knows
    ],
)
def test_what_cannot_be_called_from_a_config(entry, problem):
    assert call_problem(entry, ("input_shape",), expected="(input_shape)") == problem


def test_an_unusable_entry_is_refused_from_a_script_and_reported_of_a_package(monkeypatch):
    points = [SimpleNamespace(name="odd", value="package:odd", load=lambda: 7)]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points)
    found: Registry[int] = Registry(
        "shape", group="shapes", load=lambda point: iter([(point.name, point.load())]),
        problem=lambda entry: f"found {entry}; expected an even number" if entry % 2 else "",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^shape 'three': found 3; expected an even number$"):
        found.add("three", 3)
    found.add("four", 4)
    assert found.names() == ("four",)
    assert found.not_loaded == ("entry point odd = package:odd (found 7; expected an even number)",)


def _run_cell(found: Registry[Any], name: str, source: str) -> Any:
    """Run the text of a notebook's cell that defines ``entry``, and register that."""
    cell: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), cell)
    found.add(name, cell["entry"])
    return cell["entry"]


CELLS = {
    "class": "class Mine:\n    pass\nentry = Mine",
    "function": "def entry(x):\n    return x",
    "partial": "import functools\ndef f(x):\n    return x\nentry = functools.partial(f, 2)",
    "metric": "from clframe.metrics import Metric\nentry = Metric(label='x', score=lambda found: 0.0)",
}


@pytest.mark.parametrize("source", CELLS.values(), ids=list(CELLS))
def test_a_second_run_of_a_cell_replaces_what_the_first_has_registered(source):
    found: Registry[Any] = Registry("shape")
    first = _run_cell(found, "mine", source)
    second = _run_cell(found, "mine", source)
    assert first is not second and found.get("mine") is second and found.names() == ("mine",)


@pytest.mark.parametrize(
    "source, origin",
    [
        (CELLS["class"].replace("Mine", "Other"), "__main__.Other"),
        (CELLS["function"].replace("entry(x)", "f(x)") + "\nentry = f", "__main__.f"),
        (CELLS["metric"].replace("score=lambda found: 0.0", "score=max"), "builtins.max"),
        ("entry = 7", "7"),
    ],
)
def test_another_entry_of_a_name_is_refused_and_both_are_named(source, origin):
    found: Registry[Any] = Registry("shape")
    _run_cell(found, "mine", CELLS["class"])
    expected = f"shape 'mine': registered twice, by __main__.Mine and {origin}; rename one of them"
    with pytest.raises(ClframeError, match=f"^{re.escape(expected)}$"):
        _run_cell(found, "mine", source)
