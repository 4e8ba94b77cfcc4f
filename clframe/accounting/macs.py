"""MACs of networks and of arbitrary calls: one multiply-add counts 1; FLOPs = 2 x MACs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from clframe.accounting.mac_counter import Convention, MacCounter
from clframe.errors import UnsupportedError

__all__ = [
    "Convention", "Staged", "as_found", "backbone_macs", "count_macs", "count_parameters", "cumulative_macs",
    "stage_macs", "zeros_for",
]  # fmt: skip


class Staged(Protocol):
    """A network that can name its parts: stages in order, each with the exits on its output."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input sample."""

    def plan(self) -> Sequence[tuple[str, nn.Module, Sequence[tuple[str, int]]]]:
        """``(stage name, stage, ((exit name, exit number), ...))`` for every stage."""

    def modules(self) -> Iterator[nn.Module]:
        """Every part, as a module gives them."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter, as a module gives them."""

    def eval(self) -> Any:
        """Evaluation mode, as a module has it."""

    def classify(self, exit: int, tap: Tensor, previous_BC: Tensor | None) -> Tensor:
        """logits_BC of one exit, given those of the exit before."""


def count_macs(
    module: nn.Module, input_shape: Sequence[int], *, batch: int = 1, convention: Convention = "macs"
) -> int:
    """MACs of one forward pass in eval mode over ``batch`` samples of zeros.

    The pass runs on the module's device and leaves training flags, buffers and random states as they were.

    Args:
        module: What to count; it is called with one tensor of its parameters' type.
        input_shape: Shape of one sample.
        batch: Number of samples; the count is for all of them.
        convention: What is counted.

    >>> count_macs(nn.Linear(10, 5), (10,))
    50
    """
    with _counting(module, convention) as macs:
        module(zeros_for(module, (batch, *input_shape)))
        return macs()


def stage_macs(network: Staged, *, batch: int = 1, convention: Convention = "macs") -> dict[str, int]:
    """MACs of every stage, and of every exit's head as ``exit/<name>``; they add up to the whole network's.

    Args:
        network: A network with stages and exits.
        batch: Number of samples; the counts are for all of them.
        convention: What is counted.

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


def cumulative_macs(network: Staged, *, convention: Convention = "macs") -> tuple[int, ...]:
    """cost_K: MACs of one sample up to and including exit k, the heads of all earlier exits among them.

    The last is the cost of a whole pass, up to the stages behind the last exit, of which there are none where
    it is the backbone's own classifier.

    Args:
        network: A network with stages and exits.
        convention: What is counted.

    >>> from clframe.nn import GrowingLinear, Network
    >>> from clframe.nn.backbones import mlp
    >>> network = Network(mlp((1, 2, 2), width=10), exits=[("layer1", GrowingLinear(10))])
    >>> network.grow(range(3)), cumulative_macs(network)
    (True, (70, 200))
    """
    counts = stage_macs(network, convention=convention)
    spent, costs = 0, {}
    for stage, _, exits in network.plan():
        spent += counts[stage]
        for name, exit in exits:
            spent += counts[f"exit/{name}"]
            costs[exit] = spent
    return tuple(costs[exit] for exit in sorted(costs))


def backbone_macs(network: Staged, *, convention: Convention = "macs") -> int:
    """MACs of one sample through the bare backbone and its own classifier: what costs are compared with.

    Args:
        network: A network with stages and exits.
        convention: What is counted.

    >>> from clframe.nn import GrowingLinear, Network
    >>> from clframe.nn.backbones import mlp
    >>> network = Network(mlp((1, 2, 2), width=10), exits=[("layer1", GrowingLinear(10))])
    >>> network.grow(range(3)), backbone_macs(network)
    (True, 170)
    """
    counts, plan = stage_macs(network, convention=convention), network.plan()
    last, _ = plan[-1][2][-1]
    return sum(counts[stage] for stage, _, _ in plan) + counts[f"exit/{last}"]


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones once, trained or not.

    >>> count_parameters(nn.Linear(10, 5))
    55
    """
    return sum(parameter.numel() for parameter in module.parameters())


def zeros_for(module: nn.Module | Staged, shape: Sequence[int]) -> Tensor:
    """Zeros of this shape, of the type and on the device of the module's parameters."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return torch.zeros(*shape)
    return torch.zeros(*shape, dtype=parameter.dtype, device=parameter.device)


@contextmanager
def as_found(module: nn.Module | Staged) -> Iterator[None]:
    """Evaluation mode for a while, after which training flags and random states are what they were."""
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
    """Eval mode, no gradients, everything as found afterwards; yields a function for the MACs so far."""
    with as_found(module), torch.no_grad(), MacCounter(convention=convention) as counter:
        yield lambda: counter.macs


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
