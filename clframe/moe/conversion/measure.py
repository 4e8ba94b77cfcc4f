"""Outputs and costs of a converted model, sample by sample and exit by exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from clframe.accounting import MacCounter
from clframe.data.target import Batch, Batches
from clframe.errors import DataError, UnsupportedError
from clframe.moe.routed import RoutedExperts, routed_layers, set_gate
from clframe.moe.router import ALL, Gate
from clframe.nn.frozen import answering
from clframe.nn.network import Network
from clframe.nn.types import Inputs

Answers = Callable[[nn.Module, Inputs], Sequence[Tensor]]
"""scores_BC of each exit, or scores_BTC of the next token."""


def exit_macs(model: nn.Module, inputs: Inputs, answers: Answers) -> Tensor:
    """cost_K of one sample."""
    with answering(model), MacCounter() as counter:
        if not isinstance(model, Network):
            answers(model, inputs)
            return torch.tensor([counter.macs], dtype=torch.float64)
        costs: dict[int, int] = {}
        value, logits_BC = inputs, None
        for _, stage, exits in model.plan():
            value = stage(value)
            tap = value if isinstance(value, Tensor) else value[0]
            for _, exit in exits:
                logits_BC = model.classify(exit, tap, logits_BC)
                costs[exit] = counter.macs
    return torch.tensor([costs[exit] for exit in sorted(costs)], dtype=torch.float64)


def within_exits(model: nn.Module, names: Sequence[str]) -> Tensor:
    """within_KL: 1 where a layer runs before an exit answers."""
    if not isinstance(model, Network):
        return torch.ones(1, len(names), dtype=torch.float64)
    taps, stages = model.exit_taps, {}
    for name in names:
        _, _, at = name.partition("backbone.stages.")
        stages[name] = int(at.partition(".")[0]) if at else 0
    last = [model.backbone.tap(tap) for tap in taps]
    return torch.tensor([[float(stages[name] <= end) for name in names] for end in last], dtype=torch.float64)


def tensors_of(inputs: Inputs) -> list[tuple[str, Tensor]]:
    """All tensors that a model is called with, by name or place."""
    if isinstance(inputs, Tensor):
        return [("", inputs)]
    pairs = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return [(str(name), value) for name, value in pairs if isinstance(value, Tensor)]


def first_of(inputs: Inputs) -> Inputs:
    """The inputs of the first sample."""
    if isinstance(inputs, Tensor):
        return inputs[:1]
    if isinstance(inputs, Mapping):
        return {name: value[:1] for name, value in inputs.items()}
    return tuple(value[:1] for value in inputs)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pass:
    """One setting of a converted model over some data.

    Attributes:
        right_KN: Right answers of each exit: 0 or 1, or of a language model how many tokens.
        confidence_KN: Largest probability, its mean over a text's tokens.
        asked_N: Answers asked for: 1, or of a language model the number of tokens.
        y_N: Classes; -1 of a language model's texts.
        tokens_NL: Tokens that came to each layer, padding included.
        ran_NL: Experts that ran for them, in all.
        real_NL: Tokens that are no padding.
        real_ran_NL: Experts that ran for those.
        cost_KN: MACs up to each exit.
        ffn_N: MACs of experts and routers.
        dense_N: MACs of the dense model.
        dense_ffn_N: MACs of what became experts, in the dense model.
    """

    right_KN: Tensor
    confidence_KN: Tensor
    asked_N: Tensor
    y_N: Tensor
    tokens_NL: Tensor
    ran_NL: Tensor
    real_NL: Tensor
    real_ran_NL: Tensor
    cost_KN: Tensor
    ffn_N: Tensor
    dense_N: Tensor
    dense_ffn_N: Tensor

    @property
    def accuracy(self) -> float:
        """Of the last exit."""
        return float(self.right_KN[-1].sum() / self.asked_N.sum())

    @property
    def ffn_share(self) -> float:
        """MACs of experts and routers over those of the same networks in the dense model."""
        return float(self.ffn_N.sum() / self.dense_ffn_N.sum())

    @property
    def share(self) -> float:
        """MACs of the whole pass over the dense model's."""
        return float(self.cost_KN[-1].sum() / self.dense_N.sum())

    def experts_per_token(self, chosen_N: Tensor | None = None) -> list[float]:
        """By layer, of all samples or of those chosen; NaN without tokens."""
        ran_NL, real_NL = self.real_ran_NL, self.real_NL
        if chosen_N is not None:
            ran_NL, real_NL = ran_NL[chosen_N], real_NL[chosen_N]
        found: list[float] = (ran_NL.sum(0).double() / real_NL.sum(0).double()).tolist()
        return found


def joined(passes: Sequence[Pass]) -> Pass:
    """Passes of one setting over several data, one after the other."""
    parts = {field.name: [getattr(one, field.name) for one in passes] for field in fields(Pass)}
    return Pass(**{name: torch.cat(own, dim=1 if name.endswith("_KN") else 0) for name, own in parts.items()})


