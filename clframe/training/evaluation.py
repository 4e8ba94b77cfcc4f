"""Records of an evaluation: correct predictions, every exit, hidden neurons and experts.

Shape suffixes: B batch, N samples of an evaluation, K exits, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clframe.accounting import backbone_macs, stage_macs
from clframe.avalanche_bridge.imports import SupervisedPlugin
from clframe.data.benchmark import Benchmark
from clframe.exits import STATIC, ExitEvaluation
from clframe.exits.calibration_error import brier_N, nll_N
from clframe.exits.curves import BUDGETS
from clframe.exits.diagnostics import MOST_TOKENS, ExitRecord, make_exit_record
from clframe.functional.language import next_token_targets
from clframe.functional.similarity import flat_tap, unbiased_linear_cka
from clframe.metrics import Tally, TallyCounter, TokenCounter
from clframe.metrics.confusion import MOST_CLASSES, ConfusionCounter
from clframe.moe import Usage, count_usage
from clframe.moe.usage import active_rates, overlaps
from clframe.nn.backbones.stages import preserving_state
from clframe.nn.network import Network
from clframe.nn.types import Samples
from clframe.sparsity.activity import ActivityRecord, ExpertActivity, LayerActivity
from clframe.training.learner import Learner
from clframe.training.prediction_cost import exit_costs


@dataclass(frozen=True, slots=True)
class ExitPredictions:
    """Predictions of every exit, sample by sample: of a whole evaluation on the CPU."""

    confidence_KN: Tensor
    """Largest probability of each exit."""
    correct_KN: Tensor
    """Whether the class of that probability is correct."""
    experience_N: Tensor
    """Test experience of each sample."""
    static: Mapping[str, Tensor]
    """For each decision of :data:`~clframe.exits.STATIC`, whether it is correct on each sample."""
    nll_KN: Tensor
    """Negative log-likelihood of each exit, infinite for classes that it has no score for."""
    brier_KN: Tensor
    """Brier score of each exit."""


MOST_TOKENS_OF_ONE_EXIT = 256
"""As :data:`~clframe.exits.diagnostics.MOST_TOKENS`, of a network with one exit."""
JOINED = 256
"""Samples from which on the predictions of an evaluation's batches are compared, in one batch."""


