"""Strategies as text: ``"er + lwf(alpha=2)"``.

The grammar is names, ``+``, parentheses and literal options; text is parsed, never executed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import Any

from clframe.core.component import Component
from clframe.core.compose import Composition, compose
from clframe.core.options import check_options
from clframe.errors import ClframeError, ConfigError
from clframe.registry import Registry


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


COMPONENTS: Registry[type[Component]] = Registry(
    "component", group="clframe.components", load=_load_components
)
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
    options = options or {}
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(
            f"strategy: cannot read {text!r}; write component names joined by '+', such as "
            f"'er + lwf(alpha=2)'"
        ) from None
    return compose(*(_build(node, text, options) for node in _terms(tree, text)))


def _terms(tree: ast.expr, text: str) -> Iterator[ast.expr]:
    """The leaves of a sum, left to right; iterative, so that no length of text can exhaust the stack."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.BinOp):
            if not isinstance(node.op, ast.Add):
                raise ConfigError(f"strategy: {text!r} joins components by something else than '+'; use '+'")
            stack += [node.right, node.left]
        else:
            yield node


def _build(node: ast.expr, text: str, options: Mapping[str, Mapping[str, Any]]) -> Component:
    if isinstance(node, ast.Name):
        name, inline = node.id, {}
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name, inline = node.func.id, _inline_options(node, text)
    else:
        raise ConfigError(
            f"strategy: {ast.unparse(node)!r} is no component; write a name, or a name with options such as "
            f"'lwf(alpha=2)'"
        )
    component = COMPONENTS.get(name, where="strategy")
    where = f"components.{name}"
    given = {
        **check_options(component, options.get(name, {}), where=where),
        **check_options(component, inline, where=where),
    }
    return component(**given)


def _inline_options(node: ast.Call, text: str) -> dict[str, Any]:
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ConfigError(
            f"strategy: {ast.unparse(node)!r} gives an option without a name; write option=value"
        )
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        assert keyword.arg is not None
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            raise ConfigError(
                f"strategy: option {keyword.arg}={ast.unparse(keyword.value)} in {text!r} is no plain value; "
                f"give a number, text in quotes, True, False, None or a list"
            ) from None
    return options
