"""Options of a conversion, and checks of options against a model before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import gcd
from typing import Any, Literal, get_args

from clframe.data.target import Target
from clframe.errors import ConfigError
from clframe.moe.conversion.training import On, Ramp, Regularizer
from clframe.moe.convert import SPLITS, Split, expert_count
from clframe.moe.dense import find_dense_ffns
from clframe.moe.pipeline import GATES, MOST, GateKind
from clframe.moe.projections import check_dense
from clframe.moe.router import ROUTERS, RouterKind
from clframe.nn.network import Network
from clframe.options import convert_fields
from clframe.sparsity.functional import Schedule

Method = Literal["d2dmoe", "moefication"]

@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a conversion; those shared with the component ``moe`` have the same names.

    Args:
        method: ``d2dmoe``: routers predict output norms, and the number of experts varies with the token.
            ``moefication``: routers predict summed activations, and each token runs the k best experts.
        on: Training data of a run: its replay buffer (``memory``), the ``last`` experience, or ``all``.
        projections: Whether attention projections are replaced by networks first.
        projection_epochs: Epochs of their distillation.
        projection_lr: Adam learning rate of the distillation.
        sparsify: Epochs of fine-tuning; 0 skips it.
        sparsify_lr: Initial Adam learning rate of fine-tuning.
        strength: Weight of the sparsity penalty; None: 0.01, and 0 for moefication.
        regularizer: Sparsity penalty of fine-tuning.
        schedule: Change of its weight during fine-tuning: ``constant``; ``linear``, rising to ``strength`` at the end;
            ``warmup``, rising linearly to ``strength`` at half of the training.
        ramp: Whether the weight changes with every optimizer ``step``, from 0 at the first one, as published, or with
            every ``epoch``, from 1 / epochs in the first one.
        relu: Whether activations are replaced by ReLU; None: with fine-tuning, except for the displaced regularizers.
        experts: Experts of each network. Give at most one of this and ``expert_size``; with neither, the largest number
            up to 24 that divides a network's neurons.
        expert_size: Neurons of an expert.
        split: Grouping of neurons.
        router: Kind of router; None: by method. ``norm`` and ``activation`` predict an expert's output norm or summed
            activations; ``analytical`` is one neuron of each expert, without training (CMoE).
        router_width: Width of a router's hidden layer; None: a twenty-fourth of the network's, at least 16.
        shared: Number of experts that always run, made of the neurons that are active in most tokens; the gate chooses
            among the others, ``k`` in addition.
        epochs: Epochs of router training; None: 7.
        lr: Initial learning rate of router training; None: 1e-3.
        samples: Maximum number of samples for distillation and router training, evenly spaced; 0: all.
        gate: Kind of gate; None: by method.
        tau: Setting of the converted model; None: the one closest to half of the networks' cost on validation data.
        k: The same for top_k.
        batch: Batch size.
        limit: Maximum number of validation samples and of test samples; None: all.
        seed: Seed of all random choices.
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
    ramp: Ramp = "step"
    relu: bool | None = None
    experts: int | None = None
    expert_size: int | None = None
    split: Split = "kmeans"
    router: RouterKind | None = None
    router_width: int | None = None
    shared: int = 0
    epochs: int | None = None
    lr: float | None = None
    samples: int = 0
    gate: GateKind | None = None
    tau: float | None = None
    k: int | None = None
    batch: int = 64
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values of another type or out of range, and options without effect."""
        for name, known in (
            ("method", get_args(Method)), ("regularizer", get_args(Regularizer)), ("schedule", get_args(Schedule)),
            ("ramp", get_args(Ramp)),
            ("split", SPLITS), ("router", (None, *ROUTERS)), ("gate", (None, *GATES)), ("on", (None, *get_args(On))),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                choices = ", ".join(str(each) for each in known if each is not None)
                raise ConfigError(f"moefy.{name}: found '{getattr(self, name)}'; choose from {choices}")
        convert_fields(self, where="moefy")
        least = {
            "projection_epochs": 0, "sparsify": 0, "router_width": 1, "epochs": 1, "batch": 1, "limit": 1, "k": 1,
            "samples": 0,
            "strength": 0, "shared": 0,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:
                raise ConfigError(f"moefy.{name}: found {value}; give {smallest} or more")
        for name in ("projection_lr", "sparsify_lr", "lr"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"moefy.{name}: found {getattr(self, name)}; give a number above 0")
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise ConfigError(f"moefy.tau: found {self.tau}; give a number from 0 (one expert a token) to 1 (all)")
        if self.tau is not None and self.gate_kind == "top_k":
            raise ConfigError("moefy.tau: found one for the gate top_k; give k")
        if self.k is not None and self.gate_kind != "top_k":
            raise ConfigError(f"moefy.k: found one for the gate {self.gate_kind}; give tau, or --gate top_k")
        if self.experts is not None and self.expert_size is not None:
            raise ConfigError("moefy: found both experts and expert_size; give one of them")
        for name in ("epochs", "lr", "router_width"):
            if self.router == "analytical" and getattr(self, name) is not None:
                raise ConfigError(
                    f"moefy.{name}: found {getattr(self, name)} for analytical routers, which are not trained and have "
                    f"no hidden layer; leave it out"
                )
        self._check_unused()

    def _check_unused(self) -> None:
        """Refuse options of steps that are left out."""
        of_penalty = ("regularizer", "schedule", "ramp")
        for used, names, reason in (
            (self.projections, ("projection_epochs", "projection_lr"), "without projections"),
            (self.sparsify > 0, ("sparsify_lr", "strength", *of_penalty), "without fine-tuning (sparsify 0)"),
            (self.penalty > 0, of_penalty, "for a penalty of strength 0"),
        ):
            for name in names:
                value = getattr(self, name)
                if not used and value != type(self).__dataclass_fields__[name].default:
                    raise ConfigError(f"moefy.{name}: found {value} {reason}, which has no effect; leave it out")

    @property
    def gate_kind(self) -> GateKind:
        """The gate, by default that of the method."""
        return self.gate or ("dynamic_k" if self.method == "d2dmoe" else "top_k")

    @property
    def router_kind(self) -> RouterKind:
        """The router, by default that of the method."""
        return self.router or ("norm" if self.method == "d2dmoe" else "activation")

    @property
    def router_epochs(self) -> int:
        """Epochs of router training, by default 7."""
        return self.epochs or 7

    @property
    def router_lr(self) -> float:
        """Initial learning rate of router training, by default 1e-3."""
        return self.lr or 1e-3

    @property
    def penalty(self) -> float:
        """Weight of the penalty, by default that of the method."""
        if self.strength is not None:
            return self.strength
        return 0.01 if self.method == "d2dmoe" else 0.0

    @property
    def swaps(self) -> bool:
        """Whether activations are replaced by ReLU."""
        if self.relu is not None:
            return self.relu
        return self.sparsify > 0 and not self.regularizer.startswith("displaced")

    @property
    def asked(self) -> float | None:
        """The requested setting of the gate, or None."""
        if self.gate_kind == "top_k":
            return None if self.k is None else float(self.k)
        return self.tau

    def as_tree(self) -> dict[str, Any]:
        """All options with defaults of the method filled in."""
        return {
            **asdict(self), "router": self.router_kind, "gate": self.gate_kind, "strength": self.penalty,
            "relu": self.swaps,
            **({} if self.router == "analytical" else {"epochs": self.router_epochs, "lr": self.router_lr}),
        }  # fmt: skip


def check_model(target: Target) -> None:
    """Refuse a model that cannot be converted.

    Raises:
        DivergenceError: Weights that are not finite.
        UnsupportedError: A converted model, half precision, no weights, no feed-forward network, or an exit on neurons
            that would become experts.
    """
    check_dense(target.model, where=target.name)
    if isinstance(target.model, Network):
        find_dense_ffns(target.model)  # refuses exits on converted stages, which the body alone does not contain


def check_numbers(
    widths: Mapping[str, int], *, experts: int | None, expert_size: int | None, shared: int = 0, k: int | None = None
) -> None:
    """Refuse a number or size of experts that does not divide the hidden widths of all networks, or too many of them.

    At most all but one expert may be shared, and a token may run at most ``k`` = all others. Of networks with different
    numbers of experts, ``k`` is bounded by the largest.

    Raises:
        ConfigError: Names the nearest valid values.

    >>> check_numbers({"a": 256, "b": 192}, experts=24, expert_size=None)
    Traceback (most recent call last):
    clframe.errors.ConfigError: moefy.experts: found 24, no divisor of the 256 hidden neurons of a; give 16 or 32
    """
    if experts is None and expert_size is None:
        _check_counts(widths, shared, k, experts=None, expert_size=None, most=MOST)
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
    _check_counts(widths, shared, k, experts=experts, expert_size=expert_size)


def _check_counts(
    widths: Mapping[str, int], shared: int, k: int | None, *, experts: int | None, expert_size: int | None,
    most: int | None = None,
) -> None:  # fmt: skip
    counts = {
        name: expert_count(width, experts=experts, expert_size=expert_size, most=most) for name, width in widths.items()
    }
    for name, count in counts.items():
        if shared >= count:
            raise ConfigError(
                f"moefy.shared: found {shared} of the {count} experts of {name}; give fewer than experts"
            )
    largest = max(counts.values(), default=0) - shared
    if k is not None and counts and k > largest:
        kind = "experts" if not shared else "routed experts"
        raise ConfigError(f"moefy.k: found {k} of {largest} {kind}; give 1 to {largest}")


def _nearest(divisors: Sequence[int], value: int) -> str:
    below = [n for n in divisors if n < value]
    above = [n for n in divisors if n > value]
    return " or ".join(str(n) for n in (*below[-1:], *above[:1]))
