"""What README.md and docs/ show is what happens: code runs, commands name things that exist.

A block after ``<!-- no-run -->`` is left alone. The ``python`` blocks of one document run in order, in one
namespace, in an empty folder, as a reader would paste them.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest

from clframe.config.files import shipped_configs
from clframe.report.terminal import accuracy_text
from clframe.results import Result

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
SHELLS = ("console", "bash", "sh", "shell")
BLOCK = re.compile(
    r"(?P<skip><!--\s*no-run\s*-->\s*)?"
    r"^(?P<indent>[ ]*)(?P<fence>`{3,})(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
"""A fenced block with a language, and the mark that excuses it."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, first line in the document, code, and whether it is to run."""

    language: str
    line: int
    code: str
    runs: bool


def blocks(text: str) -> list[Block]:
    """All fenced blocks that name a language, in order."""
    return [
        Block(
            language=match["language"],
            line=text.count("\n", 0, match.start("code")) + 1,
            code=re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE),
            runs=match["skip"] is None,
        )
        for match in BLOCK.finditer(text)
    ]


def commands(text: str) -> list[str]:
    """Shell lines, without their prompt; where a block shows prompts, the other lines are output."""
    found = []
    for block in blocks(text):
        if block.language in SHELLS and block.runs:
            lines = block.code.splitlines()
            prompted = [line[2:] for line in lines if line.startswith("$ ")]
            found += [line.split(" #")[0].strip() for line in (prompted or lines)]
    return found


def test_blocks_are_found_with_their_lines_marks_and_indents() -> None:
    """The reader of the documents, on a document of our own."""
    text = (
        "a\n```python\nx = 1\n```\n<!-- no-run -->\n```python\ny\n```\n"
        "- b\n  ```bash\n  make test\n  ```\n```\nz\n```\n"
    )
    assert blocks(text) == [
        Block("python", 3, "x = 1\n", True),
        Block("python", 7, "y\n", False),
        Block("bash", 11, "make test\n", True),
    ]


def test_commands_are_found_with_and_without_prompts() -> None:
    """Output between prompts is no command."""
    text = "```console\n$ clframe run quickstart\nmake no sense\n```\n```bash\nmake test  # all\n```\n"
    assert commands(text) == ["clframe run quickstart", "make test"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each document's blocks, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / name
    # A module, not a bare namespace: dataclasses look their annotations up in the module they are defined in.
    module = ModuleType("pasted_document")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.language == "python" and block.runs:
            # Empty lines in front: a traceback names the document's own line.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(path), "exec", dont_inherit=True), vars(module))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_name_what_exists(name: str) -> None:
    """Every ``make`` target and every config that ``clframe run`` or ``explain`` is shown with."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    experiments = {path.stem for path in (shipped_configs() / "experiment").rglob("*.yaml")}
    for command in commands((ROOT / name).read_text(encoding="utf-8")):
        words = command.split()
        if words[:1] == ["make"]:
            named = {word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)}
            assert named <= targets, command
        if words[:1] == ["clframe"] and words[1] in ("run", "explain"):
            # An option, an override or a path of the reader's own is no shipped config.
            assert all(name in experiments for name in words[2:3] if re.fullmatch(r"\w[\w-]*", name)), command


def test_the_readme_shows_the_two_commands_of_a_fresh_clone() -> None:
    """The first screen: a result, and the proof that it all works."""
    shown = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "make quickstart" in shown
    assert "make test" in shown


def test_every_experiment_is_listed_with_the_first_line_of_its_file() -> None:
    """docs/experiments.md has one row per shipped experiment."""
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\(\.\./configs/experiment/(\w+)\.yaml\) \| (.+) \|$", text, flags=re.MULTILINE)
    files = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
    first = [path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for path in files]
    assert rows == [(path.stem, path.stem, line) for path, line in zip(files, first, strict=True)]


def test_the_readme_shows_the_accuracies_as_the_program_prints_them() -> None:
    """The matrix of its numbers, from which shares of the test samples are restored, rendered again."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = (block.code for block in blocks(text) if block.language == "text" and "Accuracy in %" in block.code)
    numbers = [[float(cell) for cell in line.split()[1:-1]] for line in shown.splitlines()[4:]]
    sizes = (91, 89, 89, 91, 90)  # test samples of the quickstart's experiences, as clframe explain lists them
    matrix = [
        [round(cell / 100 * size) / size for cell, size in zip(row, sizes, strict=True)] for row in numbers
    ]  # fmt: skip
    assert accuracy_text(cast(Result, SimpleNamespace(accuracy_matrix=matrix))) == shown.rstrip("\n")
