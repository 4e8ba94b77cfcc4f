"""Strategies as text: ``"er + lwf(alpha=2)"``.

The grammar is names, ``+``, parentheses and literal options; text is parsed, never executed.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import Any

from clframe.core.component import Component, Composition, compose
from clframe.errors import ClframeError, ConfigError
from clframe.options import check_options
from clframe.registry import Registry

LONGEST = 2000
"""Characters of an expression: more than anybody writes, too few to exhaust the parser's stack."""


def _load_components(point: EntryPoint) -> Iterator[tuple[str, type[Component]]]:
    try:
        loaded = point.load()
    except AttributeError as error:
        # Another package called like ours (a folder in the working directory, say) came first.
        module = __import__(point.module)
        raise ClframeError(
            f"entry point clframe.components '{point.name}': the package '{point.module}' found at "
            f"{getattr(module, '__file__', None) or list(module.__path__)} has no '{point.attr}'; it shadows "
            f"the one that was installed: rename it or start from another folder"
        ) from error
    classes = loaded if isinstance(loaded, (tuple, list)) else (loaded,)
    for entry in classes:
        if not (isinstance(entry, type) and issubclass(entry, Component)):
            raise TypeError(f"{entry!r} is not a Component class")
        yield entry.name, entry


COMPONENTS: Registry[type[Component]] = Registry("component", group="clframe.components", load=_load_components)
"""Every component by name, found through the entry-point group ``clframe.components``."""


def register(component: type[Component]) -> type[Component]:
    """Make a component class of a script or notebook known by its name; usable as a decorator."""
    COMPONENTS.add(component.name, component)
    return component


def parse(text: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> Composition:
    """The strategy that ``text`` names.

    Args:
        text: Component names joined by ``+``, each with literal options in parentheses if wanted.
        options: Options by component name, as the config block ``components:`` holds them; options in
            the text win.

    Raises:
        ConfigError: The text is no such expression, or an option is unknown or mistyped.
        UnknownNameError: No such component; the message has the nearest name.
        ComposeError: The components cannot stand together.

    >>> str(parse("lwf(alpha=2) + er"))
    'er + lwf'
    """
    text, options = text.strip(), options or {}
    if len(text) > LONGEST:
        raise ConfigError(f"strategy: found {len(text):,} characters; give at most {LONGEST:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a compiler thinks of text that is never run
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(
            f"strategy: cannot read {_quoted(text)}; write component names joined by '+', such as 'er + lwf(alpha=2)'"
        ) from None
    return compose(*(_build(node, text, options) for node in _terms(tree, text)))


def _terms(tree: ast.expr, text: str) -> Iterator[ast.expr]:
    """The leaves of a sum, left to right; iterative, so that no number of terms can exhaust the stack."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.BinOp):
            if not isinstance(node.op, ast.Add):
                raise ConfigError(f"strategy: {_quoted(text)} joins components by something else than '+'; use '+'")
            stack += [node.right, node.left]
        else:
            yield node


def _build(node: ast.expr, text: str, options: Mapping[str, Mapping[str, Any]]) -> Component:
    named = node.func if isinstance(node, ast.Call) else node
    if not isinstance(named, ast.Name):
        raise ConfigError(
            f"strategy: {_source(node, text)} is no component; write a name, or a name with options such as "
            f"'lwf(alpha=2)'"
        )
    name, where = named.id, f"components.{named.id}"
    component = COMPONENTS.get(name, where="strategy")
    inline = _inline_options(node, text) if isinstance(node, ast.Call) else {}
    return component(**check_options(component, {**options.get(name, {}), **inline}, where=where))


def _inline_options(node: ast.Call, text: str) -> dict[str, Any]:
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ConfigError(f"strategy: {_source(node, text)} gives an option without a name; write it as option=value")
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        assert keyword.arg is not None
        if keyword.arg in options:
            raise ConfigError(f"strategy: {_source(node, text)} gives '{keyword.arg}' twice; give it once")
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise ConfigError(
                f"strategy: {_source(keyword.value, text)} is no plain value for {keyword.arg}; give a "
                f"number, text in quotes, True, False, None or a list"
            ) from None
    return options


def _source(node: ast.expr, text: str) -> str:
    """The part of ``text`` that a node stands for; unlike ``ast.unparse`` it takes any depth."""
    return _quoted(ast.get_source_segment(text, node) or "")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:75]} ...")
