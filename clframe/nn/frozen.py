"""Frozen copies of a network, and passes next to training that leave no trace in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from clframe.functional.losses import cross_entropy
from clframe.nn.network import Network
from clframe.nn.types import Inputs, Output, Samples


def freeze(network: Network) -> Network:
    """An independent copy in eval mode whose parameters need no gradient and hold none.

    >>> from clframe.nn.backbones import mlp
    >>> teacher = freeze(Network(mlp((1, 8, 8))))
    >>> teacher.training, any(p.requires_grad for p in teacher.parameters())
    (False, False)
    """
    return copy.deepcopy(network).eval().requires_grad_(False)  # a parameter's copy has no gradient


def restore(network: Network, state_dict: Mapping[str, Any]) -> Network:
    """A frozen copy of ``network``'s architecture with the weights of ``state_dict``.

    Heads take the sizes of the saved state, so a teacher with fewer classes comes back from the network
    that has grown since. ``network`` itself is left alone.
    """
    frozen = freeze(network)
    frozen.load_state_dict(state_dict)
    return frozen


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every part gets its own mode back."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def called(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for inputs of any of the three kinds."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


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
