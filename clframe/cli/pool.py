"""Several runs in separate processes, a number of them at a time.

Each process has its share of the CPU's cores as threads and, on CUDA, one device and a share of its memory; a run
beyond that share fails alone. Runs that read the same data begin once the first of them has read it: what is downloaded
is there by then. See :mod:`clframe.cli.child` for the side of the processes.
"""

from __future__ import annotations

import queue
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO, Any

from clframe.cli.jobs import Plan
from clframe.cli.processes import Events, RunProcess, Task
from clframe.printable import printable
from clframe.progress import is_shown, progress_bar


class PoolStopped(KeyboardInterrupt):
    """The processes were stopped by the user or by a signal, and have saved.

    Args:
        started: Those that were started.
        waiting: Runs that were not.
    """

    def __init__(self, started: Sequence[RunProcess], waiting: Sequence[Task]) -> None:
        super().__init__("interrupted")
        self.started, self.waiting = started, waiting


class Pool:
    """Starts processes, shows what they say, and stops them together.

    Args:
        quiet: Whether to print errors and warnings only.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.bars = is_shown() and not quiet
        """Whether processes send their progress bars."""
        self._quiet = quiet
        self._events: Events = queue.SimpleQueue()
        self._said: set[str] = set()
        self._shown: list[Any] = []
        self._read: set[str] = set()

    def run(self, tasks: Sequence[Task], plan: Plan, *, on_ended: Callable[[RunProcess], None]) -> None:
        """Run all tasks.

        Args:
            tasks: In the order in which they are started.
            plan: Number of processes, and their shares.
            on_ended: Called with each process that has ended. An error that it raises stops the others.

        Raises:
            PoolStopped: The user or a signal stopped the runs.
        """
        waiting, running, started = deque(tasks), list[RunProcess](), list[RunProcess]()
        try:
            while waiting or running:
                while waiting and len(running) < plan.jobs:
                    device = plan.next_device([run.device for run in running])
                    run = RunProcess(waiting[0], threads=plan.threads, events=self._events, device=device)
                    waiting.popleft()
                    running.append(run)
                    started.append(run)
                self._begin(running)
                run = self._handle()
                if run.ended:
                    running.remove(run)
                    on_ended(run)
        except KeyboardInterrupt:
            self._stop(running)
            raise PoolStopped(started, waiting) from None
        except BaseException:
            self._stop(running)
            raise
        finally:
            for bar in filter(None, self._shown):
                bar.close()
            self._shown = []

    def measure(self, task: Task, *, device: str | None = None) -> RunProcess:
        """Run one task; returns its process, which has ended."""
        run = RunProcess(task, threads=None, events=self._events, device=device)
        run.begin()
        try:
            self._wait([run])
        except KeyboardInterrupt:
            self._stop([run])
            raise
        return run

    def say(self, text: str, *, error: bool = False) -> None:
        """Print a line above the bars."""
        stream: IO[str] = sys.stderr if error else sys.stdout
        if any(bar is not None for bar in self._shown):
            from tqdm import tqdm

            tqdm.write(printable(text, lines=True), file=stream)
        else:
            print(printable(text, lines=True), file=stream, flush=True)

    def _begin(self, running: Sequence[RunProcess]) -> None:
        first: set[str] = set()
        for run in running:
            if run.task.reads in self._read or run.task.reads not in first:
                run.begin()
            first.add(run.task.reads)

    def _handle(self) -> RunProcess:
        """Wait for an event and act on it; returns the run that it is about."""
        run, kind, value = _next(self._events)
        if kind == "line":
            if value not in self._said:  # every run says the same about its data
                self._said.add(value)
                self.say(value, error=True)
        elif kind == "experience":
            if not (self.bars or self._quiet or run.measures):  # a bar shows it
                self.say(f"{run.task.label}: {value['line']}")
        elif kind == "bar":
            self._draw(run, value["bar"])
        else:
            run.take(kind, value)
        if run.built:
            self._read.add(run.task.reads)
        if run.ended:
            self._remove_bar(run)
        return run

    def _wait(self, running: Sequence[RunProcess]) -> None:
        while not all(run.ended for run in running):
            self._handle()

    def _stop(self, running: Sequence[RunProcess]) -> None:
        """Have runs save and end, and wait for them; a second interruption stops them immediately."""
        for run in running:
            run.stop()
        while not all(run.ended for run in running):
            try:
                self._wait(running)
            except KeyboardInterrupt:
                for run in running:
                    run.interrupt()

    def _draw(self, run: RunProcess, state: dict[str, Any] | None) -> None:
        if state is None:  # between two bars of the run
            return
        if run.position is None:
            run.position = next((i for i, bar in enumerate(self._shown) if bar is None), len(self._shown))
            form = "{desc} |{bar:20}| {percentage:.0f} %{postfix}"
            bar = progress_bar("", total=1, position=run.position, bar_format=form)
            self._shown[run.position : run.position + 1] = [bar]
        bar = self._shown[run.position]
        bar.total, bar.n = state["total"], state["done"]
        bar.set_description_str(f"{run.task.label}: {printable(state['label'])}", refresh=False)
        bar.set_postfix_str(state["note"], refresh=False)
        bar.refresh()

    def _remove_bar(self, run: RunProcess) -> None:
        if run.position is not None:
            self._shown[run.position].close()
            self._shown[run.position] = None
            run.position = None


def _next(events: Events) -> tuple[RunProcess, str, Any]:
    while True:
        try:
            return events.get(timeout=1)  # without a timeout Windows would not deliver Ctrl-C
        except queue.Empty:
            continue
