"""Low-rank adapters of linear layers: ``(W + scale B A) x + b``.

Shape suffixes: I inputs, O outputs, R rank, E kept adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError

NONE = -1
"""The choice of no adapter: the weights alone."""


class AdaptedLinear(nn.Linear):
    """A linear layer with a low-rank adapter: ``W x + b + scale B (A x)``. Hu et al., "LoRA" (2022), equation 3.

    It takes over weight and bias of a layer. The adapter is zero until :meth:`draw`, and not computed while
    ``active`` is false.

    Args:
        layer: The layer to adapt.
        rank: R.
        scale: alpha / R.
        keeps: Whether :meth:`keep` is used.

    Attributes:
        chosen: Number of the kept adapter to compute with, or :data:`NONE`; None: the one in training, if ``active``.
    """

    kept_down_ERI: nn.Parameter
    kept_up_EOR: nn.Parameter

    def __init__(self, layer: nn.Linear, *, rank: int, scale: float, keeps: bool = False) -> None:
        with torch.device("meta"):  # no memory and no random draws
            super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self.scale, self.active = scale, False
        self.down_RI = nn.Parameter(layer.weight.new_zeros(rank, layer.in_features))
        self.up_OR = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        self.keeps, self.chosen = keeps, None if not keeps else NONE
        if keeps:
            self._set_kept(*(part.new_zeros(0, *part.shape) for part in (self.down_RI.detach(), self.up_OR.detach())))
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output of the layer, with its adapter if it is active."""
        y = F.linear(x, self.weight, self.bias)
        if self.chosen is not None and self.chosen >= 0:
            down_RI, up_OR = self.kept_down_ERI[self.chosen], self.kept_up_EOR[self.chosen]
        elif self.active and self.chosen is None:
            down_RI, up_OR = self.down_RI, self.up_OR
        else:
            return y
        return y + self.scale * F.linear(F.linear(x, down_RI), up_OR)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.keeps:
            names = [f"{prefix}{name}" for name in ("kept_down_ERI", "kept_up_EOR")]
            if all(name in state_dict for name in names):  # as many as were kept
                self._set_kept(*(self.weight.new_zeros(state_dict[name].shape) for name in names))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.active = bool(self.down_RI.any())  # A is zero only before it is drawn and after it was merged or kept
        if self.keeps:
            self.chosen = None if self.active else len(self.kept_down_ERI) - 1

    def _set_kept(self, down_ERI: Tensor, up_EOR: Tensor) -> None:
        self.kept_down_ERI = nn.Parameter(down_ERI, requires_grad=False)
        self.kept_up_EOR = nn.Parameter(up_EOR, requires_grad=False)

    @torch.no_grad()
    def draw(self) -> None:
        """Start a new adapter: A from U(-1/sqrt(I), 1/sqrt(I)) on the CPU by torch's global generator, and B zero."""
        bound = 1 / sqrt(self.in_features)
        self.down_RI.copy_(torch.empty(self.down_RI.shape, device="cpu").uniform_(-bound, bound))
        self.up_OR.zero_()
        self.active, self.chosen = True, None

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weights and remove it; the output changes by rounding only."""
        self.weight.add_(self.up_OR @ self.down_RI, alpha=self.scale)
        self._clear()

    @torch.no_grad()
    def keep(self) -> None:
        """Keep the adapter next to earlier ones and compute with it; the output does not change."""
        self._set_kept(
            torch.cat([self.kept_down_ERI, self.down_RI[None]]), torch.cat([self.kept_up_EOR, self.up_OR[None]])
        )
        self._clear()
        self.chosen = len(self.kept_down_ERI) - 1

    def _clear(self) -> None:
        for part in (self.down_RI, self.up_OR):
            part.zero_()
        self.active = False


def adapt_layers(
    module: nn.Module, targets: Sequence[str], *, rank: int, alpha: float, where: str, keeps: bool = False
) -> tuple[AdaptedLinear, ...]:
    """Replace linear layers inside a module by adapted ones.

    Args:
        module: The module to change.
        targets: Last parts of the names of layers, such as ``q_proj``; empty: all linear layers.
        rank: R.
        alpha: Adapters are scaled by ``alpha / rank``.
        where: Start of error messages.
        keeps: Whether adapters are kept next to each other.

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
            adapted.append(AdaptedLinear(layer, rank=rank, scale=alpha / rank, keeps=keeps))
            setattr(module.get_submodule(parent), last, adapted[-1])
    return tuple(adapted)
