"""Features and logits of stored samples: not augmented, network in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clframe.functional.language import next_token_targets
from clframe.functional.prototypes import to_single
from clframe.nn.backbones.stages import preserving_state
from clframe.nn.frozen import freeze
from clframe.nn.network import Network
from clframe.nn.types import Output, Samples

TapPooling = Literal["mean", "max"]
MOST_TOKENS = 8192
"""Tokens of a text whose logits are held in memory together."""


def feature_reader(
    network: Network, samples: Samples, *, batch_size: int = 256
) -> Callable[[Tensor], Tensor]:
    """Return a function from index_N to the last-tap features_NF of ``samples``, of a text their mean over its tokens.

    It uses a frozen copy of the network, made at the first call, so that an unused reader costs nothing.
    """
    frozen: list[Network] = []

    def features(index_N: Tensor) -> Tensor:
        if not frozen:
            frozen.append(freeze(network))
        parts = [network.to_device(samples.prepare(samples.raw(index))) for index in index_N.split(batch_size)]
        with torch.no_grad():
            found = torch.cat([frozen[0].backbone(x) for x in parts])
        return found.mean(1) if network.vocabulary else found

    return features


def exit_logits(
    network: Network,
    parts: Sequence[Samples],
    *,
    forward: Callable[[Tensor], Output] | None = None,
    batch_size: int = 256,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Compute K tensors logits_NC, one per exit, of all samples of all ``parts``, and their targets_N.

    Of text, N are the tokens of at most :data:`MOST_TOKENS` in evenly spaced windows of each part, since logits over a
    vocabulary take thousands of numbers per token.

    Modules return to their own mode afterwards. ``forward`` replaces the plain forward pass where a component adjusts
    logits (``context.corrected_output``).
    """
    device = network.final.weight.device
    compute = network if forward is None else forward
    outputs, targets = [], []
    with preserving_state([network]):
        for samples in parts:
            chosen = _windows(network, len(samples)) if network.vocabulary else torch.arange(len(samples))
            for index in chosen.split(batch_size):
                x = network.to_device(samples.prepare(samples.raw(index)))
                outputs.append(compute(x).logits)
                y_B = samples.y[index.to(samples.y.device)].to(device)
                targets.append(next_token_targets(x) if network.vocabulary else y_B)
    targets_N = torch.cat(targets)
    return tuple(torch.cat(logits) for logits in zip(*outputs, strict=True)), targets_N


def _windows(network: Network, count: int) -> Tensor:
    """Indices of evenly spaced windows with at most MOST_TOKENS tokens in all."""
    most = max(1, MOST_TOKENS // (network.input_shape[0] - 1))
    return torch.arange(min(count, most)) * count // min(count, most)


def embed_tap(tap: Tensor, *, pooling: TapPooling = "mean") -> Tensor:
    """Reduce a tap to features_BF: a map pooled over its positions, the first of its tokens, or the flat tap itself.

    ``mean`` averages a map over all positions; ``max`` flattens it after max pooling by 2x2.
    """
    if tap.ndim == 4 and pooling == "max":
        window = (min(2, tap.shape[2]), min(2, tap.shape[3]))  # maps of one row or column cannot be pooled further
        return F.max_pool2d(tap, window).flatten(1)
    if tap.ndim == 4:
        return tap.mean(dim=(2, 3))
    return tap[:, 0] if tap.ndim == 3 else tap


@torch.no_grad()
def exit_features(
    network: Network,
    samples: Samples,
    *,
    order: Tensor | None = None,
    batch_size: int = 256,
    pooling: TapPooling = "mean",
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Iterate over batches of K embedded taps features_BF, one per exit, and targets_B.

    The network returns to its own mode at the end.

    Args:
        network: The network that computes the taps.
        samples: Its inputs.
        order: index_N of the samples to iterate over; None is all, in stored order.
        batch_size: Samples per batch.
        pooling: Of the taps of exits before the last; the last one averages, as the final classifier does.
    """
    order = torch.arange(len(samples)) if order is None else order
    device, training, names = network.final.weight.device, network.training, network.exit_taps
    network.eval()
    try:
        for index in order.split(batch_size):
            taps = network(network.to_device(samples.prepare(samples.raw(index))), taps=names).taps
            wanted: list[tuple[str, TapPooling]] = [(name, pooling) for name in names[:-1]] + [(names[-1], "mean")]
            embedding = {(name, how): embed_tap(taps[name], pooling=how) for name, how in dict.fromkeys(wanted)}
            yield tuple(embedding[key] for key in wanted), samples.y[index.to(samples.y.device)].to(device)
    finally:
        network.train(training)


@torch.no_grad()
def class_sums(
    network: Network, samples: Samples, *, batch_size: int = 256, pooling: TapPooling = "mean"
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Sum the normalized embedded taps by class: K tensors sums_CF, one per exit, and count_C.

    C is the number of outputs of the network; otherwise as :func:`exit_features`.
    """
    classes = network.classes
    sums: list[Tensor] = []
    count_C = torch.zeros(classes, dtype=torch.long, device=network.final.weight.device)
    for features, y_B in exit_features(network, samples, batch_size=batch_size, pooling=pooling):
        # A matrix product, because index_add_ has no fixed order of summation on GPUs.
        one_hot_CB = F.one_hot(y_B, classes).T
        singles = [to_single(f_BF) for f_BF in features]
        parts = [one_hot_CB.to(f_BF.dtype) @ F.normalize(f_BF, dim=1) for f_BF in singles]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        count_C += one_hot_CB.sum(1)
    return tuple(sums), count_C
