"""One run of strategy_parity.py: train a side's strategy on a course and count its answers."""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import torch
from avalanche.core import SupervisedPlugin
from peer_course import EXPERIENCES, LR, Course, Maker
from peer_strategies import METHODS, Method

from clframe.avalanche_bridge.repairs import repair
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy


def final_accuracy(course: Course, name: str, side: str) -> dict[str, float]:
    """Averages over the experiences of the accuracies after the last one, from 0 to 1, counted alike for both sides.

    ``agnostic``: of an answer among all classes, by Avalanche's metric; ``aware``: among those of the sample's experience.
    """
    watch = Aware()
    with warnings.catch_warnings(record=True):  # Avalanche uses functions of its own that it deprecates
        if side == "ours":
            strategy, stream = _ours(course, METHODS[name]), course.benchmark.avalanche
        else:
            strategy, stream = _theirs(course, METHODS[name].theirs), course.theirs(flat=METHODS[name].flat)
        if name == "JointTraining" and side != "ours":
            strategy.train(stream.train_stream)
        else:
            for experience in stream.train_stream:
                strategy.train(experience)
        strategy.plugins.append(watch)
        metrics = strategy.eval(stream.test_stream)
    accuracies = [value for key, value in metrics.items() if key.startswith("Top1_Acc_Exp/eval_phase/")]
    assert len(accuracies) == EXPERIENCES, metrics
    return {"agnostic": sum(accuracies) / EXPERIENCES, "aware": watch.average()}


class Aware(SupervisedPlugin):
    """Counts answers among the classes of the experience at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.right: Counter[int] = Counter()
        self.seen: Counter[int] = Counter()

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        index, classes = strategy.experience.current_experience, sorted(strategy.experience.classes_in_this_experience)
        answers = torch.tensor(classes)[strategy.mb_output[:, classes].argmax(1)]
        self.right[index] += int((answers == strategy.mb_y).sum())
        self.seen[index] += len(answers)

    def average(self) -> float:
        """Mean of the experiences' accuracies."""
        return sum(self.right[index] / count for index, count in self.seen.items()) / len(self.seen)


def _evaluator() -> Any:
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")  # numbers are read, not logged
        return EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])


def _ours(course: Course, method: Method) -> Any:
    setting, network = course.setting, copy.deepcopy(course.network)
    if not method.growing:
        network.grow(range(course.classes))
    optimizer = partial(torch.optim.SGD, lr=LR)
    module = ContinualModule(network, method.ours(setting), optimizer=optimizer, seed=course.seed)
    return LightningStrategy(
        model=module, benchmark=course.benchmark, train_mb_size=setting.batch, train_epochs=setting.epochs,
        eval_mb_size=256, evaluator=_evaluator(),
    )  # fmt: skip


def _theirs(course: Course, make: Maker) -> Any:
    setting = course.setting
    torch.manual_seed(course.seed)
    np.random.seed(course.seed)
    random.seed(course.seed)
    sizes = {"train_mb_size": setting.batch, "train_epochs": setting.epochs, "eval_mb_size": 256}
    strategy = make(course, {**sizes, "evaluator": _evaluator()})
    repair(strategy.plugins)
    return strategy
