"""The processes of several runs, as seen from the one that starts them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clframe.cli.child import BEGIN

_CODE = "import sys; sys.path[:] = sys.argv[1].split(chr(10)); from clframe.cli.child import main; main()"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

Events = queue.SimpleQueue[tuple["RunProcess", str, Any]]


@dataclass(frozen=True)
class Task:
    """One run, and the request that its process reads first; see :mod:`clframe.cli.child`."""

    key: int | str
    """Its seed, or the key of its cell."""
    label: str
    """In front of its lines and bars."""
    request: Mapping[str, Any]
    reads: str = ""
    """Equal for runs that read the same data: the others begin once the first of them has read it."""


class RunProcess:
    """One process and what it has said so far.

    Args:
        task: Its run.
        threads: Its CPU threads; None leaves them to torch.
        device: The one CUDA device that it sees; None shows it all.
        events: Receives what it says: the object itself, the kind of event and its values.

    Attributes:
        measures: Whether the run is a short one, for a measurement.
        built: Whether the run is ready to train.
        ended: Whether the process has ended.
        locked: Whether another process trains the cell.
        folder: Of a finished run.
        reason: Why the run failed.
        advice: What continues a run that was stopped; None for one without a folder.
        found: What was measured.
        position: Of its progress bar.
    """

    def __init__(self, task: Task, *, threads: int | None, events: Events, device: str | None = None) -> None:
        self.task, self.device, self.measures = task, device, bool(task.request.get("measure"))
        self.built = self.ended = self.locked = False
        self.folder: Path | None = None
        self.reason: str | None = None
        self.advice: str | None = None
        self.found: dict[str, Any] | None = None
        self.position: int | None = None
        self._events = events
        self._begun = self._stopped = False
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, "\n".join(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", env=_environment(threads, device),
            start_new_session=True,  # Ctrl-C in a terminal reaches this process only, which then stops the others
        )  # fmt: skip
        self._write(json.dumps(dict(task.request)))
        self._lines = threading.Thread(target=self._read_lines, daemon=True)
        self._lines.start()
        threading.Thread(target=self._read_events, daemon=True).start()

    def begin(self) -> None:
        """Let the run begin, once."""
        if not self._begun:
            self._begun = True
            self._write(BEGIN)

    def stop(self) -> None:
        """Have the run finish its step, save and end."""
        self._stopped = True
        self._close()

    def interrupt(self) -> None:
        """Stop immediately."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)

    def take(self, kind: str, values: Any) -> None:
        """Note an event."""
        if kind == "built":
            self.built = True
        elif kind == "finished":
            self.folder = Path(values["folder"])
        elif kind == "failed":
            self.reason = values["reason"]
        elif kind == "locked":
            self.locked = True
        elif kind == "measured":
            self.found = values
        elif kind == "interrupted":
            self.advice = values["advice"]
        elif kind == "ended":
            self.ended = True
            self._close()
            known = self.folder or self.reason or self.found or self.locked
            if not known and not self._stopped:
                how = f"its process ended {_describe_exit(values)}; see the lines above"
                self.reason = how if self.advice is None else f"its process was stopped; {self.advice}"

    def _close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self._process.stdin.close()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, and an event says so
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def _read_events(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                event = json.loads(line)
                self._events.put((self, event.pop("kind"), event))
        code = self._process.wait()
        self._lines.join(timeout=1)  # loader workers may keep the other pipe open
        self._events.put((self, "ended", code))

    def _read_lines(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                if line.strip():
                    self._events.put((self, "line", line.rstrip("\n")))


def _environment(threads: int | None, device: str | None) -> dict[str, str]:
    """The environment of a process, whose torch has at most ``threads`` threads and sees one device."""
    found = dict(os.environ)
    if device is not None:
        found["CUDA_VISIBLE_DEVICES"] = device
    if threads is not None:
        for name in _THREADS:
            before = found.get(name, "")
            found[name] = str(min(threads, int(before)) if before.isdecimal() and int(before) else threads)
    return found


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
