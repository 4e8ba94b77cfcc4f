"""Placements of exits: published ones as data, and placement by name, number, MACs or measured time.

Published placements are those of Szatkowski et al., "Improving Continual Learning Performance and Efficiency with
Auxiliary Classifiers" (2025). An architecture is identified by the names of its blocks, so they apply to any backbone
with the same blocks, of any class or width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from clframe.accounting.macs import stage_macs, zeros_for
from clframe.errors import ConfigError
from clframe.exits.head_kinds import HeadKind, Pooling
from clframe.exits.tap_choice import blind_taps, default_taps, require_sight
from clframe.nn.backbones.base import Backbone
from clframe.nn.backbones.stages import preserving_state
from clframe.nn.network import Network


@dataclass(frozen=True)
class ExitPlacement:
    """Taps for the exits before the last, in order of depth.

    Attributes:
        taps: Stage names.
        weights: Loss weight of each at the end of a ramp; the weight of the last exit is 1.
        pooling: Windows of each exit's pooling in the authors' code; empty where all are ``2x2``.
    """

    taps: tuple[str, ...]
    weights: tuple[float, ...]
    pooling: tuple[Pooling, ...] = ()


@dataclass(frozen=True)
class Published:
    """Placements for one architecture, identified by the names of its blocks; the first is the default."""

    blocks: tuple[str, ...]
    placements: tuple[ExitPlacement, ...]


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
            ExitPlacement(
                ("layer1.2", "layer1.4", "layer2.1", "layer2.3", "layer3.0", "layer3.2"),
                (0.15, 0.30, 0.45, 0.60, 0.75, 0.90),
            ),
            ExitPlacement(("layer1.2", "layer2.1", "layer3.0"), (0.15, 0.45, 0.75)),
            # The last step is smaller than the others in the authors' configuration too.
            ExitPlacement(
                _RESNET32[2:-1],
                (0.15, 0.225, 0.3, 0.375, 0.45, 0.525, 0.6, 0.675, 0.75, 0.825, 0.9, 0.95),
            ),
        ),
    ),
    "resnet18": Published(
        _blocks("layer", (2, 2, 2, 2)),
        (
            ExitPlacement(
                ("layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0"),
                (0.30, 0.40, 0.55, 0.65, 0.80, 0.90),
                ("2x2",) * 5 + ("2x2_ceil",),
            ),
        ),
    ),
    # Outputs 6, 13, 19, 26, 32, 39, 45 and 52 of torchvision's `features`, and the two hidden layers.
    "vgg19": Published(
        _blocks("block", (2, 2, 4, 4, 4)),
        (
            ExitPlacement(
                ("block1.1", "block2.1", "block3.1", "block3.3", "block4.1", "block4.3", "block5.1", "block5.3",
                 "fc1", "fc2"),
                _steps(0.09, 10),
            ),
        ),
    ),
    "wrn16_2": Published(
        _blocks("block", (2, 2, 2)),
        (
            ExitPlacement(
                ("block1.0", "block1.1", "block2.0", "block2.1", "block3.0"), (0.15, 0.35, 0.50, 0.65, 0.80),
                ("4x4",) * 5,
            ),
        ),
    ),
    "vit_b_16": Published(_VIT, (ExitPlacement(_VIT[:-1], _steps(0.08, 11)),)),
}  # fmt: skip
"""Placements by the paper's name of the backbone."""


def family_of(names: Sequence[str]) -> str | None:
    """Name of the published architecture whose blocks are the numbered stages in ``names``; None if there is none."""
    blocks = tuple(name for name in names if name.rpartition(".")[2].isdigit())
    for family, published in PUBLISHED.items():
        taps = {tap for placement in published.placements for tap in placement.taps}
        if blocks == published.blocks and taps <= set(names):
            return family
    return None


