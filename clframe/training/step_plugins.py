"""Avalanche's plugins inside a training step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from clframe.avalanche_bridge.imports import EvaluationPlugin, PeriodicEval, SupervisedPlugin

EVENTS = (
    "before_training_iteration", "before_forward", "after_forward", "before_backward", "after_backward",
    "before_update", "after_update", "after_training_iteration",
)  # fmt: skip
"""Avalanche's callbacks inside a training step, in its order."""


class StepPlugins:
    """The calls of Avalanche's plugins inside a training step, resolved once an epoch.

    Avalanche triggers every plugin at each of the eight events of a step, nearly all of which do nothing. Calling
    only those that override the callback keeps a step free of idle Python calls.

    Args:
        plugins: In the order in which they act.
    """

    def __init__(self, plugins: Iterable[Any] = ()) -> None:
        calls: dict[str, list[Callable[..., None]]] = defaultdict(list)
        for plugin in plugins:
            for event in EVENTS:
                if _acts_at(plugin, event):
                    calls[event].append(getattr(plugin, event))
        self.calls = {event: tuple(calls[event]) for event in EVENTS}
        """Methods of plugins, in order, by event."""
        self.touch_loss = any(calls[event] for event in ("before_forward", "after_forward", "before_backward"))
        """Whether a plugin may read or change ``strategy.loss`` before the backward pass."""
        self.touch_gradients = any(calls[event] for event in ("after_backward", "before_update"))
        """Whether a plugin may change the gradients before the update."""


def _acts_at(plugin: Any, event: str) -> bool:
    # An EvaluationPlugin answers to every event through __getattribute__; without metrics and loggers it does nothing.
    if isinstance(plugin, EvaluationPlugin) and not hasattr(type(plugin), event):
        return bool(plugin.metrics or plugin.loggers)
    # PeriodicEval overrides the callback for all modes but evaluates inside epochs only in this one.
    if type(plugin) is PeriodicEval:
        return event == "after_training_iteration" and plugin.peval_mode == "iteration"
    call = getattr(plugin, event, None)
    return call is not None and getattr(call, "__func__", call) is not getattr(SupervisedPlugin, event, None)
