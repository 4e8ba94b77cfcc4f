"""Early exit for requests that arrive one by one: early answers return, other samples continue in a shared batch.

Requests that have arrived are computed together, segment by segment (:mod:`clframe.exits.segments`). After the exit at
the end of a segment the samples that stop are answered, the others wait, with everything carried for them, for the next
segment, where those of several batches meet. So an easy request never waits for a hard one of its batch.

Shape suffixes: n samples of a batch, C classes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count
from time import monotonic
from typing import Literal

import torch
from torch import Tensor

from clframe.errors import ClframeError, ConfigError, DataError
from clframe.exits.active_samples import ActiveSamples
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.segment_runners import PlainRunner, SegmentRun, SegmentRunner
from clframe.exits.server_requests import Answer, Chunk, Request, first_rows


class BusyError(ClframeError):
    """The queue of a server is full."""


class ClosedError(ClframeError):
    """The server has been closed."""


@dataclass(eq=False)
class _Batch:
    """Samples for which a segment is computed."""

    segment: int
    requests: list[Request]
    chunks: list[Chunk]
    """The chunks of these samples; empty in the first segment."""
    run: SegmentRun | None = None
    error: Exception | None = None
    """Why it could not be launched."""

    def is_ready(self) -> bool:
        """Whether it can be finished without waiting."""
        return self.error is not None or (self.run is not None and self.run.is_ready())


class ExitServer:
    """Answers single requests by early exit, in batches that samples join and leave between segments.

    Use it as an asynchronous context, which closes it at the end::

        async with ExitServer(dynamic, max_batch=32) as server:
            answer = await server.predict(x)

    Answers are those of the :class:`DynamicNetwork`, up to the rounding of kernels that depend on the batch size. If a
    batch fails, its samples are computed one by one, and only those that fail get the error.

    If the runner computes one segment at a time, the oldest request is served first, where every exit that it has
    passed counts as ``slack`` seconds of waiting less: with 0 a batch is finished before the next one starts, with a
    large value new requests always run first. Otherwise (:class:`GraphRunner
    <clframe.exits.segment_runners.GraphRunner>`) a segment starts when its previous batch is complete, whatever others
    do. On CUDA segments are launched from the event loop, which then looks after every turn whether they are complete;
    elsewhere they are computed in another thread.

    Whatever stops the event loop delays every answer: record graphs before requests arrive (:meth:`GraphRunner.prepare
    <clframe.exits.segment_runners.GraphRunner.prepare>`), and call ``gc.collect()`` and ``gc.freeze()`` after that: to
    collect all objects of a process with torch takes tenths of a second.

    Args:
        dynamic: The network and its policy.
        max_batch: Most samples that are computed together.
        max_waiting: Most requests that have not been answered; further ones are refused.
        slack: Seconds, see above; only for a runner that computes one segment at a time.
        runner: Runs the segments; those of ``dynamic`` as they are if not given.

    Attributes:
        events: The last segments that ran: ``(segment, numbers of the requests)``; requests count from 0.

    Raises:
        ConfigError: A limit below 1, a negative slack, larger batches than those of the runner, or a slack that has no
            effect.

    >>> from clframe.exits.policies import ExitPolicy
    >>> from clframe.nn import GrowingLinear, Network
    >>> from clframe.nn.backbones import mlp
    >>> network = Network(mlp((4,), width=8), exits=[("layer1", GrowingLinear(8))])
    >>> network.grow([0, 1, 2])
    True
    >>> async def main():
    ...     async with ExitServer(DynamicNetwork(network.eval(), ExitPolicy(thresholds=0.0))) as server:
    ...         return await asyncio.gather(*(server.predict(x) for x in torch.zeros(3, 4)))
    >>> [answer.exit for answer in asyncio.run(main())]
    [0, 0, 0]
    """

    def __init__(
        self,
        dynamic: DynamicNetwork,
        *,
        max_batch: int = 32,
        max_waiting: int = 1024,
        slack: float = 0.0,
        runner: SegmentRunner | None = None,
    ) -> None:
        if max_batch < 1 or max_waiting < 1 or not slack >= 0:
            raise ConfigError(
                f"server: found max_batch={max_batch}, max_waiting={max_waiting}, slack={slack}; give limits of 1 or "
                "more and 0 seconds or more"
            )
        self.max_batch, self.max_waiting, self.slack = max_batch, max_waiting, slack
        self._runner = PlainRunner(dynamic) if runner is None else runner
        if self._runner.max_batch is not None and max_batch > self._runner.max_batch:
            raise ConfigError(
                f"server: found max_batch={max_batch} and a runner for {self._runner.max_batch} samples; give both the "
                "same number"
            )
        if slack and self._runner.concurrent:
            raise ConfigError(
                f"server: found slack={slack} and a runner that computes segments at the same time, in no order; leave "
                "slack out, or give the runner concurrent=False"
            )
        self._network = dynamic.network
        self._requests: deque[Request] = deque()
        self._pools: list[deque[Chunk]] = [deque() for _ in range(self._runner.segments)]  # the first stays empty
        self._on_cuda = dynamic.network.final.weight.device.type == "cuda"
        self._numbers, self._unanswered = count(), 0
        self._arrived = asyncio.Event()
        self._running = list[_Batch]()
        self._worker: asyncio.Task[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._closed = self._refusing = False
        self.events: deque[tuple[int, tuple[int, ...]]] = deque(maxlen=1000)

    async def __aenter__(self) -> ExitServer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def predict(self, x: Tensor) -> Answer:
        """Answer one sample, prepared as the network expects it, without a batch dimension.

        If the caller is cancelled, the sample is dropped before the next segment.

        Raises:
            DataError: An input of another shape than the network expects; other requests are not affected.
            BusyError: As many requests as allowed are waiting.
            ClosedError: The server is closed.
        """
        if self._closed:
            raise ClosedError("server: found a request after it was closed; make another server")
        expected = tuple(self._network.input_shape)  # of integers only the number of dimensions: texts differ in length
        if x.dim() != len(expected) or (x.is_floating_point() and tuple(x.shape) != expected):
            raise DataError(f"server: found an input of shape {tuple(x.shape)}; give one sample of shape {expected}")
        if self._unanswered >= self.max_waiting:
            raise BusyError(f"server: found {self._unanswered} requests waiting; try again later or raise max_waiting")
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._requests.append(Request(x, next(self._numbers), monotonic(), answer))
        self._unanswered += 1
        self._arrived.set()
        if self._worker is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="exit-server")
            self._worker = asyncio.create_task(self._serve())
        try:
            return await answer
        finally:
            self._unanswered -= 1

    async def close(self, *, waiting: Literal["answer", "refuse"] = "answer") -> None:
        """Refuse further requests and end the thread.

        A call that is cancelled, such as by ``asyncio.wait_for``, leaves the server closed and its requests to the
        worker, which still answers them; call again with ``waiting="refuse"`` to end sooner.

        Args:
            waiting: Whether requests that wait are answered first, or raise :class:`ClosedError` after the segment that
                is running.
        """
        self._closed = True
        if waiting == "refuse":
            self._refusing = True
            self._fail(_refusal())
        self._arrived.set()
        worker = self._worker
        if worker is not None:
            # Not awaited itself: the cancellation of this call would cancel it, and with it the requests.
            await asyncio.wait([worker])
            self._worker = None
            if not worker.cancelled():
                worker.result()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    async def _serve(self) -> None:
        """Run segments until the server is closed and nothing waits, then end the thread."""
        changed = True
        try:
            while True:
                if changed or self._arrived.is_set():  # asked in every turn while a GPU computes
                    self._arrived.clear()
                    while (not self._running or self._runner.concurrent) and (batch := self._take()) is not None:
                        self._running.append(batch)
                        await self._launch(batch)
                if self._running:
                    await asyncio.sleep(0)
                    ready = [batch for batch in self._running if batch.is_ready()]
                    for batch in ready:
                        await self._finish(batch)
                        self._running.remove(batch)
                    changed = bool(ready)
                elif self._closed:
                    return
                else:
                    await self._arrived.wait()
        except BaseException as error:
            self._closed = True
            cancelled = isinstance(error, asyncio.CancelledError)
            reason = "its task was cancelled" if cancelled else f"ended by {type(error).__name__}"
            self._fail(ClosedError(f"server: {reason} before the answer; make another server"), running=self._running)
            raise
        finally:
            if self._thread is not None:
                self._thread.shutdown(wait=False)

    def _take(self) -> _Batch | None:
        """The samples to compute next, of a segment that is not computed now; None where no sample waits for one."""
        self._drop_cancelled()
        busy = {batch.segment for batch in self._running}
        due = [(self._requests[0].since, 0)] if self._requests and 0 not in busy else []
        due += [
            (pool[0].requests[0].since + segment * self.slack, -segment)  # of equal times the latest segment
            for segment, pool in enumerate(self._pools)
            if pool and segment not in busy
        ]
        if not due:
            return None
        segment = -min(due)[1]
        batch = self._take_requests() if segment == 0 else self._take_chunks(segment)
        self.events.append((segment, tuple(request.number for request in batch.requests)))
        return batch

    def _take_chunks(self, segment: int) -> _Batch:
        """The chunk that has waited longest for a segment, and others of its kind."""
        pool = self._pools[segment]
        chunks = [pool.popleft()]
        size = len(chunks[0].requests)
        while pool and pool[0].kind == chunks[0].kind and size + len(pool[0].requests) <= self.max_batch:
            chunks.append(pool.popleft())
            size += len(chunks[-1].requests)
        return _Batch(segment, [request for chunk in chunks for request in chunk.requests], chunks)

    def _take_requests(self) -> _Batch:
        """The oldest request and others with inputs of its shape, type and device."""
        batch, others = list[Request](), list[Request]()
        while self._requests and len(batch) < self.max_batch:
            request = self._requests.popleft()
            (batch if not batch or request.kind == batch[0].kind else others).append(request)
        self._requests.extendleft(reversed(others))
        return _Batch(0, batch, [])

    def _drop_cancelled(self) -> None:
        if any(request.answer.done() for request in self._requests):
            self._requests = deque(request for request in self._requests if not request.answer.done())
        for pool in self._pools:
            for _ in range(len(pool)):
                chunk = pool.popleft()
                keep = [at for at, request in enumerate(chunk.requests) if not request.answer.done()]
                if keep:
                    complete = len(keep) == len(chunk.requests)
                    pool.append(chunk if complete else chunk.pick(keep))

    async def _launch(self, batch: _Batch) -> None:
        """Start the computation of a batch; on a CPU complete it."""
        if batch.segment + 1 < len(self._pools):
            for chunk in self._pools[batch.segment + 1]:
                chunk.own()
        try:
            if self._on_cuda:
                batch.run = self._run(batch)
            else:
                batch.run = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, batch)
        except Exception as error:  # of a model or an input, of any kind
            batch.error = error

    def _run(self, batch: _Batch) -> SegmentRun:
        if batch.segment:
            return self._runner.launch(batch.segment, [chunk.rows for chunk in batch.chunks])
        x = torch.stack([request.x for request in batch.requests])
        return self._runner.launch(0, [ActiveSamples(self._network.to_device(x))])

    async def _finish(self, batch: _Batch) -> None:
        """Answer the samples of a computed batch that stop, and pass on the others."""
        requests, run = batch.requests, batch.run
        try:
            if run is None:
                raise batch.error or AssertionError
            scores_nC, exits, stops = run.results()
        except Exception as error:
            await self._run_apart(batch, error)
            return
        for request, scores_C, exit, stopped in zip(requests, scores_nC.unbind(0), exits, stops, strict=True):
            if stopped:
                _resolve(request.answer, Answer(scores_C, exit))
            elif self._refusing:
                _resolve(request.answer, _refusal())
        remaining = [at for at, stopped in enumerate(stops) if not stopped]
        keep = [row for row, at in enumerate(remaining) if not requests[at].answer.done()]
        if not keep:
            return
        assert run.rows is not None
        if run.remaining_first:
            rows = first_rows(run.rows, len(remaining))
            passed = Chunk(rows, [requests[at] for at in remaining], shared=True)
        else:
            passed = Chunk(run.rows, requests).pick(remaining)
        self._pools[batch.segment + 1].append(passed.pick(keep))

    async def _run_apart(self, batch: _Batch, error: Exception) -> None:
        """Run the samples of a batch that has failed one by one; a single one gets the error."""
        if len(batch.requests) == 1:
            _resolve(batch.requests[0].answer, error)
            return
        single = [_Batch(batch.segment, [request], []) for request in batch.requests if not batch.chunks]
        for chunk in batch.chunks:
            for at, request in enumerate(chunk.requests):
                single.append(_Batch(batch.segment, [request], [chunk.pick([at])]))
        for each in single:
            await self._launch(each)
            while not each.is_ready():
                await asyncio.sleep(0)
            await self._finish(each)

    def _fail(self, error: Exception, *, running: Sequence[_Batch] = ()) -> None:
        """Give an error to all requests that wait, and to those of ``running`` that have not been answered."""
        waiting = [chunk.requests for pool in self._pools for chunk in pool]
        for request in chain(self._requests, *waiting, *(batch.requests for batch in running)):
            _resolve(request.answer, error)
        self._requests.clear()
        for pool in self._pools:
            pool.clear()


def _refusal() -> ClosedError:
    return ClosedError("server: closed before the answer; make another server")


def _resolve(answer: asyncio.Future[Answer], found: Answer | Exception) -> None:
    """Set an answer or an error, unless the caller has been cancelled."""
    if answer.done():
        return
    if isinstance(found, Exception):
        answer.set_exception(found)
    else:
        answer.set_result(found)