class Scores(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]  # an argument of Avalanche
    """Avalanche plugin that counts the correct predictions of the last evaluation.

    Attributes:
        tally: Correct predictions of the strategy, by test experience and class.
        exits: The same for each exit, in order of depth.
        predictions: Each exit's prediction for each sample.
        confusion_CC: Samples by true and predicted class of the strategy; None beyond
            :data:`~clframe.metrics.confusion.MOST_CLASSES` classes.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        super().__init__()
        self._benchmark = benchmark
        self._counter: TallyCounter | TokenCounter | None = None
        self._exits: list[TallyCounter | TokenCounter] = []
        self._stored_E: list[int] = []
        self._confusion: ConfusionCounter | None = None
        self._waiting: list[tuple[int, Tensor, tuple[Tensor, ...]]] = []
        self._batches: list[ExitPredictions] = []
        self.tally: Tally | None = None
        self.exits: tuple[Tally, ...] = ()
        self.predictions: ExitPredictions | None = None
        self.confusion_CC: Tensor | None = None

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Reset all counts."""
        self._counter = self._new_counter(strategy)
        self._exits = [self._new_counter(strategy) for _ in strategy.learner.network.heads]
        classes = len(self._benchmark.class_order)
        confused = classes <= MOST_CLASSES and not self._benchmark.vocabulary
        self._confusion = ConfusionCounter(classes, device=strategy.device) if confused else None
        self._waiting, self._batches = [], []
        self._stored_E = [0] * len(self._benchmark)

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Set the domain of the samples, where a choice between adapters may know it."""
        choice = strategy.learner.network.choice
        if choice is not None and choice.known:
            choice.domain = strategy.experience.current_experience

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Count one batch."""
        index, y_B = strategy.experience.current_experience, strategy.mb_y
        if self._benchmark.vocabulary:
            self._count_tokens(strategy, index)
            return
        assert isinstance(self._counter, TallyCounter)
        classes = self._benchmark.classes[index]
        self._counter.update(index, strategy.mb_output, y_B, classes)
        if self._confusion is not None:
            self._confusion.update(strategy.mb_output, y_B)
        scores = strategy.adjusted.logits
        for counter, scores_BC in zip(self._exits, scores, strict=True):
            assert isinstance(counter, TallyCounter)
            counter.update(index, scores_BC, y_B, classes)
        if scores[0].shape[1]:
            self._waiting.append((index, y_B, scores))
            if sum(len(y_B) for _, y_B, _ in self._waiting) >= JOINED:
                self._compare()

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Read the counts from the device, once, and unset the domain."""
        assert self._counter is not None
        choice = strategy.learner.network.choice
        if choice is not None:
            choice.domain = None  # not after each experience: its samples are counted with the cost of its adapter
        self._compare()
        self.tally = self._counter.result()
        self.exits = tuple(counter.result() for counter in self._exits)
        self.predictions = self._gather(len(self._exits))
        self.confusion_CC = None if self._confusion is None else self._confusion.result()
        self._batches = []

    def _count_tokens(self, strategy: Any, index: int) -> None:
        """Count one batch of windows of text, and store the predictions of the first tokens of an experience."""
        assert isinstance(self._counter, TokenCounter)
        y_N, scores = next_token_targets(strategy.mb_x), strategy.adjusted.logits
        self._counter.update(index, strategy.mb_output, y_N, strategy.mb_y)
        for counter, scores_NV in zip(self._exits, scores, strict=True):
            assert isinstance(counter, TokenCounter)
            counter.update(index, scores_NV, y_N, strategy.mb_y)
        most = MOST_TOKENS if len(scores) > 1 else MOST_TOKENS_OF_ONE_EXIT
        room = min(most - self._stored_E[index], len(y_N))
        if room > 0:
            self._stored_E[index] += room
            self._waiting.append((index, y_N[:room], tuple(scores_NV[:room] for scores_NV in scores)))
            self._compare()

    def _compare(self) -> None:
        """Compute the exits' predictions of the samples that wait for it, in one batch.

        A stream of many experiences has few samples in each, and small batches cost as much as large ones.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        y_B = torch.cat([y_B for _, y_B, _ in waiting])
        scores = tuple(torch.cat(scores_BC) for scores_BC in zip(*(scores for _, _, scores in waiting), strict=True))
        experience_B = torch.cat([torch.full((len(y_B),), index) for index, y_B, _ in waiting])
        best = [scores_BC.float().softmax(1).max(dim=1) for scores_BC in scores]
        # As in the tally: scores that are NaN or +inf predict nothing.
        correct_KB = torch.stack([(class_B == y_B) & p_B.isfinite() for p_B, class_B in best])
        decided = {name: decide(scores).scores_BC for name, decide in STATIC.items()}
        static = {name: (found_BC.argmax(1) == y_B) & found_BC.amax(1).isfinite() for name, found_BC in decided.items()}
        nll_KB = torch.stack([nll_N(scores_BC, y_B) for scores_BC in scores])
        brier_KB = torch.stack([brier_N(scores_BC, y_B) for scores_BC in scores])
        confidence_KB = torch.stack([p_B for p_B, _ in best])
        self._batches.append(ExitPredictions(confidence_KB, correct_KB, experience_B, static, nll_KB, brier_KB))

    def _new_counter(self, strategy: Any) -> TallyCounter | TokenCounter:
        benchmark = self._benchmark
        if benchmark.vocabulary:
            return TokenCounter(len(benchmark), len(benchmark.class_order), device=strategy.device)
        return TallyCounter(len(benchmark), len(benchmark.class_order), device=strategy.device)

    def _gather(self, exits: int) -> ExitPredictions:
        parts = self._batches
        if not parts:
            return _no_predictions(exits)
        # Joined on the device: one transfer for each field, however many batches there were.
        return ExitPredictions(
            torch.cat([part.confidence_KN for part in parts], dim=1).cpu(),
            torch.cat([part.correct_KN for part in parts], dim=1).cpu(),
            torch.cat([part.experience_N for part in parts]),
            {name: torch.cat([part.static[name] for part in parts]).cpu() for name in STATIC},
            torch.cat([part.nll_KN for part in parts], dim=1).cpu(),
            torch.cat([part.brier_KN for part in parts], dim=1).cpu(),
        )


