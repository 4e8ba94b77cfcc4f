"""A process of a run on several devices other than the first; see :mod:`clframe.training.peers`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from typing import Any

from clframe.errors import ClframeError, reason_of
from clframe.progress import hide_progress


def main() -> None:
    """Train along."""
    events = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to stderr

    def send(kind: str, **values: Any) -> None:
        with contextlib.suppress(OSError):  # the first process is gone, and this one is about to end
            os.write(events, json.dumps({"kind": kind, **values}).encode() + b"\n")

    # A signal to one process is a signal to the run: the first process finishes the step, saves and ends all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):  # Windows has only the first
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: send("signal", number=number))
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_first, daemon=True).start()
    sys.argv = request["command"]
    code = 1
    try:
        from clframe.execution import train_along

        with hide_progress():
            train_along(
                request["folder"], rank=request["rank"], port=request["port"], devices=request["devices"],
                resumes=request["resumes"], on_ready=lambda: send("ready"),
            )  # fmt: skip
        send("finished")
        code = 0
    except ClframeError as error:
        send("failed", reason=reason_of(error))
    except BaseException as error:
        traceback.print_exc()
        send("failed", reason=f"{type(error).__name__}: {reason_of(error, most=300)}")
    sys.stderr.flush()
    os._exit(code)  # without waiting for threads of collectives whose other processes may be gone


def _end_with_first() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
