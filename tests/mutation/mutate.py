"""Mutation test: change one place of the mathematics at a time and check that a test fails.

    make test-mutations                                      # 100 places, seed 0; at least 95 must be found
    python tests/mutation/mutate.py --count 10 --seed 3      # fewer places, other ones
    python tests/mutation/mutate.py --list                   # show the places without running anything

A mutation swaps + and -, * and /, or an order (< and <=), removes a sign or the second term of a sum, or adds one to a
whole number, in functions of ``strategies``, ``clframe/functional``, ``clframe/replay`` and
``clframe/regularization``. Validation of options, texts and type annotations are left out. Only the golden curves and the
tests that mirror the changed file run, in a fork of a process that has imported torch and Avalanche: seconds per
place. Prints the mutations that no test finds: each needs a test, or an entry in ``EQUIVALENT`` if it changes nothing
that a test could see. Those are left out, and the next places of the same seeded order take their turn.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
MUTATED = ("strategies", "clframe/functional", "clframe/replay", "clframe/regularization")
COPIED = ("clframe", "strategies", "configs", "tests", "pyproject.toml")
UNTESTED = ("__post_init__", "__str__", "__repr__", "check", "check_needs")
"""Functions that refuse input or make text; their tests are elsewhere."""
NAMES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
SWAPS = {"+": "-", "-": "+", "*": "/", "/": "*", "<": "<=", "<=": "<", ">": ">=", ">=": ">"}

_SIMILARITY = "clframe/functional/similarity.py"
EQUIVALENT: dict[tuple[str, str], str] = {
    (_SIMILARITY, f"sums_x_N, sums_y_N = gram_x_NN.sum(dim={x}), gram_y_NN.sum(dim={y})"): "Gram matrices are symmetric"
    for x, y in ((0, 1), (1, 0))
}
"""Mutations without effect, by file and changed line, with the reason."""

QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
"""Lightning imports a module that is a plugin of pytest, before pytest starts."""


@dataclass(frozen=True)
class Mutation:
    """Replacement of the bytes from ``start`` to ``end`` of a file."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {' '.join(self.old.split())!r} -> {' '.join(self.new.split())!r}"

    def apply(self, source: bytes) -> bytes:
        """Return the changed source."""
        assert source[self.start : self.end].decode() == self.old
        return source[: self.start] + self.new.encode() + source[self.end :]

    def changed_line(self, source: bytes) -> str:
        """Return the first line that differs in the changed source, without indentation."""
        return self.apply(source).split(b"\n")[source.count(b"\n", 0, self.start)].decode().strip()