def published_placement(names: Sequence[str], *, exits: int | None = None) -> ExitPlacement:
    """The published placement for a backbone with stages of these names.

    Args:
        names: Names of the backbone's stages.
        exits: Number of exits before the last; None selects the main setting of the paper.

    Raises:
        ConfigError: No placement was published for these blocks, or none with this number of exits.

    >>> from clframe.nn.backbones import resnet32
    >>> published_placement(resnet32((3, 32, 32)).names, exits=3)
    ExitPlacement(taps=('layer1.2', 'layer2.1', 'layer3.0'), weights=(0.15, 0.45, 0.75), pooling=())
    """
    family = family_of(names)
    if family is None:
        raise ConfigError(
            f"exits: found no published taps for {', '.join(names)}; give taps, or place exits by number or cost "
            f"(published: {', '.join(PUBLISHED)})"
        )
    placements = PUBLISHED[family].placements
    for placement in placements:
        if exits is None or len(placement.taps) == exits:
            return placement
    counts = ", ".join(str(len(placement.taps)) for placement in placements)
    raise ConfigError(f"exits: found {exits} exits for {family}; published are {counts}")


def at_taps(backbone: Backbone, taps: Sequence[str]) -> ExitPlacement:
    """Exits on these taps, in order of depth; several may be on one tap.

    Raises:
        UnknownNameError: A tap that the backbone does not have; the nearest one is named.
        ConfigError: No taps, or taps that are not in order of depth.
    """
    if not taps:
        raise ConfigError("exits: found no taps; name at least one")
    depth = [backbone.tap(tap, where="exits") for tap in taps]
    if depth != sorted(depth):
        raise ConfigError(f"exits: found taps {', '.join(taps)}; list them in order of depth")
    return ExitPlacement(tuple(taps), _rising(len(taps)))


def every_nth_tap(backbone: Backbone, n: int) -> ExitPlacement:
    """An exit on every n-th tap except the last, which has the backbone's own classifier.

    Raises:
        ConfigError: ``n`` below 1, or so large that no tap remains.

    >>> from clframe.nn.backbones import mlp
    >>> every_nth_tap(mlp((1, 8, 8), depth=4), 2)
    ExitPlacement(taps=('layer2',), weights=(0.5,), pooling=())
    """
    taps = backbone.names[n - 1 : -1 : n] if n >= 1 else ()
    if not taps:
        most = len(backbone.names) - 1
        raise ConfigError(f"exits: found every {n} of {most} taps before the last; give a number from 1 to {most}")
    return ExitPlacement(taps, _rising(len(taps)))


def at_cost(
    costs: Mapping[str, float], shares: Sequence[float], *, without: Collection[str] = ()
) -> ExitPlacement:
    """Exits on the taps nearest to these shares of the backbone's cost, each on a different tap.

    Minimizes the sum of distances; of taps of equal cost the first is used.

    Args:
        costs: Cost of every stage in order, such as ``stage_macs(network)``. Costs of heads, under ``exit/<name>``,
            are ignored.
        shares: Ascending, between 0 and 1.
        without: Taps that are not used.

    Raises:
        ConfigError: Shares that are not ascending or not between 0 and 1, or more shares than taps.

    >>> at_cost({"a": 10, "b": 20, "c": 30, "d": 40}, [0.25, 0.5])
    ExitPlacement(taps=('b', 'c'), weights=(0.3, 0.6), pooling=())
    """
    stages = {name: cost for name, cost in costs.items() if not name.startswith("exit/")}
    total = sum(stages.values())
    spent = list(zip(stages, accumulate(stages.values()), strict=True))[:-1] if total else []
    names = [name for name, _ in spent if name not in without]
    reached = [cost / total for name, cost in spent if name not in without]
    if not shares or list(shares) != sorted(set(shares)) or shares[0] <= 0 or shares[-1] >= 1:
        raise ConfigError(f"exits: found shares {_listed(shares)}; give ascending numbers between 0 and 1")
    if len(shares) > len(reached):
        raise ConfigError(
            f"exits: found {len(shares)} shares for {len(reached)} taps before the last; give at most one per tap"
        )
    chosen = _nearest(reached, shares)
    weights = tuple(max(round(reached[stage], 2), 0.01) for stage in chosen)
    return ExitPlacement(tuple(names[stage] for stage in chosen), weights)


