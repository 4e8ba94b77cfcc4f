"""Study of a run's exits: calibration, failure prediction, and budgets realized on test data.

Scores of every exit are computed once and cached in the run's folder as memory-mapped arrays; metrics, intervals and
budgets are functions of them. Thresholds are chosen on validation data only.

Shape suffixes: C classes, E experiences, K exits, N samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clframe.accounting import backbone_macs, cumulative_macs
from clframe.data.target import DataSplit, Target
from clframe.errors import RunFolderError, UnsupportedError
from clframe.exits.bootstrap import bootstrap
from clframe.exits.calibration_error import BINS, bin_of, brier_N, nll_N
from clframe.exits.curves import BudgetPoints, budget_points
from clframe.exits.decisions import ExitEvaluation
from clframe.exits.failure import RANKING_METRICS, eefp_K, failure_metrics
from clframe.exits.ranking import rank
from clframe.exits.smooth_calibration import smooth_ece
from clframe.nn.frozen import evaluating

BUDGETS: Final = (0.25, 0.5, 0.75, 1.0)
"""Budgets of the study, as shares of the bare backbone's MACs."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class ExitScores:
    """Scores of every exit on one split, after corrections and ensemble.

    Attributes:
        scores_KNC: May be memory-mapped.
        y_N: Classes, in learning order.
        experience_N: Test experience of each sample; -1 where the split is not divided.
    """

    scores_KNC: NDArray[np.float32]
    y_N: NDArray[np.int64]
    experience_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y_N)


MOST_POINTS: Final = 400
"""Points of a risk-coverage curve; a figure needs no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitCurve:
    """Numbers behind the figures of one exit, of the samples whose confidence is finite."""

    right_M: tuple[int, ...]
    """Correct predictions in each bin of ECE."""
    wrong_M: tuple[int, ...]
    """Wrong predictions in each bin."""
    confidence_M: tuple[float, ...]
    """Mean confidence of each bin; NaN for an empty one."""
    coverage_P: tuple[float, ...]
    """Share of samples above each threshold, ascending."""
    risk_P: tuple[float, ...]
    """Error rate of these samples."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExitStudy:
    """Result of :func:`study_exits`.

    Attributes:
        name: The run.
        exit_names: Names of the exits, in order of depth.
        cost_K: MACs of a sample up to each exit, as a share of the bare backbone's.
        samples: Test samples.
        validation_samples: Samples that thresholds were chosen on; 0 without validation data.
        metrics: Metrics by name, one value per exit, on all test samples.
        intervals: 95 % bootstrap intervals of the same.
        undecided: Metrics on the samples that no earlier exit has stopped, at the threshold of the 50 % budget.
        undecided_samples: Number of these samples at each exit.
        by_experience: Metrics on the test samples of each experience: name to values by experience and exit.
        points: Accuracy at each budget.
        curves: Numbers behind the figures, by exit; empty in files of older versions.
        evaluation: Confidence and correctness behind the metrics; None for a study that was read from a file.
    """

    name: str
    exit_names: tuple[str, ...]
    cost_K: tuple[float, ...]
    samples: int
    validation_samples: int
    metrics: Mapping[str, tuple[float, ...]]
    intervals: Mapping[str, tuple[tuple[float, float], ...]]
    undecided: Mapping[str, tuple[float, ...]]
    undecided_samples: tuple[int, ...]
    by_experience: Mapping[str, tuple[tuple[float, ...], ...]]
    points: BudgetPoints
    curves: tuple[ExitCurve, ...] = ()
    evaluation: ExitEvaluation | None = None


