"""MACs of networks and of arbitrary calls: one multiply-add counts 1; FLOPs = 2 x MACs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from clframe.accounting.mac_counter import Convention, MacCounter
from clframe.errors import UnsupportedError, reason_of

__all__ = [
    "ConditionalModule", "Convention", "Staged", "UncountedWarning", "backbone_macs", "count_macs", "count_parameters",
    "cumulative_macs", "evaluation_mode", "stage_macs", "zeros_for",
]  # fmt: skip


class ConditionalModule(nn.Module):
    """Base of modules that leave out parts of their computation depending on the input, such as experts with a router.

    :func:`count_macs` and the functions built on it count such a module with every part, so that the number depends on
    shapes only; what predictions save is counted on samples.
    """

    def compute_all(self) -> AbstractContextManager[None]:
        """Return a context in which every part runs for every input."""
        raise NotImplementedError


class UncountedWarning(UserWarning):
    """A count of MACs is too low, because it leaves out operators without a formula."""


class Staged(Protocol):
    """Interface of networks with named stages in order, each with the exits on its output.

    A protocol, because this package is below :mod:`clframe.nn` in the layers.
    """

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input sample."""

    def plan(self) -> Sequence[tuple[str, nn.Module, Sequence[tuple[str, int]]]]:
        """Return ``(stage name, stage, ((exit name, exit number), ...))`` for every stage."""

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over all submodules, as ``nn.Module.modules``."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over all parameters, as ``nn.Module.parameters``."""

    def eval(self) -> Any:
        """Set evaluation mode, as ``nn.Module.eval``."""

    def classify(self, exit: int, tap: Tensor, previous_BC: Tensor | None) -> Tensor:
        """Return logits_BC of one exit, given those of the exit before."""


def count_macs(
    module: nn.Module, input_shape: Sequence[int], *, batch: int = 1, convention: Convention = "macs"
) -> int:
    """Count the MACs of one forward pass in evaluation mode over ``batch`` samples of zeros.

    The pass runs on the module's device and changes no training flag, buffer or random state. Of modules that leave out
    parts of their computation everything counts, see :class:`ConditionalModule`. Operators without a
    formula count 0 and are named in an :class:`UncountedWarning`, here and in the functions below.

    Args:
        module: Module to count, called with one tensor of its parameters' dtype.
        input_shape: Shape of one sample.
        batch: Number of samples; the count is for all of them.
        convention: Operations that count.

    >>> count_macs(nn.Linear(10, 5), (10,))
    50
    """
    with _counting(module, convention) as macs:
        module(zeros_for(module, (batch, *input_shape)))
        return macs()


def stage_macs(network: Staged, *, batch: int = 1, convention: Convention = "macs") -> dict[str, int]:
    """Count the MACs of every stage, and of every exit's head as ``exit/<name>``; their sum is the network's.

    Args:
        network: A network with stages and exits.
        batch: Number of samples; the counts are for all of them.
        convention: Operations that count.

    >>> from clframe.nn import Network
    >>> from clframe.nn.backbones import mlp
    >>> stage_macs(Network(mlp((1, 2, 2), width=10)))
    {'layer1': 40, 'layer2': 100, 'exit/final': 0}
    """
    counts: dict[str, int] = {}
    with _counting(network, convention) as macs:
        value: Any = zeros_for(network, (batch, *network.input_shape))
        logits_BC: Tensor | None = None
        before = 0
        for name, stage, exits in network.plan():
            value = stage(value)
            counts[name] = macs() - before
            before = macs()
            tap = value if isinstance(value, Tensor) else value[0]
            for exit_name, exit in exits:
                logits_BC = network.classify(exit, tap, logits_BC)
                counts[f"exit/{exit_name}"] = macs() - before
                before = macs()
    return counts


def cumulative_macs(
    network: Staged, *, convention: Convention = "macs", counts: Mapping[str, int] | None = None
) -> tuple[int, ...]:
    """Return cost_K, the MACs of one sample up to and including exit k and the heads of all earlier exits.

    Stages behind the last exit are left out; there are none if it is the backbone's own classifier.

    Args:
        network: A network with stages and exits.
        convention: Operations that count.
        counts: What :func:`stage_macs` returns for this network, if it has been counted before.

    >>> from clframe.nn import GrowingLinear, Network
    >>> from clframe.nn.backbones import mlp
    >>> network = Network(mlp((1, 2, 2), width=10), exits=[("layer1", GrowingLinear(10))])
    >>> network.grow(range(3)), cumulative_macs(network)
    (True, (70, 200))
    """
    counts = counts or stage_macs(network, convention=convention)
    spent, costs = 0, {}
    for stage, _, exits in network.plan():
        spent += counts[stage]
        for name, exit in exits:
            spent += counts[f"exit/{name}"]
            costs[exit] = spent
    return tuple(costs[exit] for exit in sorted(costs))


