"""What a prediction costs on average: where samples stop, and of the experts on the way there those that run."""

from __future__ import annotations

from clframe.accounting import Predictions
from clframe.nn.network import Network


def mean_macs(network: Network, predictions: Predictions, *, experience: int) -> float:
    """Mean MACs of a prediction after training experience ``experience``; NaN where nothing was noted.

    Exits are counted on all test samples of the experiences so far. What experts leave out, less their router, is
    measured on a few samples that run through everything, and taken off for the share of samples that reach the layer.
    """
    stops = predictions.stops(experience=experience)
    samples = sum(stop.samples for stop in stops)
    macs = predictions.expected(experience=experience)
    for layer in predictions.experts(experience=experience):
        saved = (layer.dense_macs - layer.macs) / layer.samples
        reaching = _exits_behind(network, layer.layer)
        macs -= saved * sum(stop.samples for stop in stops if stop.exit in reaching) / max(samples, 1)
    return macs


def _exits_behind(network: Network, layer: str) -> set[str]:
    """The exits that a sample reaches only through a layer: those at its stage or deeper, or on its head."""
    part = network.get_submodule(layer)
    found, passed = set[str](), False
    for _, stage, exits in network.plan():
        passed = passed or any(inner is part for inner in stage.modules())
        for name, exit in exits:
            passed = passed or any(inner is part for inner in network.heads[exit].modules())
            if passed:
                found.add(name)
    return found
