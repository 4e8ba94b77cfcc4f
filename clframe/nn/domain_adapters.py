"""Choice between the low-rank adapters of several domains in evaluation.

Shape suffixes: B windows, S ids of a window, T = S - 1 tokens, N = B T tokens, V vocabulary, D adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from clframe.functional.language import next_token_targets, token_nll
from clframe.nn.low_rank import NONE, AdaptedLinear
from clframe.nn.network import Network
from clframe.nn.types import Output

Adapter = int | None
"""Number of a kept adapter, :data:`~clframe.nn.low_rank.NONE` for the weights alone; None for the one in training."""


class DomainAdapters:
    """Runs a language model with the adapter of each window's domain; ``network.choice`` of such a network.

    Where the domain is not known, each token is predicted with the adapter under which the earlier tokens of its window
    are most likely, and the first one with the newest: no choice depends on what is to be predicted. That takes a pass
    with every adapter.

    Args:
        owner: Name of the component that trains the adapters.
        after: Experiences in which the whole network is trained, whose adapter is none.
        known: Whether evaluations know the domain, which they set as :attr:`domain`.

    Attributes:
        domain: Index of the experience whose adapter is used; None: the choice by likelihood, or the newest one if
            domains are known.
    """

    def __init__(self, owner: str, *, after: int, known: bool) -> None:
        self.owner, self.after, self.known = owner, after, known
        self.domain: int | None = None

    def __call__(self, network: Network, x: Tensor, taps: Collection[str] = ()) -> Output:
        """Run the network in evaluation mode."""
        adapters = self.adapters(network)
        one = self.adapter_of(network, self.domain) if self.domain is not None else adapters[-1]
        if self.domain is not None or self.known or len(adapters) == 1:
            with self.using(network, one):
                return network.run_once(x, taps)
        outputs = []
        for adapter in adapters:
            with self.using(network, adapter):
                outputs.append(network.run_once(x, taps))
        best_N = likeliest([output.last for output in outputs], x)
        rows_N = torch.arange(len(best_N), device=best_N.device)
        logits = tuple(
            torch.stack(each)[best_N, rows_N] for each in zip(*(output.logits for output in outputs), strict=True)
        )
        return outputs[-1]._replace(logits=logits)

    def adapters(self, network: Network) -> list[Adapter]:
        """Return the adapters in the order of their domains: none, the kept ones, and the one in training."""
        layers = adapted_layers(network)
        kept = layers[0].kept_down_ERI.shape[0]
        found = [*([NONE] if self.after else []), *range(kept), *([None] if layers[0].active else [])]
        return found or [NONE]  # before the first experience

    def adapter_of(self, network: Network, domain: int) -> Adapter:
        """Return the adapter of an experience; of one that was not learned yet, the newest."""
        adapters = self.adapters(network)
        return adapters[min(max(domain - self.after, -1) + bool(self.after), len(adapters) - 1)]

    def best_for(self, network: Network, ids: Sequence[int]) -> AbstractContextManager[None]:
        """Return a context in which the network computes with the adapter for a text that begins with ``ids``.

        It is that of :attr:`domain`; where that is not known, the one under which ``ids`` are most likely, and the
        newest for a single id.
        """
        if self.domain is not None:
            return self.using(network, self.adapter_of(network, self.domain))
        return self.using(network, self._likeliest(network, ids))

    def _likeliest(self, network: Network, ids: Sequence[int]) -> Adapter:
        adapters = self.adapters(network)
        if len(ids) < 2 or len(adapters) == 1:
            return adapters[-1]
        x = torch.tensor([list(ids)], device=network.final.weight.device)
        nats = []
        for adapter in adapters:
            with self.using(network, adapter):
                nats.append(float(token_nll(network.run_once(x).last, next_token_targets(x)).double().sum()))
        return adapters[nats.index(min(nats))]

    @contextmanager
    def using(self, network: Network, adapter: Adapter) -> Iterator[None]:
        """Context in which the network computes with an adapter."""
        layers = adapted_layers(network)
        before = [layer.chosen for layer in layers]
        try:
            for layer in layers:
                layer.chosen = adapter
            yield
        finally:
            for layer, chosen in zip(layers, before, strict=True):
                layer.chosen = chosen

    @contextmanager
    def of_domain(self, domain: int | None) -> Iterator[None]:
        """Context in which windows are of a domain; None: of an unknown one, whose adapter is chosen by likelihood."""
        before = self.domain, self.known
        self.domain, self.known = domain, domain is not None
        try:
            yield
        finally:
            self.domain, self.known = before


def adapted_layers(network: Network) -> list[AdaptedLinear]:
    """Return the layers with adapters."""
    return [part for part in network.backbone.modules() if isinstance(part, AdaptedLinear)]


def likeliest(logits: Sequence[Tensor], ids_BS: Tensor) -> Tensor:
    """Return best_N: for each token the index of the logits_NV under which the earlier tokens are most likely.

    Of equal ones, such as for the first token of a window, it is the last.

    >>> good, bad = torch.zeros(3, 2), torch.tensor([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
    >>> likeliest([good, bad], torch.tensor([[0, 1, 1, 1]])).tolist()
    [1, 0, 0]
    """
    targets_N = next_token_targets(ids_BS)
    nll_DBT = torch.stack([token_nll(each_NV, targets_N) for each_NV in logits]).reshape(len(logits), len(ids_BS), -1)
    before_DBT = nll_DBT.cumsum(2) - nll_DBT
    before_DBT[:, :, 0] = 0
    best_BT: Tensor = len(logits) - 1 - before_DBT.flip(0).argmin(0)
    return best_BT.flatten()
