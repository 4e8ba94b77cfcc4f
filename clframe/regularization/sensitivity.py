"""Sensitivity of the losses of a network's exits to its weights, estimated on samples.

Shape suffixes: B batch, C classes, K exits, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.func import functional_call

from clframe.functional.prototypes import to_single
from clframe.nn.network import Network
from clframe.nn.types import Samples
from clframe.regularization.importance import gradient_sums

Scope = Literal["exit", "block", "last", "total"]
"""Losses: of each exit, over all stages up to its tap or over its own stage; of the last exit; of all exits."""

Labels = Literal["given", "sampled", "predicted"]
"""Labels of the data; drawn from each exit's softmax; each exit's arg-max."""

Estimate = Literal["samples", "batches", "published"]

Objective = tuple[tuple[int, ...], tuple[str, ...]]
"""Exits whose losses are added, and the names of the weights they depend on, those of the backbone first."""

SampleLoss = Callable[[Tensor, Tensor], Tensor]
"""Loss of logits_BC and labels_B, a mean over samples."""

AT_ONCE = 2**26
"""Values of per-sample gradients in memory together; 256 MiB in float32."""


def objectives(
    network: Network, *, scope: Scope, heads: Literal["covered", "free"] = "covered"
) -> tuple[Objective, ...]:
    """Return the objectives of a scope: one, or with ``exit`` and ``block`` one for each exit.

    An exit's weights are those of its head and of the backbone up to its tap; with ``block``, of an exit before the
    last, those of the stage it is attached to and of its head. Frozen weights are left out.

    >>> from clframe.nn import GrowingLinear
    >>> from clframe.nn.backbones import mlp
    >>> network = Network(mlp((4,), width=3), exits=[("layer1", GrowingLinear(3))])
    >>> objectives(network, scope="exit")[0]
    ((0,), ('backbone.stages.0.weight', 'backbone.stages.0.bias', 'heads.0.weight', 'heads.0.bias'))
    """
    learning = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    depth = network.exit_stages
    everyone = tuple(range(len(network.heads)))
    each: list[tuple[int, ...]] = [(k,) for k in everyone]
    groups: dict[Scope, list[tuple[int, ...]]] = {
        "exit": each, "block": each, "last": [everyone[-1:]], "total": [everyone]
    }  # fmt: skip
    found = []
    for exits in groups[scope]:
        first = depth[exits[-1]] if scope == "block" and exits[-1] != everyone[-1] else 0
        parts = [f"backbone.stages.{stage}." for stage in range(first, depth[exits[-1]] + 1)]
        parts += [f"heads.{exit}." for exit in exits] if heads == "covered" else []
        found.append((exits, tuple(name for name in learning if name.startswith(tuple(parts)))))
    return tuple(found)


def sensitivities(
    network: Network,
    samples: Samples,
    *,
    measured: Sequence[Objective],
    loss: SampleLoss,
    power: int,
    estimate: Estimate = "samples",
    labels: Labels = "given",
    limit: int = 0,
    batch_size: int = 64,
    generator: Generator,
) -> tuple[dict[str, Tensor], ...]:
    """Return, for each objective, the mean over samples of ``|gradient of the sample's loss|^power``, by weight.

    Samples are not augmented and the network is in evaluation mode, with running statistics of batch normalization;
    gradients pass between exits as in training. The network is not changed. The sample of a language model is a window
    of text, its loss the mean over its tokens. The cost is a forward and a backward pass
    of every sample for each objective, about ten training epochs on a CPU (convolutional nets and small transformers,
    all exits) and more with large linear layers, because each sample needs a gradient of all weights; ``limit`` bounds
    it.

    Args:
        network: The network.
        samples: Samples to average over.
        measured: See :func:`objectives`.
        loss: Loss of an exit's logits and labels.
        power: 2 for a Fisher diagonal, 1 for absolute gradients.
        estimate: ``samples`` averages over samples. ``batches`` averages over batches the powers of the gradient of the
            batch's mean loss: one backward pass per batch, but squares are ``batch_size`` times too small if the
            gradients of different samples are uncorrelated. ``published`` divides by the number of samples after every
            batch instead of once at the end, so all batches but the last nearly vanish.
        labels: Labels of the loss.
        limit: Most samples to use, drawn at random; 0 uses all.
        batch_size: Batch size; changes the result of the last two estimates only.
        generator: Draws the order and the sampled labels.
    """
    index_N = torch.randperm(len(samples), generator=generator)
    index_N = index_N[:limit] if limit else index_N
    weights = {name: value.detach() for name, value in network.named_parameters()}
    found = [{name: torch.zeros_like(to_single(weights[name])) for name in names} for _, names in measured]
    training, device = network.training, network.final.weight.device
    network.eval()
    try:
        with torch.no_grad():
            for index in index_N.split(batch_size):
                x = network.to_device(samples.prepare(samples.raw(index)))
                x = x.to(network.final.weight.dtype) if x.is_floating_point() else x
                y_B = samples.y[index.to(samples.y.device)].to(device)
                y_B = x[:, 1:] if network.vocabulary else y_B  # of each token of a window
                label_BK = _labels(network, x, y_B, labels, generator)
                for sums, (exits, names) in zip(found, measured, strict=True):
                    own = {name: weights[name] for name in names}
                    _add(sums, network, loss, exits, own, x, label_BK, power, estimate, len(index_N))
    finally:
        network.train(training)
    if estimate == "samples":
        torch._foreach_div_([value for sums in found for value in sums.values()], len(index_N))
    return tuple(found)


def _add(
    sums: dict[str, Tensor],
    network: Network,
    loss: SampleLoss,
    exits: Sequence[int],
    weights: Mapping[str, Tensor],
    x: Tensor,
    label_BK: Tensor,
    power: int,
    estimate: Estimate,
    count: int,
) -> None:
    """Add the contribution of one batch, of ``count`` samples in all, to one objective."""

    def batch_loss(values: dict[str, Tensor], x_B: Tensor, labels_BK: Tensor) -> Tensor:
        logits = functional_call(network, values, (x_B,)).logits
        total: Tensor = sum((loss(logits[k], labels_BK[:, k].flatten()) for k in exits), start=logits[0].new_zeros(()))
        return total

    def sample_loss(values: dict[str, Tensor], x_1: Tensor, label_K: Tensor) -> Tensor:
        return batch_loss(values, x_1.unsqueeze(0), label_K.unsqueeze(0))

    if estimate == "samples":
        size = sum(value.numel() for value in weights.values())
        chunk = max(1, AT_ONCE // max(1, size))
        for name, value in gradient_sums(sample_loss, weights, x, label_BK, power=power, chunk=chunk).items():
            sums[name] += value
        return
    gradients = torch.func.grad(batch_loss)(dict(weights), x, label_BK)
    for name, gradient in gradients.items():
        sums[name] += to_single(gradient).abs() ** power * (len(x) if estimate == "published" else len(x) / count)
        if estimate == "published":
            sums[name] /= count


def _labels(network: Network, x: Tensor, y_B: Tensor, labels: Labels, generator: Generator) -> Tensor:
    """Return label_BK of every exit; label_BKT of a language model, with the labels of the T tokens of each window."""
    shape = y_B.shape
    if labels == "given":
        return y_B[:, None].expand(-1, len(network.heads), *shape[1:])
    logits = network(x).logits
    if labels == "predicted":
        return torch.stack([logits_BC.argmax(1).reshape(shape) for logits_BC in logits], 1)
    drawn = [torch.multinomial(logits_BC.softmax(1).cpu(), 1, generator=generator) for logits_BC in logits]
    return torch.stack([label_N1.reshape(shape) for label_N1 in drawn], 1).to(x.device)
