"""Ensembles: what each exit answers, given its own logits and those of the exits before it.

An ensemble works exit by exit and carries what it needs from one to the next, so the same code answers for
a whole forward pass and for one that stops early.

The backbone's own classifier stands outside by default and answers with its own logits, as in Wojcik et al.,
"Zero Time Waste in Pre-trained Early Exit Neural Networks" (2023): where no exit is sure enough, the network
answers as if it had none.

Logits of ``-inf`` mark classes not met. All exits have met the same ones; in the scores they stay ``-inf``, and
no gradient is NaN.

Shape suffixes: B batch, C classes, K exits, M members of the ensemble.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from math import inf, log
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Generator, Tensor, nn

from clframe.errors import ConfigError, DataError
from clframe.exits.losses import log_probabilities
from clframe.nn.network import Carried, Ensemble, Single
from clframe.nn.types import Output, Samples

if TYPE_CHECKING:
    from clframe.nn.network import Network


EnsembleKind = Literal["single", "geometric", "product", "mean", "boosted"]
"""Ensembles by name; ``boosted`` exits add up their logits in the network itself."""

Final = Literal["alone", "member"]
"""Whether the last exit answers with its own logits or is the last member of the ensemble."""


class Running(Ensemble):
    """What ensembles of the first m exits share: how many members there are.

    Args:
        exits: Number K of exits of the network, the backbone's own classifier included.
        final: ``alone``: it answers with its own logits; ``member``: it is the last member.

    Attributes:
        members: M, the number of exits that answer together with those before them.

    Raises:
        ConfigError: Fewer than one exit.
    """

    def __init__(self, exits: int, *, final: Final = "alone") -> None:
        super().__init__()
        if exits < 1:
            raise ConfigError(f"ensemble: found {exits} exits; give at least 1")
        self.exits = exits
        self.final = final
        self.members = exits if final == "member" else exits - 1

    def step(self, exit: int, logits_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """Scores of the members up to ``exit``; the logits themselves where the last exit stands alone.

        Raises:
            ConfigError: An exit that the ensemble was not made for.
        """
        if exit >= self.exits:
            raise ConfigError(f"ensemble: found exit {exit}, counted from 0; make it for more than {self.exits} exits")
        if exit >= self.members:
            return logits_BC, ()
        return self.combine(exit, log_probabilities(logits_BC), carried)

    def forward(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """scores_BC of every exit, from the logits of all.

        Raises:
            ConfigError: Another number of exits than the ensemble was made for.
        """
        self._require(len(logits))
        return super().forward(logits)

    def _require(self, exits: int) -> None:
        if exits != self.exits:
            raise ConfigError(f"ensemble: found {exits} exits; make it for as many, not for {self.exits}")

    @abstractmethod
    def combine(self, exit: int, log_p_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """As :meth:`step`, from the log-probabilities of a member."""


class ProductOfExperts(Running):
    """Mean of the log-probabilities, ``s_m = (1/m) sum_{j<=m} log p_j`` (Hinton, 2002, up to the factor 1/m).

    >>> logits = [torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    >>> [scores_BC.softmax(1)[0, 0].item() for scores_BC in ProductOfExperts(3)(logits)][1]
    0.5
    """

    def combine(self, exit: int, log_p_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """The running sum over the number of members."""
        sum_BC = carried[0] + log_p_BC if carried else log_p_BC
        return sum_BC / (exit + 1), (sum_BC,)


class Mean(Running):
    """Log of the mean probability, ``s_m = log((1/m) sum_{j<=m} p_j)``, summed in log space.

    >>> logits = [torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()]
    >>> Mean(2, final="member")(logits)[1].exp()
    tensor([[0.7000, 0.3000]])
    """

    def combine(self, exit: int, log_p_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """The running log-sum-exp, less the log of the number of members."""
        unmet = log_p_BC == -inf
        log_p_BC = log_p_BC.masked_fill(unmet, 0.0)  # logaddexp(-inf, -inf) is -inf, but its gradient NaN
        log_sum_BC = torch.logaddexp(carried[0], log_p_BC) if carried else log_p_BC
        return (log_sum_BC - log(exit + 1)).masked_fill(unmet, -inf), (log_sum_BC,)


class Geometric(Running):
    """Weighted geometric mean, ``s_m = (1/m) sum_{j<=m} exp(w_mj) log p_j + b_m`` (Wojcik et al., 2023).

    Every member m has a vector w_m of m weights and a bias b_m for each class, which is 0 for new classes. They
    are fitted by :func:`~clframe.exits.ensembles.fit_ensemble` while everything else stands still, and so
    need no gradient otherwise: no optimizer of the network touches them.

    The paper draws w from N(0, 0.01); here 0.01 is the standard deviation, as in torch's ``normal_``. Either way
    the start is near w = 0, b = 0, where this is a :class:`ProductOfExperts`. Draws are on the CPU, from torch's
    global generator, when the ensemble is made.

    Args:
        exits: Number K of exits of the network, the backbone's own classifier included.
        final: ``alone``: it answers with its own logits; ``member``: it is the last member.
        deviation: Standard deviation of the first w.

    Attributes:
        weights: w_1 to w_M.
        bias: bias_MC, one row for each member.

    Raises:
        ConfigError: Fewer than one exit.
    """

    bias: nn.Parameter

    def __init__(self, exits: int, *, final: Final = "alone", deviation: float = 0.01) -> None:
        super().__init__(exits, final=final)
        drawn = [torch.empty(m + 1).normal_(0.0, deviation) for m in range(self.members)]
        self.weights = nn.ParameterList([nn.Parameter(w, requires_grad=False) for w in drawn])
        self.bias = nn.Parameter(torch.empty(self.members, 0), requires_grad=False)

    @property
    def classes(self) -> int:
        """Number of classes C: the highest one met, plus one."""
        return self.bias.shape[1]

    def grow(self, classes: Iterable[int]) -> bool:
        """Biases of 0 for new classes; True if ``bias`` is a new parameter now."""
        wanted = max(classes, default=-1) + 1
        if wanted <= self.classes:
            return False
        self._resize(wanted)
        return True

    def combine(self, exit: int, log_p_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """The weighted sum; carried are the log-probabilities of all members so far, log_p_BMC.

        Raises:
            DataError: Another number of classes than the ensemble has grown to.
        """
        self._require_classes(log_p_BC.shape[1])
        unmet = log_p_BC == -inf
        log_p_BMC = log_p_BC.masked_fill(unmet, 0.0).unsqueeze(1)  # -inf times a gradient of 0 is NaN
        if carried:
            log_p_BMC = torch.cat([carried[0], log_p_BMC], dim=1)
        # A sum of products: a matrix product would round to half precision under autocast.
        sum_BC = (self.weights[exit].exp().unsqueeze(1) * log_p_BMC).sum(1)
        return (sum_BC / (exit + 1) + self.bias[exit]).masked_fill(unmet, -inf), (log_p_BMC,)

    def forward(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """scores_BC of every exit as :meth:`step` gives them, to rounding, by one matrix product.

        Raises:
            ConfigError: Another number of exits than the ensemble was made for.
            DataError: Another number of classes than the ensemble has grown to.
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
            raise DataError(f"ensemble: found logits of {classes} classes; grow it from {self.classes} to as many")

    @torch.no_grad()
    def _resize(self, classes: int) -> None:
        """Keep the first columns, as many as fit, and put zeros behind them."""
        kept = self.bias[:, :classes]
        added = kept.new_zeros(self.members, classes - kept.shape[1])
        self.bias = nn.Parameter(torch.cat([kept, added], dim=1), requires_grad=self.bias.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the number of classes of the saved state first, then load it as any module does."""
        saved = state_dict.get(f"{prefix}bias")
        if saved is not None and saved.ndim == 2 and saved.shape[1] != self.classes:
            self._resize(saved.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def make_ensemble(kind: EnsembleKind, *, exits: int, final: Final = "alone") -> Ensemble:
    """The ensemble of that name for a network of ``exits`` exits, the backbone's own classifier included.

    ``single`` and ``boosted`` are none: boosted exits add up their logits in the network (``Network.boosted``).

    Raises:
        ConfigError: An unknown name, or fewer than one exit.

    >>> make_ensemble("geometric", exits=7).members, make_ensemble("product", exits=7, final="member").members
    (6, 7)
    """
    if kind in ("single", "boosted"):
        return Single()
    classes: dict[str, type[Running]] = {"geometric": Geometric, "product": ProductOfExperts, "mean": Mean}
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
        answer: In place of the plain forward pass, where a component corrects it (``context.answer``).

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
