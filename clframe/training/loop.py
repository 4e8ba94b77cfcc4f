"""The one loop body, and what may drive it.

:func:`iterate` is the body of every training step: under Avalanche's loop on Lightning Fabric, under
Avalanche's loop with a Lightning Trainer inside, and under a plain Trainer. A driver says what each part
means there; nothing is written twice.
"""

from __future__ import annotations

from typing import Protocol

EVENTS = (
    "before_training_iteration", "before_forward", "after_forward", "before_backward", "after_backward",
    "before_update", "after_update", "after_training_iteration",
)  # fmt: skip
"""Avalanche's callbacks inside a training step, in its order."""


class Driver(Protocol):
    """Whoever runs training steps."""

    def fire(self, event: str) -> None:
        """Call the foreign plugins that act at ``event``."""

    def clear_gradients(self) -> None:
        """Zero the gradients, where a new update begins."""

    def predict(self) -> None:
        """Run the model on the current batch."""

    def add_loss(self) -> None:
        """Add the mixed loss terms of the current batch."""

    def backward(self) -> None:
        """Run the backward pass and the gradient's owner."""

    def optimizer_step(self) -> None:
        """Clip and update, where an update is due."""


def iterate(driver: Driver) -> None:
    """Train on the current batch, in the order of Avalanche's ``SGDUpdate.training_epoch``."""
    driver.fire("before_training_iteration")
    driver.clear_gradients()
    driver.fire("before_forward")
    driver.predict()
    driver.fire("after_forward")
    driver.add_loss()
    driver.fire("before_backward")
    driver.backward()
    driver.fire("after_backward")
    driver.fire("before_update")
    driver.optimizer_step()
    driver.fire("after_update")
    driver.fire("after_training_iteration")
