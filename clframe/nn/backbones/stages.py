"""Stages of a backbone: the value that passes from one to the next, and dry runs that infer their tap shapes.

Dry runs have no side effects: training flags, batch-norm statistics and random states are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clframe.errors import ConfigError
from clframe.nn.backbones.traced_graph import starts_in_place

Flow = Tensor | tuple[Tensor, ...]
"""Value passed from stage to stage: the tap, alone or followed by further tensors such as an attention mask."""
Stages = Sequence[tuple[str, nn.Module]]
"""``(name, module)`` in order of execution."""
ShapedStage = tuple[str, nn.Module, tuple[int, ...]]
"""``(name, module, tap shape)``, one stage of a backbone."""
_SAMPLES = 2
"""Batch size of a dry run; 1 would not reveal a stage that swaps batch and channels."""


def tap_of(value: Flow) -> Tensor:
    """The tap in the value of a stage."""
    return value if isinstance(value, Tensor) else value[0]


def infer_shapes(
    stages: Stages, input_shape: tuple[int, ...], *, where: str, compute: bool = False
) -> list[ShapedStage]:
    """Infer tap shapes by a dry run on two samples of zeros in evaluation mode.

    A stage that writes into its input, such as an in-place ReLU, would change the previous tap. It is merged with the
    stages whose taps it overwrites into one stage of its name.

    Args:
        stages: The stages to run.
        input_shape: Shape of one sample.
        where: Prefix of messages.
        compute: Run on the device of the weights. By default the run is on torch's meta device and costs next to
            nothing at any size, but modules whose forward depends on values fail there.

    Raises:
        ConfigError: A stage that fails or whose output has no batch dimension, or a first stage that writes into the
            batch.

    >>> layers = [("0", nn.Conv2d(1, 4, 3)), ("1", nn.ReLU(inplace=True)), ("2", nn.Flatten())]
    >>> [(name, shape) for name, _, shape in infer_shapes(layers, (1, 5, 5), where="mine")]
    [('1', (4, 3, 3)), ('2', (36,))]
    """
    x = torch.zeros(_SAMPLES, *input_shape, device=None if compute else "meta")
    if compute:
        x = match_parameters(x, [stage for _, stage in stages])
    merged: list[tuple[int, ShapedStage]] = []
    call = _run if compute else _run_on_meta
    for index, (name, stage, shape, first) in enumerate(_dry_run(stages, x, call=call, where=where)):
        parts = [stage]
        if first == 0:
            raise ConfigError(f"{where}: stage '{name}' writes into the batch; make it work out of place")
        while merged and first is not None and merged[-1][0] >= first:
            parts.insert(0, merged.pop()[1][1])
        merged.append((index + 1, (name, parts[0] if len(parts) == 1 else nn.Sequential(*parts), shape)))
    return [entry for _, entry in merged]


def is_equivalent(model: nn.Module, stages: Sequence[nn.Module], input_shape: tuple[int, ...]) -> bool:
    """Whether the stages compute the same as ``model`` (up to rounding) on one random sample."""
    # Models of token ids round this noise down to the id 0.
    noise = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    x = match_parameters(noise, [model])
    with preserving_state([model, *stages]):
        whole = model(x.clone())  # cloned, because a module may write into its input
        value = x
        for stage in stages:
            value = stage(value)
    if not isinstance(whole, Tensor) or not isinstance(value, Tensor) or whole.numel() != value.numel():
        return False
    return torch.allclose(whole.flatten(), value.flatten(), rtol=1e-4, atol=1e-5)


@contextmanager
def preserving_state(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random states are restored at the end."""
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


def match_parameters(x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """``x`` with the dtype and device of the first floating-point parameter."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return x.to(device=parameter.device, dtype=parameter.dtype)
    return x


class _Ran(NamedTuple):
    name: str
    stage: nn.Module
    shape: tuple[int, ...]
    first: int | None
    """Index of the first value that it overwrites: 0 is the batch, k the output of stage k; None if there is none."""


def _dry_run(stages: Stages, x: Tensor, *, call: Callable[[nn.Module, Any], Any], where: str) -> Iterator[_Ran]:
    value: Any = x
    seen: list[tuple[Tensor, int]] = []
    with preserving_state([stage for _, stage in stages]):
        for index, (name, stage) in enumerate(stages):
            before = tap_of(value)
            seen.append((before, before._version))
            try:
                value = call(stage, value)
            except Exception as error:  # foreign modules raise anything; the message must name the stage
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ConfigError(
                    f"{where}: stage '{name}' fails on inputs of shape {tuple(before.shape[1:])} ({reason}); "
                    f"give stages that accept each other's outputs"
                ) from error
            shape = _check_shape(value, name=name, last=index == len(stages) - 1, where=where)
            # A version counts the writes to a tensor and to every view of it.
            written = [k for k, (tap, version) in enumerate(seen) if tap._version != version]
            seen = [(tap, tap._version) for tap, _ in seen]
            if not written and starts_in_place(stage):
                written = [index]
            yield _Ran(name, stage, shape, written[0] if written else None)


def _run(stage: nn.Module, value: Any) -> Any:
    return stage(value)


def _run_on_meta(stage: nn.Module, value: Any) -> Any:
    """Run a stage on the meta device; its weights are not moved."""
    tensors = [*stage.named_parameters(), *stage.named_buffers()]
    return functional_call(stage, {name: tensor.to("meta") for name, tensor in tensors}, (value,))


def _check_shape(value: Any, *, name: str, last: bool, where: str) -> tuple[int, ...]:
    tap = value[0] if isinstance(value, tuple) and value and not last else value
    if not isinstance(tap, Tensor):
        wanted = "a tensor" if last else "a tensor or (tap, ...)"
        raise ConfigError(f"{where}: stage '{name}' returns {type(value).__name__}; return {wanted}")
    if tap.ndim < 2 or tap.shape[0] != _SAMPLES:
        raise ConfigError(
            f"{where}: stage '{name}' returns shape {tuple(tap.shape)} for {_SAMPLES} samples; keep the batch first"
        )
    return tuple(tap.shape[1:])
