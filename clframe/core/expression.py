"""Strategies as text: ``"er + lwf(alpha=2)"``.

The grammar is names, ``+``, parentheses and literal options; text is parsed, never executed.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from keyword import iskeyword
from types import NoneType
from typing import Any, Final

from clframe.core.component import Component, Composition, compose
from clframe.core.declarations import declaration_problem
from clframe.errors import ClframeError, ConfigError
from clframe.options import check_options, format_value, rename_options
from clframe.registry import Registry

LONGEST = 2000
"""Most characters of an expression: ample for any strategy, too few to exhaust the parser's stack."""


def _load_components(point: EntryPoint) -> Iterator[tuple[str, type[Component]]]:
    try:
        loaded = point.load()
    except AttributeError as error:
        # A package of the same name, such as a folder in the working directory, comes first on the path.
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


def _problem(entry: Any) -> str:
    """Return why ``entry`` cannot be a component, or an empty text."""
    if not (isinstance(entry, type) and issubclass(entry, Component)):
        return f"found {entry!r}; expected a subclass of Component"
    if not isinstance(getattr(entry, "name", None), str):
        return f"{entry.__name__} has no name; write name: ClassVar[str] = \"...\""
    if not entry.name.isidentifier() or iskeyword(entry.name):
        return "expressions cannot use this name; give letters, digits and underscores, such as my_strategy"
    fields = {field.name for field in dataclasses.fields(entry)}
    kinds = inspect.get_annotations(entry)
    missed = [option for option, kind in kinds.items() if option not in fields and "ClassVar" not in str(kind)]
    if missed:
        advice = "write @dataclass(frozen=True, kw_only=True) above it"
        return f"'{missed[0]}' of {entry.__name__} is not an option; {advice}"
    return declaration_problem(entry)


COMPONENTS: Registry[type[Component]] = Registry(
    "component", group="clframe.components", load=_load_components, problem=_problem
)
"""Every component by name, found through the entry-point group ``clframe.components``."""


def register(component: type[Component]) -> type[Component]:
    """Register a component class of a script or notebook under its name; usable as a decorator.

    Raises:
        ConfigError: A class whose options are not fields of a dataclass, or another object.
    """
    COMPONENTS.add(getattr(component, "name", getattr(component, "__name__", "?")), component)
    return component


def parse(text: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> Composition:
    """Parse ``text`` into a strategy.

    Args:
        text: Component names joined by ``+``, each optionally with literal options in parentheses.
        options: Options by component name, as in the config block ``components:``; options in the text override
            them.

    Raises:
        ConfigError: The text is not such an expression, or an option is unknown or has a wrong type.
        UnknownNameError: Unknown component; the message has the nearest name.
        ComposeError: The components cannot be composed.

    >>> str(parse("lwf(alpha=2) + er"))
    'er + lwf'
    """
    if not isinstance(text, str):
        raise ConfigError(f"strategy: found {format_value(text)}; give text such as 'er + lwf(alpha=2)'")
    by_name = isinstance(options, (Mapping, NoneType))
    if not by_name or not all(isinstance(given, Mapping) for given in (options or {}).values()):
        raise ConfigError(
            f"components: found {format_value(options)}; give options by component, such as {{'er': {{'memory': 50}}}}"
        )
    text, options = text.strip(), options or {}
    if len(text) > LONGEST:
        raise ConfigError(f"strategy: found {len(text):,} characters; give at most {LONGEST:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the text is never run, so warnings of the compiler do not apply
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(
            f"strategy: cannot read {_quoted(text)}; write component names joined by '+', such as 'er + lwf(alpha=2)'"
        ) from None
    return compose(*(_build(node, text, options) for node in _terms(tree, text)))


def _terms(tree: ast.expr, text: str) -> Iterator[ast.expr]:
    """Iterate over the terms of a sum, left to right, without recursion: many terms would exhaust the stack."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.BinOp):
            if not isinstance(node.op, ast.Add):
                raise ConfigError(f"strategy: {_quoted(text)} joins components by an operator other than '+'; use '+'")
            stack += [node.right, node.left]
        else:
            yield node


def _build(node: ast.expr, text: str, options: Mapping[str, Mapping[str, Any]]) -> Component:
    named = node.func if isinstance(node, ast.Call) else node
    if not isinstance(named, ast.Name):
        raise ConfigError(
            f"strategy: {_source(node, text)} is not a component; write a name, or a name with options such as "
            f"'lwf(alpha=2)'"
        )
    name, where = named.id, f"components.{named.id}"
    component = COMPONENTS.get(name, where="strategy")
    inline = _inline_options(node, text) if isinstance(node, ast.Call) else {}
    merged = {
        key: value
        for part in (options.get(name, {}), inline)  # renamed before they are merged: inline options win
        for key, value in rename_options(part, component.renamed, where=where).items()
    }
    return component(**check_options(component, merged, where=where))


def _inline_options(node: ast.Call, text: str) -> dict[str, Any]:
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ConfigError(f"strategy: {_source(node, text)} has an option without a name; write it as option=value")
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        assert keyword.arg is not None
        if keyword.arg in options:
            raise ConfigError(f"strategy: {_source(node, text)} has '{keyword.arg}' twice; remove one")
        try:
            options[keyword.arg] = ast.literal_eval(_YAMLWords().visit(keyword.value))
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise ConfigError(
                f"strategy: {_source(keyword.value, text)} is not a plain value for {keyword.arg}; use a "
                f"number, text, true, false, null or a list"
            ) from None
    return options


_YAML_WORDS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "null": None}


class _YAMLWords(ast.NodeTransformer):
    """Replaces bare words by their meaning in YAML, so that options read as in a config: ``true``, ``herding``."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.copy_location(ast.Constant(_YAML_WORDS.get(node.id.lower(), node.id)), node)


def _source(node: ast.expr, text: str) -> str:
    """Return the part of ``text`` that a node was parsed from; unlike ``ast.unparse`` it works at any depth."""
    return _quoted(ast.get_source_segment(text, node) or "")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:75]} ...")


def split_terms(expression: str) -> list[str]:
    """Split an expression at every ``+`` outside of parentheses.

    >>> split_terms("er(memory=5) + exits(at=('a + b',))")
    ['er(memory=5)', "exits(at=('a + b',))"]
    """
    terms, depth = [""], 0
    for letter in expression:
        depth += (letter == "(") - (letter == ")")
        if letter == "+" and depth == 0:
            terms.append("")
        else:
            terms[-1] += letter
    return [term.strip() for term in terms]


def names_in_order(expression: str, composition: Composition) -> str:
    """Return the names of a composition's components, joined by ``+``, in the order in which an expression has them.

    >>> strategy = "lwf(alpha=2) + (exits + er)"
    >>> names_in_order(strategy, parse(strategy)), names_in_order("naive", parse("naive"))
    ('lwf + exits + er', 'naive')
    """
    terms = [term.strip() for term in split_terms(expression)]
    while any(term.startswith("(") for term in terms):
        terms = [part for term in terms for part in split_terms(term[1:-1] if term.startswith("(") else term)]
    names = [component.name for component in composition]
    written = [name for name in (term.partition("(")[0].strip() for term in terms) if name in names]
    return " + ".join(dict.fromkeys((*written, *names))) or "naive"
