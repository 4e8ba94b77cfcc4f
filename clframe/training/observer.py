"""The interface of observers of a run, such as profilers, which the learner and the loop notify of every section."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

Section = Literal[
    "before_experience", "make_batch", "forward", "task_loss", "losses", "combine_losses", "backward",
    "modify_gradients", "after_step", "after_experience", "adjust_logits", "predict",
]  # fmt: skip
"""Sections of a run that an observer is notified of: the hooks that compute, and the two passes of a training step."""

UNOBSERVED: AbstractContextManager[object] = nullcontext()  # reusable, so that an unobserved run allocates nothing


class StepObserver:
    """Interface of observers of a run; this one does nothing.

    A profiler overrides :meth:`around` and is assigned to ``learner.observer``. The loop enters a section where the
    work is done anyway, so an observer measures the run itself and needs no copy of it.
    """

    def around(self, section: Section, component: str = "", samples: int = 0) -> AbstractContextManager[object]:
        """Return a context manager to run a section in.

        Args:
            section: What runs.
            component: Name of the component whose hook runs; empty for the network and the default loss.
            samples: Size of the batch; 0 outside of a step.
        """
        return UNOBSERVED

    def spent(self) -> int:
        """Return the MACs of the experience so far; 0 where nothing is counted."""
        return 0

    def spent_before_epoch(self) -> int:
        """Return the MACs of the experience before its current epoch; 0 where nothing is counted."""
        return 0

    def sharing(self, *, rows: int, of: int) -> AbstractContextManager[object]:
        """Return a context manager in which this process computes its share of a batch.

        Args:
            rows: Rows of the share.
            of: Rows of the batch.
        """
        return UNOBSERVED

    def begin_share(self) -> None:
        """Note that the share begins here, inside :meth:`sharing`: what came before, every process computes."""