class _Finder(ast.NodeVisitor):
    """Collects the mutations of a module."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutation] = []
        self.inside = False

    def span(self, node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def add(self, node: ast.expr, start: int, end: int, new: str) -> None:
        self.found.append(Mutation(self.file, node.lineno, start, end, self.source[start:end].decode(), new))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in UNTESTED:
            return
        before, self.inside = self.inside, True
        for part in node.body:  # not the signature
            self.visit(part)
        self.inside = before

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in node.body:
            if isinstance(part, ast.FunctionDef):
                self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Left out: texts of errors."""

    visit_JoinedStr = visit_Raise  # type: ignore[assignment]

    def between(self, node: ast.expr, left: ast.expr, right: ast.expr, operator: str) -> None:
        """Swap an operator that is written between two expressions."""
        low, high = self.span(left)[1], self.span(right)[0]
        match = re.search(re.escape(operator), self.source[low:high].decode())
        if match:
            self.add(node, low + match.start(), low + match.end(), SWAPS[operator])

    def visit_BinOp(self, node: ast.BinOp) -> None:
        operator = NAMES.get(type(node.op))
        if self.inside and operator and not _is_text(node):
            self.between(node, node.left, node.right, operator)
            if operator in "+-":
                start, end = self.span(node)
                left = self.source[slice(*self.span(node.left))].decode()
                self.add(node, start, end, left if left.count("(") == left.count(")") else f"({left})")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        left = node.left
        for kind, right in zip(node.ops, node.comparators, strict=True):
            if self.inside and type(kind) in NAMES:
                self.between(node, left, right, NAMES[type(kind)])
            left = right
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if self.inside and isinstance(node.op, ast.USub):
            start = self.span(node)[0]
            self.add(node, start, start + 1, "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if self.inside and type(node.value) is int:
            self.add(node, *self.span(node), str(node.value + 1))


def _is_text(node: ast.AST) -> bool:
    return any(isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", None), str) for part in ast.walk(node))


def mutations(file: str, source: bytes) -> list[Mutation]:
    """List the mutations of a module, in order.

    >>> [str(m) for m in mutations("f.py", b"def f(x):\\n    return 1 - x")]
    ["f.py:2: '-' -> '+'", "f.py:2: '1 - x' -> '1'", "f.py:2: '1' -> '2'"]
    """
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    return finder.found


def all_mutations(root: Path = ROOT) -> list[Mutation]:
    """List the mutations of every mutated package."""
    files = [path for package in MUTATED for path in sorted((root / package).glob("*.py")) if path.name != "__init__.py"]
    return [m for path in files for m in mutations(path.relative_to(root).as_posix(), path.read_bytes())]


def is_equivalent(mutation: Mutation, root: Path = ROOT) -> bool:
    """Whether a mutation is listed in ``EQUIVALENT``."""
    return (mutation.file, mutation.changed_line((root / mutation.file).read_bytes())) in EQUIVALENT


def choose(places: Sequence[Mutation], count: int, *, seed: int) -> list[Mutation]:
    """Return ``count`` places in a seeded order, without those in ``EQUIVALENT``."""
    order = random.Random(seed).sample(places, len(places))
    return [place for place in order if not is_equivalent(place)][:count]


def tests_of(file: str, root: Path = ROOT) -> Iterator[list[str]]:
    """Arguments of pytest for the tests of a file, the fastest first."""
    path = Path(file)
    golden = "tests/golden/test_golden.py"
    if path.parts[0] == "strategies":
        curve = f"{golden}::test_it_trains_as_its_golden_file_says[{path.stem}]"
        word = re.compile(rf"\b{path.stem}\b")
        folder = root / "tests/strategies"
        own = folder / f"test_{path.stem}.py"
        named = [own] if own.exists() else [p for p in sorted(folder.glob("test_*.py")) if word.search(p.read_text("utf-8"))]
        mirrors = [str(p.relative_to(root)) for p in named]
        yield [curve, file, *mirrors, "-k", "not resume and not stopped and not presets"]  # file: its doctests
        yield ["tests/conformance", "-k", f"[{path.stem}] or [{path.stem}-1] or [{path.stem}-3]"]
    else:
        yield [file, f"tests/{path.parts[1]}"]
        yield [golden, "-k", "trains"]


def survives(mutation: Mutation, copy: Path, *, limit: float = 600.0) -> bool:
    """Whether all tests pass with the mutation; a time-out counts as a failure."""
    target = copy / mutation.file
    original = target.read_bytes()
    for arguments in tests_of(mutation.file, copy):
        target.write_bytes(mutation.apply(original))
        try:
            failed = _first_failure(arguments, copy, limit)
        finally:
            target.write_bytes(original)
        if failed is not None:
            _require_passing(tuple(failed), copy, limit)
            return False
    return True


@cache
def _require_passing(arguments: tuple[str, ...], copy: Path, limit: float) -> None:
    """Exit if tests fail without any mutation: they would find every one."""
    if _first_failure(arguments, copy, limit) is not None:
        text = (copy / "output.txt").read_text(errors="replace")
        sys.exit(f"mutate: pytest {' '.join(arguments)} fails without a mutation; fix it first\n{text[-2000:]}")


def _first_failure(arguments: Sequence[str], copy: Path, limit: float) -> list[str] | None:
    """Run pytest in a fork, which leaves this process without clframe's modules.

    Returns:
        Arguments that run the first test which fails, or all of ``arguments`` after a time-out or a crash, also of an
        import; None if all tests pass.
    """
    (copy / "failed.txt").unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _become_pytest(arguments, copy)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) in (0, 5):  # 5: no test has that name
                return None
            first = copy / "failed.txt"
            return [first.read_text("utf-8")] if first.exists() else list(arguments)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return list(arguments)


class _FailureRecorder:
    """Plugin of pytest that writes the name of the first test, or file, that fails."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a test that fails."""
        if report.failed and not self._path.exists():
            self._path.write_text(report.nodeid, "utf-8")

    pytest_collectreport = pytest_runtest_logreport


def _become_pytest(arguments: Sequence[str], copy: Path) -> NoReturn:
    """Run pytest in the copy and exit with its code, whatever is raised: this is a fork."""
    code = 99
    try:
        out = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.setsid()
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        import pytest

        import clframe

        if Path(clframe.__file__).is_relative_to(copy):
            options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *QUIET, *arguments]
            code = int(pytest.main(options, plugins=[_FailureRecorder(copy / "failed.txt")]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def import_heavy() -> None:
    """Import what every fork needs, but nothing of clframe."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import avalanche.training
        import lightning
        import pytest  # noqa: F401
        import sklearn.datasets
        import torch
        import torchvision  # noqa: F401

        assert avalanche.training and lightning and sklearn.datasets
    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutation test; returns 1 if too many mutations survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="number of places (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of places (default: 0)")
    parser.add_argument("--required", type=float, default=0.95, help="share that tests must find (default: 0.95)")
    parser.add_argument("--list", action="store_true", help="show the places and stop")
    options = parser.parse_args(arguments)
    places = all_mutations()
    chosen = choose(places, options.count, seed=options.seed)
    if options.list:
        print("\n".join(map(str, chosen)))
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    import_heavy()
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        for number, mutation in enumerate(chosen, 1):
            start = time.monotonic()
            lives = survives(mutation, copy)
            survived += lives
            took = time.monotonic() - start
            print(f"{number}/{len(chosen)} {'SURVIVED' if lives else 'found'} {mutation} ({took:.0f} s)", flush=True)
    found = len(chosen) - survived
    print(f"{found} of {len(chosen)} mutations found ({len(places)} possible)")
    return int(found < options.required * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
