"""Graphs of a model's forward, traced by torch.fx, and their division into the graphs of stages."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from clframe.errors import ConfigError

_ROOT = "model"
BATCHES = (2, 3)
"""Two batch sizes: what differs between them depends on the batch."""


def starts_in_place(stage: nn.Module) -> bool:
    """Whether the stage begins with a layer marked in-place, such as dropout, which does nothing in evaluation mode."""
    while isinstance(stage, nn.Sequential) and len(stage):
        stage = stage[0]
    return getattr(stage, "inplace", False) is True


def modules_around(names: Sequence[str]) -> set[str]:
    """Names of the modules that contain the named ones.

    >>> sorted(modules_around(["a.b.c", "d"]))
    ['a', 'a.b']
    """
    return {outer for name in names for outer in accumulate(name.split(".")[:-1], "{}.{}".format)}


class _Entry(nn.Module):
    """Calls the model with its inputs alone, so that other arguments of its forward have their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Traces into the modules around the named layers and into no others; keeps what each module returns."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._around = {_ROOT, *(f"{_ROOT}.{outer}" for outer in modules_around(names))}
        self.returned: dict[str, list[Any]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._around

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        if path != _ROOT:
            self.returned.setdefault(path.removeprefix(f"{_ROOT}."), []).append(result)
        return result


@dataclass(frozen=True)
class _Value:
    """Properties of the value of a node."""

    number: bool
    """Whether it is a size or another property of tensors, and contains no tensor."""
    carriable: bool
    """Whether it is a tensor computed from the inputs, with the batch first."""
    differentiable: bool
    """Whether it is computed from the inputs and gradients pass through it; also several tensors as one value."""
    overwritten: bool
    """Whether a later node writes into it."""
    at_batch: tuple[Any, ...]
    """A number's value for each of the batch sizes."""


class TracedGraph:
    """The graph of a model's forward in its present mode.

    Args:
        model: The model. Modules around the named layers are traced, others called as they are.
        names: Names of layers.
        where: Prefix of messages.

    Raises:
        ConfigError: A forward that cannot be traced, or an output that is not one tensor.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, where: str) -> None:
        self.model, self.where = model, where
        tracer, entry = _Tracer(names), _Entry(model)
        try:
            self.graph = tracer.trace(entry)
        except Exception as error:  # forwards raise anything on traced values
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"{where}: torch.fx cannot trace the forward of {type(model).__name__} ({reason}); give (name, module) "
                f"pairs to Backbone.of"
            ) from error
        self.returned = tracer.returned
        self.nodes = [node for node in self.graph.nodes if node.op != "output"]
        (result,) = next(node for node in self.graph.nodes if node.op == "output").args
        if not isinstance(result, fx.Node):
            raise ConfigError(
                f"{where}: {type(model).__name__} returns a {type(result).__name__}; return one tensor of features"
            )
        self.result = result
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self._check_names()
        self.module = fx.GraphModule(entry, self.graph)
        self.values: dict[fx.Node, _Value] = {}

    def _check_names(self) -> None:
        """Refuse layers named as words of Python's grammar, for which torch.fx writes code that cannot be read."""
        for node in self.nodes:
            named = node.op in ("call_module", "get_attr")
            word = next(filter(keyword.iskeyword, str(node.target).split(".") if named else ()), None)
            if word is not None:
                raise ConfigError(
                    f"{self.where}: {type(self.model).__name__} has a layer named '{word}', a word of Python's "
                    f"grammar, which torch.fx cannot trace; rename it"
                )

    def key(self) -> list[tuple[str, Any, str]]:
        """Equal for equal graphs."""
        return [(node.op, node.target, f"{node.args} {node.kwargs}") for node in self.graph.nodes]

    def run(self, x: Tensor) -> None:
        """Run the graph on batches of two sizes and find out what each node computes."""
        try:
            runs = [_Recorder(self.module, x[:batch]) for batch in BATCHES]
        except Exception as error:  # modules raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            text = f"{self.where}: the traced forward of {type(self.model).__name__} fails ({reason})"
            raise ConfigError(f"{text}; give (name, module) pairs to Backbone.of") from error
        written = runs[0].overwritten()
        for node in self.nodes:
            found, of_inputs = [run.values[node] for run in runs], node in runs[0].of_inputs
            tensors = _tensors(found[0])
            single = all(isinstance(value, Tensor) and value.ndim > 0 for value in found)
            self.values[node] = _Value(
                number=not tensors,
                carriable=of_inputs and single and tuple(map(len, found)) == BATCHES,
                differentiable=of_inputs and bool(tensors) and (not single or tensors[0].requires_grad),
                overwritten=node in written or self._is_written_in_training(node),
                at_batch=() if tensors else tuple(found),
            )

    def _is_written_in_training(self, node: fx.Node) -> bool:
        """Whether an in-place layer that does nothing in evaluation mode writes into the value."""
        for user in node.users:
            if user.op == "call_module" and starts_in_place(self.module.get_submodule(str(user.target))):
                return True
            if user.op == "call_function" and user.kwargs.get("inplace") is True and user.args[:1] == (node,):
                return True
        return False

    def node_of(self, name: str) -> fx.Node | None:
        """The node that computes the output of a layer; None unless it is called once and returns one value."""
        found = self.returned.get(name, [])
        return found[0].node if len(found) == 1 and isinstance(found[0], fx.Proxy) else None

    def problem(self, name: str) -> str:
        """Return the reason why the model cannot be divided after a layer; empty if it can."""
        calls, node = self.returned.get(name, []), self.node_of(name)
        if len(calls) != 1:
            return f"is called {len(calls)} times by the forward" if calls else "is not called by the forward"
        if node is None or node not in self.values or not self.values[node].carriable:
            return "does not return one tensor with the batch first"
        if self.values[node].overwritten:
            return "is overwritten in place by the layer that follows"
        live = self.live_after(node)
        aside = [other for other in live if other is not node and self.values[other].differentiable]
        if aside:
            past = name_of(aside[0])
            return f"is not on every path from the inputs to the features ('{past}' passes it by)"
        return "" if node in live else "does not reach the features"

    def live_after(self, node: fx.Node) -> list[fx.Node]:
        """Values computed up to a node that are passed on because later nodes read them, in order."""
        end, found, seen = self.order[node], set[fx.Node](), set[fx.Node]()
        # What only sizes and devices are read from need not be passed on: these are constants, or read from the tap.
        readers = [later for later in self.nodes[end + 1 :] if not self.values[later].number]
        reads = [self.result, *(read for later in readers for read in later.all_input_nodes)]
        while reads:
            read = reads.pop()
            if read in seen or self.order[read] > end:
                continue
            seen.add(read)
            value = self.values[read]
            if value.carriable or (value.differentiable and not value.number):
                found.add(read)
            elif not value.number:  # computed again, from what it reads
                reads += read.all_input_nodes
        return sorted(found, key=self.order.__getitem__)

    def divide(self, names: Sequence[str]) -> list[nn.Module]:
        """Stages that end with the layers, which are in order of execution, and the rest."""
        taps = [self.node_of(name) for name in names]
        return [self._stage(start, end) for start, end in pairwise([self.nodes[0], *taps, None]) if start is not None]

    def _stage(self, start: fx.Node, end: fx.Node | None) -> fx.GraphModule:
        """The nodes after ``start`` up to ``end``, or to the result."""
        graph = fx.Graph()
        received = [start, *(node for node in self.live_after(start) if node is not start)]
        flow = graph.placeholder("flow")
        parts = [flow]
        if len(received) > 1:
            parts = [graph.call_function(operator.getitem, (flow, i)) for i in range(len(received))]
        copy = _Copy(self, graph, dict(zip(received, parts, strict=True)), parts[0])
        last = len(self.nodes) if end is None else self.order[end] + 1
        for node in self.nodes[self.order[start] + 1 : last]:
            reads = [read for read in node.all_input_nodes if not self.values[read].number]
            if not self.values[node].number or all(read in copy.known for read in reads):
                copy.add(node)
        tap = self.result if end is None else end
        carried = () if end is None else tuple(node for node in self.live_after(tap) if node is not tap)
        sent = tuple(map(copy.load, (tap, *carried)))
        graph.output(sent if carried else sent[0])
        return fx.GraphModule(self.model, graph, class_name="TracedStage")


class _Copy:
    """Copies nodes into the graph of a stage; values of earlier stages are received, written as constants or repeated.

    Args:
        traced: The whole graph.
        graph: That of the stage.
        known: Nodes of the stage by those of the whole graph.
        tap: The first value that the stage receives.
    """

    def __init__(self, traced: TracedGraph, graph: fx.Graph, known: dict[fx.Node, fx.Node], tap: fx.Node) -> None:
        self.traced, self.graph, self.known, self.tap = traced, graph, known, tap

    def add(self, node: fx.Node) -> fx.Node:
        """Copy one node."""
        copied = self.graph.node_copy(node, self.load)
        if node.op in ("call_module", "get_attr"):
            copied.target = name_of(node)
        self.known[node] = copied
        return copied

    def load(self, node: fx.Node) -> Any:
        """The value of a node in the stage."""
        if node in self.known:
            return self.known[node]
        value = self.traced.values[node]
        if value.number:
            return self._number(node, *value.at_batch)
        if node.op == "call_module":  # a second call might draw or count twice
            raise ConfigError(
                f"{self.traced.where}: several stages need the output of '{name_of(node)}', which does not depend on "
                f"the inputs; compute it inside one layer"
            )
        return self.add(node)

    def _number(self, node: fx.Node, first: Any, second: Any) -> Any:
        """A value other than a tensor: the size of the batch is read from the tap, whose batch may be smaller."""
        if isinstance(first, (tuple, list)) and type(first) is type(second) and len(first) == len(second):
            return tuple(self._number(node, *pair) for pair in zip(first, second, strict=True))
        if isinstance(first, torch.device):
            return self.graph.call_function(getattr, (self.tap, "device"))
        if isinstance(first, torch.dtype) and first.is_floating_point:
            return self.graph.call_function(getattr, (self.tap, "dtype"))
        if first == second and isinstance(first, (int, float, str, torch.dtype, type(None))):
            return first
        each = first // BATCHES[0] if isinstance(first, int) else 0
        if each and (each * BATCHES[0], each * BATCHES[1]) == (first, second):
            size = self.graph.call_method("size", (self.tap, 0))
            return size if each == 1 else self.graph.call_function(operator.mul, (size, each))
        raise ConfigError(
            f"{self.traced.where}: '{node.name}' of {type(self.traced.model).__name__}, which several stages need, "
            f"depends on the batch and is not a tensor; compute it where it is used"
        )


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of each node."""

    def __init__(self, module: fx.GraphModule, x: Tensor) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        self.of_inputs: set[fx.Node] = set()
        self._versions: dict[fx.Node, int] = {}
        with torch.enable_grad():  # whether gradients pass through a value is part of what is recorded
            # A copy of a leaf, since models may write into their inputs.
            self.run(x.detach().clone().requires_grad_().clone() if x.is_floating_point() else x)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Arguments with plain lists, which modules may change, in the place of the graph's."""
        return _plain(super().fetch_args_kwargs_from_env(n))

    def run_node(self, n: fx.Node) -> Any:
        """Run and record a node."""
        value = super().run_node(n)
        self.values[n] = value
        if isinstance(value, Tensor):
            self._versions[n] = value._version
        reads_inputs = any(read in self.of_inputs and _tensors(self.values[read]) for read in n.all_input_nodes)
        if n.op == "placeholder" or reads_inputs:
            self.of_inputs.add(n)
        return value

    def overwritten(self) -> set[fx.Node]:
        """Nodes whose values were changed after they were computed."""
        return {node for node, version in self._versions.items() if self.values[node]._version != version}


def name_of(node: fx.Node) -> str:
    """Name inside the model of the module or parameter of a node, else that of the node."""
    return str(node.target).removeprefix(f"{_ROOT}.") if node.op in ("call_module", "get_attr") else node.name


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(map(_plain, value))
    if isinstance(value, list):
        return list(map(_plain, value))
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, dict) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return [value] if isinstance(value, Tensor) else []
