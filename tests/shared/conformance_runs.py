"""A stream, networks and comparisons of the conformance suites, which test every component there is."""

from __future__ import annotations

import torch

from clframe.core import COMPONENTS, compose, parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.exits import make_head
from clframe.nn import BACKBONES, GrowingLinear, Network

NAMES = COMPONENTS.names()
NEEDS_TOKENS = {"l2p", "lora", "moe"}
"""Components that refuse a small MLP, or an exit on the first layer of two."""


def benchmark(classes=6, per_class=8, experiences=3):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(classes).repeat(per_class)
    x = torch.randn(len(y), 1, 4, 4, generator=generator) + y.reshape(-1, 1, 1, 1)
    data = TensorSamples(x, y)
    return class_incremental(
        Source("blobs", data, data, classes=classes), experiences=experiences, order="sorted"
    )


def fed(strategy):
    """The strategy, with `er` added if a component needs a memory and none has one."""
    composition = parse(strategy) if isinstance(strategy, str) else compose(strategy)
    lacks = any(c.needs_memory for c in composition) and not any(c.keeps_memory for c in composition)
    return composition + COMPONENTS.get("er")() if lacks and composition.owner("batch") is None else composition


def untrained(strategy, stream, *, exits=1, seed=3):
    """The network as it is before the strategy: a small MLP, or a transformer where a component needs tokens."""
    composition = parse(strategy) if isinstance(strategy, str) else compose(strategy)
    torch.manual_seed(seed)
    if {component.name for component in composition} & NEEDS_TOKENS:
        backbone = BACKBONES.get("vit_tiny")(stream.input_shape, patch=2, width=12, depth=2, heads=2)
        heads = [("encoder.0", make_head("token", backbone.tap_shapes["encoder.0"])) for _ in range(exits - 1)]
    else:
        backbone = BACKBONES.get("mlp")(stream.input_shape, width=12)
        heads = [("layer1", GrowingLinear(12)) for _ in range(exits - 1)]
    return Network(backbone, exits=heads)


def same(a, b):
    if isinstance(a, Network):
        return same(dict(a.state_dict()), dict(b.state_dict())) and not any(
            p.requires_grad for p in b.parameters()
        )
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
