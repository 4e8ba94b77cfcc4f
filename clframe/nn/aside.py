"""Passes beside training that leave no trace in the network: logits to store, gradients to compare with.

Shape suffixes: B batch, N samples, K exits, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from clframe.core.types import Output, Samples
from clframe.nn.network import Network


def logits_reader(network: Network, samples: Samples, *, batch_size: int = 256) -> Callable[[Tensor], Tensor]:
    """A function from index_N to logits_NKC of ``samples`` at all exits: not augmented, in evaluation mode.

    They lie where ``samples`` does, with ``-inf`` for classes not met; the network's own mode is put back.
    """

    @torch.no_grad()
    def logits(index_N: Tensor) -> Tensor:
        training = network.training
        if not len(index_N):
            return torch.empty(0, len(network.heads), network.classes, device=samples.raw(index_N).device)
        network.eval()
        parts = []
        for index in index_N.split(batch_size):
            raw = samples.raw(index)
            output: Output = network(network.place(samples.prepare(raw)))
            parts.append(torch.stack(output.logits, dim=1).to(raw.device))
        network.train(training)
        return torch.cat(parts)

    return logits


def forward_aside(network: Network, x: Tensor) -> Output:
    """Every exit's logits as training computes them, with their graph, while buffers stay as they are.

    Batch normalization takes the statistics of ``x`` and writes its running ones into copies.
    """
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    output: Output = functional_call(network, buffers, (x,))
    return output
