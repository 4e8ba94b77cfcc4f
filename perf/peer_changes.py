"""Avalanche's methods with a definition changed to ours: which of several differences makes two accuracies differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peer_course import LR, PER_EXPERIENCE, Course, Setting
from torch import Tensor, nn


def ewc_by_sample(setting: Setting) -> Any:
    """Avalanche's EWC with batches of one sample in its pass for the Fisher diagonal."""
    from avalanche.training.plugins import EWCPlugin

    class BySample(EWCPlugin):
        def compute_importances(self, *arguments: Any, **options: Any) -> Any:
            *others, _ = arguments  # the last one is the size of batches
            return super().compute_importances(*others, 1, **options)

    return BySample(ewc_lambda=10.0)


def mas_by_sample(setting: Setting) -> Any:
    """Avalanche's MAS with batches of one sample in its pass, merging from zero on."""
    from avalanche.training.plugins import MASPlugin

    class BySample(MASPlugin):
        def _get_importance(self, strategy: Any) -> Any:
            size, strategy.train_mb_size = strategy.train_mb_size, 1
            try:
                found = super()._get_importance(strategy)
            finally:
                strategy.train_mb_size = size
            if self.importance is None:
                for value in found.values():
                    value.data = (1 - self.alpha) * value.data
            return found

    return BySample(lambda_reg=0.01, alpha=0.5)


def lwf_by_experience(setting: Setting) -> Any:
    """Avalanche's LwF with a softmax for the classes of each old experience."""
    from avalanche.training.plugins import LwFPlugin

    made = LwFPlugin(alpha=4.0, temperature=2.0)
    whole: Callable[..., Tensor] = made.lwf._distillation_loss

    def by_experience(out: Tensor, old: Tensor, classes: Any) -> Tensor:
        known = sorted(classes)
        losses = [whole(out, old, known[i : i + PER_EXPERIENCE]) for i in range(0, len(known), PER_EXPERIENCE)]
        return sum(losses, torch.zeros(()))

    made.lwf._distillation_loss = by_experience
    return made


def er_ace_of_the_past(course: Course, shared: dict[str, Any]) -> Any:
    """Avalanche's ER-ACE with a memory that takes in an experience after it was trained, its two terms added up."""
    from avalanche.training import ER_ACE

    class Past(ER_ACE):
        def _before_training_exp(self, **kwargs: Any) -> None:
            update, self.storage_policy.update = self.storage_policy.update, lambda *_, **__: None
            super()._before_training_exp(**kwargs)
            self.storage_policy.update = update

        def _after_training_exp(self, **kwargs: Any) -> None:
            self.storage_policy.update(self, **kwargs)
            super()._after_training_exp(**kwargs)

    model, setting = course.model(), course.setting
    optimizer, sizes = (
        torch.optim.SGD(model.parameters(), lr=LR),
        {"mem_size": setting.memory, "batch_size_mem": setting.batch},
    )
    strategy = Past(model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), **sizes, **shared)
    mean = strategy.ace_criterion
    strategy.ace_criterion = lambda *outputs_and_targets: 2 * mean(*outputs_and_targets)
    return strategy
