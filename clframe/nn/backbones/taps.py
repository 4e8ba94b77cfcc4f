"""Taps and their shapes: what a stage returns, and dry runs that find the shapes of modules from other libraries.

Neither dry run leaves a trace: training flags, batch-norm statistics and random states stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clframe.errors import ConfigError

Flow = Tensor | tuple[Tensor, ...]
"""What goes from stage to stage: the tap, alone or followed by what travels with it (an attention mask)."""
Stages = Sequence[tuple[str, nn.Module]]
"""``(name, module)`` in the order in which they run."""
Shaped = tuple[str, nn.Module, tuple[int, ...]]
"""``(name, module, tap shape)``, what a backbone is made of."""

_SAMPLES = 2
"""Samples of a dry run; with one, a stage that mixes up batch and channels would go unnoticed."""


def tap_of(value: Flow) -> Tensor:
    """The tap in what a stage returns."""
    return value if isinstance(value, Tensor) else value[0]


def shaped(stages: Stages, input_shape: tuple[int, ...], *, where: str, compute: bool = False) -> list[Shaped]:
    """The stages with their tap shapes, found by a dry run on two samples of zeros in eval mode.

    A stage that writes into its input, such as an in-place ReLU, would change the tap before it: it is joined
    to the stages whose taps it writes into, and together they bear its name.

    Args:
        stages: What to run.
        input_shape: Shape of one sample.
        where: What messages begin with.
        compute: Run for real, where the weights are. By default the run is on torch's meta device and costs
            next to nothing at any size, which modules that look at values cannot take.

    Raises:
        ConfigError: A stage that fails, that returns no tensor with the batch first, or a first stage that
            writes into the batch.

    >>> layers = [("0", nn.Conv2d(1, 4, 3)), ("1", nn.ReLU(inplace=True)), ("2", nn.Flatten())]
    >>> [(name, shape) for name, _, shape in shaped(layers, (1, 5, 5), where="mine")]
    [('1', (4, 3, 3)), ('2', (36,))]
    """
    x = torch.zeros(_SAMPLES, *input_shape, device=None if compute else "meta")
    if compute:
        x = _like_parameters(x, [stage for _, stage in stages])
    joined: list[tuple[int, Shaped]] = []
    call = _run if compute else _on_meta
    for place, (name, stage, shape, first) in enumerate(_dry_run(stages, x, call=call, where=where)):
        parts = [stage]
        if first == 0:
            raise ConfigError(f"{where}: stage '{name}' writes into the batch; make it work out of place")
        while joined and first is not None and joined[-1][0] >= first:
            parts.insert(0, joined.pop()[1][1])
        joined.append((place + 1, (name, parts[0] if len(parts) == 1 else nn.Sequential(*parts), shape)))
    return [entry for _, entry in joined]


def same_function(model: nn.Module, stages: Sequence[nn.Module], input_shape: tuple[int, ...]) -> bool:
    """Whether the stages, run in order, compute what ``model`` does (to rounding), on one random sample."""
    noise = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))  # rounded down, the id 0
    x = _like_parameters(noise, [model])
    with untouched([model, *stages]):
        whole = model(x.clone())  # a module that writes into its input must not change what the other one sees
        value = x
        for stage in stages:
            value = stage(value)
    if not isinstance(whole, Tensor) or not isinstance(value, Tensor) or whole.numel() != value.numel():
        return False
    return torch.allclose(whole.flatten(), value.flatten(), rtol=1e-4, atol=1e-5)


@contextmanager
def untouched(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode without gradients; training flags and random states are put back."""
    training = {part: part.training for module in modules for part in module.modules()}
    devices = {p.device for module in modules for p in module.parameters() if p.device.type == "cuda"}
    try:
        for module in modules:
            module.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for part, flag in training.items():
            part.training = flag


class _Ran(NamedTuple):
    name: str
    stage: nn.Module
    shape: tuple[int, ...]
    first: int | None
    """The first value it writes into: 0 is the batch, k what the k-th stage returns; None where it writes into none."""


def _dry_run(stages: Stages, x: Tensor, *, call: Callable[[nn.Module, Any], Any], where: str) -> Iterator[_Ran]:
    value: Any = x
    seen: list[tuple[Tensor, int]] = []
    with untouched([stage for _, stage in stages]):
        for place, (name, stage) in enumerate(stages):
            before = tap_of(value)
            seen.append((before, before._version))
            try:
                value = call(stage, value)
            except Exception as error:  # whatever a foreign module raises, its user needs to know which one
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ConfigError(
                    f"{where}: stage '{name}' fails on inputs of shape {tuple(before.shape[1:])} ({reason}); "
                    f"give stages that take each other's outputs"
                ) from error
            shape = _shape(value, name=name, last=place == len(stages) - 1, where=where)
            # A version counts the writes to a tensor and to every view of it.
            written = [index for index, (tap, version) in enumerate(seen) if tap._version != version]
            seen = [(tap, tap._version) for tap, _ in seen]
            if not written and _in_place(stage):
                written = [place]
            yield _Ran(name, stage, shape, written[0] if written else None)


def _run(stage: nn.Module, value: Any) -> Any:
    return stage(value)


def _on_meta(stage: nn.Module, value: Any) -> Any:
    """The stage's output without its numbers; its weights stay where they are."""
    tensors = [*stage.named_parameters(), *stage.named_buffers()]
    return functional_call(stage, {name: tensor.to("meta") for name, tensor in tensors}, (value,))


def _shape(value: Any, *, name: str, last: bool, where: str) -> tuple[int, ...]:
    tap = value[0] if isinstance(value, tuple) and value and not last else value
    if not isinstance(tap, Tensor):
        wanted = "a tensor" if last else "a tensor or (tap, ...)"
        raise ConfigError(f"{where}: stage '{name}' returns {type(value).__name__}; return {wanted}")
    if tap.ndim < 2 or tap.shape[0] != _SAMPLES:
        raise ConfigError(
            f"{where}: stage '{name}' returns shape {tuple(tap.shape)} for {_SAMPLES} samples; keep the batch first"
        )
    return tuple(tap.shape[1:])


def _in_place(stage: nn.Module) -> bool:
    """Whether the stage begins with a layer that says so: dropout writes only where it trains."""
    while isinstance(stage, nn.Sequential) and len(stage):
        stage = stage[0]
    return getattr(stage, "inplace", False) is True


def _like_parameters(x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """``x`` in the type and on the device of the first floating-point parameter."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return x.to(device=parameter.device, dtype=parameter.dtype)
    return x
