"""Evaluation of a trained model on its own test data, or on other data with the same classes.

Shape suffixes: B batch, C classes in learning order, K exits, N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clframe.accounting import backbone_macs, cumulative_macs
from clframe.config.load import data_config, require_list
from clframe.data.sources.labeled import labeled_data
from clframe.device_names import usable_device
from clframe.errors import ConfigError, DataError
from clframe.exits.curves import wilson_interval
from clframe.exits.study import ExitScores, ExitStudy, Progress, study_scores
from clframe.metrics.confusion import MOST_CLASSES
from clframe.nn.frozen import evaluating
from clframe.options import require_count
from clframe.records import to_json_lines
from clframe.targets.evaluation_data import (
    Batches,
    check_unchanged,
    file_batches,
    match_classes,
    own_batches,
    stored_batches,
    trained_on,
)
from clframe.targets.loading import RunModel, load_run
from clframe.targets.opening import run_target
from clframe.targets.prediction import class_label
from clframe.targets.reading import InputReader, image_reader
from clframe.targets.rules import PredictionRule
from clframe.targets.text_evaluation import TextEvaluation, evaluate_text
from clframe.training.trained import TrainedModel

SCHEMA_VERSION = 1
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ClassAccuracy:
    """Accuracy on the samples of one class."""

    class_id: int
    """The data set's id."""
    name: str
    samples: int
    correct: int

    @property
    def accuracy(self) -> float:
        """Share of correct predictions."""
        return self.correct / self.samples

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval."""
        return wilson_interval(self.correct, self.samples)


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        run: The run folder.
        data: The data, for people.
        rule: The rule by which exits decided, see :class:`~clframe.targets.rules.PredictionRule`.
        threshold: Threshold of all exits; None for the strategy's own rule.
        simulated: Reason why exits cannot be skipped, so that MACs are those of a model that could; empty otherwise.
        notes: Restrictions of the numbers.
        samples: Number of samples.
        correct: Number of correct predictions.
        macs: Mean MACs of a prediction.
        backbone_macs: MACs of the bare backbone with its classifier.
        decided_K: Number of samples that each exit decided.
        macs_K: MACs of one sample up to and including each exit, with the heads passed on the way.
        decision_macs_K: MACs of a sample that stops at each exit by the rule, with confidences, corrections and
            ensembles on the way, and without heads that are not asked.
        classes: Accuracy by class, of the classes with samples, in order of their ids.
        unseen: Names of learned classes without samples.
        experiences: Samples and correct predictions of each test experience, in order; empty for other data.
        confusion: Samples by true and predicted class, both in ``class_order``; empty beyond
            :data:`~clframe.metrics.confusion.MOST_CLASSES` classes.
        class_order: The data set's ids of the learned classes, in learning order.
        class_names: Names of the same.
        exits: Accuracy, calibration and failure prediction of every exit, with intervals.
        skipped: Reason for each file that could not be read.
    """

    run: str
    data: str
    rule: str
    threshold: float | None
    simulated: str
    notes: tuple[str, ...]
    samples: int
    correct: int
    macs: float
    backbone_macs: int
    decided_K: tuple[int, ...]
    macs_K: tuple[int, ...]
    decision_macs_K: tuple[int, ...]
    classes: tuple[ClassAccuracy, ...]
    unseen: tuple[str, ...]
    experiences: tuple[tuple[int, int], ...]
    confusion: tuple[tuple[int, ...], ...]
    class_order: tuple[int, ...]
    class_names: tuple[str, ...]
    exits: ExitStudy
    skipped: Mapping[str, str]

    @property
    def accuracy(self) -> float:
        """Share of correct predictions over all samples."""
        return self.correct / self.samples

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(self.correct, self.samples)

    @property
    def accuracy_by_class(self) -> dict[int, float]:
        """Accuracy on each class with samples, by the data set's id."""
        return {one.class_id: one.accuracy for one in self.classes}