class Measure:
    """Runs a converted model with one gate after the other.

    Args:
        dense: The model as it was.
        model: The same, converted; its gates are put back after each pass.
        answers: Of each exit.
        replaced: MACs of a token in the dense model of layers that were no feed-forward network there, by name.
    """

    def __init__(
        self, dense: nn.Module, model: nn.Module, *, answers: Answers, replaced: Mapping[str, int] | None = None
    ) -> None:
        self.dense, self.model, self.answers = dense, model, answers
        self.layers = routed_layers(model)
        macs = [layer.macs() for layer in self.layers.values()]
        whole = [each.dense for each in macs]
        before = [(replaced or {}).get(name, each.dense) for name, each in zip(self.layers, macs, strict=True)]
        self._expert_L, self._router_L, self._all_L, self._before_L = (
            torch.tensor(values, dtype=torch.float64)
            for values in ([each.expert for each in macs], [each.router for each in macs], whole, before)
        )
        self._within_KL = within_exits(model, tuple(self.layers))
        self._counted: dict[object, tuple[Tensor, Tensor]] = {}

    def run(self, batches: Batches, gate: Gate, *, tick: Callable[[], None] | None = None) -> Pass:
        """One pass over the data.

        Raises:
            DataError: No samples, or none with labels.
            UnsupportedError: A layer that does not see its tokens sample by sample.
        """
        found = []
        gates = {name: layer.gate for name, layer in self.layers.items()}
        try:
            set_gate(self.model, gate)
            with answering(self.model):
                for batch in batches:
                    found.append(self._batch(batch, routed=not gate.keeps_all))
                    if tick is not None:
                        tick()
        finally:
            for name, layer in self.layers.items():
                layer.gate = gates[name]
        if not found:
            raise DataError("moefy: found no samples to measure on; give some")
        return joined(found)

    def _batch(self, batch: Batch, *, routed: bool) -> Pass:
        if batch.targets is None:
            raise DataError("moefy: found data without labels; give a benchmark with labels")
        dense_K, full_K = self._whole(batch.inputs)
        with _counting(self.layers, batch, size=len(batch.targets)) as seen:
            scores = self.answers(self.model, batch.inputs)
        tokens_BL, ran_BL, real_BL, real_ran_BL = (
            torch.stack(list(column), 1) for column in zip(*seen.values(), strict=True)
        )
        right_KB, confidence_KB = zip(*(_judged(each, batch.targets) for each in scores), strict=True)
        experts_BL = ran_BL.double() * self._expert_L
        if routed:
            experts_BL += tokens_BL.double() * self._router_L
        saved_BL = tokens_BL.double() * self._all_L - experts_BL
        size, asked = len(batch.targets), batch.targets != -100
        return Pass(
            right_KN=torch.stack(right_KB).cpu(),
            confidence_KN=torch.stack(confidence_KB).cpu(),
            asked_N=(asked.sum(1) if asked.dim() > 1 else asked.long()).cpu().double(),
            y_N=batch.targets.cpu() if batch.targets.dim() == 1 else torch.full((size,), -1),
            tokens_NL=tokens_BL,
            ran_NL=ran_BL,
            real_NL=real_BL,
            real_ran_NL=real_ran_BL,
            cost_KN=full_K[:, None] - self._within_KL @ saved_BL.t(),
            ffn_N=experts_BL.sum(1),
            dense_N=dense_K[-1].expand(size),
            dense_ffn_N=(tokens_BL.double() * self._before_L).sum(1),
        )

    def _whole(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(dense_K, full_K): MACs of one sample up to each exit, of the dense model and with all experts."""
        shape = tuple((name, tuple(value.shape[1:])) for name, value in tensors_of(inputs))
        if shape not in self._counted:
            one = first_of(inputs)
            gates = {name: layer.gate for name, layer in self.layers.items()}
            try:
                set_gate(self.model, ALL)
                counted = (exit_macs(self.dense, one, self.answers), exit_macs(self.model, one, self.answers))
            finally:
                for name, layer in self.layers.items():
                    layer.gate = gates[name]
            self._counted[shape] = counted
        return self._counted[shape]


@contextmanager
def _counting(
    layers: Mapping[str, RoutedExperts], batch: Batch, *, size: int
) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """By layer: tokens_B, experts that ran for them, tokens that are no padding, experts that ran for those."""
    zero = torch.zeros(size, dtype=torch.long)
    seen = {name: (zero, zero, zero, zero) for name in layers}
    mask_BT = _mask(batch)

    def see(name: str, experts_T: Tensor) -> None:
        ran_BT = _by_sample(experts_T, size=size, name=name).cpu()
        real_BT = mask_BT if mask_BT is not None and mask_BT.shape == ran_BT.shape else torch.ones_like(ran_BT)
        now = (torch.full((size,), ran_BT.shape[1]), ran_BT.sum(1), real_BT.sum(1), (ran_BT * real_BT).sum(1))
        a, b, c, d = (old + new for old, new in zip(seen[name], now, strict=True))
        seen[name] = a, b, c, d

    before = {name: layer.chosen for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.chosen = partial(see, name)
        yield seen
    finally:
        for name, layer in layers.items():
            layer.chosen = before[name]


def _by_sample(experts_T: Tensor, *, size: int, name: str) -> Tensor:
    """experts_BT of the tokens of a layer, in whichever shape they came."""
    if experts_T.dim() == 2 and experts_T.shape[0] != size and experts_T.shape[1] == size:
        return experts_T.t()
    if experts_T.numel() % size:
        raise UnsupportedError(
            f"moefy: {name} sees {experts_T.numel()} tokens for {size} samples; what a sample costs cannot be told"
        )
    return experts_T.reshape(size, -1)


def _mask(batch: Batch) -> Tensor | None:
    if batch.tokens is None:
        return None
    kinds = [batch.tokens] if isinstance(batch.tokens, Tensor) else list(batch.tokens.values())
    return torch.stack(kinds).any(0).long().cpu()


def _judged(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(right_B, confidence_B)."""
    best, choice = scores.float().softmax(-1).max(-1)
    right = (choice == targets) & (targets != -100)
    if targets.dim() == 1:
        return right.double(), best.double()
    asked = targets != -100
    return right.sum(1).double(), (best * asked).sum(1).double() / asked.sum(1).clamp_min(1)
