"""``clframe run --seeds A..B --jobs N``: the runs of several seeds in separate processes, N at a time.

Each process trains one seed as ``clframe run --seed`` would, and writes the same run folder. It has its share of the
CPU's cores as threads and, on CUDA, of the device's memory; a run beyond that share fails alone. The processes begin
once the first of them has read its data: what is downloaded is there by then, and what every run would refuse is
refused once. See :mod:`clframe.cli.seed_process` for their side.
"""

from __future__ import annotations

import queue
import shlex
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from clframe.cli.jobs import Memory, Plan, choose_jobs
from clframe.cli.seed_runs import Events, SeedRun
from clframe.environment import available_cores
from clframe.errors import ClframeError, Interrupted
from clframe.printable import printable
from clframe.progress import is_shown, progress_bar

if TYPE_CHECKING:
    from clframe.config.schema import Config


class SeedsInterrupted(Interrupted):
    """Runs of several seeds stopped by the user or by a signal.

    Args:
        commands: Commands that continue them.
    """

    def __init__(self, commands: Sequence[str]) -> None:
        KeyboardInterrupt.__init__(self, "interrupted")
        self.folder = Path()
        self.advice = "".join(["continue with", *(f"\n  {command}" for command in commands)])


class SideBySide:
    """Runs of one config with several seeds.

    Args:
        config: Name or file of the config.
        overrides: Those of every run.
        output: As for :func:`clframe.run`.
        quiet: Whether to print errors and warnings only.
        rest: The command that starts such runs, without its seeds: what continues those that were not started.
    """

    def __init__(
        self, config: str, overrides: Sequence[str], *, output: str | None, quiet: bool, rest: Sequence[str]
    ) -> None:
        self._request = {
            "config": config, "overrides": list(overrides), "output": output, "quiet": quiet, "measure": False,
            "memory_share": None, "command": list(sys.argv), "bars": is_shown() and not quiet,
        }  # fmt: skip
        self._quiet, self._rest = quiet, list(rest)
        self._events: Events = queue.SimpleQueue()
        self._said: set[str] = set()
        self._bars: list[Any] = []

    def measure(self, seed: int, *, captured: bool) -> Memory | None:
        """Measure the memory of a short run; None where it does not run on CUDA.

        Raises:
            ClframeError: The run failed.
        """
        overrides = ["trainer.fast_dev_run=true", "trainer.figures=none", "trainer.loggers=[]"]
        with tempfile.TemporaryDirectory(prefix="clframe-") as folder:
            run = self._start(seed, threads=None, overrides=overrides, output=folder, measure=True, quiet=True)
            run.begin()
            try:
                self._wait([run])
            except KeyboardInterrupt:
                self._stop([run])
                raise
        if run.reason is not None:
            raise ClframeError(run.reason)
        found = run.found or {}
        if not found.get("peak"):
            return None
        return Memory(peak=found["peak"], free=found["free"], total=found["total"], captured=captured)

    def run(self, seeds: Sequence[int], chosen: Plan) -> dict[int, Path | None]:
        """Run all seeds; returns the folder of each finished run, and None for a failed one.

        Raises:
            ClframeError: The first run failed before it could train, as all would.
            SeedsInterrupted: The user or a signal stopped the runs, which have saved.
        """
        waiting, running = deque(seeds), list[SeedRun]()
        started: list[SeedRun] = []
        try:
            while waiting or running:
                while waiting and len(running) < chosen.jobs:
                    run = self._start(waiting[0], threads=chosen.threads, memory_share=chosen.memory_share)
                    waiting.popleft()
                    running.append(run)
                    started.append(run)
                first = started[0]
                for run in running if first.built else [first]:
                    run.begin()
                run = self._handle()
                if not run.ended:
                    continue
                if run is first and not run.built:
                    self._stop(running)
                    raise ClframeError(run.reason or "run: the first process ended; start again")
                running.remove(run)
                self._report(run)
        except KeyboardInterrupt:
            self._stop(running)
            raise SeedsInterrupted(self._commands(started, waiting)) from None
        finally:
            for bar in filter(None, self._bars):
                bar.close()
        return {run.seed: run.folder for run in started}

    def _start(self, seed: int, *, threads: int | None, overrides: Sequence[str] = (), **changed: Any) -> SeedRun:
        request = {**self._request, **changed}
        request["overrides"] = [*request["overrides"], f"seed={seed}", *overrides]
        return SeedRun(seed, request, threads=threads, events=self._events)

    def _handle(self) -> SeedRun:
        """Wait for an event and act on it; returns the run that it is about."""
        run, kind, value = _next(self._events)
        if kind == "line":
            if value not in self._said:  # every run says the same about its data
                self._said.add(value)
                self._print(value, sys.stderr)
        elif kind == "experience":
            if not (self._request["bars"] or self._quiet or run.measures):  # a bar shows it
                self._print(f"seed {run.seed}: {value['line']}", sys.stdout)
        elif kind == "bar":
            self._draw(run, value["bar"])
        else:
            run.take(kind, value)
        if run.ended:
            self._remove_bar(run)
        return run

    def _wait(self, running: Sequence[SeedRun]) -> None:
        while not all(run.ended for run in running):
            self._handle()

    def _stop(self, running: Sequence[SeedRun]) -> None:
        """Have runs save and end, and wait for them; a second interruption stops them immediately."""
        for run in running:
            run.stop()
        while not all(run.ended for run in running):
            try:
                self._wait(running)
            except KeyboardInterrupt:
                for run in running:
                    run.interrupt()

    def _commands(self, started: Sequence[SeedRun], waiting: Sequence[int]) -> list[str]:
        """Return what continues the runs that were stopped, and starts those that have no folder yet."""
        stopped = [run for run in started if run.folder is None and run.reason is None]
        left = sorted([*(run.seed for run in stopped if run.advice is None), *waiting])
        commands = [run.advice.removeprefix("resume with ") for run in stopped if run.advice is not None]
        return commands + ([shlex.join([*self._rest, "--seeds", ",".join(map(str, left))])] if left else [])

    def _report(self, run: SeedRun) -> None:
        if run.reason is not None:
            self._print(f"clframe: error: seed {run.seed}: {run.reason}", sys.stderr)
        elif not self._quiet:
            self._print(f"seed {run.seed}: finished, {run.folder}", sys.stdout)

    def _draw(self, run: SeedRun, state: dict[str, Any] | None) -> None:
        if state is None:  # between two bars of the run
            return
        if run.position is None:
            run.position = next((i for i, bar in enumerate(self._bars) if bar is None), len(self._bars))
            form = "{desc} |{bar:20}| {percentage:.0f} %{postfix}"
            bar = progress_bar("", total=1, position=run.position, bar_format=form)
            self._bars[run.position : run.position + 1] = [bar]
        bar = self._bars[run.position]
        bar.total, bar.n = state["total"], state["done"]
        bar.set_description_str(f"seed {run.seed}: {printable(state['label'])}", refresh=False)
        bar.set_postfix_str(state["note"], refresh=False)
        bar.refresh()

    def _remove_bar(self, run: SeedRun) -> None:
        if run.position is not None:
            self._bars[run.position].close()
            self._bars[run.position] = None
            run.position = None

    def _print(self, text: str, stream: IO[str]) -> None:
        if any(bar is not None for bar in self._bars):
            from tqdm import tqdm

            tqdm.write(printable(text, lines=True), file=stream)
        else:
            print(printable(text, lines=True), file=stream, flush=True)


def _next(events: Events) -> tuple[SeedRun, str, Any]:
    while True:
        try:
            return events.get(timeout=1)  # without a timeout Windows would not deliver Ctrl-C
        except queue.Empty:
            continue


def plan_runs(runs: SideBySide, config: Config, *, seeds: Sequence[int], jobs: int | None) -> Plan:
    """Choose the number of processes for a config; measures a short run where CUDA memory decides."""
    trainer, memory = config.trainer, None
    cores = max(1, int(available_cores()))
    if jobs is None and len(seeds) > 1 and trainer.accelerator in ("auto", "cuda", "gpu"):
        import torch

        if torch.cuda.is_available():
            from clframe.build import build_strategy

            recorded = all(component.capturable for component in build_strategy(config.strategy, config.components))
            captured = recorded and trainer.capture is not False and trainer.engine == "fabric"
            memory = runs.measure(seeds[0], captured=captured)
    return choose_jobs(seeds=len(seeds), jobs=jobs, cores=cores, threads=trainer.threads, memory=memory)
