"""The algebra: components, their composition, and the values that pass between them."""

from clframe.core.component import HOOKS, SLOTS, Component, total
from clframe.core.compose import Composition, compose
from clframe.core.expression import COMPONENTS, parse, register
from clframe.core.types import Batch, Experience, Moment, Output, Samples, State, Step

__all__ = [
    "COMPONENTS", "HOOKS", "SLOTS", "Batch", "Component", "Composition", "Experience", "Moment", "Output",
    "Samples", "State", "Step", "compose", "parse", "register", "total",
]  # fmt: skip
