"""Train a copy of a network by itself, beside the run."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Generator

from clframe.core.types import Samples
from clframe.functional.losses import cross_entropy
from clframe.nn.network import Network


def fine_tuned(
    network: Network,
    samples: Samples,
    *,
    classes: Sequence[int],
    epochs: int,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    clip: float = 100.0,
    generator: Generator,
) -> tuple[Network, int]:
    """A copy of the network, trained on some samples by SGD, and how many steps that took.

    The loss is the sum over exits of the cross-entropy among ``classes``. Order and augmentation are drawn from the
    generator, and so is what the network's own layers draw, such as dropout; torch's global generators are left as
    they were, and so is the network.

    Args:
        network: Copied, trainable parts and all.
        samples: To train on, augmented as in training.
        classes: The classes of the samples, among which they are told apart.
        epochs: Passes over the samples.
        lr: Learning rate, constant.
        momentum: Of SGD.
        weight_decay: Of SGD.
        batch_size: Samples a step; the last batch may be smaller.
        clip: Largest norm of the gradient.
        generator: On the CPU.
    """
    learner = copy.deepcopy(network).train()
    device = learner.final.weight.device
    columns = torch.tensor(sorted(classes), device=device)
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    steps = 0
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for _ in range(epochs):
            for index_B in torch.randperm(len(samples), generator=generator).split(batch_size):
                x = network.place(samples.prepare(samples.raw(index_B), generator=generator))
                y_B = samples.y[index_B.to(samples.y.device)].to(device)
                logits = [logits_BC.index_select(1, columns) for logits_BC in learner(x).logits]
                loss = cross_entropy(logits, torch.searchsorted(columns, y_B)).sum()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                steps += 1
    optimizer.zero_grad()
    return learner, steps
