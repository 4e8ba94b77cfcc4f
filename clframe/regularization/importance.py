"""Importance of weights as pure functions: quadratics, per-sample gradients, path integrals.

Weights are concatenated in one flat vector, so that a penalty costs a few operations for any number of layers; a layout
lists the tensors in the vector.

Shape suffixes: P weights in a flat vector, K exits, B samples, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clframe.functional.prototypes import to_single

Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of the tensors in a flat vector, in order."""

Spans = tuple[tuple[int, int], ...]
"""Ranges ``[start, stop)`` of a flat vector that make up a shorter one, in order."""

Quadratic = Mapping[str, Tensor]
"""``sum_p importance_p (weight_p - center_p)^2 + constant``: ``importance``, ``center``, ``constant``."""


def quadratic(importance_P: Tensor, center_P: Tensor) -> dict[str, Tensor]:
    """Build a quadratic that is zero at its center.

    >>> sorted(quadratic(torch.ones(2), torch.zeros(2)))
    ['center', 'constant', 'importance']
    """
    return {"importance": importance_P, "center": center_P, "constant": importance_P.new_zeros(())}


def add_quadratics(first: Quadratic, second: Quadratic) -> dict[str, Tensor]:
    """Add two quadratics exactly; the sum is a quadratic again, so the cost does not grow with the stream.

    ``a (w - m)^2 + b (w - n)^2 = (a + b) (w - (a m + b n) / (a + b))^2 + a b / (a + b) (m - n)^2``

    Importances must be at least 0.
    """
    a_P, b_P = first["importance"], second["importance"]
    share_P = b_P / (a_P + b_P).clamp_min(torch.finfo(a_P.dtype).tiny)
    apart_P = second["center"] - first["center"]
    constant = first["constant"] + second["constant"] + (a_P * share_P * apart_P.square()).sum()
    return {"importance": a_P + b_P, "center": first["center"] + share_P * apart_P, "constant": constant}


def penalty_values(parameters: Sequence[Tensor], quadratics: Sequence[Quadratic], spans: Sequence[Spans]) -> Tensor:
    """Return penalty_K, the value of each quadratic at the present weights.

    Value and gradient take one pass over the flat weights, without synchronizing with the device.

    Args:
        parameters: The weights, of any shapes.
        quadratics: K quadratics.
        spans: For each, the ranges of the flat parameters that it covers.

    >>> weight = torch.tensor([3.0, 5.0], requires_grad=True)
    >>> ones = quadratic(torch.ones(1), torch.ones(1))
    >>> penalty_values([weight], [ones, ones], [((0, 1),), ((1, 2),)]).tolist()
    [4.0, 16.0]
    """
    result: Tensor = _Penalties.apply(tuple(quadratics), tuple(spans), *parameters)
    return result


class _Penalties(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, quadratics: Sequence[Quadratic], spans: Sequence[Spans], *parameters: Tensor) -> Tensor:
        flat_P = flatten(parameters)
        pulls, values = [], []
        for terms, parts in zip(quadratics, spans, strict=True):
            moved_P = take_spans(flat_P, parts) - terms["center"]
            pull_P = terms["importance"] * moved_P
            values.append((pull_P * moved_P).sum() + terms["constant"])
            pulls.append(pull_P)
        ctx.save_for_backward(*pulls)
        ctx.spans = spans
        ctx.shapes = [parameter.shape for parameter in parameters]
        return torch.stack(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_K: Tensor) -> tuple[Tensor | None, ...]:
        sizes = [prod(shape) for shape in ctx.shapes]
        total_P = gradient_K.new_zeros(sum(sizes))
        for pull_P, parts, factor in zip(ctx.saved_tensors, ctx.spans, (2 * gradient_K).unbind(), strict=True):
            pieces = (pull_P * factor).split([stop - start for start, stop in parts])
            for (start, stop), piece in zip(parts, pieces, strict=True):
                total_P[start:stop] += piece
        split = zip(total_P.split(sizes), ctx.shapes, strict=True)
        return (None, None, *(part.view(shape) for part, shape in split))


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate all values in one vector, detached."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]) if tensors else torch.zeros(0)


def take_spans(flat_P: Tensor, spans: Spans) -> Tensor:
    """Concatenate ranges of a flat vector; a view if there is one range."""
    parts = [flat_P[start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else flat_P[:0]


def find_spans(layout: Layout, names: Sequence[str]) -> Spans:
    """Return the ranges of the named tensors in a flat vector, in the layout's order; adjacent ones are merged.

    >>> find_spans((("a", (2,)), ("b", (3, 1)), ("c", ()), ("d", (4,))), ["a", "b", "d"])
    ((0, 5), (6, 10))
    """
    wanted, spans, start = set(names), list[tuple[int, int]](), 0
    for name, shape in layout:
        stop = start + prod(shape)
        if name in wanted and spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], stop)
        elif name in wanted:
            spans.append((start, stop))
        start = stop
    return tuple(spans)


