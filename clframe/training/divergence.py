"""Detection of diverged training: losses or weights that are not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from clframe.errors import DivergenceError
from clframe.training.learner import Learner

_log = logging.getLogger(__name__)


class DivergenceGuard:
    """Checks losses where they are logged and weights at the end of each experience, never inside a step.

    Args:
        action: ``"stop"`` raises :class:`~clframe.errors.DivergenceError`; ``"warn"`` logs one warning for each
            experience and trains on.

    Attributes:
        found: One line for each experience that diverged.
    """

    def __init__(self, action: Literal["stop", "warn"] = "stop") -> None:
        self.action = action
        self.found: list[str] = []
        self._experience: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the findings so far and the experience of the last one."""
        return {"found": list(self.found), "experience": self._experience}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; :attr:`found` remains the same list."""
        self.found[:] = state["found"]
        self._experience = state["experience"]

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
        if learner.term_steps:
            sums = {name: float(value.sum()) for name, value in learner.term_sums.items()}
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
                f"trainer.gradient_clip (trainer.on_divergence=warn trains on)"
            )
        _log.warning("%s; training has diverged and its results mean nothing", line)
