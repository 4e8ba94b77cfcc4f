"""Detection of diverged training: losses, gradients or weights that are not finite, and updates skipped for them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from clframe.errors import DivergenceError
from clframe.training.learner import Learner
from clframe.training.loss_sums import Snapshot

_log = logging.getLogger(__name__)


def gradient_norm(optimizer: Optimizer, norm_type: float = 2.0) -> Tensor | None:
    """Return the norm of the gradient with respect to all parameters of an optimizer, without synchronizing.

    With the default that is ``sqrt(sum(g ** 2))`` over every entry g of every gradient, the norm that
    ``trainer.gradient_clip`` bounds. None if no parameter has a gradient.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return get_total_norm(gradients, norm_type) if gradients else None


class UpdateFilter:
    """Skips updates from losses or gradients that are not finite, and counts them.

    A skipped update changes neither weights nor the optimizer nor the states of components. The network's buffers, such
    as the running statistics of batch normalization, are restored to their values before the update's first batch.
    Under accumulation one batch that is not finite skips the whole update. Batches whose loss is not finite are left
    out of the loss terms that are logged.

    Every batch is checked after its backward pass, which synchronizes with the device, and all buffers are copied
    before every update.

    Attributes:
        updates: Updates so far that were due, by experience.
        skipped: Those of them that were skipped.
        loss_is_finite: Whether that of the current batch is.
    """

    def __init__(self) -> None:
        self.updates: Counter[int] = Counter()
        self.skipped: Counter[int] = Counter()
        self.loss_is_finite = True
        self._losses_are_finite = self._gradients_are_finite = True
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._sums: Snapshot = {}, 0

    def before_batch(self, learner: Learner, *, first: bool) -> None:
        """Copy what the batch may spoil; ``first`` is that of an update."""
        if first:
            self._losses_are_finite = self._gradients_are_finite = True
            self._buffers = [(buffer, buffer.clone()) for buffer in learner.network.buffers()]
        self._sums = learner.loss_sums.snapshot()

    def check_batch(self, learner: Learner, loss: Tensor, optimizer: Optimizer) -> bool:
        """Return whether losses and gradients of the update are finite so far; called after the backward pass."""
        finite = [loss.detach().isfinite().all()]
        # The largest absolute value, since the sum of squares of finite gradients may overflow.
        largest = gradient_norm(optimizer, math.inf)
        if largest is not None:
            finite.append(largest.isfinite())
        self.loss_is_finite, *gradients = torch.stack(finite).tolist()
        if not self.loss_is_finite:
            learner.loss_sums.restore(self._sums)
        self._losses_are_finite &= self.loss_is_finite
        self._gradients_are_finite = all(gradients)
        return self._losses_are_finite and self._gradients_are_finite

    def admit(self, learner: Learner, engine: Any, optimizer: Optimizer, *, changed: bool) -> bool:
        """Return whether to make the update that is due; otherwise the buffers are restored and the skip is counted.

        Args:
            learner: The learner.
            engine: The engine, which adapts the loss scale.
            optimizer: The optimizer of the update.
            changed: Whether something may have changed the gradients since :meth:`check_batch`.
        """
        assert learner.experience is not None
        index = learner.experience.index
        self.updates[index] += 1
        if changed and self._gradients_are_finite:
            largest = gradient_norm(optimizer, math.inf)
            self._gradients_are_finite = largest is None or bool(largest.isfinite())
        if self._losses_are_finite and self._gradients_are_finite:
            return True
        self.skipped[index] += 1
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        if not self._gradients_are_finite:  # the scaler would update with finite ones
            engine.skip()
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far."""
        return {"updates": dict(self.updates), "skipped": dict(self.skipped)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.updates, self.skipped = Counter(state["updates"]), Counter(state["skipped"])


Action = Literal["stop", "warn", "skip"]


class DivergenceGuard:
    """Checks losses where they are logged and weights at the end of each experience.

    Args:
        action: ``"stop"`` raises :class:`~clframe.errors.DivergenceError`; ``"warn"`` logs one warning for each
            experience and trains on; ``"skip"`` does that as well, and skips updates from losses or gradients that
            are not finite. Only ``"skip"`` checks inside a step.

    Attributes:
        found: One line for each experience that diverged.
        filter: Skips updates and counts them; None unless ``action`` is ``"skip"``.
        updates: Updates that were due, by experience; with a filter, its own.
        skipped: Those of them that the scaler of 16-bit mixed precision has left out.
    """

    def __init__(self, action: Action = "stop") -> None:
        self.action = action
        self.found: list[str] = []
        self.filter = UpdateFilter() if action == "skip" else None
        self.updates: Counter[int] = Counter()
        self.skipped: Counter[int] = Counter()
        self._experience: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the findings so far, the experience of the last one, and the counts of skipped updates."""
        filter = {} if self.filter is None else self.filter.state_dict()
        scaler = {"updates": dict(self.updates), "skipped": dict(self.skipped)}
        return {"found": list(self.found), "experience": self._experience, "filter": filter, "scaler": scaler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; :attr:`found` remains the same list."""
        self.found[:] = state["found"]
        self._experience = state["experience"]
        if self.filter is not None and state.get("filter"):
            self.filter.load_state_dict(state["filter"])
        scaler = state.get("scaler", {})  # missing in checkpoints of an early version
        self.updates, self.skipped = Counter(scaler.get("updates")), Counter(scaler.get("skipped"))

    def count_update(self, learner: Learner, *, made: bool) -> None:
        """Count an update that was due, and whether the gradient scaler has made it."""
        assert learner.experience is not None
        index = learner.experience.index
        self.updates[index] += 1
        self.skipped[index] += not made

    def count_skipped(self, index: int) -> tuple[int, int] | None:
        """Return the updates of an experience that were skipped, and all of them; None if none was looked for or found.

        Args:
            index: Index of the experience.
        """
        if self.filter is not None:
            return self.filter.skipped[index], self.filter.updates[index]
        return (self.skipped[index], self.updates[index]) if self.skipped[index] else None

    def check_updates(self, learner: Learner) -> None:
        """Report an experience all of whose updates were skipped."""
        assert learner.experience is not None
        index = learner.experience.index
        if self.filter is not None and 0 < self.filter.updates[index] == self.filter.skipped[index]:
            count = self.filter.skipped[index]
            self._report(f"losses or gradients were not finite in every update, so all {count} were skipped", index)

    def check_losses(self, means: Mapping[str, float], *, experience: int, step: int) -> None:
        """Check the mean of each loss term since the last check.

        Args:
            means: By name of the term.
            experience: Index of the experience.
            step: Training steps so far.

        Raises:
            DivergenceError: A mean is not finite and ``action`` is ``"stop"``.
        """
        terms = [name.removeprefix("loss/") for name, mean in means.items() if not math.isfinite(mean)]
        if terms:
            plural = "losses are" if len(terms) > 1 else "loss is"
            self._report(f"the {plural} not finite at step {step} ({', '.join(terms)})", experience)

    def check_weights(self, learner: Learner, *, step: int | None = None) -> None:
        """Check the weights at the end of an experience; synchronizes with the device once.

        Raises:
            DivergenceError: A weight is not finite and ``action`` is ``"stop"``.
        """
        assert learner.experience is not None
        experience = learner.experience.index
        floats = {name: p for name, p in learner.network.named_parameters() if p.is_floating_point()}
        finite = torch.stack([p.detach().isfinite().all() for p in floats.values()]).tolist()
        broken = [name for name, fine in zip(floats, finite, strict=True) if not fine]
        if not broken:
            return
        # The losses name the cause better than the weights, if they have been summed since the last log entry.
        if learner.loss_sums.steps:
            sums = {name: float(value.sum()) for name, value in learner.loss_sums.sums.items()}
            self.check_losses(sums, experience=experience, step=step or 0)
        after = "" if step is None else f" after step {step}"
        weights = f"{broken[0]} and {len(broken) - 1} more" if len(broken) > 1 else broken[0]
        self._report(f"weights are not finite{after} ({weights})", experience)

    def _report(self, finding: str, experience: int) -> None:
        if experience == self._experience:
            return  # what diverged stays diverged: one line is enough
        self._experience = experience
        line = f"experience {experience + 1}: {finding}"
        self.found.append(line)
        if self.action == "stop":
            raise DivergenceError(
                f"{line}, training has diverged; lower optimizer.lr or the strengths of the loss terms, or set "
                f"trainer.gradient_clip (trainer.on_nonfinite=warn trains on, skip leaves out the updates concerned)"
            )
        _log.warning("%s; training has diverged and its results mean nothing", line)
