"""MACs: one multiply-add counts 1; FLOPs = 2 x MACs.

Counted are matrix products, convolutions and attention, by torch's own formulas on the operators that one
forward pass really calls. Normalization, activations, pooling, additions and biases count nothing, so other
tools' figures may be about one percent higher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry


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


def count_macs(module: nn.Module, input_shape: Sequence[int], *, batch: int = 1) -> int:
    """MACs of one forward pass in eval mode over ``batch`` samples of zeros.

    The pass runs on the module's device and leaves training flags, buffers and random states as they were.

    Args:
        module: What to count; it is called with one tensor of its parameters' type.
        input_shape: Shape of one sample.
        batch: Number of samples; the count is for all of them.

    >>> count_macs(nn.Linear(10, 5), (10,))
    50
    """
    with _counting(module) as macs:
        module(_zeros(module, (batch, *input_shape)))
        return macs()


def stage_macs(network: Staged, *, batch: int = 1) -> dict[str, int]:
    """MACs of every stage, and of every exit's head as ``exit/<name>``; they add up to the whole network's.

    Args:
        network: A network with stages and exits.
        batch: Number of samples; the counts are for all of them.

    >>> from clframe.nn import Network
    >>> from clframe.nn.backbones import mlp
    >>> stage_macs(Network(mlp((1, 2, 2), width=10)))
    {'layer1': 40, 'layer2': 100, 'exit/final': 0}
    """
    counts: dict[str, int] = {}
    with _counting(network) as macs:
        value: Any = _zeros(network, (batch, *network.input_shape))
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


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones once, trained or not.

    >>> count_parameters(nn.Linear(10, 5))
    55
    """
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _counting(module: nn.Module | Staged) -> Iterator[Callable[[], int]]:
    """Eval mode, no gradients, the random states put back; yields a function for the MACs so far."""
    training = {part: part.training for part in module.modules()}
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    # The fused path of nn.MultiheadAttention in eval mode is one operator that no formula covers.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False, custom_mapping=_missing_formulas())
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        module.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)), counter:
            yield lambda: counter.get_total_flops() // 2
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for part, flag in training.items():
            part.training = flag


def _zeros(module: nn.Module | Staged, shape: Sequence[int]) -> Tensor:
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return torch.zeros(*shape)
    return torch.zeros(*shape, dtype=parameter.dtype, device=parameter.device)


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for operators that this torch does not count (attention on CPU, in older versions)."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return {} if operator in flop_registry else {operator: _attention_flops}


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """FLOPs of softmax(Q K^T) V from shapes (B, heads, length, width): the two products."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])
