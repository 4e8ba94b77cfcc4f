"""What a feed-forward network inside a model is, and how its layers are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from clframe.nn.sparsity.elementwise import Function


@dataclass(frozen=True, eq=False, kw_only=True)
class FFN:
    """One feed-forward network inside a model.

    Attributes:
        name: Of the owner inside the model, numbered (``#2``) where an owner has several; empty for the model itself.
        owner: The smallest module that holds all its parts.
        up: Linear layer (or transformers' Conv1D) from ``d_model`` to ``d_ff``; where ``fused``, to ``2 d_ff``.
        down: Linear layer from ``d_ff`` to ``d_model``.
        activation: Module or function.
        up_name: Name of ``up`` inside the model; likewise ``down_name`` and ``gate_name``.
        activation_name: Name of the activation inside the model; None where ``forward`` calls a function by itself.
        d_model: Width of input and output.
        d_ff: Number of hidden neurons.
        gate: Linear layer whose output passes the activation, in a gated FFN of three layers; else None.
        fused: In a gated FFN whose ``up`` holds both matrices: which half of its output is the gate.
    """

    name: str
    owner: nn.Module
    up: nn.Module
    down: nn.Module
    activation: nn.Module | Function
    up_name: str
    down_name: str
    activation_name: str | None
    d_model: int
    d_ff: int
    gate: nn.Module | None = None
    gate_name: str | None = None
    fused: Literal["first", "second"] | None = None

    @property
    def gated(self) -> bool:
        """Whether the activation of one projection is multiplied by another."""
        return self.gate is not None or self.fused is not None


def shape_of(part: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, or of transformers' Conv1D, whose weight is transposed; None of others."""
    if isinstance(part, nn.Linear):
        return part.in_features, part.out_features
    weight = getattr(part, "weight", None)
    if type(part).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0], weight.shape[1]
    return None


def weight_of(part: nn.Module) -> Tensor:
    """weight_OI of a linear layer or of transformers' Conv1D: outputs first, a view."""
    weight = part.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(part, nn.Linear) else weight.T
