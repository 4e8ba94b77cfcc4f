"""What a network makes of stored samples, as evaluation sees them: features, and logits of every exit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clframe.core.types import Samples
from clframe.nn.freeze import freeze
from clframe.nn.network import Network


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
        device = next(network.parameters()).device
        parts = [samples.prepare(samples.raw(index)).to(device) for index in index_N.split(batch_size)]
        with torch.no_grad():
            return torch.cat([frozen[0].backbone(x) for x in parts])

    return features


@torch.no_grad()
def exit_logits(
    network: Network, parts: Sequence[Samples], *, batch_size: int = 256
) -> tuple[tuple[Tensor, ...], Tensor]:
    """K tensors logits_NC, one for each exit, of all samples of all parts, and their targets_N.

    Not augmented, in evaluation mode; the network's own mode is put back.
    """
    device, training = network.final.weight.device, network.training
    network.eval()
    outputs = [
        network(samples.prepare(samples.raw(index)).to(device)).logits
        for samples in parts
        for index in torch.arange(len(samples)).split(batch_size)
    ]
    network.train(training)
    targets_N = torch.cat([samples.y.to(device) for samples in parts])
    return tuple(torch.cat(logits) for logits in zip(*outputs, strict=True)), targets_N
