"""Batches of a target as a sparsity study uses them: some kinds of tokens, one mask, or predictions as labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clframe.data.target import IGNORED, Batch, Batches, Target
from clframe.nn.frozen import evaluating
from clframe.nn.types import Inputs


def restrict_tokens(batches: Batches, tokens: Sequence[str]) -> Batches:
    """Restrict batches of language models to the named kinds of tokens."""

    def narrowed(batch: Batch) -> Batch:
        if not isinstance(batch.tokens, Mapping) or batch.targets is None:
            return batch
        masks = {name: mask_BT for name, mask_BT in batch.tokens.items() if name in tokens}
        any_BT = torch.stack(list(masks.values())).any(0)
        targets_BT = torch.full_like(batch.targets, IGNORED)
        # The target of a token is at the position of the token before it.
        targets_BT[:, :-1] = batch.targets[:, :-1].where(any_BT[:, 1:], IGNORED)
        return Batch(batch.inputs, targets_BT, masks)

    return Batches([lambda at=at: narrowed(batches[at]) for at in range(len(batches))])  # type: ignore[misc]


def count_data(batches: Batches) -> tuple[int, int | None, bool]:
    """Count samples and unmasked tokens (None where samples are not texts); also whether all have labels."""
    samples, tokens, labeled, texts = 0, 0, True, True
    for batch in batches:
        first = next(iter(batch.inputs.values())) if isinstance(batch.inputs, Mapping) else batch.inputs
        samples += len(first)
        labeled &= batch.targets is not None
        if batch.tokens is None:
            texts = False
        else:
            masks = batch.tokens.values() if isinstance(batch.tokens, Mapping) else [batch.tokens]
            tokens += sum(int(mask.sum()) for mask in masks)
    return samples, tokens if texts else None, labeled


def with_predictions(target: Target, batches: Batches) -> Batches:
    """Return the same inputs with the dense model's predictions as targets."""
    predictions = []
    with evaluating(target.model):
        for batch in batches:
            found = target.predict(target.model, batch.inputs).argmax(-1)
            given = batch.targets if batch.targets is not None and batch.targets.shape == found.shape else None
            predictions.append(found if given is None else found.where(given != IGNORED, IGNORED))
    return Batches([lambda at=at: batches[at]._replace(targets=predictions[at]) for at in range(len(predictions))])  # type: ignore[misc]


def with_mask(batch: Batch) -> tuple[Inputs, Tensor | None]:
    """Return the inputs of a batch, and the mask of its tokens of all kinds; None where samples are not texts."""
    if isinstance(batch.tokens, Mapping):
        return batch.inputs, torch.stack(list(batch.tokens.values())).any(0)
    return batch.inputs, batch.tokens
