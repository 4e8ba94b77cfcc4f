"""A classifier for an encoder that has none: the nearest mean embedding.

Shape suffixes: B batch, C classes, D features, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.analysis.places import Inputs, called
from clframe.errors import DataError

if TYPE_CHECKING:
    from clframe.studies.batches import Batch

SCALE = 20.0
"""Of cosines, as is usual where they are trained as logits; which is the largest does not depend on it."""


class MeanTokens(nn.Module):
    """Texts to the mean of their tokens, in float32 at least.

    Args:
        encoder: Of transformers.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """embedding_BD of ids_BT and the mask of what is no padding."""
        hidden_BTD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_BT1 = attention_mask[..., None].to(hidden_BTD.dtype)
        total_BD: Tensor = (hidden_BTD * mask_BT1).float().sum(1)
        return total_BD / mask_BT1.float().sum(1)


class NearestMean(nn.Module):
    """Scores of classes: 20 times the cosine of an input's embedding and the class's mean embedding.

    The means are computed once, by :meth:`learn`, from embeddings of length 1, and stay.

    Args:
        embed: From inputs to embeddings.
        classes: How many.
    """

    means_CD: Tensor

    def __init__(self, embed: nn.Module, *, classes: int) -> None:
        super().__init__()
        self.embed = embed
        self.classes = classes
        self.register_buffer("means_CD", torch.zeros(classes, 0))

    def forward(self, inputs: Inputs) -> Tensor:
        """scores_BC."""
        return SCALE * self._embedded(inputs) @ self.means_CD.T

    @torch.no_grad()
    def learn(self, batches: Iterable[Batch]) -> None:
        """Take the mean embedding of each class of labeled batches.

        Raises:
            DataError: A class without samples.
        """
        sums_CD, seen_C = None, None
        for batch in batches:
            embedded_BD, y_B = self._embedded(batch.inputs), batch.targets
            assert y_B is not None
            if sums_CD is None:
                sums_CD = embedded_BD.new_zeros(self.classes, embedded_BD.shape[1])
                seen_C = embedded_BD.new_zeros(self.classes)
            assert seen_C is not None
            sums_CD.index_add_(0, y_B, embedded_BD)
            seen_C.index_add_(0, y_B, torch.ones_like(y_B, dtype=seen_C.dtype))
        if sums_CD is None or seen_C is None or bool((seen_C == 0).any()):
            raise DataError("target: found a class without training samples; give each at least one")
        self.means_CD = F.normalize(sums_CD, dim=1)

    def _embedded(self, inputs: Inputs) -> Tensor:
        embedded_BD: Tensor = called(self.embed, inputs)
        return F.normalize(embedded_BD.float(), dim=1)
