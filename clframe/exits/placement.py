"""Published placements of exits, as data.

From Szatkowski et al., "Improving Continual Learning Performance and Efficiency with Auxiliary Classifiers" (2025).
An architecture is known by the names of its blocks, so that any backbone of the same blocks has its placements,
whatever its class or width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clframe.accounting.macs import stage_macs, zeros_for
from clframe.errors import ConfigError
from clframe.nn.backbones.base import Backbone, untouched

if TYPE_CHECKING:
    from clframe.nn.network import Network


@dataclass(frozen=True)
class Placement:
    """Taps for the exits before the last, in order of depth.

    Attributes:
        taps: Stage names.
        weights: What the loss of each weighs at the end of a ramp; the last exit's weighs 1.
    """

    taps: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Published:
    """Placements for one architecture, known by the names of its blocks; the first is the default."""

    blocks: tuple[str, ...]
    placements: tuple[Placement, ...]


def _blocks(kind: str, counts: Sequence[int]) -> tuple[str, ...]:
    """``kind1.0``, ``kind1.1``, ...: groups counted from 1, blocks from 0."""
    return tuple(f"{kind}{group}.{block}" for group, count in enumerate(counts, 1) for block in range(count))


def _steps(step: float, count: int) -> tuple[float, ...]:
    return tuple(round(step * (i + 1), 2) for i in range(count))


_RESNET32 = _blocks("layer", (5, 5, 5))
_VIT = tuple(f"encoder.{layer}" for layer in range(12))

PUBLISHED = {
    "resnet32": Published(
        _RESNET32,
        (
            Placement(
                ("layer1.2", "layer1.4", "layer2.1", "layer2.3", "layer3.0", "layer3.2"),
                (0.15, 0.30, 0.45, 0.60, 0.75, 0.90),
            ),
            Placement(("layer1.2", "layer2.1", "layer3.0"), (0.15, 0.45, 0.75)),
            # Of the twelve weights the paper gives the ends, .15 and .95; between them they are even.
            Placement(_RESNET32[2:-1], tuple(round(0.15 + 0.8 * i / 11, 3) for i in range(12))),
        ),
    ),
    "resnet18": Published(
        _blocks("layer", (2, 2, 2, 2)),
        (
            Placement(
                ("layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0"),
                (0.30, 0.40, 0.55, 0.65, 0.80, 0.90),
            ),
        ),
    ),
    # Outputs 6, 13, 19, 26, 32, 39, 45 and 52 of torchvision's `features`, and the two hidden layers.
    "vgg19": Published(
        _blocks("block", (2, 2, 4, 4, 4)),
        (
            Placement(
                ("block1.1", "block2.1", "block3.1", "block3.3", "block4.1", "block4.3", "block5.1", "block5.3",
                 "fc1", "fc2"),
                _steps(0.09, 10),
            ),
        ),
    ),
    "wrn16_2": Published(
        _blocks("block", (2, 2, 2)),
        (
            Placement(
                ("block1.0", "block1.1", "block2.0", "block2.1", "block3.0"), (0.15, 0.35, 0.50, 0.65, 0.80)
            ),
        ),
    ),
    "vit_b_16": Published(_VIT, (Placement(_VIT[:-1], _steps(0.08, 11)),)),
}  # fmt: skip
"""By the name of the backbone that the paper uses."""


def family_of(names: Sequence[str]) -> str | None:
    """The published architecture whose blocks are all numbered stages, and the taps of all placements exist."""
    blocks = tuple(name for name in names if name.rpartition(".")[2].isdigit())
    for family, published in PUBLISHED.items():
        taps = {tap for placement in published.placements for tap in placement.taps}
        if blocks == published.blocks and taps <= set(names):
            return family
    return None


def preset(names: Sequence[str], *, exits: int | None = None) -> Placement:
    """The published placement for a backbone whose blocks have these names, whatever its class or width.

    Args:
        names: The backbone's stages.
        exits: How many exits before the last; None takes the paper's main setting.

    Raises:
        ConfigError: No placement was published for such blocks, or none with so many exits.

    >>> from clframe.nn.backbones import resnet32
    >>> preset(resnet32((3, 32, 32)).names, exits=3)
    Placement(taps=('layer1.2', 'layer2.1', 'layer3.0'), weights=(0.15, 0.45, 0.75))
    """
    family = family_of(names)
    if family is None:
        raise ConfigError(
            f"exits: found no published taps for {', '.join(names)}; name taps, or place them by number or cost "
            f"(published: {', '.join(PUBLISHED)})"
        )
    placements = PUBLISHED[family].placements
    for placement in placements:
        if exits is None or len(placement.taps) == exits:
            return placement
    counts = ", ".join(str(len(placement.taps)) for placement in placements)
    raise ConfigError(f"exits: found {exits} exits for {family}; published are {counts}")


def named(backbone: Backbone, taps: Sequence[str]) -> Placement:
    """Exits on these taps, in order of depth; several may share one.

    Raises:
        UnknownNameError: A tap that the backbone does not have; the nearest one is named.
        ConfigError: No taps, or taps that are not in order of depth.
    """
    if not taps:
        raise ConfigError("exits: found no taps; name at least one")
    depth = [backbone.tap(tap) for tap in taps]
    if depth != sorted(depth):
        raise ConfigError(f"exits: found taps {', '.join(taps)}; list them in order of depth")
    return Placement(tuple(taps), _rising(len(taps)))


def every(backbone: Backbone, n: int) -> Placement:
    """An exit on every n-th tap, the last one left out: it has the backbone's own classifier.

    Raises:
        ConfigError: ``n`` below 1, or so large that no tap remains.

    >>> from clframe.nn.backbones import mlp
    >>> every(mlp((1, 8, 8), depth=4), 2)
    Placement(taps=('layer2',), weights=(0.5,))
    """
    taps = backbone.names[n - 1 : -1 : n] if n >= 1 else ()
    if not taps:
        most = len(backbone.names) - 1
        raise ConfigError(f"exits: found every {n} of {most} taps before the last; give a number from 1 to {most}")
    return Placement(taps, _rising(len(taps)))


def at_cost(costs: Mapping[str, float], shares: Sequence[float]) -> Placement:
    """Exits on the taps nearest to these shares of the backbone's cost, each on a tap of its own.

    Nearest means the smallest sum of distances; of taps of equal cost the first is taken.

    Args:
        costs: Cost of every stage in order, such as ``stage_macs(network)``. Those of heads, under
            ``exit/<name>``, are left out.
        shares: Ascending, between 0 and 1.

    Raises:
        ConfigError: Shares that are not ascending or not between 0 and 1, or more of them than taps.

    >>> at_cost({"a": 10, "b": 20, "c": 30, "d": 40}, [0.25, 0.5])
    Placement(taps=('b', 'c'), weights=(0.3, 0.6))
    """
    stages = {name: cost for name, cost in costs.items() if not name.startswith("exit/")}
    total = sum(stages.values())
    reached = [spent / total for spent in accumulate(stages.values())][:-1] if total else []
    if not shares or list(shares) != sorted(set(shares)) or shares[0] <= 0 or shares[-1] >= 1:
        raise ConfigError(f"exits: found shares {_listed(shares)}; give ascending numbers between 0 and 1")
    if len(shares) > len(reached):
        raise ConfigError(
            f"exits: found {len(shares)} shares for {len(reached)} taps before the last; give no more than taps"
        )
    names, chosen = list(stages), _nearest(reached, shares)
    weights = tuple(max(round(reached[place], 2), 0.01) for place in chosen)
    return Placement(tuple(names[place] for place in chosen), weights)


def at_latency(
    backbone: Backbone, shares: Sequence[float], *, batch: int = 1, repetitions: int = 5
) -> Placement:
    """Exits on the taps nearest to these shares of the backbone's time on this machine.

    As :func:`at_cost` with :func:`stage_seconds`; the weights are the shares asked for, since measured ones
    differ from one time to the next.

    Args:
        backbone: What to measure, on the device it is on.
        shares: Ascending, between 0 and 1.
        batch: Number of samples in a pass.
        repetitions: Passes, after one that warms up.

    Raises:
        ConfigError: As :func:`at_cost`.
    """
    seconds = stage_seconds(backbone, batch=batch, repetitions=repetitions)
    return replace(at_cost(seconds, shares), weights=tuple(shares))


def stage_seconds(backbone: Backbone, *, batch: int = 1, repetitions: int = 5) -> dict[str, float]:
    """Seconds that every stage takes, the median of several passes in eval mode after one that warms up."""
    x = zeros_for(backbone, (batch, *backbone.input_shape))
    passes: list[list[float]] = []
    with untouched([backbone]):
        for _ in range(repetitions + 1):
            value, seconds = x, []
            for stage in backbone.stages:
                start = _now(x)
                value = stage(value)
                seconds.append(_now(x) - start)
            passes.append(seconds)
    return dict(zip(backbone.names, map(median, zip(*passes[1:], strict=True)), strict=True))


def place(
    network: Network,
    *,
    taps: Sequence[str] = (),
    count: int | None = None,
    nth: int | None = None,
    cost_shares: Sequence[float] = (),
    latency_shares: Sequence[float] = (),
    values: Sequence[float] = (),
) -> Placement:
    """The placement that the first option given asks for; with none, the published one or every tap.

    Args:
        network: Whose backbone; its exits have no part in it.
        taps: As :func:`named`.
        count: As ``exits`` of :func:`preset`.
        nth: As :func:`every`.
        cost_shares: As :func:`at_cost`, by MACs.
        latency_shares: As :func:`at_latency`.
        values: Weights in place of the placement's own, one for each exit.

    Raises:
        ConfigError: As the function for that option, or another number of values than exits.
        UnknownNameError: A tap that the backbone does not have.
    """
    backbone = network.backbone
    if taps:
        found = named(backbone, taps)
    elif nth is not None:
        found = every(backbone, nth)
    elif cost_shares:
        found = at_cost(stage_macs(network), cost_shares)
    elif latency_shares:
        found = at_latency(backbone, latency_shares)
    elif count is None and family_of(backbone.names) is None:
        found = every(backbone, 1)
    else:
        found = preset(backbone.names, exits=count)
    if values and len(values) != len(found.taps):
        raise ConfigError(f"exits: found {len(values)} weights for {len(found.taps)} exits; give one for each")
    return replace(found, weights=tuple(values)) if values else found


def _rising(count: int) -> tuple[float, ...]:
    """For exit i of K, counted from 1 and without the last, i / K."""
    return tuple(i / (count + 1) for i in range(1, count + 1))


def _nearest(reached: Sequence[float], shares: Sequence[float]) -> tuple[int, ...]:
    """Ascending places in ``reached``, all different, with the smallest sum of distances from ``shares``."""
    # best[j]: the distance and the places for the shares so far, within the first j places.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (len(reached) + 1)
    for share in shares:
        longer: list[tuple[float, tuple[int, ...]]] = [(inf, ())]
        for place, at in enumerate(reached):
            distance, places = best[place]
            taken = (distance + abs(at - share), (*places, place))
            longer.append(min(longer[-1], taken, key=lambda choice: choice[0]))  # the first of equals
        best = longer
    return best[-1][1]


def _listed(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:g}" for share in shares) or "none"


def _now(x: Tensor) -> float:
    """Seconds on the clock when all work on the device of ``x`` is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return perf_counter()
