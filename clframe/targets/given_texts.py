"""Texts that are given from Python to the language model of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from clframe.errors import DataError
from clframe.options import format_value


def named_texts(given: Any, *, where: str) -> list[tuple[str, str]]:
    """Return names and texts of ``given``: a text, several, or texts by name. A text without name is its own name.

    Args:
        given: Texts.
        where: Start of error messages.

    Raises:
        DataError: Something else, or half of a surrogate pair, which no tokenizer can encode.

    >>> named_texts("the fox", where="score")
    [('the fox', 'the fox')]
    """
    listed = [given] if isinstance(given, str) else given
    if isinstance(listed, (bytes, bytearray)) or not isinstance(listed, Iterable):
        raise DataError(f"{where}: found {format_value(given)}; give a text, or a list of texts")
    found = list(listed.items()) if isinstance(listed, Mapping) else [(text, text) for text in listed]
    for number, (name, text) in enumerate(found, start=1):
        place = f"text {number}" if name is text or not isinstance(name, str) else name
        if not isinstance(text, str):
            raise DataError(f"{where}: found {format_value(text)} as {place}; give text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"character {error.start} of {place} is half of a pair"
            raise DataError(f"{where}: {half}; give whole characters") from None
    return found
