"""Plain technical English: phrases and docstring openings that the code and its documentation do without."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PHRASES = re.compile(
    r"\b(beside|anew|likewise|whoever|nobody|somebody|mend(s|ed|ing)?|dealt|deals? out|told|tells|spoken|stands|stood|looked at"
    r"|looks (on|into|at)|looked into|comes? to what|came of it|came to|goes on|gone on|handed (on|to|over)|hands? on|taken up|taken out"
    r"|put back|held back|kin|of its own|of their own|at once|in place of|settles|booked|another than|is no|are no)\b",
    re.IGNORECASE,
)
"""Turns of phrase that readers of technical documentation do not expect; see CONTRIBUTING.md."""

OPENING = re.compile(r"(What|Who|Whose|Where|How|When|Why)\b")
"""A docstring begins with what the object is or does."""

BRITISH = re.compile(r"\b(distil|distils|analys(e|ed|ing)|regularis\w+|optimis\w+|normalis\w+|behaviour|colours?)\b")

SOURCES = sorted(path for package in ("clframe", "strategies") for path in (ROOT / package).rglob("*.py"))
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield text


def comments(source):
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def messages(tree):
    """Texts of exceptions, which users read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_speaks_plainly(path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    texts = [*docstrings(tree), *messages(tree)]
    if PHRASES.search(source) or BRITISH.search(source):  # reading comments takes most of the time
        texts += comments(source)
    found = [match[0] for text in texts for match in [*PHRASES.finditer(text), *BRITISH.finditer(text)]]
    assert not found, f"{path.name}: write these plainly: {found}"
    opened = [text.splitlines()[0] for text in docstrings(tree) if OPENING.match(text)]
    assert not opened, f"{path.name}: begin with a verb or a noun phrase: {opened}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_speak_plainly(path):
    text = path.read_text(encoding="utf-8")
    found = [match[0] for match in [*PHRASES.finditer(text), *BRITISH.finditer(text)] if match[0] not in ("analyse", "distil")]  # former spellings
    assert not found, f"{path.name}: write these plainly: {found}"


def test_the_pattern_finds_what_it_bans():
    assert PHRASES.search("a figure of its own") and OPENING.match("What a run costs.")
    assert BRITISH.search("normalised") and not BRITISH.search("normalized analysis distill")
