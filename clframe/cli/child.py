"""The process of one of several runs that one command trains; see :mod:`clframe.cli.pool`.

It is a run of ``clframe run --seeds A..B --jobs N`` or a cell of a sweep. It reads its request from the standard input
and writes events to the standard output, both JSON, one object a line. When the standard input is closed, also because
the process that started it was killed, the run stops as on SIGTERM: it finishes its step and saves.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.cli.context import notices, progress_line
from clframe.cli.signals import StopSignals
from clframe.errors import ClframeError, Interrupted, reason_of
from clframe.progress import BarState, hide_progress, relay_progress

if TYPE_CHECKING:
    from clframe.build import Setup

_KINDS = {"done": "finished", "failed": "failed", "locked": "locked"}
"""Event by the outcome of a cell."""
BEGIN = "begin"
"""The line after the request, on which the run begins."""


def main() -> None:
    """Run what is requested."""
    events = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to stderr

    def send(kind: str, **values: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the other process is gone, and this one will see it as well
            os.write(events, json.dumps({"kind": kind, **values}).encode() + b"\n")

    with StopSignals():
        try:
            _serve(send)
        except Interrupted as stop:
            send("interrupted", advice=stop.advice)
        except KeyboardInterrupt:  # before a run folder was made
            send("interrupted", advice=None)
        except ClframeError as error:
            send("failed", reason=reason_of(error))
        except Exception as error:  # the other runs go on
            traceback.print_exc()
            send("failed", reason=f"{type(error).__name__}: {reason_of(error, most=300)}")


def _serve(send: Any) -> None:
    request = json.loads(sys.stdin.readline())
    sys.argv = request["command"]  # recorded in the run's environment.json
    import clframe.api
    import clframe.training.launch  # while another process reads the data

    if sys.stdin.readline().strip() != BEGIN:
        return
    threading.Thread(target=_watch_input, daemon=True).start()
    quiet, measure = request["quiet"], request["measure"]
    memory: dict[str, int] = {}

    def begin(setup: Setup) -> None:
        data_notices.show(least=logging.WARNING if setup.config.earlier else logging.NOTSET)
        memory.update(_prepare_device(setup, share=request["memory_share"]))
        send("built")

    def show(bar: BarState | None) -> None:
        send("bar", bar=None if bar is None else bar._asdict())

    shown = relay_progress(show) if request["bars"] else hide_progress()

    def evaluated(progress: Any) -> None:
        send("experience", line=progress_line(progress))

    with notices(quiet=quiet) as data_notices, shown:
        if request.get("cell") is not None:
            from clframe.sweep.work import run_cell

            outcome = run_cell(Path(request["sweep"]), request["cell"], on_built=begin, on_evaluated=evaluated)
            send(_KINDS[outcome.state], folder=outcome.folder, reason=outcome.reason)
            return
        result = clframe.api.run(
            request["config"], request["overrides"], output=request["output"], on_built=begin, on_evaluated=evaluated
        )
    if measure:
        send("measured", peak=_peak(memory), **memory)
    else:
        send("finished", folder=result.run_folder)


def _prepare_device(setup: Setup, *, share: float | None) -> dict[str, int]:
    """Bound the memory of a run on CUDA to a share of the device's; returns its index, free and total bytes."""
    import torch

    from clframe.device_defaults import on_cuda

    trainer = setup.config.trainer
    if not on_cuda(trainer):
        return {}
    device = trainer.devices[0] if isinstance(trainer.devices, tuple) else 0
    if share is not None:
        torch.cuda.set_per_process_memory_fraction(share, device)
    free, total = torch.cuda.mem_get_info(device)
    return {"device": device, "free": free, "total": total}


def _peak(memory: dict[str, int]) -> int | None:
    import torch

    return torch.cuda.max_memory_reserved(memory["device"]) if memory else None


def _watch_input() -> None:
    while os.read(0, 1):
        pass
    _thread.interrupt_main(signal.SIGTERM)


if __name__ == "__main__":
    main()