def _no_predictions(exits: int) -> ExitPredictions:
    nothing_N = torch.zeros(0, dtype=torch.bool)
    return ExitPredictions(
        torch.zeros(exits, 0), torch.zeros(exits, 0, dtype=torch.bool), torch.zeros(0, dtype=torch.long),
        dict.fromkeys(STATIC, nothing_N), torch.zeros(exits, 0, dtype=torch.float64),
        torch.zeros(exits, 0, dtype=torch.float64),
    )  # fmt: skip


PROBES = 256
"""Samples of the first experience on which taps are compared."""
GRID = 4
"""Larger maps are average-pooled to this many cells per side first."""


class ExitRecorder:
    """Computes an :class:`~clframe.exits.diagnostics.ExitRecord` of each evaluation.

    Args:
        benchmark: The stream.
        scores: The plugin with the predictions of the last evaluation.

    Attributes:
        reference: Each exit's tap after the first experience, by name; part of every checkpoint.
    """

    def __init__(self, benchmark: Benchmark, scores: Scores) -> None:
        self._benchmark, self._scores = benchmark, scores
        self.reference: Mapping[str, Tensor] = {}

    def record(self, strategy: Any, index: int) -> ExitRecord:
        """Return the record after experience ``index``, right after its evaluation."""
        learner: Learner = strategy.learner
        network = learner.network
        counts = stage_macs(network)
        cost_K = exit_costs(network, counts=counts)
        predictions, owner = self._scores.predictions, learner.composition.owner("prediction")
        assert predictions is not None
        wanted = getattr(owner, "budgets", ())
        # Everything of the evaluation of the test stream is read first: that of validation data replaces the scores.
        accuracy_KE = tuple(tally.accuracy_E for tally in self._scores.exits)
        nll_KE = tuple(tally.nll_E for tally in self._scores.exits) if self._benchmark.vocabulary else ()
        seen_N = predictions.experience_N <= index
        return make_exit_record(
            _exit_evaluation(predictions, cost_K, seen_N),
            self._validation(strategy, index, cost_K),
            backbone_macs=backbone_macs(network, counts=counts),
            accuracy_KE=accuracy_KE,
            nll_KE=nll_KE,
            correct={name: right_N[seen_N] for name, right_N in predictions.static.items()},
            similarity_K=self._similarity(network, index),
            rule=getattr(owner, "budget_rule", "best"),
            budgets=tuple(sorted({*BUDGETS, *wanted})) if len(wanted) > 1 else BUDGETS,
            simulated=learner.simulated_exits,
        )

    def _validation(self, strategy: Any, index: int, cost_K: tuple[int, ...]) -> ExitEvaluation | None:
        """Predictions on held-out data of the experiences so far, if there is more than one exit to choose from.

        They replace those of the last evaluation in the plugin with the scores.
        """
        benchmark = self._benchmark
        if len(cost_K) == 1 or not benchmark.validation or benchmark.evaluate == "validation":
            return None
        strategy.eval([each for each in benchmark.avalanche.streams["valid"][: index + 1] if len(each.dataset)])
        predictions = self._scores.predictions
        assert predictions is not None
        return _exit_evaluation(predictions, cost_K, predictions.experience_N <= index)

    def _similarity(self, network: Network, index: int) -> tuple[float, ...]:
        if len(network.exit_taps) == 1:  # a network without extra exits: nothing shows it
            return ()
        if not len(self._benchmark.evaluation[0]):  # the first data of an extended run are gone
            return (float("nan"),) * len(network.exit_taps)
        now = _taps(network, self._benchmark)
        if index == 0:
            self.reference = now
        return tuple(unbiased_linear_cka(self.reference[tap], now[tap]) for tap in network.exit_taps)


def _exit_evaluation(predictions: ExitPredictions, cost_K: tuple[int, ...], of_N: Tensor) -> ExitEvaluation:
    return ExitEvaluation(
        confidence_KN=predictions.confidence_KN[:, of_N],
        correct_KN=predictions.correct_KN[:, of_N],
        cost_K=cost_K,
        experience_N=predictions.experience_N[of_N],
        nll_KN=predictions.nll_KN[:, of_N],
        brier_KN=predictions.brier_KN[:, of_N],
    )


def _taps(network: Network, benchmark: Benchmark) -> dict[str, Tensor]:
    """Each exit's flattened tap on the first test samples of the first experience, on the CPU."""
    samples = benchmark.evaluation[0]
    index = torch.arange(min(PROBES, len(samples)))
    x = network.to_device(samples.prepare(samples.raw(index)))
    with preserving_state([network]):
        taps = network(x, taps=network.exit_taps).taps
    return {name: flat_tap(tap, grid=GRID).float().cpu() for name, tap in taps.items()}