def backbone_macs(network: Staged, *, convention: Convention = "macs", counts: Mapping[str, int] | None = None) -> int:
    """Count the MACs of one sample through the backbone and its own classifier, the reference for budgets.

    Args:
        network: A network with stages and exits.
        convention: Operations that count.
        counts: What :func:`stage_macs` returns for this network, if it has been counted before.

    >>> from clframe.nn import GrowingLinear, Network
    >>> from clframe.nn.backbones import mlp
    >>> network = Network(mlp((1, 2, 2), width=10), exits=[("layer1", GrowingLinear(10))])
    >>> network.grow(range(3)), backbone_macs(network)
    (True, 170)
    """
    counts, plan = counts or stage_macs(network, convention=convention), network.plan()
    last, _ = plan[-1][2][-1]
    return sum(counts[stage] for stage, _, _ in plan) + counts[f"exit/{last}"]


def count_parameters(module: nn.Module) -> int:
    """Count parameters, shared ones once, trainable or not.

    >>> count_parameters(nn.Linear(10, 5))
    55
    """
    return sum(parameter.numel() for parameter in module.parameters())


def zeros_for(module: nn.Module | Staged, shape: Sequence[int]) -> Tensor:
    """Return zeros of this shape with the dtype and device of the module's parameters."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return torch.zeros(*shape)
    return torch.zeros(*shape, dtype=parameter.dtype, device=parameter.device)


@contextmanager
def evaluation_mode(module: nn.Module | Staged) -> Iterator[None]:
    """Set evaluation mode; restore training flags and random states on exit."""
    training = {part: part.training for part in module.modules()}
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        module.eval()
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for part, flag in training.items():
            part.training = flag


@contextmanager
def _counting(module: nn.Module | Staged, convention: Convention) -> Iterator[Callable[[], int]]:
    """Count in evaluation mode without gradients; yields a function that returns the MACs so far."""
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, ConditionalModule):
                stack.enter_context(part.compute_all())
        stack.enter_context(evaluation_mode(module))
        stack.enter_context(torch.no_grad())
        counter = stack.enter_context(MacCounter(convention=convention))
        yield lambda: counter.macs
    gaps = counter.uncounted()
    if gaps:
        calls = ", ".join(f"{name} ({count} call{'s'[: count > 1]})" for name, count in gaps.items())
        # One place, so that the default filter shows it once per set of operators, not once per experience.
        warnings.warn(
            f"MACs of {type(module).__name__}: found operators without a formula, which count as 0: {calls}; costs, "
            f"budgets and exits placed by cost leave them out",
            UncountedWarning,
            stacklevel=1,
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one call."""

    macs: int
    """Multiply-adds of the call, for all samples in it."""
    parameters: int
    """Parameters, shared ones once, trainable or not."""
    bytes: int
    """Bytes of parameters and buffers, shared ones once."""
    modules: Mapping[str, int] = field(default_factory=dict)
    gaps: Mapping[str, int] = field(default_factory=dict)
    conventions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Floating-point operations: two per multiply-add."""
        return 2 * self.macs

    def by_module(self) -> dict[str, int]:
        """Return the MACs of every module called, by its name in the root (empty for the root), submodules included."""
        return dict(self.modules)

    def uncounted(self) -> dict[str, int]:
        """Return the calls of operators that neither a formula nor a convention covers, by name; empty if none."""
        return dict(self.gaps)

    def by_convention(self) -> dict[str, dict[str, int]]:
        """Return the calls of operators that count 0 by convention, by family and name."""
        return {family: dict(calls) for family, calls in self.conventions.items()}


def measure_cost(module: nn.Module, example: Any) -> Cost:
    """Count the cost of ``module(example)`` in evaluation mode, without gradients; the module is not changed.

    Works on real devices and on ``meta``, where nothing is computed.

    Args:
        module: Module to call.
        example: One tensor, a tuple of arguments, or a mapping of keyword arguments; tensors are moved to the
            module's device.

    Raises:
        UnsupportedError: The module is on ``meta`` and its path depends on values.

    >>> cost = measure_cost(nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 2)), torch.zeros(3, 10))
    >>> cost.macs, cost.flops, cost.parameters, cost.bytes
    (180, 360, 67, 268)
    >>> cost.by_module()
    {'': 180, '0': 150, '1': 0, '2': 30}
    """
    args, kwargs = _arguments(module, example)
    with evaluation_mode(module), torch.no_grad(), MacCounter(modules=True) as counter:
        try:
            module(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
                raise
            raise UnsupportedError(
                f"measure_cost: {type(module).__name__} cannot run on meta tensors "
                f"({reason_of(error, most=120)}); use a real device"
            ) from error
    called = counter.by_module()
    return Cost(
        macs=counter.macs,
        parameters=count_parameters(module),
        bytes=module_bytes(module),
        modules={name: called.get(_counter_name(module, name), 0) for name, _ in module.named_modules()},
        gaps=counter.uncounted(),
        conventions=counter.by_convention(),
    )


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones once.

    >>> module_bytes(nn.BatchNorm1d(3))  # two trained vectors, two running statistics, and a count of batches
    56
    """
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _counter_name(module: nn.Module, name: str) -> str:
    """Return the name of a submodule in the counter, which starts with the class of the root."""
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
