"""A folder to call the command line in, and one finished run that many tests look at."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import pytest

import clframe.execution
import clframe.planning
import clframe.sessions
from clframe.cli import main

TINY = ("trainer.fast_dev_run=2", "benchmark.experiences=2", "backbone.width=4")


class Called(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(here, capsys):
    """Call the command line in ``here``."""

    def calling(*arguments):
        code = main(arguments)
        captured = capsys.readouterr()
        return Called(code, captured.out, captured.err)

    return calling


@pytest.fixture
def refused(call, here, contents):
    """Call, and see that it is refused: one line, exit code 2, nothing written or changed."""

    def refusing(arguments, *messages, lines=1):
        before = contents(here)
        code, out, err = call(*arguments)
        assert code == 2
        assert out == ""
        assert err.count("\n") == lines and err.endswith("\n")
        assert err.startswith("clframe: error: ") and "Traceback" not in err
        for text in messages:
            assert text in err
        _, found_and_advice = err.removeprefix("clframe: error: ").split(": ", 1)
        assert ";" in found_and_advice
        assert contents(here) == before

    return refusing


@pytest.fixture
def no_training(monkeypatch):
    """Fail where a session is made."""

    def reached(*_, **__):
        pytest.fail("a session was made: the input was not refused in time")

    for module in (clframe.execution, clframe.planning, clframe.sessions):
        monkeypatch.setattr(module, "new_session", reached)


@pytest.fixture(scope="session")
def contents():
    """Every path below a folder, with the bytes of files."""

    def of(folder: Path) -> dict[str, bytes | None]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*")
        }

    return of


@pytest.fixture(scope="session")
def finished(tmp_path_factory, drawing):
    """``(run folder, what was printed, working directory)`` of a run that tests only look at."""
    cwd = tmp_path_factory.mktemp("finished")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), drawing():
        patch.chdir(cwd)
        assert main(["run", "quickstart", *TINY, "--output", "out", "--seed", "3"]) == 0
    (folder,) = cwd.glob("out/quickstart/*")
    return folder, printed.getvalue(), cwd
