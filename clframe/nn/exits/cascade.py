"""The cascade: what an exit takes over from the exit before it.

Shape suffixes: B batch, C classes, P classes of the exit before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError
from clframe.nn.heads import ordered


class Cascade(nn.Module):
    """Adds ``V l`` to an exit's logits, ``l`` the logits of the exit before (Wolczyk et al., "Zero Time Waste", 2021).

    The paper concatenates ``l`` to the pooled features ``f`` before the last linear layer. That is the same
    function: ``[W V] [f; l] + b = (W f + b) + V l``; here V is a matrix of its own because it grows in both
    directions. Every entry starts at zero, so that

    - a cascading head starts as the same head without the cascade, with the same random draws, and
    - growing leaves all logits as they were, those of new classes in the exit before included.

    V still has a gradient. (The paper draws it as it draws W.) With ``norm``, ``l`` goes through a LayerNorm with
    gain and shift first; its mean and variance are over all P classes, so old logits do move when a head that
    already learned grows. A head for each experience keeps its P and does not move.

    ``l`` never receives a gradient, and a class whose logit is ``-inf`` counts as 0.

    Args:
        norm: Whether to normalize ``l``.

    Attributes:
        inputs: class_P, the classes of the exit before, in the order they were met.

    >>> cascade = Cascade(norm=True)
    >>> cascade.grow(3, inputs=[0, 1, 2]), tuple(cascade.weight.shape)
    (True, (3, 3))
    """

    weight: nn.Parameter
    inputs: Tensor

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, 0))
        self.gain = nn.Parameter(torch.empty(0)) if norm else None
        self.shift = nn.Parameter(torch.empty(0)) if norm else None
        self.register_buffer("inputs", torch.empty(0, dtype=torch.long))
        self._remember(())

    def grow(self, outputs: int, *, inputs: Iterable[int]) -> bool:
        """Make room for ``outputs`` logits and for the classes ``inputs`` of the exit before.

        Returns:
            Whether there are new parameters now.

        Raises:
            DataError: A negative class.
        """
        known = (*self._known, *(c for c in ordered(inputs) if c not in self._known))
        outputs = max(outputs, len(self.weight))
        if self.weight.shape == (outputs, len(known)):
            return False
        self._resize(outputs, len(known))
        self._remember(known)
        self.inputs = torch.tensor(known, dtype=torch.long, device=self.inputs.device)
        return True

    def forward(self, previous_BC: Tensor) -> Tensor:
        """What to add to the logits, from those of the exit before; its later classes are ignored.

        Raises:
            ConfigError: An exit before that has not grown for the same classes.
        """
        if previous_BC.shape[1] < self._least:  # on a GPU the gather would end the process
            found = f"found {previous_BC.shape[1]} logits of the exit before, not {self._least}"
            raise ConfigError(f"exits.cascade: {found}; grow all heads for the same classes")
        previous_BP = previous_BC.detach().index_select(1, self.inputs)
        previous_BP = previous_BP.masked_fill(previous_BP.isneginf(), 0)
        if self.gain is not None:
            previous_BP = F.layer_norm(previous_BP, self.gain.shape, self.gain, self.shift)
        return F.linear(previous_BP, self.weight)

    def extra_repr(self) -> str:
        """Sizes, as ``print`` shows them."""
        return f"outputs={len(self.weight)}, inputs={len(self._known)}, norm={self.gain is not None}"

    def _remember(self, known: Iterable[int]) -> None:
        """Keep ``inputs`` in Python too, so that neither growing nor ``forward`` need ask the device."""
        self._known = tuple(known)
        self._least = max(self._known, default=-1) + 1

    @torch.no_grad()
    def _resize(self, outputs: int, inputs: int) -> None:
        """Keep what fits; new entries of the matrix are 0, new gains 1 and shifts 0."""
        old = self.weight
        added = (0, inputs - old.shape[1], 0, outputs - old.shape[0])  # columns, then rows; negative ones go
        self.weight = nn.Parameter(F.pad(old, added), requires_grad=old.requires_grad)
        if self.gain is not None and self.shift is not None:
            gain, shift = self.gain, self.shift
            self.gain = nn.Parameter(F.pad(gain, added[:2], value=1.0), requires_grad=gain.requires_grad)
            self.shift = nn.Parameter(F.pad(shift, added[:2]), requires_grad=shift.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the sizes of the saved state first, then load it as any module does."""
        saved = state_dict.get(f"{prefix}weight")
        if saved is not None and saved.shape != self.weight.shape:
            self._resize(*saved.shape)
            self.inputs = self.inputs.new_zeros(saved.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._remember(self.inputs.tolist())