def at_latency(
    backbone: Backbone,
    shares: Sequence[float],
    *,
    without: Collection[str] = (),
    batch: int = 1,
    repetitions: int = 5,
) -> ExitPlacement:
    """Exits on the taps nearest to these shares of the backbone's run time on this machine.

    Applies :func:`at_cost` to :func:`stage_seconds`. Weights are the given shares, since measured shares vary between
    measurements.

    Args:
        backbone: The backbone to time, on its device.
        shares: Ascending, between 0 and 1.
        without: Taps that are not used.
        batch: Samples per pass.
        repetitions: Number of passes after one warm-up pass.

    Raises:
        ConfigError: As :func:`at_cost`.
    """
    seconds = stage_seconds(backbone, batch=batch, repetitions=repetitions)
    return replace(at_cost(seconds, shares, without=without), weights=tuple(shares))


def stage_seconds(backbone: Backbone, *, batch: int = 1, repetitions: int = 5) -> dict[str, float]:
    """Run time of every stage in seconds: medians of several passes in evaluation mode after one warm-up pass."""
    x = zeros_for(backbone, (batch, *backbone.input_shape))
    passes: list[list[float]] = []
    with preserving_state([backbone]):
        for _ in range(repetitions + 1):
            value, seconds = x, []
            for stage in backbone.stages:
                start = _synchronized_time(x)
                value = stage(value)
                seconds.append(_synchronized_time(x) - start)
            passes.append(seconds)
    return dict(zip(backbone.names, map(median, zip(*passes[1:], strict=True)), strict=True))


def place_exits(
    network: Network,
    *,
    taps: Sequence[str] = (),
    count: int | None = None,
    nth: int | None = None,
    cost_shares: Sequence[float] = (),
    latency_shares: Sequence[float] = (),
    values: Sequence[float] = (),
    head: HeadKind = "auto",
) -> ExitPlacement:
    """Place exits by the first option given; without options as published, or by :func:`~.tap_choice.default_taps`.

    Taps on which the head cannot see the input (:func:`~.tap_choice.blind_taps`) are left out, and refused in ``taps``.

    Args:
        network: The network; only its backbone matters.
        taps: Names, for :func:`at_taps`.
        count: Number of exits, for :func:`published_placement`.
        nth: Distance in taps, for :func:`every_nth_tap`.
        cost_shares: Shares of MACs, for :func:`at_cost`.
        latency_shares: Shares of run time, for :func:`at_latency`.
        values: Weights that replace those of the placement, one for each exit.
        head: Kind of the heads.

    Raises:
        ConfigError: As raised by the function for that option, or a wrong number of values.
        UnknownNameError: A tap that the backbone does not have.
    """
    backbone = network.backbone
    if taps:
        found = at_taps(backbone, taps)
        require_sight(backbone, taps, head)
    elif nth is not None:
        blind = blind_taps(backbone, head)
        found = at_taps(backbone, [tap for tap in every_nth_tap(backbone, nth).taps if tap not in blind])
    elif cost_shares:
        found = at_cost(stage_macs(network), cost_shares, without=blind_taps(backbone, head))
    elif latency_shares:
        found = at_latency(backbone, latency_shares, without=blind_taps(backbone, head))
    elif count is None and family_of(backbone.names) is None:
        found = at_taps(backbone, default_taps(network, head))
    else:
        found = published_placement(backbone.names, exits=count)
    if values and len(values) != len(found.taps):
        raise ConfigError(f"exits: found {len(values)} weights for {len(found.taps)} exits; give one for each")
    return replace(found, weights=tuple(values)) if values else found


def _rising(count: int) -> tuple[float, ...]:
    """Weights i / K for exit i of K, counted from 1, without the last."""
    return tuple(i / (count + 1) for i in range(1, count + 1))


def _nearest(reached: Sequence[float], shares: Sequence[float]) -> tuple[int, ...]:
    """Ascending, distinct indices into ``reached`` with the smallest sum of distances from ``shares``."""
    # Dynamic programming: best[j] is the distance and the indices for the shares so far, among the first j values.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (len(reached) + 1)
    for share in shares:
        longer: list[tuple[float, tuple[int, ...]]] = [(inf, ())]
        for index, value in enumerate(reached):
            distance, indices = best[index]
            chosen = (distance + abs(value - share), (*indices, index))
            longer.append(min(longer[-1], chosen, key=lambda choice: choice[0]))  # the first of equals
        best = longer
    return best[-1][1]


def _listed(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:g}" for share in shares) or "none"


def _synchronized_time(x: Tensor) -> float:
    """Clock time in seconds after all work on the device of ``x`` is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return perf_counter()
