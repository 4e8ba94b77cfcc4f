"""Frozen copies of a network, and forward passes without side effects."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from clframe.functional.losses import cross_entropy
from clframe.nn.network import Network
from clframe.nn.types import Inputs, Output, Samples
from clframe.process_state import preserve_generators


def freeze(network: Network) -> Network:
    """Copy a network in evaluation mode, without gradients: a teacher.

    >>> from clframe.nn.backbones import mlp
    >>> teacher = freeze(Network(mlp((1, 8, 8))))
    >>> teacher.training, any(p.requires_grad for p in teacher.parameters())
    (False, False)
    """
    return copy.deepcopy(network).eval().requires_grad_(False)  # a parameter's copy has no gradient


def restore(network: Network, state_dict: Mapping[str, Any]) -> Network:
    """Copy the architecture of ``network``, frozen, with the weights of ``state_dict``.

    Heads take the sizes of the saved state, so that a teacher with fewer classes can be restored from a network that
    has grown since.
    """
    frozen = freeze(network)
    frozen.load_state_dict(state_dict)
    return frozen


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module returns to its own mode at the end."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model with one tensor, positional or named inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def first_logits(output: Output, count: int) -> dict[str, Tensor]:
    """Return ``logits``: logits_NKC of the first ``count`` samples at all exits, detached."""
    return {"logits": torch.stack([logits_BC[:count].detach() for logits_BC in output.logits], dim=1)}


def logits_reader(network: Network, samples: Samples, *, batch_size: int = 256) -> Callable[[Tensor], Tensor]:
    """Return a function from index_N to logits_NKC of ``samples`` at all exits, not augmented, in evaluation mode.

    Logits are on the device of ``samples``, with ``-inf`` for unseen classes; the network returns to its own mode.
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
            output: Output = network(network.to_device(samples.prepare(raw)))
            parts.append(torch.stack(output.logits, dim=1).to(raw.device))
        network.train(training)
        return torch.cat(parts)

    return logits


TOP_LOGITS = 16
"""Largest logits of a token that are stored: all would be thousands of numbers per token and exit."""


def top_logits_reader(
    network: Network, samples: Samples, *, batch_size: int = 16
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return a function from index_N to the largest logits of a language model for windows of text.

    ``logits`` is [N, tokens, exits, :data:`TOP_LOGITS`], in descending order, and ``tokens`` the ids that they belong
    to, on the device of ``samples``; the network is in evaluation mode and returns to its own mode.
    """
    exits, context = len(network.heads), network.input_shape[0] - 1
    top = min(TOP_LOGITS, network.vocabulary)

    @torch.no_grad()
    def read(index_N: Tensor) -> dict[str, Tensor]:
        device, training = samples.raw(index_N[:0]).device, network.training
        shape = (0, context, exits, top)
        found = [(torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int32, device=device))]
        network.eval()
        for index in index_N.split(batch_size) if len(index_N) else ():
            output: Output = network(network.to_device(samples.prepare(samples.raw(index))))
            best = [logits_NV.topk(top, dim=1) for logits_NV in output.logits]
            values, ids = (torch.stack([each[part] for each in best], dim=1) for part in (0, 1))
            size = (-1, *shape[1:])
            found.append((values.float().reshape(size).to(device), ids.int().reshape(size).to(device)))
        network.train(training)
        return {name: torch.cat([each[part] for each in found]) for part, name in enumerate(("logits", "tokens"))}

    return read


def forward_preserving_buffers(
    network: Network, x: Tensor, *, parameters: Mapping[str, Tensor] = MappingProxyType({})
) -> Output:
    """Run a training-mode forward pass with its graph that leaves all buffers unchanged.

    Batch normalization uses the statistics of ``x`` and updates copies of its running statistics. ``parameters``, by
    name, replace the network's own.
    """
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    output: Output = functional_call(network, {**buffers, **parameters}, (x,))
    return output


def fine_tune(
    network: Network,
    samples: Samples,
    *,
    classes: Sequence[int],
    epochs: int,
    lr: float,
    milestones: Sequence[float] = (),
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    clip: float = 100.0,
    generator: Generator,
) -> tuple[Network, int]:
    """Train a copy of the network on some samples with SGD; return the copy and the number of steps.

    The loss is the sum over exits of the cross-entropy over ``classes``. ``generator`` determines order, augmentation
    and the network's own random layers, such as dropout; torch's global generators and the network are unchanged.

    Args:
        network: The network to copy.
        samples: Training data, augmented as in training.
        classes: The classes of the samples, over which the softmax is taken.
        epochs: Passes over the samples.
        lr: Learning rate at the start.
        milestones: Fractions of ``epochs`` after which the learning rate is divided by 10.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        batch_size: Samples per step; the last batch may be smaller.
        clip: Maximum gradient norm.
        generator: A generator on the CPU.
    """
    learner = copy.deepcopy(network).train()
    device = learner.final.weight.device
    columns = torch.tensor(sorted(classes), device=device)
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    steps = 0
    # The network's own layers draw from the global generator: seed it here, and restore it at the end.
    with preserve_generators(), torch.enable_grad():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for epoch in range(epochs):
            passed = sum(epoch >= share * epochs for share in milestones)
            optimizer.param_groups[0]["lr"] = lr * 0.1**passed
            for index_B in torch.randperm(len(samples), generator=generator).split(batch_size):
                x = network.to_device(samples.prepare(samples.raw(index_B), generator=generator))
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
