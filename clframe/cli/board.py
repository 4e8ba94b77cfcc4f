"""``clframe run --tensorboard``: TensorBoard on localhost while the command runs.

TensorBoard runs in a separate process, so that serving pages does not slow training. The process ends when its standard
input is closed, which also happens when this process is killed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from clframe.errors import ConfigError, UnsupportedError, reason_of

if TYPE_CHECKING:
    from clframe.config.schema import Config

STARTED, FAILED = "url ", "failed "
"""Prefixes of the line that the process prints: the address, or the reason of a failure."""
UNSMOOTHED = "?smoothing=0#custom_scalars&_smoothingWeight=0"
"""End of the printed address: the page Custom Scalars, with curves as measured; TensorBoard's own setting is 0.6."""
ENDS_WITHIN = 10.0
"""Seconds after which the process is killed."""


class Board:
    """TensorBoard from :meth:`show` to the end of the ``with`` block.

    Args:
        wanted: Whether :meth:`show` starts TensorBoard.
        echo: Called with one line that has the address; None prints nothing.

    Attributes:
        url: The address; empty before the start.
    """

    def __init__(self, *, wanted: bool, echo: Callable[[str], None] | None) -> None:
        self._wanted, self._echo = wanted, echo
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> Board:
        """Start nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop TensorBoard."""
        self.stop()

    def show(self, config: Config, *, resume: str | Path | None = None) -> None:
        """Start TensorBoard on all runs of the experiment, unless it runs already.

        Args:
            config: The config of the run.
            resume: The folder of a resumed run.

        Raises:
            ConfigError: The run writes no event files.
            UnsupportedError: TensorBoard does not start.
        """
        if not self._wanted or self._process is not None:
            return
        if "tensorboard" not in config.trainer.loggers:
            raise ConfigError(
                f"--tensorboard: found trainer.loggers={list(config.trainer.loggers)}, so there is nothing to show; "
                f"add tensorboard to the list"
            )
        self.start(Path(config.output) / config.name if resume is None else Path(resume).resolve().parent)

    def start(self, folder: Path) -> None:
        """Start TensorBoard on the run folders below ``folder``, which need not exist yet.

        Raises:
            UnsupportedError: TensorBoard does not start.
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
        answer = next(lines, "")  # other lines are printed by imports
        if not answer.startswith(STARTED):
            self.stop()
            raise _cannot_start(answer.removeprefix(FAILED) or "the process ended")
        self.url = answer.removeprefix(STARTED)
        if self._echo is not None:
            self._echo(f"TensorBoard: {self.url}{UNSMOOTHED}")

    def stop(self) -> None:
        """Stop TensorBoard, if it is running, and wait for its end."""
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
        f"--tensorboard: cannot start TensorBoard ({reason}); leave the option out, event files are written anyway"
    )


def serve(folder: str) -> None:
    """Main function of the process: serve, print the address, and block until standard input is closed."""
    try:
        address = _launch(folder)
    except BaseException as error:  # including SystemExit when ports are taken: the parent reports it
        print(f"{FAILED}{reason_of(error, most=200)}", flush=True)
        raise SystemExit(1) from None
    print(f"{STARTED}{address}", flush=True)
    sys.stdin.read()


def _launch(folder: str) -> str:
    from tensorboard import program  # type: ignore[import-untyped]

    board = program.TensorBoard()
    # Without --port TensorBoard uses the first free one from 6006.
    board.configure(argv=["tensorboard", "--logdir", folder, "--host", "localhost", "--reload_interval", "3",
                          "--samples_per_plugin", "images=100"])  # fmt: skip
    return str(board.launch())


if __name__ == "__main__":
    serve(sys.argv[1])
