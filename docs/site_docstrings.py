"""Griffe extension: docstrings of clframe, with the roles of Sphinx, as Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(
    r":(?:class|func|meth|mod|data|attr|exc|obj):`(?:(?P<text>[^`<]+?)\s*<)?(?P<short>~)?(?P<path>[^`<>]+)>?`"
)


DOCTEST = re.compile(r"(?m)^(?P<indent> *)>>> .*(?:\n(?P=indent)\S.*)*")


def markdown(text: str) -> str:
    """Roles become code with a link where the reference has the object; two backticks one; examples blocks of code.

    >>> markdown("see :func:`~clframe.api.run`, ``x``")
    'see <autoref optional identifier="clframe.api.run">`run`</autoref>, `x`'
    """

    def role(match: re.Match[str]) -> str:
        path = match["path"].lstrip(".")
        name = match["text"] or (path.rpartition(".")[2] if match["short"] else path)
        return f'<autoref optional identifier="{path}">`{name}`</autoref>'

    def block(match: re.Match[str]) -> str:
        indent = match["indent"]
        return f"{indent}```pycon\n{match[0]}\n{indent}```"

    text = ROLE.sub(role, text).replace("``", "`")
    return DOCTEST.sub(block, re.sub(r"(?m)::$", ":", text))


class MarkdownDocstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
