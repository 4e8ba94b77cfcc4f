"""Weights and component states that are equal in all processes: those of the first process, sent to the others.

The first process describes its states: the shapes of their tensors, and everything else in them. The others allocate
the tensors that they lack, and then all tensors are sent in a few calls. :func:`fingerprint` shows whether tensors that
should be equal have remained so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from clframe.errors import DistributedError
from clframe.nn.network import Network

BUCKET = 2**26
"""Most values that are sent in one call."""


@torch.no_grad()
def synchronize(
    network: Network, states: Mapping[str, Any], *, device: torch.device, is_first: bool
) -> dict[str, Any]:
    """Give every process the weights, buffers and component states of the first one; returns the states.

    Args:
        network: Its tensors are overwritten.
        states: States by component name.
        device: That of this process.
        is_first: Whether this is the first process.

    Raises:
        DistributedError: A state has a network in one process and none in another.
    """
    plans = [_describe(states) if is_first else None]
    dist.broadcast_object_list(plans, 0)
    tensors = _tensors_of(network)
    found = _adopt(plans[0], states, tensors, device)
    assert isinstance(found, dict)
    _send(tensors, is_first=is_first)
    return found


def _describe(value: Any) -> Any:
    """Shapes of the tensors and networks in a state, and everything else in it."""
    if isinstance(value, Network):
        return "network", None
    if isinstance(value, Tensor):
        return "tensor", (value.shape, value.dtype, value.device.type)
    if isinstance(value, Mapping):
        return "mapping", {key: _describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_describe(item) for item in value]
    return "value", value


def _adopt(plan: Any, own: Any, tensors: list[Tensor], device: torch.device) -> Any:
    """Return the first process' value for ``own``, as described by ``plan``.

    Args:
        plan: The description.
        own: Value of this process.
        tensors: Is extended by the tensors of the value that are still to be sent.
        device: That of this process.
    """
    kind, content = plan
    if kind == "network":
        if not isinstance(own, Network):
            raise DistributedError(
                "trainer.devices: the processes differ in the networks that components keep; train on one device"
            )
        tensors += _tensors_of(own)
        return own
    if kind == "tensor":
        shape, dtype, where = content
        place = torch.device("cpu") if where == "cpu" else device
        fits = isinstance(own, Tensor) and own.shape == shape and own.dtype == dtype and own.device == place
        tensor = own if fits else torch.empty(shape, dtype=dtype, device=place)
        tensors.append(tensor.data)
        return tensor
    if kind == "mapping":
        mine = own if isinstance(own, Mapping) else {}
        return {key: _adopt(part, mine.get(key), tensors, device) for key, part in content.items()}
    if kind in ("list", "tuple"):
        values = list(own) if isinstance(own, (list, tuple)) else []
        values += [None] * (len(content) - len(values))
        parts = [_adopt(part, value, tensors, device) for part, value in zip(content, values, strict=False)]
        return parts if kind == "list" else tuple(parts)
    return content


def _send(tensors: Sequence[Tensor], *, is_first: bool) -> None:
    """Overwrite tensors by those of the first process, in a few calls."""
    for bucket in buckets([tensor for tensor in tensors if tensor.numel()]):
        parts = [as_bytes(tensor.contiguous()) for tensor in bucket]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        dist.broadcast(flat, 0)
        if not is_first:
            for tensor, part in zip(bucket, flat.split([len(part) for part in parts]), strict=True):
                tensor.copy_(part.view(tensor.dtype).view(tensor.shape))


def _tensors_of(network: Network) -> list[Tensor]:
    return [tensor.data for tensor in (*network.parameters(), *network.buffers())]


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Divide tensors into lists of one type and device and at most ``BUCKET`` values, or one tensor."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        alike = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or size + tensor.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a flat view as bytes, because gloo does not know every type of number."""
    return tensor.reshape(-1).view(torch.uint8)


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """Return a number that differs, in all likelihood, between tensors that differ."""
    sums = [tensor.detach().sum(dtype=torch.float64) for tensor in tensors if tensor.numel()]
    if not sums:
        return torch.zeros((), dtype=torch.float64)
    values = torch.stack([value.to(sums[0].device) for value in sums])
    return (values * torch.linspace(1, 2, len(sums), dtype=torch.float64, device=values.device)).sum()


def state_tensors(state: Any) -> Iterator[Tensor]:
    """Yield the tensors of a state; those of networks are frozen copies, which are synchronized with it."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for part in state.values():
            yield from state_tensors(part)
    elif isinstance(state, (list, tuple)):
        for part in state:
            yield from state_tensors(part)
