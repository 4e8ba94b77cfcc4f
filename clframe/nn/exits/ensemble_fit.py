"""Fitting an ensemble on cached logits, while the network stands still.

Shape suffixes: B batch, N samples, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from clframe.core.types import Output, Samples
from clframe.errors import DataError
from clframe.functional.exits import log_probabilities
from clframe.nn.exits.ensemble import Ensemble

if TYPE_CHECKING:
    from clframe.nn.network import Network


def fit_ensemble(
    ensemble: Ensemble,
    logits_KNC: Tensor | Sequence[Tensor],
    y_N: Tensor,
    *,
    epochs: int,
    lr: float = 5e-4,
    batch_size: int = 128,
    generator: Generator,
) -> Tensor:
    """Fit the parameters of an ensemble by Adam on ``sum_m CE(q_m, y)``, q_m the softmax of exit m's scores.

    Wojcik et al., "Zero Time Waste in Pre-trained Early Exit Neural Networks" (2023), stage 3. Nothing but the
    ensemble's own parameters changes; they need gradients again only if they did before. An ensemble without
    parameters is left as it is. Same arguments and generator state, same result.

    Args:
        ensemble: What to fit, grown to C classes.
        logits_KNC: Logits of every exit. Held-out data: on training data the network is surer than it should be.
        y_N: Targets, each below C.
        epochs: Passes over the data.
        lr: Adam's learning rate.
        batch_size: Samples in a step; the last one of a pass may have fewer.
        generator: Draws the order of the samples, on the CPU.

    Returns:
        nll_K, the mean cross-entropy of every exit's scores afterwards, in nats.

    Raises:
        DataError: No samples.
    """
    logits_KNC = (logits_KNC if isinstance(logits_KNC, Tensor) else torch.stack(tuple(logits_KNC))).detach()
    if not len(y_N):
        raise DataError("ensemble: found no samples to fit it on; hold some out, or fit it on the training data")
    y_N = y_N.to(logits_KNC.device)
    parameters = list(ensemble.parameters())
    needed = [parameter.requires_grad for parameter in parameters]
    if parameters:
        ensemble.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=lr)
        try:
            with torch.enable_grad():
                for _ in range(epochs):
                    order_N = torch.randperm(len(y_N), generator=generator).to(y_N.device)
                    for index_B in order_N.split(batch_size):
                        loss = _nll(ensemble, logits_KNC[:, index_B], y_N[index_B]).sum()
                        optimizer.zero_grad(set_to_none=True)
                        loss.backward()
                        optimizer.step()
        finally:
            for parameter, flag in zip(parameters, needed, strict=True):
                parameter.grad = None
                parameter.requires_grad_(flag)
    with torch.no_grad():
        return _nll(ensemble, logits_KNC, y_N)


def fit_on_samples(
    network: Network,
    samples: Iterable[Samples],
    *,
    epochs: int,
    lr: float = 5e-4,
    batch_size: int = 128,
    generator: Generator,
    answer: Callable[[Tensor], Output] | None = None,
) -> Tensor:
    """Run the network over samples once, in eval mode, and fit its ensemble on the logits.

    Args:
        network: Its ensemble is fitted; training flags are put back, and the rest stays as it is.
        samples: One or more sets of samples, prepared without augmentation.
        epochs: As for :func:`fit_ensemble`, and so are the others.
        lr: Adam's learning rate.
        batch_size: Samples in a step, and in a forward pass.
        generator: Draws the order of the samples.
        answer: In place of the plain forward pass, where a component corrects it (``moment.answer``).

    Returns:
        nll_K, the mean cross-entropy of every exit's scores afterwards, in nats.

    Raises:
        DataError: No samples.
    """
    from clframe.nn.features import exit_logits  # networks are built on this package

    parts = tuple(samples)
    if not sum(len(part) for part in parts):
        raise DataError("ensemble: found no samples to fit it on; hold some out, or fit it on the training data")
    logits, y_N = exit_logits(network, parts, answer=answer, batch_size=batch_size)
    logits_KNC = torch.stack(logits)
    return fit_ensemble(
        network.ensemble, logits_KNC, y_N, epochs=epochs, lr=lr, batch_size=batch_size, generator=generator
    )


def _nll(ensemble: Ensemble, logits_KBC: Tensor, y_B: Tensor) -> Tensor:
    """nll_K: the mean cross-entropy of every exit's scores."""
    log_q_KBC = log_probabilities(torch.stack(ensemble(logits_KBC.unbind())))
    return -log_q_KBC.gather(2, y_B.expand(len(log_q_KBC), -1).unsqueeze(2)).mean((1, 2))
