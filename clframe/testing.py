"""Checks of components for the tests of other packages: the rules that every component of clframe keeps."""

from __future__ import annotations

import dataclasses
import inspect
import io
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clframe.core import COMPONENTS, HOOKS, Component, Composition, compose
from clframe.data import Benchmark, Source, TensorSamples, class_incremental
from clframe.errors import ClframeError, ConfigError, RunFolderError
from clframe.exits import make_head
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.training.checkpoint import decode, encode
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

SEED = 3


def check_component(component: type[Component] | str, *, transformer: bool = False, **options: Any) -> None:
    """Check that a component keeps the rules on which checkpoints, configs and comparisons rely; takes seconds.

    - Its class is a frozen dataclass with keyword options, all with defaults and documented, and its hooks have the
      parameters of :class:`~clframe.core.Component`.
    - It trains a small network on three experiences, with and without an exit in the middle, to finite weights, logs no
      terms but those that it declares, and trains with one class and one sample per experience as well.
    - It trains to equal weights a second time, bit for bit, which it does not if it keeps anything outside its state.
    - Its state equals what a checkpoint restores.
    - Its weight may be 0, which leaves it out of a strategy.

    Steps recorded as CUDA graphs (``capturable``) and several processes (``distributed``) are not checked.

    Where it needs a memory and has none, ``er`` is added. Registration is not needed.

    Args:
        component: The class, or the name of a registered component.
        transformer: Whether it is trained on a small vision transformer instead of a perceptron.
        options: Options of the component that differ from its defaults.

    Raises:
        ConfigError: The first rule that it does not keep.
        ClframeError: It cannot be trained, such as on a network without what it needs.

    >>> check_component("lwf")
    """
    kind = COMPONENTS.get(component) if isinstance(component, str) else component
    _check_declaration(kind)
    _check_hooks(kind)
    made = kind(**options)
    for exits in (1, 2):
        first = _trained(made, exits=exits, transformer=transformer)
        _check_terms(kind, first)
        second = _trained(made, exits=exits, transformer=transformer)
        if not same(_weights(first), _weights(second)):
            raise _broken(
                kind, "equal seeds gave other weights; keep everything in the state and draw from context.generator"
            )
        _check_state(kind, first)
    _trained(made, stream=small_stream(classes=3, per_class=1), transformer=transformer)
    _check_weight(kind, options)


def small_stream(classes: int = 6, per_class: int = 8, experiences: int = 3) -> Benchmark:
    """A class-incremental stream of images [1, 4, 4], random values around the class."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(classes).repeat(per_class)
    x = torch.randn(len(y), 1, 4, 4, generator=generator) + y.reshape(-1, 1, 1, 1)
    data = TensorSamples(x, y)
    source = Source("blobs", data, data, classes=classes)
    return class_incremental(source, experiences=experiences, order="sorted")


def with_memory(composition: Composition) -> Composition:
    """Return the composition with ``er``, if a component needs a memory and none has one."""
    lacks = any(c.needs_memory for c in composition) and not any(c.keeps_memory for c in composition)
    return composition + COMPONENTS.get("er")() if lacks and composition.owner("batch") is None else composition


def small_network(stream: Benchmark, *, exits: int = 1, transformer: bool = False, seed: int = SEED) -> Network:
    """A perceptron of two layers of 12, or a transformer of two blocks of 12, with ``exits`` classifiers in all.

    It sets the seed of torch's global generator, from which the weights are drawn.
    """
    torch.manual_seed(seed)
    if transformer:
        backbone = BACKBONES.get("vit_tiny")(stream.input_shape, patch=2, width=12, depth=2, heads=2)
        heads = [("encoder.0", make_head("token", backbone.tap_shapes["encoder.0"])) for _ in range(exits - 1)]
        return Network(backbone, exits=heads)
    backbone = BACKBONES.get("mlp")(stream.input_shape, width=12)
    return Network(backbone, exits=[("layer1", GrowingLinear(12)) for _ in range(exits - 1)])


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, tensors bit for bit, networks by their weights; ``b`` has frozen networks."""
    if isinstance(a, Network):
        return same(dict(a.state_dict()), dict(b.state_dict())) and not any(p.requires_grad for p in b.parameters())
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _check_declaration(kind: type[Component]) -> None:
    parameters = kind.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise _broken(kind, "it is not a frozen dataclass; decorate it with @dataclass(frozen=True, kw_only=True)")
    documented = inspect.getdoc(kind) or ""
    for field in dataclasses.fields(kind):
        if not field.kw_only:
            raise _broken(kind, f"option {field.name} is positional; decorate the class with kw_only=True")
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _broken(kind, f"option {field.name} has no default; give one")
        if f"{field.name}:" not in documented:
            raise _broken(kind, f"option {field.name} is not documented; describe it in the docstring's Args")


def _check_hooks(kind: type[Component]) -> None:
    for hook in HOOKS:
        own, base = (list(inspect.signature(getattr(owner, hook)).parameters) for owner in (kind, Component))
        if own != base:
            raise _broken(kind, f"{hook} has the parameters ({', '.join(own)}); give it ({', '.join(base)})")


def _check_terms(kind: type[Component], module: ContinualModule) -> None:
    logged = {name for name in module.learner.flush_terms() if name.startswith(f"loss/{kind.name}/")}
    undeclared = logged - {f"loss/{kind.name}/{term}" for term in kind.terms}
    if undeclared:
        names = sorted(name.rpartition("/")[2] for name in undeclared)
        raise _broken(kind, f"losses returned the terms {names}; declare them in the class attribute terms")


def _check_state(kind: type[Component], module: ContinualModule) -> None:
    state, file = module.learner.state, io.BytesIO()
    try:
        torch.save(encode(state), file)
    except RunFolderError as error:
        raise _broken(kind, str(error)) from error
    file.seek(0)
    restored = decode(torch.load(file, weights_only=True), module.network)
    if not same(state, restored):
        raise _broken(kind, "its state differs from what a checkpoint restores; keep tensors, numbers, text, lists")


def _check_weight(kind: type[Component], options: Mapping[str, Any]) -> None:
    if kind.weight is None:
        return
    try:
        kind(**{**options, kind.weight: 0.0})
    except ClframeError as error:
        raise _broken(kind, f"{kind.weight}=0, which leaves it out, is refused ({error}); allow it") from error


def _trained(
    component: Component, *, stream: Benchmark | None = None, exits: int = 1, transformer: bool = False
) -> ContinualModule:
    """Train it for two epochs on every experience, and refuse weights that are not finite."""
    stream = stream or small_stream()
    with torch.random.fork_rng(devices=[]):
        network = small_network(stream, exits=exits, transformer=transformer)
        optimizer = partial(torch.optim.SGD, lr=0.05)
        module = ContinualModule(network, with_memory(compose(component)), optimizer=optimizer, seed=SEED)
        loop = LightningStrategy(
            model=module, benchmark=stream, train_mb_size=5, train_epochs=2, eval_mb_size=16, evaluator=None
        )
        for experience in stream.avalanche.train_stream:
            loop.train(experience)
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise _broken(type(component), f"it trained {name} to weights that are not finite")
    return module


def _weights(module: ContinualModule) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def _broken(kind: type[Component], problem: str) -> ConfigError:
    return ConfigError(f"component '{getattr(kind, 'name', kind.__name__)}': {problem}")
