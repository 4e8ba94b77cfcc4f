"""Text from outside, such as names of classes and files, made safe to print and to open in a spreadsheet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TextIO

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, among them those that begin escape sequences of terminals
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that reverse the direction of the text after them
    "\u2028\u2029\ufeff\ud800-\udfff]"  # other line breaks, a byte order mark, halves of characters
)
_BREAKS = re.compile("[\t\n]")
_FORMULA = re.compile("[=+\\-@\t\r\uff1d\uff0b\uff0d\uff20].", re.DOTALL)  # the last four: wide forms of the first four
_NUMBER = re.compile(r"[+-]?(\d[\d_,]*\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan|infinity)", re.IGNORECASE)


def printable(text: str, *, lines: bool = False) -> str:
    r"""Replace control characters, bidirectional marks and surrogates by their code, ``\u001b``.

    Args:
        text: The text.
        lines: Whether tabs and line breaks are kept, for a text of several lines.

    >>> printable("cat\x1b[2J"), printable("a\nb"), printable("a\nb", lines=True), printable("Straße 犬")
    ('cat\\u001b[2J', 'a\\u000ab', 'a\nb', 'Straße 犬')
    """
    text = _UNSAFE.sub(_code, text)
    return text if lines else _BREAKS.sub(_code, text)


def csv_cell(text: str) -> str:
    """Return a text as a cell of a CSV file: printable, and with a ``'`` before what a spreadsheet would compute.

    >>> csv_cell("=HYPERLINK(A1)"), csv_cell("-3.5"), csv_cell("cat")
    ("'=HYPERLINK(A1)", '-3.5', 'cat')
    """
    starts = _FORMULA.match(text.lstrip(" ")) is not None and _NUMBER.fullmatch(text) is None
    return ("'" if starts else "") + printable(text)


class PrintableStream:
    """A text stream that writes :func:`printable` text to another one; everything else is that of the other one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text of any number of lines."""
        self._stream.write(printable(text.replace("\r\n", "\n"), lines=True))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line as :meth:`write` does."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _code(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
