"""Docstrings describe the parameters that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def described(docstring):
    """Names in the section Args."""
    section = re.split(r"\n(?=\S)", docstring.partition("\nArgs:\n")[2])[0]
    return [name.strip("* ") for names in re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", section, re.M) for name in names.split(",")]


def functions_of(tree):
    """Name, docstring and signature of functions, and of classes with their own ``__init__``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, ast.get_docstring(node), node.args
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    yield node.name, ast.get_docstring(node), part.args


def test_every_described_parameter_exists():
    found, wrong = 0, []
    for path in sorted([*(ROOT / "clframe").rglob("*.py"), *(ROOT / "strategies").glob("*.py")]):
        for name, docstring, given in functions_of(ast.parse(path.read_text(encoding="utf-8"))):
            parameters = {each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if each}
            names = described(docstring or "")
            found += len(names)
            wrong += [f"{path.relative_to(ROOT)}: {name}: {each}" for each in names if each not in parameters]
    assert not wrong and found > 1500
