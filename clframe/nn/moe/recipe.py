"""What was done to a dense model to make it one of experts, as plain values: enough to rebuild its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import nn

from clframe.errors import ConfigError, RunFolderError, UnsupportedError
from clframe.nn.moe.convert import to_experts
from clframe.nn.moe.projections import Place, put_projections
from clframe.nn.moe.routed import RoutedExperts, set_gate
from clframe.nn.moe.router import CumulativeShare, DynamicK, Gate, RouterKind, TopK
from clframe.nn.sparsity.watch import swap_for_relu

GateKind = Literal["dynamic_k", "cumulative", "top_k"]
GATES: tuple[GateKind, ...] = get_args(GateKind)


def gate_of(kind: GateKind, *, tau: float = 1.0, k: int | None = None) -> Gate:
    """The gate of a name.

    Args:
        kind: ``dynamic_k`` and ``cumulative`` take ``tau``, ``top_k`` takes ``k``.
        tau: From 0 to 1.
        k: From 1.

    Raises:
        ConfigError: An unknown name, or a value out of range or missing.

    >>> gate_of("top_k", k=3)
    TopK(k=3)
    """
    if kind not in GATES:
        raise ConfigError(f"moe.gate: found '{kind}'; choose from {', '.join(GATES)}")
    if kind == "top_k":
        if k is None:
            raise ConfigError("moe.k: found none for the gate top_k; give the number of experts that run")
        return TopK(k=k)
    return DynamicK(tau=tau) if kind == "dynamic_k" else CumulativeShare(tau=tau)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model was converted.

    Attributes:
        body: Name of the part in which networks were replaced; empty for the whole model.
        relu: Whether activations became ReLU.
        projections: Attention projections that became networks.
        experts: Experts of a network, or
        expert_size: neurons of an expert, or
        most: as many experts of each network as divide it, but no more than this.
        router: What routers foresee.
        router_width: Of their hidden layer; None: by the network's.
        gate: Who runs.
        tau: Of the gate.
        k: Of the gate.
    """

    body: str = ""
    relu: bool = False
    projections: tuple[Place, ...] = ()
    experts: int | None = None
    expert_size: int | None = None
    most: int | None = None
    router: RouterKind = "norm"
    router_width: int | None = None
    gate: GateKind = "dynamic_k"
    tau: float = 1.0
    k: int | None = None

    def shape(self, model: nn.Module) -> dict[str, RoutedExperts]:
        """Give a dense model the shapes of the converted one, in place, for weights that are to be loaded.

        Raises:
            ClframeError: A model that is not the one converted.
        """
        try:
            part = model.get_submodule(self.body)
        except AttributeError:
            raise UnsupportedError(
                f"moefy: found no {self.body} in {type(model).__name__}; give the model that was converted"
            ) from None
        if self.relu:
            swap_for_relu(part)
        if self.projections:
            put_projections(part, self.projections)
        layers = to_experts(  # which neurons make an expert comes with the weights
            part, experts=self.experts, expert_size=self.expert_size, most=self.most, split=None, router=self.router,
            router_width=self.router_width,
        )  # fmt: skip
        set_gate(model, gate_of(self.gate, tau=self.tau, k=self.k))
        return layers

    def as_tree(self) -> dict[str, Any]:
        """Plain values; :meth:`from_tree` reads them."""
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Recipe:
        """The recipe of plain values.

        Raises:
            RunFolderError: Values of something else.

        >>> recipe = Recipe(experts=4, projections=(Place(name="q", inputs=3, outputs=(3,)),))
        >>> Recipe.from_tree(recipe.as_tree()) == recipe
        True
        """
        try:
            places = tuple(
                Place(name=str(place["name"]), inputs=int(place["inputs"]), outputs=tuple(map(int, place["outputs"])))
                for place in tree["projections"]
            )
            return cls(**{**tree, "projections": places})
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"moefy: found no readable recipe ({error!r}); convert the model anew") from None
