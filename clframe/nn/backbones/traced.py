"""Stages of any model, divided after named layers: torch.fx traces the model's forward, and its graph is cut.

Only modules that contain a named layer are traced; all others are called as they are, with whatever their forward
does. A cut needs a layer whose output is on every path from the inputs to the features. Values without a gradient that
pass it by, such as an attention mask, are carried from stage to stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, UnknownNameError, nearest
from clframe.nn.backbones.traced_graph import TracedGraph, modules_around

OUTPUT = "output"
"""Name of the stage after the last named layer."""
DEPTH = 8
"""Levels of containers to open for models of libraries: more than any of them has."""


def trace_stages(
    model: nn.Module,
    layers: Sequence[str],
    x: Tensor,
    *,
    where: str,
    defaults: Sequence[str] = (),
) -> list[tuple[str, nn.Module]]:
    """Divide a model, which is in evaluation mode, after layers; run it to find what passes from stage to stage.

    In training and in evaluation mode the stages compute what the model does, bit for bit. They share its modules.

    Args:
        model: The model, which returns its features.
        layers: Names of modules as in ``model.named_modules()``, in any order.
        x: At least three inputs.
        where: Prefix of messages.
        defaults: Further layers, left out where the model cannot be divided after them.

    Returns:
        ``(name, stage)`` in order of execution. The stage of a layer ends with it; the rest is :data:`OUTPUT`.

    Raises:
        UnknownNameError: The model has no such layer; the nearest one is named.
        ConfigError: A forward that torch.fx cannot trace, or a layer after which the model cannot be divided.
    """
    modules = dict(model.named_modules())
    for name in layers:
        if name not in modules or not name:
            close = nearest(name, [known for known in modules if known])
            advice = f"did you mean '{close}'?" if close else "see named_modules() of the model"
            raise UnknownNameError(f"{where}: {type(model).__name__} has no layer '{name}'; {advice}")
    names = tuple(dict.fromkeys((*layers, *defaults)))
    modes = _Modes(model, names, x, where=where)
    problems = {name: modes.problem(name) for name in names}
    for name in layers:
        if problems[name]:
            around = sorted(modules_around([name]), key=len, reverse=True)
            outer = (outer for outer in around if not _Modes(model, (outer,), x, where=where).problem(outer))
            advice = f"use '{found}'" if (found := next(outer, None)) else "name a layer that all paths pass through"
            raise ConfigError(f"{where}: layer '{name}' {problems[name]}; {advice}")
    return modes.divide([name for name in names if not problems[name]])


def drop_classifier(model: nn.Module) -> None:
    """Replace a linear layer that computes the model's output by ``nn.Identity``, in place."""
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1:]
    graph = TracedGraph(model, linear, where=type(model).__name__)
    if linear and graph.node_of(linear[0]) is graph.result:
        outer, _, name = linear[0].rpartition(".")
        setattr(model.get_submodule(outer), name, nn.Identity())


def has_same_gradients(model: nn.Module, stages: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether the same parameters receive gradients through the model and through its stages.

    They do not where the traced forward switches gradients off, which torch.fx does not record.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reached = []
    for modules in ((model,), stages):
        with torch.enable_grad():
            value: Any = x.clone()
            for module in modules:
                value = module(value)
            total = value.sum()
        found = torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else ()
        reached.append([gradient is not None for gradient in found])
    return reached[0] == reached[1]


def default_layers(model: nn.Module, *, depth: int) -> list[str]:
    """Names of a model's blocks, or of its layers if it has fewer than two blocks.

    Containers of the classes ``nn.Sequential`` and ``nn.ModuleList``, and modules with more than three quarters of the
    parameters, are replaced by their children, down to ``depth`` levels. Blocks are modules with children.

    >>> inner = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), nn.Flatten())
    >>> default_layers(nn.Sequential(inner, nn.Linear(8, 3)), depth=2)
    ['0.0', '0.1', '1']
    """
    found = list(_children(model, "", depth, most=0.75 * _size(model)))
    blocks = [name for name, layer in found if any(True for _ in layer.children())]
    return blocks if len(blocks) > 1 else [name for name, _ in found]


def _children(model: nn.Module, prefix: str, depth: int, *, most: float) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        opened = type(child) in (nn.Sequential, nn.ModuleList) or _size(child) > most
        if depth > 1 and opened and any(True for _ in child.children()):
            yield from _children(child, f"{prefix}{name}.", depth - 1, most=most)
        elif not isinstance(child, (nn.Identity, nn.Dropout, nn.Dropout2d)):
            yield f"{prefix}{name}", child


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class _Modes:
    """A model's graphs in evaluation and in training mode; one if they are equal."""

    def __init__(self, model: nn.Module, names: Sequence[str], x: Tensor, *, where: str) -> None:
        opened = [model, *(model.get_submodule(outer) for outer in sorted(modules_around(names)))]
        self.graphs: list[TracedGraph] = []
        for training in (False, True):
            with _traced_in_mode(opened, training):
                graph = TracedGraph(model, names, where=where)
                if not self.graphs or graph.key() != self.graphs[0].key():
                    graph.run(x)
                    self.graphs.append(graph)

    def problem(self, name: str) -> str:
        """Return the reason why the model cannot be divided after a layer in both modes; empty if it can."""
        found = [graph.problem(name) for graph in self.graphs]
        if all(found) or not any(found):
            return found[0]
        return f"{found[0]} in evaluation mode" if found[0] else f"{found[1]} in training mode"

    def divide(self, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
        """Stages that end with the layers, and the rest, if there is any."""
        first = self.graphs[0]
        nodes = {name: first.node_of(name) for name in names}
        at = {name: first.order[node] for name, node in nodes.items() if node is not None}
        names = sorted(names, key=lambda name: (at[name], -name.count(".")))
        stages = first.divide(names)
        if len(self.graphs) > 1:
            stages = [ModeStage(*pair) for pair in zip(stages, self.graphs[1].divide(names), strict=True)]
        found = list(zip((*names, OUTPUT), stages, strict=True))
        ends = [graph.node_of(names[-1]) is graph.result if names else False for graph in self.graphs]
        return found[:-1] if all(ends) else found


class ModeStage(nn.Module):
    """A stage of a model whose forward differs between training and evaluation mode.

    Args:
        evaluation: The stage in evaluation mode.
        training: The stage in training mode; both share their modules.
    """

    def __init__(self, evaluation: nn.Module, training: nn.Module) -> None:
        super().__init__()
        self.in_evaluation, self.in_training = evaluation, training

    def forward(self, flow: Any) -> Any:
        """Run the stage of the present mode."""
        return self.in_training(flow) if self.training else self.in_evaluation(flow)


@contextmanager
def _traced_in_mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    """Training flags of the modules to trace; their own buffers are restored, as training may write to them."""
    flags = [module.training for module in modules]
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers(recurse=False)]
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
