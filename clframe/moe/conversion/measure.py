"""Predictions and costs of a converted model, per sample and exit.

Shape suffixes: B batch, N samples, K exits, L layers of experts, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from torch import Tensor, nn

from clframe.accounting import MacCounter
from clframe.data.target import IGNORED, Batch, Batches
from clframe.errors import DataError, UnsupportedError
from clframe.functional.language import perplexity
from clframe.moe.routed import RoutedExperts, override, routed_layers
from clframe.moe.router import ALL, Gate
from clframe.nn.frozen import evaluating
from clframe.nn.network import Network
from clframe.nn.types import Inputs
from clframe.sparsity.scores import ROWS

ExitLogits = Callable[[nn.Module, Inputs], Sequence[Tensor]]
"""Function to scores_BC of each exit, or to scores_BTC of the next token."""


def count_exit_macs(model: nn.Module, inputs: Inputs, exit_logits: ExitLogits) -> Tensor:
    """MACs of one sample up to each exit, cost_K."""
    with evaluating(model), MacCounter() as counter:
        if not isinstance(model, Network):
            exit_logits(model, inputs)
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


def layers_within_exits(model: nn.Module, names: Sequence[str]) -> Tensor:
    """within_KL: 1 if layer l runs before exit k."""
    if not isinstance(model, Network):
        return torch.ones(1, len(names), dtype=torch.float64)
    taps, stages = model.exit_taps, {}
    for name in names:
        _, _, at = name.partition("backbone.stages.")
        stages[name] = int(at.partition(".")[0]) if at else 0
    last = [model.backbone.tap(tap) for tap in taps]
    return torch.tensor([[float(stages[name] <= end) for name in names] for end in last], dtype=torch.float64)


def named_tensors(inputs: Inputs) -> list[tuple[str, Tensor]]:
    """All tensors in the inputs of a model, by name or position."""
    if isinstance(inputs, Tensor):
        return [("", inputs)]
    pairs = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return [(str(name), value) for name, value in pairs if isinstance(value, Tensor)]


def first_sample(inputs: Inputs) -> Inputs:
    """Inputs of the first sample."""
    if isinstance(inputs, Tensor):
        return inputs[:1]
    if isinstance(inputs, Mapping):
        return {name: value[:1] for name, value in inputs.items()}
    return tuple(value[:1] for value in inputs)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pass:
    """Results of one setting of a converted model, per sample.

    Attributes:
        correct_KN: Correct predictions of each exit: 0 or 1, or the number of tokens for a language model.
        confidence_KN: Largest probability; for a text the mean over its tokens.
        targets_N: Number of targets: 1, or the number of tokens for a language model.
        y_N: Classes; -1 for texts of a language model.
        tokens_NL: Tokens processed by each layer, including padding.
        ran_NL: Total number of active experts over these tokens.
        real_NL: Tokens without padding.
        real_ran_NL: Total number of active experts over tokens without padding.
        cost_KN: MACs up to each exit.
        ffn_N: MACs of experts and routers.
        dense_N: MACs of the dense model.
        dense_ffn_N: MACs of the converted networks in the dense model.
        nats_N: Negative log-likelihood of the targets of a text of a language model under its last exit, in nats; empty
            for other models.
    """

    correct_KN: Tensor
    confidence_KN: Tensor
    targets_N: Tensor
    y_N: Tensor
    tokens_NL: Tensor
    ran_NL: Tensor
    real_NL: Tensor
    real_ran_NL: Tensor
    cost_KN: Tensor
    ffn_N: Tensor
    dense_N: Tensor
    dense_ffn_N: Tensor
    nats_N: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))

    @property
    def perplexity(self) -> float | None:
        """``exp`` of the mean of nats over all targets; None for a model that is not a language model."""
        return perplexity(float(self.nats_N.sum() / self.targets_N.sum())) if len(self.nats_N) else None

    @property
    def macs_per_token(self) -> float:
        """MACs of the model per token of a text of its batch, padding included."""
        return float(self.cost_KN[-1].sum() / self.tokens_NL[:, 0].sum())

    @property
    def accuracy(self) -> float:
        """Accuracy of the last exit."""
        return float(self.correct_KN[-1].sum() / self.targets_N.sum())

    @property
    def ffn_share(self) -> float:
        """MACs of experts and routers as a fraction of those of the same networks in the dense model."""
        return float(self.ffn_N.sum() / self.dense_ffn_N.sum())

    @property
    def share(self) -> float:
        """MACs of the model as a fraction of the dense model's."""
        return float(self.cost_KN[-1].sum() / self.dense_N.sum())

    def experts_per_token(self, chosen_N: Tensor | None = None) -> list[float]:
        """Mean number of active experts by layer, over all samples or those selected by a mask; NaN without tokens."""
        ran_NL, real_NL = self.real_ran_NL, self.real_NL
        if chosen_N is not None:
            ran_NL, real_NL = ran_NL[chosen_N], real_NL[chosen_N]
        found: list[float] = (ran_NL.sum(0).double() / real_NL.sum(0).double()).tolist()
        return found


