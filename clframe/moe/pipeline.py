"""Steps of a conversion to experts, shared by the component ``moe``, ``clframe moefy`` and the Python API."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import cos, isfinite, pi
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from clframe.errors import ConfigError, DivergenceError, RunFolderError, UnsupportedError
from clframe.moe.analytical import RepresentativeRouter
from clframe.moe.convert import (
    Call,
    Split,
    all_experts_on,
    collect_inputs,
    layer_inputs,
    plain_call,
    regroup,
    to_experts,
)
from clframe.moe.projections import ProjectionSite, rebuild_projections
from clframe.moe.routed import RoutedExperts, routed_layers, set_gate
from clframe.moe.router import ALL, CumulativeShare, DynamicK, Gate, RouterKind, TopK, TrainedRouter
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
    shared: int = 0,
    epochs: int = 7,
    learning_rate: float = 1e-3,
    gate: Gate = ALL,
    call: Call = plain_call,
    seed: int = 0,
) -> dict[str, RoutedExperts]:
    """Sparsify a dense model, convert it to experts, train the routers and set the gate; changes the model in place.

    Szatkowski et al., "Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion" (2024).
    With ``router="activation"`` and a gate ``TopK``: MoEfication (Zhang et al., 2022). With ``router="analytical"``,
    ``shared`` experts and a gate ``TopK``: after CMoE (Pei et al., 2025), without training.

    Args:
        model: Dense model.
        batches: Unlabeled inputs for router training, used in this order in each epoch.
        experts: Experts of each network. Give either this or ``expert_size``.
        expert_size: Neurons of an expert.
        sparsify: Fine-tunes the dense model for sparse activations, after replacing activations if needed; None skips
            this step.
        split: Grouping of neurons.
        router: Kind of router.
        router_width: Width of their hidden layer.
        shared: Number of experts that always run; the gate chooses among the others.
        epochs: Epochs of router training.
        learning_rate: Initial rate of Adam; cosine decay to a thousandth.
        gate: Gate after the conversion.
        call: Runs the model on a batch.
        seed: Seed of split and routers.

    Raises:
        ClframeError: See :func:`~clframe.moe.convert.to_experts` and :func:`fit_routers`.
    """
    if sparsify is not None:
        sparsify(model)
    recipe = Recipe(
        experts=experts, expert_size=expert_size, router=router, router_width=router_width, shared=shared
    )
    layers = recipe.make_experts(model, split=split, batches=batches, call=call, seed=seed)
    fit_experts(model, batches, epochs=epochs, learning_rate=learning_rate, call=call)
    set_gate(model, gate)
    return layers


def fit_experts(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    split: Split | None = None,
    generator: Generator | None = None,
    epochs: int = 7,
    learning_rate: float = 1e-3,
    call: Call = plain_call,
) -> list[float]:
    """Train the routers of a converted model, after regrouping its neurons if ``split`` is given.

    A model converted before its training has meaningless experts until then: its neurons are regrouped by the trained
    weights, its routers reinitialized, and routing starts (:attr:`~clframe.moe.routed.RoutedExperts.ready`).

    Args:
        model: Converted model.
        batches: Inputs, in the same order in every epoch.
        split: Grouping of neurons; None keeps the experts.
        generator: CPU generator of the split and the routers' weights.
        epochs: Passes over the inputs.
        learning_rate: Initial rate of Adam.
        call: Runs the model on a batch.

    Returns:
        The mean loss of each epoch; none for analytical routers, which are not trained.

    Raises:
        ClframeError: See :func:`~clframe.moe.convert.regroup` and :func:`fit_routers`.
    """
    if split is not None:
        generator = generator_for(0, "moe", "split") if generator is None else generator
        regroup(model, split=split, generator=generator, batches=batches, call=call)
        for layer in routed_layers(model).values():
            layer.router.draw(generator)
            layer.ready = True
    layers = routed_layers(model)
    routers = {name: one.router for name, one in layers.items() if isinstance(one.router, RepresentativeRouter)}
    if routers:
        for name, x_ND in collect_inputs(model, batches, call=call).items():
            routers[name].fit(layers[name].experts, x_ND)
        return []
    return fit_routers(model, batches, epochs=epochs, learning_rate=learning_rate, call=call)


def fit_routers(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    epochs: int = 7,
    learning_rate: float = 1e-3,
    call: Call = plain_call,
) -> list[float]:
    """Train the routers of all layers, all else frozen, with all experts active.

    The loss is the mean over layers of the routers' losses. Adam with cosine decay to a thousandth of the initial rate.

    Args:
        model: Converted model.
        batches: Inputs, in the same order in every epoch.
        epochs: Passes over them.
        learning_rate: Initial rate.
        call: Runs the model on a batch.

    Returns:
        The mean loss of each epoch.

    Raises:
        UnsupportedError: A model without experts.
        ConfigError: No batches, or no epochs.
    """
    layers = routed_layers(model)
    if not layers:
        raise UnsupportedError(f"moe: found no experts in {type(model).__name__}; convert it first")
    if not len(batches) or epochs < 1:
        raise ConfigError(f"moe: found {len(batches)} batches for {epochs} epochs of router training; give one or more")
    step = _make_step([_trained(layer) for layer in layers.values()], learning_rate, epochs * len(batches))
    losses = []
    with all_experts_on(model), torch.enable_grad():
        for _ in range(epochs):
            total = torch.zeros(())
            for batch in batches:
                xs = layer_inputs(model, batch, call=call)
                total = total + step([_loss(layers[name], x_ND) for name, x_ND in xs.items() if len(x_ND)])
            losses.append(float(total) / len(batches))
            require_finite(losses, of="router training")
    return losses


def require_finite(losses: Sequence[float], *, of: str) -> None:
    """Refuse to continue after an epoch with a loss that is not finite.

    Args:
        losses: Mean loss of each epoch so far.
        of: Name of the step.

    Raises:
        DivergenceError: The last loss is infinite or NaN.
    """
    if not isfinite(losses[-1]):
        raise DivergenceError(
            f"moe: found a loss of {losses[-1]} in epoch {len(losses)} of {of}; lower its learning rate, or check that "
            f"the model's own training has not diverged"
        )


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
        ConfigError: No tokens, or no epochs.
    """
    if not len(x_ND) or epochs < 1 or batch_size < 1:
        raise ConfigError(
            f"moe: found {len(x_ND)} tokens in batches of {batch_size} for {epochs} epochs; give one or more of each"
        )
    generator = generator_for(0, "moe", "fit") if generator is None else generator
    step = _make_step([_trained(layer)], learning_rate, epochs * -(-len(x_ND) // batch_size))
    losses = []
    with torch.enable_grad():
        for _ in range(epochs):
            total = torch.zeros(())
            for index in torch.randperm(len(x_ND), generator=generator).split(batch_size):
                own_ND = x_ND[index.to(x_ND.device)]
                total = total + len(index) * step([_loss(layer, own_ND)])
            losses.append(float(total) / len(x_ND))
            require_finite(losses, of="router training")
    return losses


def _trained(layer: RoutedExperts) -> TrainedRouter:
    if isinstance(layer.router, RepresentativeRouter):
        raise UnsupportedError("moe: found analytical routers, which are not trained; use fit_experts")
    return layer.router


def _loss(layer: RoutedExperts, x_ND: Tensor) -> Tensor:
    router = _trained(layer)
    with torch.no_grad():
        target_NE = router.targets(layer.experts, x_ND)[:, layer.shared :]
    return router.loss(x_ND, target_NE)


def _make_step(
    routers: Iterable[TrainedRouter], learning_rate: float, steps: int
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Create a function for one Adam step on the mean of given losses; it returns the mean, detached on the CPU."""
    parameters = [parameter for router in routers for parameter in router.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    lowest = learning_rate / 1000
    taken = 0

    def step(losses: Sequence[Tensor]) -> Tensor:
        nonlocal taken
        rate = lowest + (learning_rate - lowest) * (1 + cos(pi * taken / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        loss = torch.stack(list(losses)).mean()
        # Unlike backward(), leaves .grad of all other parameters unchanged. A layer that did not run has no gradient.
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        taken += 1
        return loss.detach().float().cpu()

    return step


MOST = 24
"""Default upper limit of experts per network; the published 24 x 128 for the 3072 neurons of ViT-B."""


def default_most(experts: int | None, expert_size: int | None) -> int | None:
    """:data:`MOST` if neither the number nor the size of experts is given."""
    return MOST if experts is None and expert_size is None else None


GateKind = Literal["dynamic_k", "cumulative", "top_k"]
GATES: tuple[GateKind, ...] = get_args(GateKind)


def make_gate(kind: GateKind, *, tau: float = 1.0, k: int | None = None) -> Gate:
    """Create a gate by name.

    Args:
        kind: ``dynamic_k`` and ``cumulative`` take ``tau``, ``top_k`` takes ``k``.
        tau: In [0, 1].
        k: At least 1.

    Raises:
        ConfigError: An unknown name, or a value out of range or missing.

    >>> make_gate("top_k", k=3)
    TopK(k=3)
    """
    if kind not in GATES:
        raise ConfigError(f"moe.gate: found '{kind}'; choose from {', '.join(GATES)}")
    if kind == "top_k":
        if k is None:
            raise ConfigError("moe.k: found none for the gate top_k; give the number of active experts")
        return TopK(k=k)
    return DynamicK(tau=tau) if kind == "dynamic_k" else CumulativeShare(tau=tau)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Description of a conversion, sufficient to rebuild the converted architecture from the dense model.

    Attributes:
        body: Name of the submodule whose networks were replaced; empty for the whole model.
        relu: Whether activations were replaced by ReLU.
        projections: Attention projections that were replaced by networks.
        experts: Experts of each network. One of this, ``expert_size`` and ``most`` is set.
        expert_size: Neurons of an expert.
        most: Upper limit on the number of experts, see :func:`~clframe.moe.convert.to_experts`.
        router: Kind of router.
        router_width: Width of their hidden layer; None derives it from the network's.
        shared: Number of experts that always run.
        gate: Kind of gate.
        tau: Of the gate.
        k: Of the gate.
    """

    body: str = ""
    relu: bool = False
    projections: tuple[ProjectionSite, ...] = ()
    experts: int | None = None
    expert_size: int | None = None
    most: int | None = None
    router: RouterKind = "norm"
    router_width: int | None = None
    shared: int = 0
    gate: GateKind = "dynamic_k"
    tau: float = 1.0
    k: int | None = None

    def shape(self, model: nn.Module) -> dict[str, RoutedExperts]:
        """Convert a dense model to the recipe's architecture, in place, to load trained weights into.

        Raises:
            ClframeError: The model is not the one that was converted.
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
            rebuild_projections(part, self.projections)
        layers = self.make_experts(part)  # the loaded weights already are in the order of the experts
        set_gate(model, make_gate(self.gate, tau=self.tau, k=self.k))
        return layers

    def make_experts(
        self,
        body: nn.Module,
        *,
        split: Split | None = None,
        batches: Sequence[Any] = (),
        call: Call = plain_call,
        seed: int = 0,
    ) -> dict[str, RoutedExperts]:
        """Replace the feed-forward networks of ``body`` by experts; see :func:`~clframe.moe.convert.to_experts`."""
        return to_experts(
            body, experts=self.experts, expert_size=self.expert_size, most=self.most, split=split, router=self.router,
            router_width=self.router_width, shared=self.shared, batches=batches, call=call, seed=seed,
        )  # fmt: skip

    def as_tree(self) -> dict[str, Any]:
        """Plain values for JSON; see :meth:`from_tree`."""
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Recipe:
        """Create a recipe from plain values.

        Raises:
            RunFolderError: Values that do not describe a recipe.

        >>> recipe = Recipe(experts=4, projections=(ProjectionSite(name="q", inputs=3, outputs=(3,)),))
        >>> Recipe.from_tree(recipe.as_tree()) == recipe
        True
        """
        try:
            sites = tuple(
                ProjectionSite(
                    name=str(site["name"]), inputs=int(site["inputs"]), outputs=tuple(map(int, site["outputs"]))
                )
                for site in tree["projections"]
            )
            return cls(**{**tree, "projections": sites})
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"moefy: found no readable recipe ({error!r}); convert the model again") from None
