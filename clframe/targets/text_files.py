"""Text files to measure language models on: texts of one or several files, and their division into data splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from clframe.data.sources.paths import read_text
from clframe.errors import ConfigError, DataError

Document = Literal["line", "file"]
"""One text: a line of a file, or a whole file."""

Rows = list[list[int]]

SHARES = (0.6, 0.2, 0.2)
"""Shares of training, validation and test data, in this order."""


def text_files(data: str) -> tuple[Path, ...]:
    """Return the files of ``data``, such as ``news.txt,code.txt`` or ``questions.jsonl``; none if it is a benchmark.

    Raises:
        ConfigError: Text files and something else.
    """
    if data.endswith(".jsonl"):
        return (Path(data).expanduser(),)
    names = [name.strip() for name in data.split(",")]
    found = [name for name in names if name.endswith(".txt")]
    if found and len(found) < len(names):
        other = next(name for name in names if name not in found)
        raise ConfigError(f"--data: found '{other}' among text files; give files that end in .txt, or one benchmark")
    return tuple(Path(name).expanduser() for name in found)


def read_texts(files: Sequence[Path], *, document: Document = "line") -> dict[str, list[str]]:
    """Read the texts of each file, by the file's name without ending.

    Args:
        files: Text files in UTF-8.
        document: Whether a ``line`` is a text, without surrounding whitespace and without empty lines, or a ``file``.

    Raises:
        ConfigError: An unknown kind of document, or two files of one name.
        DataError: No file, or one without text.
    """
    if document not in get_args(Document):
        raise ConfigError(f"--document: found '{document}'; choose from {', '.join(get_args(Document))}")
    found: dict[str, list[str]] = {}
    for file in files:
        if not file.is_file():
            raise DataError(f"--data: no file {file}; give a text file with one text per line, or a benchmark")
        content = read_text(file)
        lines = [line.strip() for line in content.splitlines() if line.strip()]
        if not lines:
            raise DataError(f"--data: {file} contains no text; give one text per line")
        if file.stem in found:
            raise ConfigError(f"--data: found two files {file.stem}.txt; give them different names")
        found[file.stem] = [content] if document == "file" else lines
    return found


def divide_rows(rows: Sequence[Sequence[int]], *, name: str) -> Mapping[str, Rows]:
    """Divide the token ids of texts into ``fit``, ``validation`` and ``test``, in the order of the file.

    The first 60 % are training data, then 20 % validation data, then 20 % test data: of the texts, or of the ids of a
    single text.

    Args:
        rows: Ids of each text.
        name: Of the file, for error messages.

    Raises:
        DataError: Too few texts.

    >>> divide_rows([[1], [2], [3], [4], [5]], name="a")["validation"]
    [[4]]
    >>> divide_rows([list(range(10))], name="a")["test"]
    [[8, 9]]
    """
    single = len(rows) == 1
    count = len(rows[0]) if single else len(rows)
    first, second = round(SHARES[0] * count), round((SHARES[0] + SHARES[1]) * count)
    cuts = {"fit": slice(0, first), "validation": slice(first, second), "test": slice(second, count)}
    if any(cut.stop - cut.start < (2 if single else 1) for cut in cuts.values()):
        unit = "tokens of its only text" if single else "texts"
        raise DataError(f"{name}: found {count} {unit}, too few to divide into training and test data; give more")
    if single:
        return {part: [list(rows[0][cut])] for part, cut in cuts.items()}
    return {part: [list(row) for row in rows[cut]] for part, cut in cuts.items()}