def study_exits(
    target: Target, *, limit: int | None = None, seed: int = 0, progress: Progress | None = None
) -> ExitStudy:
    """Measure every exit of a run on its test data.

    Args:
        target: A run.
        limit: Samples per split, spread evenly; all by default.
        seed: Of the bootstrap.
        progress: Called with a step's name, what is done and how much there is.

    Raises:
        UnsupportedError: A target that is not a run, a run with one exit only, or one without test samples.
    """
    if target.run is None:
        raise UnsupportedError(f"{target.name}: not a run; give the folder of a run with exits")
    network = target.run.network
    if len(network.heads) < 2:
        raise UnsupportedError(f"{target.name}: has one exit only; train with strategy='... + exits'")
    if not len(target.splits.test):
        raise UnsupportedError(f"{target.name}: has no test samples; use a benchmark with a test set")
    test = collect_scores(target, "test", limit=limit, progress=progress)
    validation = None
    if target.splits.validation is not None and len(target.splits.validation):
        validation = collect_scores(target, "validation", limit=limit, progress=progress)
    return study_scores(
        target.name, validation, test, exit_names=network.exit_names, cost_K=cumulative_macs(network),
        backbone_cost=backbone_macs(network), seed=seed, progress=progress,
    )  # fmt: skip


def study_scores(
    name: str,
    validation: ExitScores | None,
    test: ExitScores,
    *,
    exit_names: Sequence[str],
    cost_K: Sequence[int],
    backbone_cost: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExitStudy:
    """Measure exits from their scores.

    Args:
        name: Name of the run.
        validation: Scores that thresholds are chosen on; None leaves the budgets undefined.
        test: Scores that everything is measured on.
        exit_names: Names of the exits, in order of depth.
        cost_K: MACs of a sample up to each exit.
        backbone_cost: MACs of a sample in the bare backbone.
        seed: Of the bootstrap.
        progress: Called with a step's name, what is done and how much there is.
    """
    evaluation = evaluate(test, cost_K)
    points = budget_points(
        None if validation is None else evaluate(validation, cost_K), evaluation, backbone_cost=backbone_cost,
        budgets=BUDGETS,
    )  # fmt: skip
    alive_KN = _undecided(evaluation, points)
    experiences = sorted({int(e) for e in test.experience_N if e >= 0})
    per_experience = [metrics_of(test, evaluation, test.experience_N == e) for e in experiences]
    by_experience = {metric: tuple(found[metric] for found in per_experience) for metric in (per_experience or [{}])[0]}
    return ExitStudy(
        name=name,
        exit_names=tuple(exit_names),
        cost_K=tuple(cost / backbone_cost for cost in cost_K),
        samples=len(test),
        validation_samples=0 if validation is None else len(validation),
        metrics=metrics_of(test, evaluation, np.ones(len(test), dtype=bool)),
        intervals=_intervals(evaluation, seed=seed, progress=progress),
        undecided=_metrics_undecided(test, evaluation, alive_KN),
        undecided_samples=tuple(int(n) for n in alive_KN.sum(1)),
        by_experience=by_experience,
        points=points,
        curves=tuple(map(exit_curve, evaluation.confidence_KN.numpy(), evaluation.correct_KN.numpy())),
        evaluation=evaluation,
    )


def exit_curve(confidence_N: NDArray[np.float64], correct_N: NDArray[np.bool_]) -> ExitCurve:
    """Bins of equal width, and the risk-coverage curve over thresholds: equal confidences are one point.

    >>> found = exit_curve(np.array([0.9, 0.9, 0.5]), np.array([True, False, False]))
    >>> found.coverage_P, found.risk_P
    ((0.6666666666666666, 1.0), (0.5, 0.6666666666666666))
    """
    finite_N = np.isfinite(confidence_N)
    confidence_N, correct_N = confidence_N[finite_N], correct_N[finite_N]
    bin_N = bin_of(confidence_N, bins=BINS)
    right_M, wrong_M = (np.bincount(bin_N[of_N], minlength=BINS) for of_N in (correct_N, ~correct_N))
    sum_M, count_M = np.bincount(bin_N, weights=confidence_N, minlength=BINS), right_M + wrong_M
    mean_M = np.divide(sum_M, count_M, out=np.full(BINS, nan), where=count_M > 0)
    coverage_P = risk_P = np.zeros(0)
    if len(confidence_N):
        ranking = rank(confidence_N, correct_N)
        taken_G = np.cumsum(ranking.count_RG[0])
        shown = np.unique(np.linspace(0, len(taken_G) - 1, min(len(taken_G), MOST_POINTS)).round().astype(int))
        risk_P = (np.cumsum(ranking.errors_RG[0]) / taken_G)[shown]
        coverage_P = taken_G[shown] / len(confidence_N)
    return ExitCurve(
        right_M=tuple(right_M.tolist()), wrong_M=tuple(wrong_M.tolist()), confidence_M=tuple(mean_M.tolist()),
        coverage_P=tuple(coverage_P.tolist()), risk_P=tuple(risk_P.tolist()),
    )  # fmt: skip


def evaluate(scores: ExitScores, cost_K: Sequence[int]) -> ExitEvaluation:
    """Largest probability and correctness of every exit."""
    confidences, correct = [], []
    for scores_NC in scores.scores_KNC:
        p_NC = torch.from_numpy(np.array(scores_NC)).double().softmax(1)
        top_N, class_N = p_NC.max(1)
        confidences.append(top_N)
        # The arg-max of NaN scores is class 0, which would be right by chance: as in the tally, they predict nothing.
        correct.append((class_N == torch.from_numpy(scores.y_N)) & top_N.isfinite())
    experience_N = torch.from_numpy(scores.experience_N) if (scores.experience_N >= 0).all() else None
    return ExitEvaluation(
        confidence_KN=torch.stack(confidences), correct_KN=torch.stack(correct), cost_K=tuple(cost_K),
        experience_N=experience_N,
    )  # fmt: skip


def metrics_of(scores: ExitScores, evaluation: ExitEvaluation, of_N: NDArray[np.bool_]) -> dict[str, tuple[float, ...]]:
    """Every metric of calibration and failure prediction, one value per exit, on the chosen samples.

    NaN without samples, and at exits with a confidence that is not finite.
    """
    confidence_KN, correct_KN = evaluation.confidence_KN.numpy()[:, of_N], evaluation.correct_KN.numpy()[:, of_N]
    if not of_N.any():
        names = ("accuracy", *RANKING_METRICS, "smooth_ece", "brier", "nll", "eefp")
        return {name: (nan,) * len(confidence_KN) for name in names}
    found = [failure_metrics(s_N, c_N) for s_N, c_N in zip(confidence_KN, correct_KN, strict=True)]
    y_N = torch.from_numpy(scores.y_N[of_N])
    exits = [torch.from_numpy(np.array(scores_NC[of_N])) for scores_NC in scores.scores_KNC]
    return {
        "accuracy": tuple(float(c_N.mean()) for c_N in correct_KN),
        **{name: tuple(each[name] for each in found) for name in RANKING_METRICS},
        "smooth_ece": tuple(smooth_ece(s_N, c_N) for s_N, c_N in zip(confidence_KN, correct_KN, strict=True)),
        "brier": tuple(float(brier_N(scores_NC, y_N).mean()) for scores_NC in exits),
        "nll": tuple(float(nll_N(scores_NC, y_N).mean()) for scores_NC in exits),
        "eefp": eefp_K(confidence_KN, correct_KN),
    }


def collect_scores(
    target: Target, split: Any, *, limit: int | None = None, progress: Progress | None = None
) -> ExitScores:
    """Scores of every exit on a split, from the cache of the run where it holds those of the same checkpoint."""
    folder, key = target.folder / "exits" / "cache", fingerprint(target, limit)
    cached = _read_cache(folder, split, key)
    if cached is not None:
        return cached
    divided = split == "test" and len(target.experiences) > 0
    parts: Sequence[tuple[int, DataSplit]] = (
        list(enumerate(target.experiences)) if divided else [(-1, getattr(target.splits, split))]
    )
    each = None if limit is None else max(1, limit // len(parts))
    learner, rows, classes, experiences = target.run.learner, list[Tensor](), list[Tensor](), list[int]()
    total = sum(len(part.batches(size=256, limit=each)) for _, part in parts)
    with evaluating(target.model):
        done = 0
        for experience, part in parts:
            for batch in part.batches(size=256, limit=each):
                output = learner.adjust_logits(target.model(batch.inputs, taps=learner.taps))
                rows.append(torch.stack([scores_NC.float().cpu() for scores_NC in output.logits]))
                assert batch.targets is not None  # runs have labels
                classes.append(batch.targets.cpu())
                experiences += [experience] * len(batch.targets)
                done += 1
                if progress is not None:
                    progress(f"scores of {split}", done, total)
    y_N = torch.cat(classes).numpy().astype(np.int64)
    scores = ExitScores(torch.cat(rows, dim=1).numpy(), y_N, np.array(experiences, dtype=np.int64))
    _write_cache(folder, split, key, scores)
    return scores


def _undecided(evaluation: ExitEvaluation, points: BudgetPoints) -> NDArray[np.bool_]:
    """alive_KN: samples that reach each exit at the threshold of the 50 % budget; all without a threshold."""
    threshold = next((p.threshold for p in points.points or () if p.name == "50%"), nan)
    confidence_KN = evaluation.confidence_KN.numpy()
    alive_KN = np.ones(confidence_KN.shape, dtype=bool)
    if not isnan(threshold):
        for exit in range(1, len(confidence_KN)):
            alive_KN[exit] = alive_KN[exit - 1] & (confidence_KN[exit - 1] < threshold)
    return alive_KN


def _metrics_undecided(
    scores: ExitScores, evaluation: ExitEvaluation, alive_KN: NDArray[np.bool_]
) -> dict[str, tuple[float, ...]]:
    """The metrics of each exit on the samples that reach it."""
    per_exit = [metrics_of(scores, evaluation, alive_N) for alive_N in alive_KN]
    return {name: tuple(found[name][k] for k, found in enumerate(per_exit)) for name in per_exit[0]}


def _intervals(
    evaluation: ExitEvaluation, *, seed: int, progress: Progress | None
) -> dict[str, tuple[tuple[float, float], ...]]:
    found: dict[str, tuple[tuple[float, float], ...]] = {}
    confidence_KN, correct_KN = evaluation.confidence_KN.numpy(), evaluation.correct_KN.numpy()
    for done, metric in enumerate(RANKING_METRICS, start=1):
        found[metric] = tuple(
            bootstrap(s_N, c_N, metric=metric, seed=seed) for s_N, c_N in zip(confidence_KN, correct_KN, strict=True)
        )
        if progress is not None:
            progress("bootstrap intervals", done, len(RANKING_METRICS))
    return found


def fingerprint(target: Target, limit: int | None) -> str:
    """Of the checkpoint and the request: scores of another state are never read."""
    files = sorted((target.folder / "checkpoints").glob("*.ckpt"))
    stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    config = str(target.config.benchmark) if target.config is not None else ""
    return hashlib.sha256(json.dumps([stamp, limit, config]).encode()).hexdigest()[:16]


def _read_cache(folder: Path, split: str, key: str) -> ExitScores | None:
    try:
        if (folder / f"{split}.key").read_text(encoding="utf-8") != key:
            return None
        scores_KNC = np.load(folder / f"{split}_scores.npy", mmap_mode="r", allow_pickle=False)
        y_N = np.load(folder / f"{split}_y.npy", allow_pickle=False)
        experience_N = np.load(folder / f"{split}_experience.npy", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return ExitScores(scores_KNC, y_N, experience_N)


def _write_cache(folder: Path, split: str, key: str, scores: ExitScores) -> None:
    """The key is written last: without it the arrays are not read."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.key").unlink(missing_ok=True)
        np.save(folder / f"{split}_scores.npy", scores.scores_KNC)
        np.save(folder / f"{split}_y.npy", scores.y_N)
        np.save(folder / f"{split}_experience.npy", scores.experience_N)
        (folder / f"{split}.key").write_text(key, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written ({error.strerror}); make the run folder writable") from None
