"""Log-likelihoods of text under a trained language model: of the exit that decides each token, and of every exit.

Shape suffixes: B windows, T tokens of a window, N = B T tokens, V vocabulary, K exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from clframe.accounting import stage_macs
from clframe.exits import ExitPolicy
from clframe.functional.language import Likelihood, next_token_targets, token_nll
from clframe.nn.network import Network
from clframe.targets.rules import PredictionRule
from clframe.training.prediction_cost import stops_B
from clframe.training.trained import TrainedModel


class TokenScores(NamedTuple):
    """Scores of the tokens of several windows, on the CPU."""

    nll_N: Tensor
    """Negative log-likelihood in nats, by the exit that decides."""
    right_N: Tensor
    """Whether that exit's most likely token is the right one."""
    exit_N: Tensor
    """The exit that decides."""
    nll_KN: Tensor
    """As ``nll_N``, of each exit."""
    right_KN: Tensor
    """As ``right_N``, of each exit."""
    macs: int
    """MACs of all tokens up to the exits where they stop."""
    waiting: int
    """MACs of later stages for tokens that have stopped, which later tokens of the window attend to."""


class TokenScorer:
    """Computes the scores of windows of text.

    All exits are computed and the rule then chooses, so costs are those that stopping would have. A window costs as
    much as one of the same length in training; each of its tokens counts an equal part.

    Args:
        model: A language model.
        threshold: Largest probability from which an exit decides a token; None: the strategy's rule.
        budget: See :class:`~clframe.targets.rules.PredictionRule`.

    Raises:
        ClframeError: See :class:`~clframe.targets.rules.PredictionRule`.

    Attributes:
        description: The rule, for people.
        threshold: The threshold of all exits; None for the strategy's own rule.
        notes: Restrictions of the numbers.
    """

    def __init__(self, model: TrainedModel, *, threshold: float | None = None, budget: float | None = None) -> None:
        self._rule = PredictionRule(model, threshold=threshold, budget=budget, graphs=False)
        self._model = model
        self._stage_K, self._position_S = model.network.exit_stages, position_costs(model.network)
        self.description, self.threshold = self._rule.description, self._rule.threshold
        self.notes = ("MACs count every expert, as if all were chosen",) if self._rule.counts_experts else ()

    @torch.no_grad()
    def __call__(self, ids_BS: Tensor) -> TokenScores:
        """Score windows of ids; the first id of each is context only.

        Raises:
            DataError: Logits that are NaN: training has diverged.
        """
        learner, network = self._model.learner, self._model.network
        x = network.to_device(ids_BS)
        y_N = next_token_targets(x)
        output = learner.adjust_logits(network(x, taps=learner.taps))
        scores_NV, exit_N, macs_N = self._rule.decide(output, x)
        tokens = len(y_N) // len(x)
        nll = [token_nll(logits_NV, y_N) for logits_NV in output.logits]
        right = [logits_NV.argmax(1) == y_N for logits_NV in output.logits]
        policy = self._rule.policy
        waiting = 0 if policy is None else self._waiting(output.logits, policy, tokens=tokens)
        return TokenScores(
            token_nll(scores_NV, y_N).cpu(), (scores_NV.argmax(1) == y_N).cpu(), exit_N.cpu(), torch.stack(nll).cpu(),
            torch.stack(right).cpu(), round(int(macs_N.sum()) / tokens), waiting,
        )  # fmt: skip

    def _waiting(self, logits: Sequence[Tensor], policy: ExitPolicy, *, tokens: int) -> int:
        """MACs of the stages behind the exits of stopped tokens.

        A stage reads the keys and values of all earlier tokens, so it is computed for every token before the last one
        of the window that reaches it.
        """
        stop_BT = stops_B(logits, policy).reshape(-1, tokens)
        stage_BT = torch.tensor(self._stage_K, device=stop_BT.device)[stop_BT]
        number_T = torch.arange(1, tokens + 1, device=stop_BT.device)
        spent = 0.0
        for stage, macs in enumerate(self._position_S):
            reaches_BT = stage_BT >= stage
            needed_B = (reaches_BT * number_T).amax(1)
            spent += macs * int((needed_B - reaches_BT.sum(1)).sum())
        return round(spent)


def position_costs(network: Network) -> tuple[float, ...]:
    """MACs of each stage for one token, the mean over a window of the longest context."""
    counts, tokens = stage_macs(network), network.input_shape[0] - 1
    return tuple(counts[name] / tokens for name in network.backbone.names)


class TextTotals:
    """Sums of token scores over windows of text of equal length.

    Args:
        exits: K.
    """

    def __init__(self, exits: int) -> None:
        self._window_nats: list[Tensor] = []
        self.total, self.right = Likelihood(), 0
        self.exits = [Likelihood()] * exits
        self.right_K, self.decided_K = [0] * exits, [0] * exits
        self.macs = self.waiting = 0

    def add(self, found: TokenScores, *, windows: int) -> None:
        """Add the scores of some windows."""
        self._window_nats.append(found.nll_N.double().reshape(windows, -1).mean(1))
        self.total += Likelihood.of(found.nll_N)
        self.right += int(found.right_N.sum())
        self.exits = [a + Likelihood.of(nll_N) for a, nll_N in zip(self.exits, found.nll_KN, strict=True)]
        self.right_K = [a + int(b) for a, b in zip(self.right_K, found.right_KN.sum(1), strict=True)]
        decided_K = torch.bincount(found.exit_N, minlength=len(self.exits)).tolist()
        self.decided_K = [a + b for a, b in zip(self.decided_K, decided_K, strict=True)]
        self.macs += found.macs
        self.waiting += found.waiting

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the nats per token: mean of the windows and 1.96 standard errors; NaN for one window."""
        nats_W = torch.cat(self._window_nats)
        mean = float(nats_W.mean())
        error = 1.96 * float(nats_W.std()) / sqrt(len(nats_W)) if len(nats_W) > 1 else nan
        return mean - error, mean + error
