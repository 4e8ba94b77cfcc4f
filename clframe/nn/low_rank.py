"""Low-rank adapters of linear layers: ``(W + scale B A) x + b``.

Shape suffixes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError


class AdaptedLinear(nn.Linear):
    """A linear layer with a low-rank adapter: ``W x + b + scale B (A x)``. Hu et al., "LoRA" (2022), equation 3.

    It takes over weight and bias of a layer. The adapter is zero until :meth:`draw`, and not computed while
    ``active`` is false.

    Args:
        layer: The layer to adapt.
        rank: R.
        scale: alpha / R.
    """

    def __init__(self, layer: nn.Linear, *, rank: int, scale: float) -> None:
        with torch.device("meta"):  # no memory and no random draws
            super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self.scale, self.active = scale, False
        self.down_RI = nn.Parameter(layer.weight.new_zeros(rank, layer.in_features))
        self.up_OR = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output of the layer, with its adapter if it is active."""
        y = F.linear(x, self.weight, self.bias)
        return y + self.scale * F.linear(F.linear(x, self.down_RI), self.up_OR) if self.active else y

    @torch.no_grad()
    def draw(self) -> None:
        """Start a new adapter: A from U(-1/sqrt(I), 1/sqrt(I)) on the CPU by torch's global generator, and B zero."""
        bound = 1 / sqrt(self.in_features)
        self.down_RI.copy_(torch.empty(self.down_RI.shape, device="cpu").uniform_(-bound, bound))
        self.up_OR.zero_()
        self.active = True

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weights and remove it; the output changes by rounding only."""
        self.weight.add_(self.up_OR @ self.down_RI, alpha=self.scale)
        for part in (self.down_RI, self.up_OR):
            part.zero_()
        self.active = False


def adapt_layers(
    module: nn.Module, targets: Sequence[str], *, rank: int, alpha: float, where: str
) -> tuple[AdaptedLinear, ...]:
    """Replace linear layers inside a module by adapted ones.

    Args:
        module: The module to change.
        targets: Last parts of the names of layers, such as ``q_proj``; empty: all linear layers.
        rank: R.
        alpha: Adapters are scaled by ``alpha / rank``.
        where: Start of error messages.

    Raises:
        ConfigError: No linear layer, a target that none has as its name, or one that is smaller than the rank.

    >>> net = nn.Sequential(nn.Linear(4, 8))
    >>> adapt_layers(net, ["0"], rank=2, alpha=4, where="lora")[0].scale
    2.0
    """
    linear = {name: part for name, part in module.named_modules() if type(part) is nn.Linear}
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if target not in known:
            raise ConfigError(f"{where}.targets: found '{target}'; linear layers are called {', '.join(known) or '-'}")
    if not linear:
        raise ConfigError(f"{where}.targets: found no linear layer in the backbone; use a transformer")
    adapted = []
    for name, layer in linear.items():
        parent, _, last = name.rpartition(".")
        if not targets or last in targets:
            if rank > min(layer.in_features, layer.out_features):
                raise ConfigError(
                    f"{where}.rank: found {rank} for '{name}' of {layer.in_features} inputs and {layer.out_features} "
                    f"outputs; give fewer"
                )
            adapted.append(AdaptedLinear(layer, rank=rank, scale=alpha / rank))
            setattr(module.get_submodule(parent), last, adapted[-1])
    return tuple(adapted)
