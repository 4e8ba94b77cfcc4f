"""What a network makes of stored samples, as evaluation sees them: features, and logits of every exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clframe.nn.backbones.base import untouched
from clframe.nn.frozen import freeze
from clframe.nn.network import Network
from clframe.nn.types import Output, Samples


def feature_reader(
    network: Network, samples: Samples, *, batch_size: int = 256
) -> Callable[[Tensor], Tensor]:
    """A function from index_N to features_NF of ``samples``: not augmented, network in eval mode.

    The network itself is left alone: it is copied at the first call, so a reader that nobody calls costs
    nothing.
    """
    frozen: list[Network] = []

    def features(index_N: Tensor) -> Tensor:
        if not frozen:
            frozen.append(freeze(network))
        parts = [network.place(samples.prepare(samples.raw(index))) for index in index_N.split(batch_size)]
        with torch.no_grad():
            return torch.cat([frozen[0].backbone(x) for x in parts])

    return features


def exit_logits(
    network: Network,
    parts: Sequence[Samples],
    *,
    answer: Callable[[Tensor], Output] | None = None,
    batch_size: int = 256,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """K tensors logits_NC, one for each exit, of all samples of all parts, and their targets_N.

    Not augmented, in evaluation mode; the mode of every part is put back. ``answer`` takes the place of the plain
    forward pass where a component corrects it (``context.answer``).
    """
    device = network.final.weight.device
    forward = network if answer is None else answer
    with untouched([network]):
        outputs = [
            forward(network.place(samples.prepare(samples.raw(index)))).logits
            for samples in parts
            for index in torch.arange(len(samples)).split(batch_size)
        ]
    targets_N = torch.cat([samples.y.to(device) for samples in parts])
    return tuple(torch.cat(logits) for logits in zip(*outputs, strict=True)), targets_N


def embedded(tap: Tensor) -> Tensor:
    """features_BF of a tap: a map's mean over its positions, the first of its tokens, or the flat tap itself."""
    if tap.ndim == 4:
        return tap.mean(dim=(2, 3))
    return tap[:, 0] if tap.ndim == 3 else tap


@torch.no_grad()
def exit_features(
    network: Network, samples: Samples, *, order: Tensor | None = None, batch_size: int = 256
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """K embedded taps features_BF, one for each exit, and targets_B: batch by batch.

    Not augmented, in evaluation mode; the network's own mode is put back in the end.

    Args:
        network: What makes the features.
        samples: What it makes them of.
        order: index_N of the samples to go through; None takes all as they come.
        batch_size: How many at a time.
    """
    order = torch.arange(len(samples)) if order is None else order
    device, training, names = network.final.weight.device, network.training, network.exit_taps
    network.eval()
    try:
        for index in order.split(batch_size):
            taps = network(network.place(samples.prepare(samples.raw(index))), taps=names).taps
            embedding = {name: embedded(tap) for name, tap in taps.items()}
            yield tuple(embedding[name] for name in names), samples.y[index.to(samples.y.device)].to(device)
    finally:
        network.train(training)


@torch.no_grad()
def class_sums(network: Network, samples: Samples, *, batch_size: int = 256) -> tuple[tuple[Tensor, ...], Tensor]:
    """K tensors sums_CF, one for each exit: its embedded taps, brought to length 1, summed up by class; and count_C.

    C is the number of outputs of the network. As :func:`exit_features` otherwise.
    """
    classes = network.classes
    sums: list[Tensor] = []
    count_C = torch.zeros(classes, dtype=torch.long, device=network.final.weight.device)
    for features, y_B in exit_features(network, samples, batch_size=batch_size):
        # A product with one-hot rows: adding by index has no fixed order of summation on accelerators.
        one_hot_CB = F.one_hot(y_B, classes).T
        parts = [one_hot_CB.to(f_BF.dtype) @ F.normalize(f_BF, dim=1) for f_BF in features]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        count_C += one_hot_CB.sum(1)
    return tuple(sums), count_C
