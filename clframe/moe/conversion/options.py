"""What may be asked of a conversion, and whether it fits a model: told before anything is trained or changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import gcd
from typing import Any, Literal, get_args

import torch

from clframe.data.target import Target
from clframe.errors import ConfigError, UnsupportedError
from clframe.moe.conversion.training import On, Regularizer, Schedule
from clframe.moe.convert import SPLITS, Split
from clframe.moe.dense import dense_networks
from clframe.moe.pipeline import GATES, GateKind
from clframe.moe.projections import Projection
from clframe.moe.routed import routed_layers
from clframe.moe.router import ROUTERS, RouterKind
from clframe.nn.network import Network

Method = Literal["d2dmoe", "moefication"]

MOST = 24
"""Experts of a network at most, where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a conversion; those that the component ``moe`` has too are named as there.

    Args:
        method: ``d2dmoe``: routers foresee output norms, a token runs as many experts as it needs. ``moefication``:
            routers foresee summed activations, every token runs the k best.
        on: Training data of a run: what its ``memory`` keeps, those of the ``last`` experience, or ``all``.
        projections: Whether attention projections become networks first.
        projection_epochs: Of their distillation.
        projection_lr: Of Adam in it.
        sparsify: Epochs of fine-tuning; 0 leaves the model as it is.
        sparsify_lr: Of Adam at their start.
        strength: Weight of the penalty; None: 0.01, and 0 for moefication.
        regularizer: Of fine-tuning.
        schedule: Of its strength.
        relu: Whether activations become ReLU; None: where there is fine-tuning, but for the displaced regularizers.
        experts: Experts of a network, or
        expert_size: neurons of an expert; neither: as many experts as divide a network's neurons evenly, 24 at most.
        split: How neurons are grouped.
        router: What routers foresee; None: what the method says.
        router_width: Units of a router's hidden layer; None: a twenty-fourth of the network's, at least 8.
        epochs: Of router training.
        lr: Of router training at its start.
        samples: Most samples that projections and routers are trained on, spread evenly over the data; 0: all.
        gate: Who runs; None: what the method says.
        tau: Setting of the converted model; None: the one nearest to half of the networks' cost on validation data.
        k: Likewise, for top_k.
        batch: Samples of a batch.
        limit: Most samples of validation and of test data each; None: all.
        seed: Of everything that is drawn.
    """

    method: Method = "d2dmoe"
    on: On | None = None
    projections: bool = False
    projection_epochs: int = 3
    projection_lr: float = 1e-3
    sparsify: int = 3
    sparsify_lr: float = 3e-4
    strength: float | None = None
    regularizer: Regularizer = "hoyer"
    schedule: Schedule = "warmup"
    relu: bool | None = None
    experts: int | None = None
    expert_size: int | None = None
    split: Split = "kmeans"
    router: RouterKind | None = None
    router_width: int | None = None
    epochs: int = 7
    lr: float = 1e-3
    samples: int = 0
    gate: GateKind | None = None
    tau: float | None = None
    k: int | None = None
    batch: int = 64
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name, known in (
            ("method", get_args(Method)), ("regularizer", get_args(Regularizer)), ("schedule", get_args(Schedule)),
            ("split", SPLITS), ("router", (None, *ROUTERS)), ("gate", (None, *GATES)), ("on", (None, *get_args(On))),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                choices = ", ".join(str(each) for each in known if each is not None)
                raise ConfigError(f"moefy.{name}: found '{getattr(self, name)}'; choose from {choices}")
        least = {
            "projection_epochs": 0, "sparsify": 0, "router_width": 1, "epochs": 1, "batch": 1, "limit": 1, "k": 1,
            "samples": 0,
            "strength": 0,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:
                raise ConfigError(f"moefy.{name}: found {value}; give {smallest} or more")
        for name in ("projection_lr", "sparsify_lr", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"moefy.{name}: found {getattr(self, name)}; give a number above 0")
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise ConfigError(f"moefy.tau: found {self.tau}; give a number from 0 (one expert a token) to 1 (all)")
        if self.tau is not None and self.gate_kind == "top_k":
            raise ConfigError("moefy.tau: found one for the gate top_k; give k")
        if self.k is not None and self.gate_kind != "top_k":
            raise ConfigError(f"moefy.k: found one for the gate {self.gate_kind}; give tau, or --gate top_k")
        if self.experts is not None and self.expert_size is not None:
            raise ConfigError("moefy: found both experts and expert_size; give one of them")

    @property
    def gate_kind(self) -> GateKind:
        """The gate, by the method where none is asked for."""
        return self.gate or ("dynamic_k" if self.method == "d2dmoe" else "top_k")

    @property
    def router_kind(self) -> RouterKind:
        """The router, by the method where none is asked for."""
        return self.router or ("norm" if self.method == "d2dmoe" else "activation")

    @property
    def penalty(self) -> float:
        """The weight of the penalty, by the method where none is asked for."""
        if self.strength is not None:
            return self.strength
        return 0.01 if self.method == "d2dmoe" else 0.0

    @property
    def swaps(self) -> bool:
        """Whether activations become ReLU."""
        if self.relu is not None:
            return self.relu
        return self.sparsify > 0 and not self.regularizer.startswith("displaced")

    @property
    def asked(self) -> float | None:
        """The setting asked for, if any."""
        if self.gate_kind == "top_k":
            return None if self.k is None else float(self.k)
        return self.tau

    def as_tree(self) -> dict[str, Any]:
        """As given, with what the method says in place of None."""
        return {
            **asdict(self), "router": self.router_kind, "gate": self.gate_kind, "strength": self.penalty,
            "relu": self.swaps,
        }  # fmt: skip


def check_model(target: Target) -> None:
    """Refuse a model that cannot be converted.

    Raises:
        UnsupportedError: Converted already, in half precision, without weights, or without a feed-forward network; an
            exit on neurons that would become experts.
    """
    model, name = target.model, target.name
    if routed_layers(model) or any(isinstance(part, Projection) for part in model.modules()):
        raise UnsupportedError(f"{name}: holds experts already; give the dense model it was made of")
    parameters = list(model.parameters())
    if any(p.is_meta for p in parameters):
        raise UnsupportedError(f"{name}: is on the meta device, without weights; load them first")
    half = next((p.dtype for p in parameters if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise UnsupportedError(
            f"{name}: holds weights in {str(half).removeprefix('torch.')}, in which nothing can be trained; convert it "
            f"in float32, then cast the result"
        )
    if isinstance(model, Network):
        dense_networks(model)  # knows of the exits, which the body does not


def check_numbers(widths: Mapping[str, int], *, experts: int | None, expert_size: int | None) -> None:
    """Refuse a number or size of experts that does not divide the hidden widths of all networks.

    Raises:
        ConfigError: The nearest that do are named.

    >>> check_numbers({"a": 256, "b": 192}, experts=24, expert_size=None)
    Traceback (most recent call last):
    clframe.errors.ConfigError: moefy.experts: found 24, no divisor of the 256 hidden neurons of a; give 16 or 32
    """
    if experts is None and expert_size is None:
        return
    common = 0
    for width in widths.values():
        common = gcd(common, width)
    divisors = [n for n in range(1, common + 1) if common % n == 0]
    option, value = ("experts", experts) if experts is not None else ("expert_size", expert_size)
    assert value is not None
    wrong = next((name for name, width in widths.items() if value < 1 or width % value), None)
    if wrong is not None:
        raise ConfigError(
            f"moefy.{option}: found {value}, no divisor of the {widths[wrong]} hidden neurons of {wrong}; give "
            f"{_nearest(divisors, value)}"
        )


def _nearest(divisors: Sequence[int], value: int) -> str:
    below = [n for n in divisors if n < value]
    above = [n for n in divisors if n > value]
    return " or ".join(str(n) for n in (*below[-1:], *above[:1]))
