"""CUDA graphs: work recorded once and replayed by one launch, and a watch on the weights that the work reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Graphs(Protocol):
    """Records and replays work: :class:`CudaGraphs`, or a stand-in for tests on a CPU."""

    def epoch(self) -> AbstractContextManager[Any]:
        """Return the context in which an epoch runs: its eager steps, recordings and replays."""

    def branch(self) -> AbstractContextManager[Any]:
        """Return a context in which replays wait for what was launched before, and nothing outside waits for them."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work`` without running it; returns the function that runs it.

        Raises:
            RuntimeError: ``work`` waits for the device.
        """

    def release(self) -> None:
        """Free the memory of unreferenced graphs."""


class CudaGraphs:
    """Graphs on one CUDA device. They share a memory pool, since only one of them runs at a time.

    Args:
        device: The device.
        priority: Of their stream: kernels of a lower number run first. It is recorded with the graphs.
    """

    def __init__(self, device: torch.device, *, priority: int = 0) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=priority)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Return a context on the stream that records: autograd remembers the stream on which a parameter was used."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @contextmanager
    def branch(self) -> Iterator[None]:
        """Return a context on the stream that records; see :class:`Graphs`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work``; see :class:`Graphs`."""
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog may query events in its own thread, which other modes forbid.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def release(self) -> None:
        """Free the memory of unreferenced graphs."""
        torch.cuda.empty_cache()
        self._pool = torch.cuda.graph_pool_handle()


class WeightWatch:
    """Notices that a module's tensors have been replaced, and keeps the memory of those that a graph reads.

    A graph reads values written in place, such as by ``load_state_dict`` or an optimizer, at its next replay. After
    parameters have been replaced or moved, such as by ``Network.grow`` or ``to``, it would read the old ones.

    >>> layer = nn.Linear(2, 2)
    >>> watch = WeightWatch(layer)
    >>> layer.load_state_dict(nn.Linear(2, 2).state_dict()), watch.has_changed()
    (<All keys matched successfully>, False)
    >>> layer.weight = nn.Parameter(torch.zeros(3, 2))
    >>> watch.has_changed()
    True
    """

    def __init__(self, module: nn.Module) -> None:
        # The dictionaries of all modules: walking through them takes a tenth of the time of module.parameters().
        modules = list(module.modules())
        self._children = [part._modules for part in modules if part._modules]
        self._tensors: list[dict[str, Any]] = [
            found for part in modules for found in (part._parameters, part._buffers) if found
        ]
        self._state = self._read()
        self._memory = [
            tensor.detach() for found in self._tensors for tensor in found.values() if isinstance(tensor, Tensor)
        ]

    def has_changed(self) -> bool:
        """Whether a module, parameter or buffer has been replaced or moved since the watch began."""
        return self._read() != self._state

    def _read(self) -> list[int]:
        children = [id(child) for found in self._children for child in found.values()]
        pointers = [
            0 if tensor is None else tensor.data_ptr() for found in self._tensors for tensor in found.values()
        ]
        return children + pointers