def move_to_layout(flat_P: Tensor, old: Layout, new: Layout) -> Tensor:
    """Move a flat vector to a layout whose tensors may have grown; new entries are 0, removed tensors are dropped.

    >>> move_to_layout(torch.tensor([1.0, 2.0]), (("w", (1, 2)),), (("v", (1,)), ("w", (2, 2)))).tolist()
    [0.0, 1.0, 2.0, 0.0, 0.0]
    """
    if old == new:
        return flat_P
    pieces = flat_P.split([prod(shape) for _, shape in old])
    known = {name: piece.view(shape) for (name, shape), piece in zip(old, pieces, strict=True)}
    parts = []
    for name, shape in new:
        part = flat_P.new_zeros(shape)
        if name in known:
            part[tuple(slice(size) for size in known[name].shape)] = known[name]
        parts.append(part)
    return flatten(parts).to(flat_P)


Loss = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]
"""Loss of one sample, given weights by name, its input and its labels."""


def gradient_sums(
    loss_of: Loss, parameters: Mapping[str, Tensor], x: Tensor, labels: Tensor, *, power: int, chunk: int
) -> dict[str, Tensor]:
    """Return ``sum_b |d loss(x_b) / d weight|^power`` over the gradients of single samples.

    The square of a batch's gradient is a different quantity: it contains the products of different samples.
    ``torch.func.vmap`` processes ``chunk`` samples together, so memory holds ``chunk`` gradients of all weights. Models
    that it cannot run are processed sample by sample, with the same result.

    Args:
        loss_of: Loss of one sample.
        parameters: Weights by name.
        x: Inputs, one per row.
        labels: Labels, one row per input.
        power: 1 or 2.
        chunk: Samples processed together.
    """
    one = torch.func.grad(loss_of)
    many = torch.func.vmap(one, in_dims=(None, 0, 0))
    sums = {name: torch.zeros_like(to_single(value)) for name, value in parameters.items()}
    for x_B, label_B in zip(x.split(chunk), labels.split(chunk), strict=True):
        try:
            with warnings.catch_warnings():  # torch warns of each operation that it batches by a loop
                warnings.filterwarnings("ignore", message="There is a performance drop")
                gradients = many(dict(parameters), x_B, label_B)
        except RuntimeError:  # an operation without a batching rule, or a custom autograd function
            return gradient_sums_by_loop(loss_of, parameters, x, labels, power=power)
        for name, gradient_B in gradients.items():
            gradient_B = to_single(gradient_B)
            sums[name] += (gradient_B.square() if power == 2 else gradient_B.abs()).sum(0)
    return sums


def gradient_sums_by_loop(
    loss_of: Loss, parameters: Mapping[str, Tensor], x: Tensor, labels: Tensor, *, power: int
) -> dict[str, Tensor]:
    """Compute :func:`gradient_sums` by one backward pass per sample: slow, but works for any model."""
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    sums = {name: torch.zeros_like(to_single(value)) for name, value in parameters.items()}
    with torch.enable_grad():
        for sample, label in zip(x, labels, strict=True):
            loss = loss_of(leaves, sample, label)
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    sums[name] += to_single(gradient).abs() ** power
    return sums


def squared_norm(logits_BC: Tensor, y_B: Tensor | None = None) -> Tensor:
    """Return ``mean_b sum_c logits_bc^2`` over the classes with finite logits; targets are ignored.

    >>> squared_norm(torch.tensor([[3.0, 4.0, -torch.inf]])).item()
    25.0
    """
    return torch.where(logits_BC.isneginf(), 0.0, logits_BC).square().sum(1).mean()


def path_importance(importance_P: Tensor, path_P: Tensor, moved_P: Tensor, *, damping: float) -> Tensor:
    """Return ``relu(importance + path / (moved^2 + damping))``, the importances of synaptic intelligence.

    ``path_P`` is ``-sum_t gradient_t * step_t``, the contribution of each weight to the decrease of the loss. Zenke et
    al., "Continual Learning Through Synaptic Intelligence" (2017), equations 3 to 5; clipping the sum of importances at
    zero is from their code, and keeps the penalty convex.
    """
    return (importance_P + path_P / (moved_P.square() + damping)).relu()