def concatenate_passes(passes: Sequence[Pass]) -> Pass:
    """Concatenate passes of one setting over several data sets."""
    parts = {entry.name: [getattr(one, entry.name) for one in passes] for entry in fields(Pass)}
    return Pass(**{name: torch.cat(own, dim=1 if name.endswith("_KN") else 0) for name, own in parts.items()})


class GateEvaluator:
    """Evaluates a converted model with different gates.

    Args:
        dense: The dense model.
        model: The converted model; its gates are restored after each pass.
        exit_logits: Computes the scores of each exit.
        replaced: Dense MACs per token of layers that were not feed-forward networks in the dense model, by name.
    """

    def __init__(
        self, dense: nn.Module, model: nn.Module, *, exit_logits: ExitLogits, replaced: Mapping[str, int] | None = None
    ) -> None:
        self.dense, self.model, self.exit_logits = dense, model, exit_logits
        self.layers = routed_layers(model)
        macs = [layer.macs() for layer in self.layers.values()]
        whole = [each.dense for each in macs]
        before = [(replaced or {}).get(name, each.dense) for name, each in zip(self.layers, macs, strict=True)]
        self._expert_L, self._router_L, self._all_L, self._before_L = (
            torch.tensor(values, dtype=torch.float64)
            for values in ([each.expert for each in macs], [each.router for each in macs], whole, before)
        )
        self._within_KL = layers_within_exits(model, tuple(self.layers))
        self._counted: dict[object, tuple[Tensor, Tensor]] = {}

    def run(self, batches: Batches, gate: Gate, *, progress: Callable[[], None] | None = None) -> Pass:
        """Evaluate one gate over the data.

        Raises:
            DataError: No samples, or samples without labels.
            UnsupportedError: A layer whose tokens cannot be assigned to samples.
        """
        found = []
        with evaluating(self.model), override(self.layers, "gate", lambda _: gate):
            for batch in batches:
                found.append(self._batch(batch, routed=not gate.keeps_all))
                if progress is not None:
                    progress()
        if not found:
            raise DataError("moefy: found no samples to measure on; give some")
        return concatenate_passes(found)

    def _batch(self, batch: Batch, *, routed: bool) -> Pass:
        if batch.targets is None:
            raise DataError("moefy: found data without labels; give a benchmark with labels")
        dense_K, full_K = self._full_cost(batch.inputs)
        with _count_tokens(self.layers, batch, size=len(batch.targets)) as seen:
            scores = self.exit_logits(self.model, batch.inputs)
        tokens_BL, ran_BL, real_BL, real_ran_BL = (
            torch.stack(list(column), 1) for column in zip(*seen.values(), strict=True)
        )
        right_KB, confidence_KB, nats_KB = zip(*(_score(each, batch.targets) for each in scores), strict=True)
        experts_BL = ran_BL.double() * self._expert_L
        if routed:
            experts_BL += tokens_BL.double() * self._router_L
        # The rest of the model costs the same, so only the difference to running all experts is computed by formula.
        saved_BL = tokens_BL.double() * self._all_L - experts_BL
        size, asked = len(batch.targets), batch.targets != IGNORED
        return Pass(
            correct_KN=torch.stack(right_KB).cpu(),
            confidence_KN=torch.stack(confidence_KB).cpu(),
            targets_N=(asked.sum(1) if asked.dim() > 1 else asked.long()).cpu().double(),
            y_N=batch.targets.cpu() if batch.targets.dim() == 1 else torch.full((size,), -1),
            tokens_NL=tokens_BL,
            ran_NL=ran_BL,
            real_NL=real_BL,
            real_ran_NL=real_ran_BL,
            cost_KN=full_K[:, None] - self._within_KL @ saved_BL.t(),
            ffn_N=experts_BL.sum(1),
            dense_N=dense_K[-1].expand(size),
            dense_ffn_N=(tokens_BL.double() * self._before_L).sum(1),
            nats_N=nats_KB[-1].cpu(),
        )

    def _full_cost(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(dense_K, full_K): MACs of one sample up to each exit, of the dense model and with all experts active."""
        # MACs depend on the shape of a sample only; texts of one length are counted once.
        shape = tuple((name, tuple(value.shape[1:])) for name, value in named_tensors(inputs))
        if shape not in self._counted:
            one = first_sample(inputs)
            with override(self.layers, "gate", lambda _: ALL):
                dense_K, full_K = (count_exit_macs(model, one, self.exit_logits) for model in (self.dense, self.model))
            self._counted[shape] = (dense_K, full_K)
        return self._counted[shape]


@contextmanager
def _count_tokens(
    layers: Mapping[str, RoutedExperts], batch: Batch, *, size: int
) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """By layer: tokens_B, active experts over them, tokens without padding, active experts over those."""
    zero = torch.zeros(size, dtype=torch.long)
    seen = {name: (zero, zero, zero, zero) for name in layers}
    mask_BT = _mask(batch)

    def add(name: str, experts_T: Tensor) -> None:
        ran_BT = _by_sample(experts_T, size=size, name=name).cpu()
        real_BT = mask_BT if mask_BT is not None and mask_BT.shape == ran_BT.shape else torch.ones_like(ran_BT)
        now = (torch.full((size,), ran_BT.shape[1]), ran_BT.sum(1), real_BT.sum(1), (ran_BT * real_BT).sum(1))
        a, b, c, d = (old + new for old, new in zip(seen[name], now, strict=True))
        seen[name] = a, b, c, d

    with override(layers, "chosen", lambda name: partial(add, name)):
        yield seen


def _by_sample(experts_T: Tensor, *, size: int, name: str) -> Tensor:
    """Reshape the counts of a layer's tokens to experts_BT."""
    # Models with the sequence first, such as torch's transformer layers with batch_first=False.
    if experts_T.dim() == 2 and experts_T.shape[0] != size and experts_T.shape[1] == size:
        return experts_T.t()
    if experts_T.numel() % size:
        raise UnsupportedError(
            f"moefy: {name} processes {experts_T.numel()} tokens for {size} samples, which gives no cost per sample; "
            f"use a model with the same number of tokens for each sample"
        )
    return experts_T.reshape(size, -1)


def _mask(batch: Batch) -> Tensor | None:
    if batch.tokens is None:
        return None
    kinds = [batch.tokens] if isinstance(batch.tokens, Tensor) else list(batch.tokens.values())
    return torch.stack(kinds).any(0).long().cpu()


def _score(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(correct_B, confidence_B, nats_B); nats are empty where targets are classes of samples."""
    if targets.dim() == 1:
        best, choice = scores.float().softmax(-1).max(-1)
        right = (choice == targets) & (targets != IGNORED)
        return right.double(), best.double(), scores.new_empty(0, dtype=torch.float64)
    asked_BT = targets != IGNORED
    text_N = asked_BT.nonzero()[:, 0]
    sums_3B = torch.zeros(3, len(targets), dtype=torch.float64, device=scores.device)
    # In parts, because the softmax in float32 may need several GB for all tokens of a batch.
    for own_NV, own_N, own_text_N in zip(
        scores[asked_BT].split(ROWS), targets[asked_BT].split(ROWS), text_N.split(ROWS), strict=True
    ):
        log_NV = own_NV.float().log_softmax(-1)
        best_N, choice_N = log_NV.max(-1)
        nats_N = -log_NV.gather(1, own_N[:, None])[:, 0]
        values_3N = torch.stack([(choice_N == own_N).float(), best_N.exp(), nats_N]).double()
        sums_3B.index_add_(1, own_text_N, values_3N)
    right_B, best_B, nats_B = sums_3B
    return right_B, best_B / asked_BT.sum(1).clamp_min(1), nats_B
