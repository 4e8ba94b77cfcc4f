"""``clframe run --tensorboard``: TensorBoard on localhost for as long as the command runs.

It is a process of its own, so that serving a page never slows training. It ends when its standard input does: when this
process closes the pipe, and also when this process is killed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from clframe.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from clframe.config.schema import Config

STARTED, FAILED = "url ", "failed "
"""How the two answers of the process begin."""
ENDS_WITHIN = 10.0
"""Seconds that the process may take to end."""


class Board:
    """TensorBoard beside a command, from :meth:`show` to the end of the ``with`` block, however that comes.

    Args:
        wanted: Whether :meth:`show` starts anything.
        say: Called with the one line that tells the address; None for nobody.

    Attributes:
        url: Where it is; empty before it has started.
    """

    def __init__(self, *, wanted: bool, say: Callable[[str], None] | None) -> None:
        self._wanted, self._say = wanted, say
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> Board:
        """Nothing is started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()

    def show(self, config: Config, *, resume: str | Path | None = None) -> None:
        """Start it, the first time, on all runs of the experiment.

        Args:
            config: Of the run that begins.
            resume: The folder of the run, where it goes on.

        Raises:
            ConfigError: The run writes no event files.
            UnsupportedError: It does not start.
        """
        if not self._wanted or self._process is not None:
            return
        if "tensorboard" not in config.trainer.loggers:
            raise ConfigError(
                f"--tensorboard: found trainer.loggers={list(config.trainer.loggers)}, so there is nothing to show; "
                f"add tensorboard to it"
            )
        self.start(Path(config.output) / config.name if resume is None else Path(resume).resolve().parent)

    def start(self, folder: Path) -> None:
        """Start it on the run folders below ``folder``, which need not be there yet, and tell where it is.

        Raises:
            UnsupportedError: It does not start.
        """
        command = [sys.executable, "-m", "clframe.cli.board", str(folder.resolve())]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise _cannot_start(str(error)) from None
        assert self._process.stdout is not None
        lines = (line.strip() for line in self._process.stdout if line.startswith((STARTED, FAILED)))
        answer = next(lines, "")  # what else is printed on import is none
        if not answer.startswith(STARTED):
            self.stop()
            raise _cannot_start(answer.removeprefix(FAILED) or "the process ended")
        self.url = answer.removeprefix(STARTED)
        if self._say is not None:
            self._say(f"TensorBoard: {self.url}")

    def stop(self) -> None:
        """Stop it, and wait until it is gone; nothing happens where it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(timeout=ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _cannot_start(reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"--tensorboard: cannot start TensorBoard ({reason}); leave it out, event files are written all the same"
    )


def serve(folder: str) -> None:
    """What the process does: serve, tell the address on standard output, wait until standard input ends."""
    try:
        address = _launched(folder)
    except BaseException as error:  # it exits where ports are taken, and whatever is wrong has to reach the user
        print(f"{FAILED}{' '.join(str(error).split())[:200] or type(error).__name__}", flush=True)
        raise SystemExit(1) from None
    print(f"{STARTED}{address}", flush=True)
    sys.stdin.read()


def _launched(folder: str) -> str:
    from tensorboard import program  # type: ignore[import-untyped]

    board = program.TensorBoard()
    # Without a port it takes the first free one from 6006.
    board.configure(argv=["tensorboard", "--logdir", folder, "--host", "localhost", "--reload_interval", "3",
                          "--samples_per_plugin", "images=100"])  # fmt: skip
    return str(board.launch())


if __name__ == "__main__":
    serve(sys.argv[1])