NEURON_PROBES = 256
"""Most samples of an experience on which neurons are recorded."""
MOST_PROBES = 2048
"""Most samples of all experiences of a stream together, which bounds the cost of long streams."""
BATCH = 32
"""Samples per batch; small, because the hidden layers of a transformer need most of the memory."""
DIGITS = 4


class ActivityRecorder:
    """Computes an :class:`~clframe.sparsity.activity.ActivityRecord` after each training experience.

    Args:
        benchmark: The stream.

    Attributes:
        learnt: For each experience, rate_N by layer right after learning it; part of every checkpoint.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        self._benchmark = benchmark
        self.learnt: list[Mapping[str, Tensor]] = []

    def record(self, network: Network, index: int) -> ActivityRecord:
        """Return the record after experience ``index`` and store its rates as those when it was learned.

        The network, its modes and random states stay as they are.
        """
        samples_E, rates, usage = [], [], []
        with preserving_state([network]):
            for samples in self._benchmark.evaluation[: index + 1]:
                at = probe_indices(len(samples), experiences=len(self._benchmark))
                batches = (_prepare(network, samples, part) for part in at.split(BATCH) if len(part))
                with count_usage(network) as used:
                    found = active_rates(network.backbone, batches, call=network)
                    usage.append(used())
                rates.append({layer: rate_N.float() for layer, rate_N in found.items()})
                samples_E.append(len(at))
        self.learnt = [*self.learnt[:index], *[{}] * (index - len(self.learnt)), rates[index]]
        layers = dict.fromkeys(layer for found in rates for layer in found)
        return ActivityRecord(
            samples_E=tuple(samples_E),
            layers={layer: self._layer([found.get(layer) for found in rates], layer) for layer in layers},
            experts={layer: _experts([used[layer] for used in usage]) for layer in usage[index]},
        )

    def _layer(self, rates: Sequence[Tensor | None], layer: str) -> LayerActivity:
        """``rates`` are those of each experience; None where it has no samples."""
        known = next(rate_N for rate_N in rates if rate_N is not None)
        now_EN = torch.stack([torch.full_like(known, torch.nan) if rate_N is None else rate_N for rate_N in rates])
        sparsity_E = 1 - now_EN.double().mean(1)
        return LayerActivity(
            neurons=len(known),
            sparsity=_round(float(sparsity_E.nanmean())),
            sparsity_E=tuple(map(_round, sparsity_E.tolist())),
            overlap_E=tuple(map(_round, overlaps(now_EN)[-1].tolist())),
            kept_E=tuple(_kept(learnt.get(layer), now_N) for learnt, now_N in zip(self.learnt, now_EN, strict=True)),
        )


def probe_indices(samples: int, *, experiences: int) -> Tensor:
    """Indices of an experience's samples to record: evenly spaced, since samples are often sorted by class.

    >>> probe_indices(10, experiences=2048).tolist(), probe_indices(3, experiences=5).tolist()
    ([0], [0, 1, 2])
    """
    count = min(samples, NEURON_PROBES, max(1, MOST_PROBES // experiences))
    return torch.arange(count) * samples // max(count, 1)


def _prepare(network: Network, samples: Samples, index: Tensor) -> Tensor:
    return network.to_device(samples.prepare(samples.raw(index)))


def _kept(learnt_N: Tensor | None, now_N: Tensor) -> float:
    if learnt_N is None or len(learnt_N) != len(now_N):
        return float("nan")
    return _round(float(overlaps(torch.stack([learnt_N.to(now_N), now_N]))[0, 1]))


def _experts(usage: Sequence[Usage]) -> ExpertActivity:
    per_token_E = [one.experts_per_token for one in usage]
    ran_E = torch.tensor([one.ran_E for one in usage]).sum(0)
    return ExpertActivity(
        experts=usage[-1].macs.experts,
        per_token=_round(_mean(per_token_E)),
        per_token_E=tuple(map(_round, per_token_E)),
        unused=int((ran_E == 0).sum()),
        macs_share=_round(_mean([one.share for one in usage])),
    )


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).nanmean())


def _round(value: float) -> float:
    return round(value, DIGITS)
