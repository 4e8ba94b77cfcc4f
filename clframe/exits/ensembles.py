"""Ensembles: scores of each exit from its own logits and those of earlier exits.

An ensemble works exit by exit and carries its intermediate results to the next exit, so the same code serves a whole
forward pass and one that stops early.

By default the backbone's own classifier is not a member and outputs its own logits, as in Wojcik et al., "Zero Time
Waste in Pre-trained Early Exit Neural Networks" (2023): where no exit fires, the prediction is that of the network
without exits.

Logits of ``-inf`` mark classes not met, the same at all exits; they stay ``-inf`` in the scores, and no gradient is
NaN.

Shape suffixes: B batch, C classes, K exits, M members of the ensemble.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from math import ceil, inf, log
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from clframe.errors import ConfigError, DataError
from clframe.exits.losses import log_probabilities
from clframe.nn.exit_ensemble import Carried, Ensemble, Single
from clframe.nn.features import exit_logits
from clframe.nn.network import Network
from clframe.nn.types import Output, Samples

EnsembleKind = Literal["single", "geometric", "product", "mean", "boosted"]
"""Ensembles by name; ``boosted`` exits add up their logits in the network itself."""

FIT_STEPS = 4_000
"""Steps of Adam that fit an ensemble by default: at the published rate of 0.0005 its weights need thousands. 200 steps
leave it a product of experts (docs/results.md, Zero Time Waste)."""

Final = Literal["separate", "member"]
"""Whether the last exit outputs its own logits or is the last member of the ensemble."""


class RunningEnsemble(Ensemble):
    """Base class of ensembles whose scores at member m combine the members 1 to m.

    Args:
        exits: Number K of exits of the network, the backbone's own classifier included.
        final: ``separate``: the last exit outputs its own logits; ``member``: it is the last member.

    Attributes:
        members: M, the number of exits that are combined with those before them.

    Raises:
        ConfigError: Fewer than one exit.
    """

    def __init__(self, exits: int, *, final: Final = "separate") -> None:
        super().__init__()
        if exits < 1:
            raise ConfigError(f"ensemble: found {exits} exits; give at least 1")
        self.exits = exits
        self.final = final
        self.members = exits if final == "member" else exits - 1

    def step(self, exit: int, logits_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """Scores of the members up to ``exit``; the logits themselves where the last exit is separate.

        Raises:
            ConfigError: The index is not below the number of exits.
        """
        if exit >= self.exits:
            raise ConfigError(f"ensemble: found exit {exit}, counted from 0; make it for more than {self.exits} exits")
        if exit >= self.members:
            return logits_BC, ()
        return self.combine(exit, log_probabilities(logits_BC), carried)

    def forward(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """scores_BC of every exit, from the logits of all.

        Raises:
            ConfigError: The number of exits does not match.
        """
        self._require(len(logits))
        return super().forward(logits)

    def _require(self, exits: int) -> None:
        if exits != self.exits:
            raise ConfigError(f"ensemble: found {exits} exits, expected {self.exits}; make it for {exits} exits")

    @abstractmethod
    def combine(self, exit: int, log_p_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """Scores and carried values as in :meth:`step`, from the log-probabilities of a member."""


class ProductOfExperts(RunningEnsemble):
    """Mean of the log-probabilities, ``s_m = (1/m) sum_{j<=m} log p_j`` (Hinton, 2002, up to the factor 1/m).

    >>> logits = [torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    >>> [scores_BC.softmax(1)[0, 0].item() for scores_BC in ProductOfExperts(3)(logits)][1]
    0.5
    """

    def combine(self, exit: int, log_p_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """The running sum divided by the number of members."""
        sum_BC = carried[0] + log_p_BC if carried else log_p_BC
        return sum_BC / (exit + 1), (sum_BC,)


class Mean(RunningEnsemble):
    """Log of the mean probability, ``s_m = log((1/m) sum_{j<=m} p_j)``, summed in log space.

    >>> logits = [torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()]
    >>> Mean(2, final="member")(logits)[1].exp()
    tensor([[0.7000, 0.3000]])
    """

    def combine(self, exit: int, log_p_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """The running log-sum-exp minus the log of the number of members."""
        unmet = log_p_BC == -inf
        log_p_BC = log_p_BC.masked_fill(unmet, 0.0)  # the gradient of logaddexp(-inf, -inf) is NaN
        log_sum_BC = torch.logaddexp(carried[0], log_p_BC) if carried else log_p_BC
        return (log_sum_BC - log(exit + 1)).masked_fill(unmet, -inf), (log_sum_BC,)


class Geometric(RunningEnsemble):
    """Weighted geometric mean, ``s_m = (1/m) sum_{j<=m} exp(w_mj) log p_j + b_m`` (Wojcik et al., 2023).

    Every member m has a vector w_m of m weights and a bias b_m per class, 0 for new classes. They are fitted by
    :func:`~clframe.exits.ensembles.fit_ensemble` with everything else fixed; outside of it they require no gradient,
    so that no optimizer of the network updates them.

    The paper initializes w from N(0, 0.01); here 0.01 is the standard deviation, as in torch's ``normal_``. Both are
    close to w = 0, b = 0, where this is a :class:`ProductOfExperts`. Weights are drawn on the CPU from torch's global
    generator by the constructor.

    Args:
        exits: Number K of exits of the network, the backbone's own classifier included.
        final: ``separate``: the last exit outputs its own logits; ``member``: it is the last member.
        deviation: Standard deviation of the initial w.

    Attributes:
        weights: w_1 to w_M.
        bias: bias_MC, one row for each member.

    Raises:
        ConfigError: Fewer than one exit.
    """

    bias: nn.Parameter

    def __init__(self, exits: int, *, final: Final = "separate", deviation: float = 0.01) -> None:
        super().__init__(exits, final=final)
        initial = [torch.empty(m + 1).normal_(0.0, deviation) for m in range(self.members)]
        self.weights = nn.ParameterList([nn.Parameter(w, requires_grad=False) for w in initial])
        self.bias = nn.Parameter(torch.empty(self.members, 0), requires_grad=False)

    @property
    def classes(self) -> int:
        """Number of classes C: the highest one met, plus one."""
        return self.bias.shape[1]

    def grow(self, classes: Iterable[int]) -> bool:
        """Add biases of 0 for new classes; True if ``bias`` was replaced by a new parameter."""
        wanted = max(classes, default=-1) + 1
        if wanted <= self.classes:
            return False
        self._resize(wanted)
        return True

    def combine(self, exit: int, log_p_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """The weighted sum; carries the log-probabilities of all members so far, log_p_BMC.

        Raises:
            DataError: The number of classes does not match the ensemble's.
        """
        self._require_classes(log_p_BC.shape[1])
        unmet = log_p_BC == -inf
        log_p_BMC = log_p_BC.masked_fill(unmet, 0.0).unsqueeze(1)  # -inf times a gradient of 0 is NaN
        if carried:
            log_p_BMC = torch.cat([carried[0], log_p_BMC], dim=1)
        # not a matrix product, which autocast would run in half precision
        sum_BC = (self.weights[exit].exp().unsqueeze(1) * log_p_BMC).sum(1)
        return (sum_BC / (exit + 1) + self.bias[exit]).masked_fill(unmet, -inf), (log_p_BMC,)

    def forward(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """scores_BC of every exit by one matrix product; equal to those of :meth:`step` up to rounding.

        Raises:
            ConfigError: The number of exits does not match.
            DataError: The number of classes does not match the ensemble's.
        """
        self._require(len(logits))
        if not self.members:
            return tuple(logits)
        log_p_MBC = log_probabilities(torch.stack(tuple(logits[: self.members])))
        self._require_classes(log_p_MBC.shape[2])
        unmet = log_p_MBC == -inf
        dtype = torch.promote_types(log_p_MBC.dtype, self.bias.dtype)
        rows = [w.exp() / w.numel() for w in self.weights]
        weight_MM = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(dtype)  # lower triangular
        with torch.autocast(log_p_MBC.device.type, enabled=False):
            sum_MBC = (weight_MM @ log_p_MBC.masked_fill(unmet, 0.0).to(dtype).flatten(1)).view(log_p_MBC.shape)
        scores_MBC = (sum_MBC + self.bias.unsqueeze(1)).masked_fill(unmet, -inf)
        return (*scores_MBC.unbind(), *logits[self.members :])

    def _require_classes(self, classes: int) -> None:
        if classes != self.classes:
            raise DataError(f"ensemble: found logits of {classes} classes; grow it from {self.classes} to {classes}")

    @torch.no_grad()
    def _resize(self, classes: int) -> None:
        """Truncate the bias to ``classes`` columns or pad it with zeros."""
        old = self.bias[:, :classes]
        added = old.new_zeros(self.members, classes - old.shape[1])
        self.bias = nn.Parameter(torch.cat([old, added], dim=1), requires_grad=self.bias.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Resize to the number of classes of the saved state, then load it."""
        saved = state_dict.get(f"{prefix}bias")
        if saved is not None and saved.ndim == 2 and saved.shape[1] != self.classes:
            self._resize(saved.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def make_ensemble(kind: EnsembleKind, *, exits: int, final: Final = "separate") -> Ensemble:
    """Make the ensemble ``kind`` for a network of ``exits`` exits, the backbone's own classifier included.

    ``single`` and ``boosted`` need none: boosted exits add up their logits in the network (``Network.boosted``).

    Raises:
        ConfigError: An unknown name, or fewer than one exit.

    >>> make_ensemble("geometric", exits=7).members, make_ensemble("product", exits=7, final="member").members
    (6, 7)
    """
    if kind in ("single", "boosted"):
        return Single()
    classes: dict[str, type[RunningEnsemble]] = {"geometric": Geometric, "product": ProductOfExperts, "mean": Mean}
    if kind not in classes:
        raise ConfigError(
            f"ensemble: found {kind!r}; give 'single', 'boosted', {', '.join(map(repr, sorted(classes)))}"
        )
    return classes[kind](exits, final=final)


def fit_ensemble(
    ensemble: Ensemble,
    logits_KNC: Tensor | Sequence[Tensor],
    y_N: Tensor,
    *,
    epochs: int | None = None,
    lr: float = 5e-4,
    batch_size: int = 128,
    generator: Generator,
) -> Tensor:
    """Fit the parameters of an ensemble by Adam on ``sum_m CE(q_m, y)``, q_m the softmax of exit m's scores.

    Wojcik et al., "Zero Time Waste in Pre-trained Early Exit Neural Networks" (2023), stage 3. Only the ensemble's
    parameters change; ``requires_grad`` is restored afterwards. An ensemble without parameters is left unchanged.
    Equal arguments and generator state give equal results.

    Args:
        ensemble: The ensemble, grown to C classes.
        logits_KNC: Logits of every exit on held-out data; on training data the network is overconfident.
        y_N: Targets, each below C.
        epochs: Passes over the data; None for as many as make :data:`FIT_STEPS` steps.
        lr: Adam's learning rate.
        batch_size: Samples per step; the last step of a pass may have fewer.
        generator: Source of the order of the samples, on the CPU.

    Returns:
        nll_K, the mean cross-entropy of every exit's scores afterwards, in nats.

    Raises:
        DataError: No samples.
    """
    logits_KNC = (logits_KNC if isinstance(logits_KNC, Tensor) else torch.stack(tuple(logits_KNC))).detach()
    if not len(y_N):
        raise DataError("ensemble: found no samples to fit it on; hold some out, or fit it on the training data")
    y_N = y_N.to(logits_KNC.device)
    if epochs is None:
        epochs = ceil(FIT_STEPS / ceil(len(y_N) / batch_size))
    parameters = list(ensemble.parameters())
    requires_grad = [parameter.requires_grad for parameter in parameters]
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
            for parameter, flag in zip(parameters, requires_grad, strict=True):
                parameter.grad = None
                parameter.requires_grad_(flag)
    with torch.no_grad():
        return _nll(ensemble, logits_KNC, y_N)


def fit_on_samples(
    network: Network,
    samples: Iterable[Samples],
    *,
    epochs: int | None = None,
    lr: float = 5e-4,
    batch_size: int = 128,
    generator: Generator,
    forward: Callable[[Tensor], Output] | None = None,
) -> Tensor:
    """Run the network over samples once, in evaluation mode, and fit its ensemble on the logits.

    Args:
        network: The network whose ensemble is fitted; training modes are restored afterwards.
        samples: One or more sets of samples, prepared without augmentation.
        epochs: Passes over the data; see :func:`fit_ensemble`.
        lr: Adam's learning rate.
        batch_size: Samples per step and per forward pass.
        generator: Source of the order of the samples.
        forward: Replaces the forward pass if a component corrects logits (``context.corrected_output``).

    Returns:
        nll_K, the mean cross-entropy of every exit's scores afterwards, in nats.

    Raises:
        DataError: No samples.
    """
    parts = tuple(samples)
    if not sum(len(part) for part in parts):
        raise DataError("ensemble: found no samples to fit it on; hold some out, or fit it on the training data")
    logits, y_N = exit_logits(network, parts, forward=forward, batch_size=batch_size)
    logits_KNC = torch.stack(logits)
    # A calibration wraps the ensemble and is fitted afterwards.
    ensemble = network.ensemble.inner
    return fit_ensemble(
        ensemble, logits_KNC, y_N, epochs=epochs, lr=lr, batch_size=batch_size, generator=generator
    )


def _nll(ensemble: Ensemble, logits_KBC: Tensor, y_B: Tensor) -> Tensor:
    """nll_K: the mean cross-entropy of every exit's scores."""
    log_q_KBC = log_probabilities(torch.stack(ensemble(logits_KBC.unbind())))
    return -log_q_KBC.gather(2, y_B.expand(len(log_q_KBC), -1).unsqueeze(2)).mean((1, 2))
