"""The other processes of a run on several devices: started, watched and ended by the first one.

The first process is the one that the user has started. It writes the run folder, shows progress and handles signals;
the others train along and write nothing. Each reads its request from the standard input and ends as soon as that is
closed, so none outlives the first process, however it ends. It writes events as lines of JSON to the standard output:
``ready`` to join, a ``signal`` that it has received, why it has ``failed``, and ``finished``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import torch

from clframe.errors import ClframeError, DistributedError
from clframe.training.distributed import Group
from clframe.training.rendezvous import join_group, open_store

_CODE = (
    "import sys; sys.path[:] = sys.argv[1].split(chr(10)); from clframe.cli.device_process import main; main()"
)  # no -m, which would put the working directory on the path
GRACE = 20.0
"""Seconds after the loss of a process in which the first one, perhaps blocked in a collective, can end by itself."""


class Peer:
    """One process and what it has said so far.

    Args:
        rank: Its number.
        request: What it reads.
        notify: Called after every event.
    """

    def __init__(self, rank: int, request: Mapping[str, Any], *, notify: Callable[[Peer], None]) -> None:
        self.rank = rank
        self.ready = self.finished = self.ended = False
        self.reason = ""
        self.code: int | None = None
        self._notify = notify
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by kill()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, "\n".join(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, start_new_session=True,  # Ctrl-C in a terminal reaches the first process only
        )  # fmt: skip
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which its reader notices
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                event = json.loads(line)
                kind = event["kind"]
                if kind == "signal":
                    os.kill(os.getpid(), event["number"])
                self.ready |= kind == "ready"
                self.finished |= kind == "finished"
                self.reason = event.get("reason", self.reason)
                self._notify(self)
        self.code = self._process.wait()
        self.ended = True
        self._notify(self)

    @property
    def is_lost(self) -> bool:
        """Whether it has ended without having finished."""
        return self.ended and not self.finished

    def describe_end(self) -> str:
        """Return why it has ended, in one line."""
        if self.reason:
            return self.reason
        assert self.code is not None
        if self.code < 0:
            with contextlib.suppress(ValueError):
                return f"ended by {signal.Signals(-self.code).name}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"ended with exit code {self.code}" + (f" ({last[:200]})" if last else "")

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def kill(self, seconds: float) -> None:
        """End it, with the workers that it has started, if it has not ended after some seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)
        with contextlib.suppress(OSError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        self._errors.close()


class Peers:
    """All other processes of a run.

    Args:
        requests: One for each, see :mod:`clframe.cli.device_process`.
        advice: What to do after the loss of one.

    Attributes:
        on_stuck: Called with the reason before this process ends itself because it is blocked.
    """

    def __init__(self, requests: Sequence[Mapping[str, Any]], *, advice: str) -> None:
        self._changed = threading.Condition()
        self._advice, self._size = advice, len(requests) + 1
        self._stopping = False
        self._watching = False
        self.on_stuck: Callable[[str], None] = lambda reason: None
        self._peers: list[Peer] = []
        for rank, request in enumerate(requests, start=1):
            self._peers.append(Peer(rank, request, notify=self._note))

    def _note(self, peer: Peer) -> None:
        with self._changed:
            self._changed.notify_all()
            first = peer.is_lost and not self._stopping and not self._watching
            self._watching |= first
        if first:
            threading.Thread(target=self._end_if_stuck, daemon=True).start()

    def _end_if_stuck(self) -> None:
        """End this process if it is still blocked some time after the loss of another one."""
        with self._changed:
            if self._changed.wait_for(lambda: self._stopping, timeout=GRACE):
                return
        reason = self.loss()
        with contextlib.suppress(Exception):  # nothing may keep the process from ending
            self.on_stuck(reason)
        os.write(2, f"clframe: error: {reason}\n".encode())
        for peer in self._peers:
            peer.close()
        for peer in self._peers:
            peer.kill(0)
        os._exit(2)

    def loss(self) -> str:
        """Return the message about a lost process; empty where none is lost."""
        lost = [peer for peer in self._peers if peer.is_lost]
        if not lost:
            return ""
        # A process that was killed before others that fail because of it.
        cause = min(lost, key=lambda peer: (peer.code is not None and peer.code >= 0, peer.rank))
        return f"trainer.devices: process {cause.rank + 1} of {self._size}: {cause.describe_end()}; {self._advice}"

    def wait_until_ready(self) -> None:
        """Return once every process has built what it trains.

        Raises:
            DistributedError: One has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: all(peer.ready or peer.ended for peer in self._peers))
        self._raise_loss()

    def _raise_loss(self, *, cause: BaseException | None = None, seconds: float = 0.0) -> None:
        with self._changed:
            self._changed.wait_for(lambda: any(peer.is_lost for peer in self._peers), timeout=seconds)
        reason = self.loss()
        if reason:
            raise DistributedError(reason) from cause

    @contextlib.contextmanager
    def explain_failures(self) -> Iterator[None]:
        """Raise DistributedError for the failure of a collective that the loss of another process has caused."""
        try:
            yield
        except ClframeError:
            raise
        except Exception as error:  # NCCL and gloo raise various classes
            self._raise_loss(cause=error, seconds=3.0)
            raise

    def finish(self) -> None:
        """Wait for the end of processes that have finished.

        Raises:
            DistributedError: One has not.
        """
        end = time.monotonic() + GRACE
        with self._changed:
            self._changed.wait_for(lambda: all(p.ended for p in self._peers), timeout=end - time.monotonic())
        self._raise_loss()

    def stop(self) -> None:
        """End all processes."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for peer in self._peers:
            peer.close()
        for peer in self._peers:
            peer.kill(2.0)


@contextlib.contextmanager
def train_together(
    devices: Sequence[torch.device], request: Mapping[str, Any], *, advice: str
) -> Iterator[tuple[Group, Peers]]:
    """Start a process for every device but the first, and join them in a group.

    Args:
        devices: Of the processes, the first that of this one.
        request: What each of the others is asked to do; see :mod:`clframe.cli.device_process`.
        advice: What to do after the loss of a process.

    Raises:
        DistributedError: A process has failed.
    """
    size = len(devices)
    store = open_store(0, size=size, first=True)
    requests = [{**request, "rank": rank, "port": store.port} for rank in range(1, size)]
    peers = Peers(requests, advice=advice)
    try:
        peers.wait_until_ready()
        with peers.explain_failures():
            group = join_group(store, rank=0, devices=devices)
        yield group, peers
        with peers.explain_failures():
            group.barrier()
            group.close()
        peers.finish()
    finally:
        peers.stop()
        _leave()


def _leave() -> None:
    """Leave the group of processes, some of which may have been lost."""
    from torch import distributed as dist

    if not dist.is_initialized():
        return
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    with contextlib.suppress(Exception):  # whatever a group without its members raises
        if abort is not None and torch.cuda.is_available():
            abort()  # destroying one waits for collectives that will never end
        else:
            dist.destroy_process_group()
