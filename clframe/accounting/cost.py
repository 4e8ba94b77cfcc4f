"""MACs: one multiply-add counts 1; FLOPs = 2 x MACs.

:func:`measure` says what one call of any module costs. Counted are matrix products, convolutions, attention and
recurrent layers, by formulas on the operators that the call really runs; normalization, activations, pooling,
additions and biases count nothing, and :meth:`Cost.by_convention` lists them. What no formula and no convention
covers is in :meth:`Cost.uncounted`.

Counts follow shapes alone: zeros in weights or activations and masks of attention do not lower them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from clframe.errors import UnsupportedError
from clframe.functional.mac_counter import MacCounter
from clframe.functional.macs import as_found, count_parameters


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call costs."""

    macs: int
    """Multiply-adds of the call, for all samples in it."""
    parameters: int
    """Parameters, shared ones once, trained or not."""
    bytes: int
    """Bytes of parameters and buffers, shared ones once."""
    modules: Mapping[str, int] = field(default_factory=dict)
    gaps: Mapping[str, int] = field(default_factory=dict)
    conventions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Floating-point operations: two a multiply-add."""
        return 2 * self.macs

    def by_module(self) -> dict[str, int]:
        """MACs of every module called, under its name in the whole, which is the empty name; parts included."""
        return dict(self.modules)

    def uncounted(self) -> dict[str, int]:
        """How often each operator was called that neither a formula nor a convention covers; empty: none."""
        return dict(self.gaps)

    def by_convention(self) -> dict[str, dict[str, int]]:
        """How often each operator was called that counts nothing by convention, by family and name."""
        return {family: dict(calls) for family, calls in self.conventions.items()}


def measure(module: nn.Module, example: Any) -> Cost:
    """The cost of ``module(example)`` in evaluation mode, without gradients, with everything left as it was found.

    Works on real devices and on ``meta``, where nothing is computed.

    Args:
        module: What to measure.
        example: One tensor, a tuple of arguments, or a mapping of keyword arguments; tensors are moved to the
            module's device.

    Raises:
        UnsupportedError: The module is on ``meta`` and its path depends on values.

    >>> cost = measure(nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 2)), torch.zeros(3, 10))
    >>> cost.macs, cost.flops, cost.parameters, cost.bytes
    (180, 360, 67, 268)
    >>> cost.by_module()
    {'': 180, '0': 150, '1': 0, '2': 30}
    """
    args, kwargs = _arguments(module, example)
    with as_found(module), torch.no_grad(), MacCounter(modules=True) as counter:
        try:
            module(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
                raise
            raise UnsupportedError(
                f"measure: {type(module).__name__} cannot run on meta tensors ({' '.join(str(error).split())[:120]}); "
                f"measure it on a real device"
            ) from error
    called = counter.by_module()
    return Cost(
        macs=counter.macs,
        parameters=count_parameters(module),
        bytes=module_bytes(module),
        modules={name: called.get(_called(module, name), 0) for name, _ in module.named_modules()},
        gaps=counter.uncounted(),
        conventions=counter.by_convention(),
    )


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once.

    >>> module_bytes(nn.BatchNorm1d(3))  # two vectors learnt, two tracked, and a count of batches
    56
    """
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _called(module: nn.Module, name: str) -> str:
    """The name by which the counter knows a part."""
    root = type(module).__name__
    return f"{root}.{name}" if name else root


def _arguments(module: nn.Module, example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    tensor = next((t for t in (*module.parameters(), *module.buffers())), None)
    if tensor is not None:
        device = tensor.device
        example = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, example)
    if isinstance(example, Mapping):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}
