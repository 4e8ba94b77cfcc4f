"""Features of stored samples: the last tap, as evaluation sees it."""

from __future__ import annotations

from collections.abc import Callable

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
