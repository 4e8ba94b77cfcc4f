"""Backbones by name.

A backbone is a function ``(input_shape, *, options) -> Backbone``; its keyword-only options carry
annotations and defaults, against which configs are checked. Other packages add theirs through the entry
point ``clframe.backbones``: the entry point's name is the backbone's name, its value the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint

from clframe.nn.backbones.base import Backbone
from clframe.nn.backbones.resnet import resnet20, resnet32
from clframe.nn.backbones.small import mlp, small_cnn
from clframe.registry import Registry


def _load(point: EntryPoint) -> Iterator[tuple[str, Callable[..., Backbone]]]:
    yield point.name, point.load()


BACKBONES: Registry[Callable[..., Backbone]] = Registry("backbone", group="clframe.backbones", load=_load)
for _factory in (mlp, resnet20, resnet32, small_cnn):
    BACKBONES.add(_factory.__name__, _factory)

__all__ = ["BACKBONES", "Backbone", "mlp", "resnet20", "resnet32", "small_cnn"]