def evaluate(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    threshold: float | None = None,
    budget: float | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation | TextEvaluation:
    """Measure the model of a run on labeled data, or on text if it is a language model.

    Without ``benchmark=NAME`` these are the run's own test data, of the experiences it has learned, and the numbers
    equal those of ``results.json``. With it they are other data: all samples of ``image_folder``, ``csv`` and ``npz``
    without a test part, and the test part of any other data set. Classes are matched by name, or by id where they have
    none; images are converted as in training. For language models see
    :func:`~clframe.targets.text_evaluation.evaluate_text`.

    Args:
        run: A run folder.
        overrides: ``benchmark=NAME`` and options of that data set (``benchmark.path=FOLDER``), or the new location of
            the run's own data (``benchmark.data_dir=FOLDER``).
        threshold: Largest probability from which an exit decides; None: the strategy's rule.
        budget: Mean cost as a share of the bare backbone's MACs, with the threshold that the run has recorded.
        batch_size: Samples per batch.
        device: cpu, cuda, cuda:N, mps or auto.
        seed: Of the bootstrap intervals.
        progress: Called with a step's name, what is done and how much there is.

    Raises:
        RunFolderError: No run, or one without a checkpoint; own test data that has changed.
        ConfigError: Overrides or options that cannot take effect.
        DataError: Data that cannot be used: an unknown class, no samples.
    """
    require_list(overrides)
    require_count(batch_size, least=1, where="--batch-size")
    given = [text for text in overrides if text.partition("=")[0] == "benchmark"]
    model = load_run(run, kind=RunModel, device=str(usable_device(device)), where="evaluate")
    if model.network.vocabulary:
        return evaluate_text(
            model, overrides, threshold=threshold, budget=budget, batch_size=batch_size, progress=progress
        )
    if given:
        rule = PredictionRule(model, threshold=threshold, budget=budget)
        return _evaluate_other(model, run, given[-1].partition("=")[2], overrides, rule, batch_size, seed, progress)
    target = run_target(str(run), model, overrides)
    check_unchanged(target, model)
    rule = PredictionRule(model, threshold=threshold, budget=budget)
    total = sum(map(len, target.experiences))
    if not total:
        raise DataError(f"{run}: has no test samples; add benchmark=NAME to evaluate on other data")
    counts = _Counts(model, rule)
    counts.add_all(own_batches(target, batch_size), total=total, progress=progress)
    return counts.result(str(run), "own test data", seed=seed, experiences=len(target.experiences), progress=progress)


def to_json(found: Evaluation) -> str:
    """The evaluation as JSON."""
    study = found.exits
    exits = [
        {
            "name": name, "decided": found.decided_K[k], "macs": found.macs_K[k],
            "decision_macs": found.decision_macs_K[k],
            "metrics": {metric: values[k] for metric, values in study.metrics.items()},
            "intervals": {metric: limits[k] for metric, limits in study.intervals.items()},
        }
        for k, name in enumerate(study.exit_names)
    ]  # fmt: skip
    content = {
        "schema_version": SCHEMA_VERSION, "run": found.run, "data": found.data, "rule": found.rule,
        "threshold": found.threshold, "simulated": found.simulated, "notes": found.notes, "samples": found.samples,
        "correct": found.correct, "accuracy": found.accuracy, "accuracy_interval": found.interval, "macs": found.macs,
        "backbone_macs": found.backbone_macs, "exits": exits,
        "classes": [{**asdict(one), "accuracy": one.accuracy, "interval": one.interval} for one in found.classes],
        "unseen": found.unseen, "experiences": [{"samples": n, "correct": c} for n, c in found.experiences],
        "class_order": found.class_order, "class_names": found.class_names, "confusion": found.confusion,
        "skipped": found.skipped,
    }  # fmt: skip
    return to_json_lines(content)


def _evaluate_other(
    model: TrainedModel,
    run: str | Path,
    name: str,
    overrides: Sequence[str],
    rule: PredictionRule,
    size: int,
    seed: int,
    progress: Progress | None,
) -> Evaluation:
    options = [text for text in overrides if text.partition("=")[0] != "benchmark"]
    block = data_config(name, options).benchmark
    for text in options:
        key = text.partition("=")[0].removeprefix("benchmark.")
        if key not in block.options:
            raise ConfigError(f"override '{text}': has no effect on an evaluation; give options of {block.name} only")
    data = labeled_data(block.name, block.options)
    names = data.class_names or tuple(class_label(model, c) for c in range(int(data.y_N.max()) + 1))
    rank_C = torch.tensor(match_classes(model, names, where=data.title))
    y_N = rank_C[data.y_N]
    if data.paths:
        reader = image_reader(model, data.paths)
        batches = file_batches(model, reader, y_N, size)
    else:
        reader = InputReader()
        batches = stored_batches(model, data, y_N, size)
    counts = _Counts(model, rule)
    counts.add_all(batches, total=len(y_N), progress=progress)
    if not counts.samples:
        raise DataError(f"{data.title}: none of {len(reader.skipped)} files could be read; replace them")
    notes = [note for note in (reader.note, trained_on(run, block.options.get("path"))) if note]
    found = counts.result(str(run), data.title, seed=seed, experiences=0, progress=progress)
    return replace(found, notes=(*found.notes, *notes), skipped=dict(reader.skipped))


class _Counts:
    """Counts of an evaluation, batch by batch."""

    def __init__(self, model: TrainedModel, rule: PredictionRule) -> None:
        classes, exits = len(model.class_order), len(model.network.heads)
        self._model, self._rule = model, rule
        self._scores: list[Tensor] = []
        self._y: list[Tensor] = []
        self._experience: list[int] = []
        self._right: list[Tensor] = []
        self._decided_K = torch.zeros(exits, dtype=torch.long)
        self._confusion_CC = torch.zeros(classes, classes, dtype=torch.long) if classes <= MOST_CLASSES else None
        self._macs = 0
        self._cost_K: tuple[int, ...] = ()
        self.samples = 0

    def add_all(self, batches: Batches, *, total: int, progress: Progress | None) -> None:
        """Count all batches."""
        with evaluating(self._model.network), torch.no_grad():
            for x, y_B, experience in batches:
                self._add(x, y_B.cpu(), experience)
                if progress is not None:
                    progress("evaluate", self.samples, total)

    def _add(self, x: Tensor, y_B: Tensor, experience: int) -> None:
        learner, rule = self._model.learner, self._rule
        output = learner.adjust_logits(self._model.network(x, taps=learner.taps))
        scores_BC, exit_B, macs_B = rule.decide(output, x)
        if rule.counts_experts:
            macs_B = rule(x).macs_B
        predicted_B = scores_BC.argmax(1).cpu()
        self._macs += int(macs_B.sum())
        self._cost_K = self._cost_K or tuple(rule.cost_K(x).tolist())
        self._decided_K += torch.bincount(exit_B.cpu(), minlength=len(self._decided_K))
        if self._confusion_CC is not None:
            self._confusion_CC.index_put_((y_B, predicted_B), torch.ones_like(y_B), accumulate=True)
        self._right.append(predicted_B == y_B)
        self._scores.append(torch.stack([each_BC.float().cpu() for each_BC in output.logits]))
        self._y.append(y_B)
        self._experience += [experience] * len(y_B)
        self.samples += len(y_B)

    def result(
        self, run: str, data: str, *, seed: int, experiences: int, progress: Progress | None
    ) -> Evaluation:
        """Compute the metrics of everything counted."""
        model, rule, network = self._model, self._rule, self._model.network
        y_N, right_N = torch.cat(self._y), torch.cat(self._right)
        experience_N = torch.tensor(self._experience)
        scores = ExitScores(torch.cat(self._scores, dim=1).numpy(), y_N.numpy(), experience_N.numpy().astype(np.int64))
        order = model.class_order
        total_C = torch.bincount(y_N, minlength=len(order)).tolist()
        right_C = torch.bincount(y_N[right_N], minlength=len(order)).tolist()
        classes = [
            ClassAccuracy(class_id=c, name=class_label(model, c), samples=total_C[r], correct=right_C[r])
            for r, c in enumerate(order)
            if total_C[r]
        ]
        confusion = () if self._confusion_CC is None else tuple(map(tuple, self._confusion_CC.tolist()))
        of = partial(_count, right_N)
        return Evaluation(
            run=run, data=data, rule=rule.description, threshold=rule.threshold, simulated=rule.simulated,
            notes=(rule.note,) if rule.note else (), samples=len(y_N), correct=int(right_N.sum()),
            macs=self._macs / len(y_N), backbone_macs=backbone_macs(network),
            decided_K=tuple(self._decided_K.tolist()), macs_K=tuple(cumulative_macs(network)),
            decision_macs_K=self._cost_K,
            classes=tuple(sorted(classes, key=lambda one: one.class_id)),
            unseen=tuple(class_label(model, order[r]) for r in model.learner.past if not total_C[r]),
            experiences=tuple(of(experience_N == e) for e in range(experiences)),
            confusion=confusion, class_order=order, class_names=tuple(class_label(model, c) for c in order),
            exits=study_scores(
                run, None, scores, exit_names=network.exit_names, cost_K=cumulative_macs(network),
                backbone_cost=backbone_macs(network), seed=seed, progress=progress,
            ),
            skipped={},
        )  # fmt: skip


def _count(right_N: Tensor, of_N: Tensor) -> tuple[int, int]:
    return int(of_N.sum()), int((right_N & of_N).sum())
