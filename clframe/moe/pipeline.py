"""Conversion of a dense model to experts, the training of routers, and the recipe that rebuilds the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import cos, pi
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from clframe.errors import ConfigError, RunFolderError, UnsupportedError
from clframe.moe.convert import Call, Split, all_running, layer_inputs, plain_call, to_experts
from clframe.moe.projections import Place, put_projections
from clframe.moe.routed import RoutedExperts, routed_layers, set_gate
from clframe.moe.router import ALL, CumulativeShare, DynamicK, Gate, Router, RouterKind, TopK
from clframe.seeding import generator_for
from clframe.sparsity.penalties import swap_for_relu


def moefy(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    experts: int | None = None,
    expert_size: int | None = None,
    sparsify: Callable[[nn.Module], None] | None = None,
    split: Split = "kmeans",
    router: RouterKind = "norm",
    router_width: int = 128,
    epochs: int = 7,
    learning_rate: float = 1e-3,
    gate: Gate = ALL,
    call: Call = plain_call,
    seed: int = 0,
) -> dict[str, RoutedExperts]:
    """Make a dense model sparse, split it, train its routers and set the gate; the model is changed in place.

    Szatkowski et al., "Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion" (2024).
    With ``router="activation"`` and a gate ``TopK``: MoEfication (Zhang et al., 2022).

    Args:
        model: Dense.
        batches: What routers are trained on, in each epoch in this order; no labels.
        experts: Experts of a network, or
        expert_size: neurons of an expert.
        sparsify: Fine-tunes the dense model towards few active neurons, swapping activations first if it wants;
            None leaves it as it is.
        split: How neurons are grouped.
        router: What routers foresee.
        router_width: Of their hidden layer.
        epochs: Of router training.
        learning_rate: Of Adam at its start; it falls to a thousandth along a cosine.
        gate: At the end.
        call: Runs the model on a batch.
        seed: Of split and routers.

    Raises:
        ClframeError: As :func:`~clframe.moe.convert.to_experts` and :func:`fit_routers`.
    """
    if sparsify is not None:
        sparsify(model)
    layers = to_experts(
        model,
        experts=experts,
        expert_size=expert_size,
        split=split,
        router=router,
        router_width=router_width,
        batches=batches if split == "coactivation" else (),
        call=call,
        seed=seed,
    )
    fit_routers(model, batches, epochs=epochs, learning_rate=learning_rate, call=call)
    set_gate(model, gate)
    return layers


def fit_routers(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    epochs: int = 7,
    learning_rate: float = 1e-3,
    call: Call = plain_call,
) -> list[float]:
    """Train the routers of all layers, and nothing else, with all experts running.

    The loss is the mean over layers of each router's own; Adam, its rate falling along a cosine to a thousandth.

    Args:
        model: Converted.
        batches: Inputs, in the order of every epoch.
        epochs: Passes over them.
        learning_rate: At the start.
        call: Runs the model on a batch.

    Returns:
        The mean loss of each epoch.

    Raises:
        UnsupportedError: A model that was not converted.
        ConfigError: No batches, or not an epoch.
    """
    layers = routed_layers(model)
    if not layers:
        raise UnsupportedError(f"moe: found no experts in {type(model).__name__}; convert it first")
    if not len(batches) or epochs < 1:
        raise ConfigError(f"moe: found {len(batches)} batches for {epochs} epochs of router training; give one or more")
    step = _stepper([layer.router for layer in layers.values()], learning_rate, epochs * len(batches))
    losses = []
    with all_running(model), torch.enable_grad():
        for _ in range(epochs):
            total = torch.zeros(())
            for batch in batches:
                xs = layer_inputs(model, batch, call=call)
                total = total + step(
                    [_loss(layers[name], x_ND) for name, x_ND in xs.items() if len(x_ND)]
                )
            losses.append(float(total) / len(batches))
    return losses


def fit_router(
    layer: RoutedExperts,
    x_ND: Tensor,
    *,
    epochs: int = 7,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    generator: Generator | None = None,
) -> list[float]:
    """Train one layer's router on tokens, shuffled in each epoch; returns the mean loss of each epoch.

    Raises:
        ConfigError: No tokens, or not an epoch.
    """
    if not len(x_ND) or epochs < 1 or batch_size < 1:
        raise ConfigError(
            f"moe: found {len(x_ND)} tokens in batches of {batch_size} for {epochs} epochs; give one or more of each"
        )
    generator = generator_for(0, "moe", "fit") if generator is None else generator
    step = _stepper([layer.router], learning_rate, epochs * -(-len(x_ND) // batch_size))
    losses = []
    with torch.enable_grad():
        for _ in range(epochs):
            total = torch.zeros(())
            for index in torch.randperm(len(x_ND), generator=generator).split(batch_size):
                own_ND = x_ND[index.to(x_ND.device)]
                total = total + len(index) * step([_loss(layer, own_ND)])
            losses.append(float(total) / len(x_ND))
    return losses


def _loss(layer: RoutedExperts, x_ND: Tensor) -> Tensor:
    with torch.no_grad():
        target_NE = layer.router.targets(layer.experts, x_ND)
    return layer.router.loss(x_ND, target_NE)


def _stepper(
    routers: Iterable[Router], learning_rate: float, steps: int
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Takes one step of Adam for losses, of which it returns the mean, detached and on the CPU."""
    parameters = [parameter for router in routers for parameter in router.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    lowest = learning_rate / 1000
    taken = 0

    def step(losses: Sequence[Tensor]) -> Tensor:
        nonlocal taken
        rate = lowest + (learning_rate - lowest) * (1 + cos(pi * taken / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        loss = torch.stack(list(losses)).mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        taken += 1
        return loss.detach().float().cpu()

    return step


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
