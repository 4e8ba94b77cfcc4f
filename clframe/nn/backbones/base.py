"""Backbones: networks of named stages with taps, made by a class or from any model, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import EntryPoint
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.nn.backbones.checks import require_at_least
from clframe.nn.backbones.stages import ShapedStage, infer_shapes, is_equivalent, match_parameters, preserving_state
from clframe.nn.backbones.traced import default_layers, has_same_gradients, trace_stages
from clframe.nn.backbones.traced_graph import BATCHES
from clframe.registry import Registry, call_problem


class Backbone(nn.Module):
    """A sequence of named stages that ends in a flat feature vector.

    A stage returns its tap, or ``(tap, *carried)``, where the carried tensors, such as an attention mask, have the
    batch first and are passed to the next stage; the last stage returns its tap alone. Taps of convolutional networks
    are (channels, height, width), those of transformers (tokens, width).

    Args:
        stages: ``(name, module, tap shape)`` in order, with the shape for one sample. A later stage must not write into
            its input.
        input_shape: Shape of one sample, such as (channels, height, width).
        vocabulary: Number of token ids of a language model, see below; 0 for other backbones.
        tied: Whether its classifiers share the weights of the embedding, the only one of its first stage.

    The samples of a language model are windows of ids: its first stage leaves out the last id, which is only a target,
    and every tap is (tokens, width). Its network computes one row of logits over the vocabulary for each token.

    Attributes:
        names: Names of the stages and of their taps. They may contain dots.
        stages: The modules, in the order of ``names``.
        tap_shapes: Declared shape of each tap, without the batch.
        input_shape: Shape of one input sample.

    Raises:
        ConfigError: No stages, a duplicate name, or a last tap that is not flat (of a language model: not tokens).

    >>> stages = [("flat", nn.Flatten(), (12,)), ("out", nn.Linear(12, 5), (5,))]
    >>> net = Backbone(stages, input_shape=(3, 2, 2))
    >>> net.names, net.features, net.tap("out")
    (('flat', 'out'), 5, 1)
    """

    def __init__(
        self,
        stages: Sequence[tuple[str, nn.Module, tuple[int, ...]]],
        *,
        input_shape: tuple[int, ...],
        vocabulary: int = 0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.names: tuple[str, ...] = tuple(name for name, _, _ in stages)
        self.tap_shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, _, shape in stages}
        self.input_shape: tuple[int, ...] = tuple(input_shape)
        self.vocabulary = vocabulary
        self.tied = tied
        if not stages:
            raise ConfigError("backbone: found no stages; give at least one")
        if len(self.tap_shapes) != len(stages):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ConfigError(f"backbone: found stage '{twice}' twice; give every stage its own name")
        if len(self.tap_shapes[self.names[-1]]) != (2 if vocabulary else 1):
            last, shape = self.names[-1], self.tap_shapes[self.names[-1]]
            wanted = "(tokens, width)" if vocabulary else "a flat vector"
            raise ConfigError(f"backbone: found last tap '{last}' of shape {shape}; end in {wanted}")
        self.stages = nn.ModuleList(module for _, module, _ in stages)

    @classmethod
    def of(
        cls,
        model: nn.Module | Iterable[tuple[str, nn.Module]],
        *,
        input_shape: tuple[int, ...],
        depth: int = 1,
        taps: Sequence[str] = (),
    ) -> Backbone:
        """Make a backbone from any layers; tap shapes come from a dry run.

        Stages that write into their input are merged with the previous stage (see
        :func:`~clframe.nn.backbones.stages.infer_shapes`); if the last tap is not flat, a stage ``flat`` is added.

        Args:
            model: A module; names of its children become names of stages. One that does more than run its children in
                order, which is checked on random numbers, is traced by torch.fx and divided after those of its blocks
                through which every path leads. Or ``(name, module)`` pairs. Leave out the classifier: the network adds
                its own.
            input_shape: Shape of one sample.
            depth: Levels of nested ``nn.Sequential`` children to expand: with 2, ``layer1`` becomes ``layer1.0``,
                ``layer1.1``, and so on.
            taps: Names of layers, such as ``layer2.1``: the model is traced and divided after these, and nowhere else.

        Raises:
            ConfigError: A stage that fails or drops the batch dimension, a model that cannot be traced, or a tap that
                is not on every path from the inputs to the features.
            UnknownNameError: A tap that the model does not have.

        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        >>> Backbone.of(net, input_shape=(3, 32, 32)).tap_shapes
        {'0': (8, 30, 30), '1': (8, 30, 30), '2': (8, 2, 2), 'flat': (32,)}
        """
        require_at_least(depth, 1, where="backbone: depth")
        if not isinstance(model, nn.Module):
            if taps:
                raise ConfigError("backbone: found taps for stages in pairs; give the module that contains the layers")
            return cls._of_stages(infer_shapes(list(model), input_shape, where="backbone", compute=True), input_shape)
        if taps:
            return cls.traced(model, input_shape=input_shape, taps=taps)
        stages = list(_expand(model, depth))
        if type(model) is nn.Sequential:
            return cls._of_stages(infer_shapes(stages, input_shape, where="backbone", compute=True), input_shape)
        try:
            shaped = infer_shapes(stages, input_shape, where="backbone", compute=True)
        except ConfigError:  # the children do not accept each other's outputs
            shaped = []
        if shaped and is_equivalent(model, [stage for _, stage, _ in shaped], input_shape):
            return cls._of_stages(shaped, input_shape)
        return cls.traced(model, input_shape=input_shape, defaults=default_layers(model, depth=depth))

    @classmethod
    def traced(
        cls,
        model: nn.Module,
        *,
        input_shape: tuple[int, ...],
        taps: Sequence[str] = (),
        defaults: Sequence[str] = (),
        where: str = "backbone",
    ) -> Backbone:
        """Make a backbone from a model whose forward torch.fx traces, see :func:`~.traced.trace_stages`.

        Args:
            model: The model.
            input_shape: Shape of one sample.
            taps: Names of layers after which it is divided.
            defaults: Further ones, left out where that is impossible.
            where: Prefix of messages.

        Raises:
            ConfigError: A model that cannot be traced, or cannot be divided after one of the taps.
            UnknownNameError: A tap that the model does not have.
        """
        noise = torch.rand(max(BATCHES), *input_shape, generator=torch.Generator().manual_seed(0))
        x, training = match_parameters(noise, [model]), model.training
        with preserving_state([model]):
            stages = trace_stages(model, taps, x, where=where, defaults=defaults)
            parts = [stage for _, stage in stages]
            if not is_equivalent(model, parts, input_shape) or not has_same_gradients(model, parts, x):
                found = f"{where}: the traced forward of {type(model).__name__} differs from the model"
                raise ConfigError(
                    f"{found}; give (name, module) pairs to Backbone.of, or use torch.no_grad() inside of layers only"
                )
        for _, stage in stages:
            stage.training = training  # of the stage alone: the layers in it have their own
        return cls._of_stages(infer_shapes(stages, input_shape, where=where, compute=True), input_shape)

    @classmethod
    def _of_stages(cls, stages: list[ShapedStage], input_shape: tuple[int, ...]) -> Backbone:
        """A backbone of the stages; one that flattens the last tap is added where it is not flat."""
        if not stages:
            raise ConfigError("backbone: found no stages; give at least one")
        shape = stages[-1][2]
        flat = [] if len(shape) == 1 else [("flat", nn.Flatten(), (prod(shape),))]
        return cls([*stages, *flat], input_shape=input_shape)

    @property
    def features(self) -> int:
        """Width of the last tap."""
        return self.tap_shapes[self.names[-1]][-1]

    @property
    def embedding(self) -> nn.Parameter | None:
        """Weights that the classifiers share; None if they have their own."""
        if not self.tied:
            return None
        (weight,) = (part.weight for part in self.stages[0].modules() if isinstance(part, nn.Embedding))
        assert isinstance(weight, nn.Parameter)
        return weight

    def tap(self, name: str, *, where: str = "") -> int:
        """Index of the stage ``name``; an unknown one is an UnknownNameError that names ``where`` and the nearest."""
        try:
            return self.names.index(name)
        except ValueError:
            raise UnknownNameError(unknown_name("tap", name, self.names, where=where)) from None

    def forward(self, x: Tensor) -> Tensor:
        """Compute features_BF, the last tap."""
        for stage in self.stages:
            x = stage(x)
        return x


def _expand(model: nn.Module, depth: int) -> Iterator[tuple[str, nn.Module]]:
    # Not named_children(), which yields a layer that is used twice only once.
    for name, child in model._modules.items():
        if child is None:
            continue
        if depth > 1 and isinstance(child, nn.Sequential) and len(child):
            yield from ((f"{name}.{inner}", part) for inner, part in _expand(child, depth - 1))
        else:
            yield name, child


def he_initialize(backbone: Backbone, *, fan: Literal["fan_in", "fan_out"]) -> Backbone:
    """Initialize weights from N(0, 2 / fan) and biases with zero, in place (He et al., 2015).

    Torch's defaults shrink the signal by a factor of about 2.4 per ReLU layer, with which networks without
    normalization learn next to nothing in the first epoch on small data.
    """
    for part in backbone.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(part.weight, mode=fan, nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return backbone


def load_backbone(point: EntryPoint) -> Iterator[tuple[str, Callable[..., Backbone]]]:
    """The backbone of an entry point: its name, and the function it points to."""
    yield point.name, point.load()


def _problem(entry: Callable[..., Backbone]) -> str:
    return call_problem(entry, ("input_shape",), expected="a function (input_shape, *, options) -> Backbone")


BACKBONES: Registry[Callable[..., Backbone]] = Registry(
    "backbone", group="clframe.backbones", load=load_backbone, problem=_problem, own=True
)
"""Every backbone by name: functions ``(input_shape, *, options) -> Backbone``."""
