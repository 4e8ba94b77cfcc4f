"""Exponential moving averages of a network's weights, with which a run evaluates and predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clframe.errors import ConfigError
from clframe.nn.network import Network

Values = dict[str, Tensor]


class WeightAverage:
    """The average e of a network's weights w: after update n, counted from 1 over the run, e = d_n e + (1 - d_n) w.

    It begins with the weights before the first update. Floating-point buffers, such as the statistics of batch
    normalization, are averaged in the same way; those of whole numbers have the values of the weights. Weights in half
    precision are averaged in float32.

    While an experience is trained, the network has the weights that the optimizer updates. From the end of its training
    to the beginning of the next one it has the average: ``after_experience`` of the components, and so their teachers,
    importances, prototypes and thresholds, evaluation and checkpoints use the average. ``before_experience`` sees the
    weights that training continues from. An element that a hook changes, and one that a growing head adds, is changed
    in both.

    Args:
        decay: The largest d_n.
        warmup: Whether d_n = min(decay, n / (n + 9)), so that the average does not consist of initial weights for the
            first 1 / (1 - decay) updates; otherwise d_n = decay.

    Raises:
        ConfigError: A decay that is not between 0 and 1.
    """

    def __init__(self, decay: float, *, warmup: bool = True) -> None:
        if not 0 < decay < 1:
            raise ConfigError(f"trainer.ema.decay: found {decay}; give a number between 0 and 1, such as 0.999")
        self._decay, self._warmup = decay, warmup
        self.updates = 0
        self._average: Values | None = None
        self._raw: Values | None = None
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    def decay(self, update: int) -> float:
        """Return d_n of update n, counted from 1.

        >>> average = WeightAverage(0.9)
        >>> average.decay(1), average.decay(9), average.decay(1000)
        (0.1, 0.5, 0.9)
        """
        return min(self._decay, update / (update + 9)) if self._warmup else self._decay

    @property
    def in_training(self) -> bool:
        """Whether the network has the weights that the optimizer updates, next to an average."""
        return self._average is not None and self._raw is None

    def prepare(self, network: Network) -> None:
        """Before an experience begins: give the network the weights that training continues from."""
        if self._raw is None:
            self._raw = {name: value.clone() for name, value in _tensors(network).items()}
        else:
            _write(network, self._raw)

    def start(self, network: Network) -> None:
        """After an experience has begun: follow the growth of heads and what hooks have changed."""
        assert self._raw is not None
        found = _tensors(network)
        if self._average is None:
            self._average = {name: _stored(value) for name, value in found.items()}
        else:
            self._average = _follow(self._average, self._raw, found)
        self._raw = self._pairs = None

    def update(self, network: Network) -> None:
        """Add the weights after an update."""
        assert self._average is not None
        if self._pairs is None:  # not before the first update: until then the network may move between devices
            found = _tensors(network)
            self._average = {name: self._average[name].to(value.device) for name, value in found.items()}
            self._pairs = list(self._average.values()), list(found.values())
        averages, weights = self._pairs
        self.updates += 1
        current = [w if w.dtype == e.dtype else w.to(e.dtype) for e, w in zip(averages, weights, strict=True)]
        if averages:
            get_ema_multi_avg_fn(self.decay(self.updates))(averages, current, self.updates)

    def finish(self, network: Network) -> None:
        """After the training of an experience: give the network the average."""
        assert self._average is not None
        self._raw = {name: value.clone() for name, value in _tensors(network).items()}
        self._pairs = None
        _write(network, self._average)

    def settle(self, network: Network) -> None:
        """After the components' hooks: follow what they have changed."""
        assert self._average is not None and self._raw is not None
        found = _tensors(network)
        self._raw = _follow(self._raw, self._average, found)
        self._average = _follow(self._average, self._average, found)

    @contextmanager
    def shown(self, network: Network) -> Iterator[None]:
        """Context in which the network has the average, for an evaluation in the middle of the training."""
        if not self.in_training:
            yield
            return
        assert self._average is not None
        before = {name: value.clone() for name, value in _tensors(network).items()}
        _write(network, self._average)
        try:
            yield
        finally:
            _write(network, before)

    def state_dict(self, network: Network) -> dict[str, Any]:
        """Return what a checkpoint needs next to the network, which has the raw weights or the average."""
        average, found = self._average or {}, _tensors(network)
        same = () if self.in_training else {n for n, v in average.items() if n in found and v.dtype == found[n].dtype}
        return {
            "updates": self.updates,
            "raw": None if self._raw is None else dict(self._raw),
            "average": {name: value for name, value in average.items() if name not in same},
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, network: Network) -> None:
        """Restore :meth:`state_dict` for a network that has been restored; None is of a run without an average."""
        if state is None:
            return
        self.updates, self._pairs = int(state["updates"]), None
        self._raw = None if state["raw"] is None else {name: value.clone() for name, value in state["raw"].items()}
        given = state["average"]
        self._average = {name: given.get(name, value).clone() for name, value in _tensors(network).items()}


def _tensors(network: Network) -> Values:
    """The floating-point weights and buffers of a network by name; they share its memory."""
    found = network.state_dict()
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _stored(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value.clone()


@torch.no_grad()
def _write(network: Network, values: Values) -> None:
    for name, tensor in _tensors(network).items():
        if name in values:
            tensor.copy_(values[name])


def _follow(own: Values, before: Values, after: Values) -> Values:
    """``own`` with every element that differs between ``before`` and ``after``, and those that are new."""
    found: Values = {}
    for name, new in after.items():
        kept, former = own.get(name), before.get(name)
        if kept is None or former is None or kept.ndim != new.ndim:
            found[name] = new.clone()
            continue
        common = tuple(slice(min(sides)) for sides in zip(kept.shape, new.shape, strict=True))
        found[name] = value = new.to(kept.dtype, copy=True)
        unchanged = former.to(new)[common] == new[common]
        value[common] = torch.where(unchanged, kept.to(new.device)[common], value[common])
    return found
