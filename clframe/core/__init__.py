"""The algebra: components, their composition, and the values that pass between them."""

from clframe.core.component import Component, Composition, compose
from clframe.core.declarations import HOOKS, SLOTS
from clframe.core.expression import COMPONENTS, parse, register
from clframe.core.types import Batch, Experience, State, Step, StepContext
from clframe.functional.losses import total
from clframe.nn.types import Output, Samples

__all__ = [
    "COMPONENTS", "HOOKS", "SLOTS", "Batch", "Component", "Composition", "Experience", "Output",
    "Samples", "State", "Step", "StepContext", "compose", "parse", "register", "total",
]  # fmt: skip
