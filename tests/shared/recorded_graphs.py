"""A stand-in for CUDA graphs on a CPU: records the operations of torch below autograd and runs them again.

Like a graph, it knows tensors only: a number that Python has computed while recording stays the same in every replay, and
an operation whose result Python reads is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
"""Operations whose result, or its shape, Python must wait for."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2].rstrip("_")
        masks = name in ("index", "index_put") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in WAITING or masks:
            raise RuntimeError(f"aten::{name} waits for the device")
        if func._schema.is_mutable:  # which of the arguments, schemas of lists do not say
            self._save((args, kwargs))
        if name in ("native_batch_norm", "_batch_norm_impl_index", "_native_batch_norm_legit", "miopen_batch_norm"):
            self._save(args[3])
            self._save(args[4])
        result = func(*args, **kwargs)
        self._alive.append(result)
        self._made |= _storages(result) - _storages((args, kwargs))  # not of views
        self.operations.append((func, args, kwargs, result))
        return result

    def _save(self, value: Any) -> None:
        """Keep the values of tensors from before the recording, which must not take effect."""
        for tensor in tree_leaves(value):
            outside = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._made
            if outside and id(tensor) not in self.before:
                self.before[id(tensor)] = tensor, tensor.detach().clone()


def _storages(values: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


class RecordedGraphs:
    """The protocol of ``clframe.nn.graphs.Graphs`` on a CPU."""

    def __init__(self) -> None:
        self.released = 0

    def epoch(self) -> AbstractContextManager[Any]:
        """Return an empty context."""
        return nullcontext()

    def branch(self) -> AbstractContextManager[Any]:
        """Return an empty context: replays are computed at once."""
        return nullcontext()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the operations of ``work`` and undo what they have written."""
        recorder = _Recorder()
        try:
            with recorder:
                work()
        finally:
            with torch.no_grad():
                for tensor, value in recorder.before.values():
                    tensor.detach().copy_(value)
        return lambda: _run(recorder.operations)

    def release(self) -> None:
        """Count the calls."""
        self.released += 1


@torch.no_grad()
def _run(operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
    """Run operations again, writing results where the recording has found them."""
    for func, args, kwargs, recorded in operations:
        returns = func._schema.returns
        if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            continue  # a view of a tensor that has been written already
        found = func(*args, **kwargs)
        for old, new in zip(tree_leaves(recorded), tree_leaves(found), strict=True):
            if isinstance(old, Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                old.detach().copy_(new)
