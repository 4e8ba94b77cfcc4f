"""Bytes of weights that a decoder reads for one token: the bound of what skipping neurons can gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from clframe.moe.dense import find_dense_ffns
from clframe.sparse_decode.rules import read_share


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of the weights that a dense model reads for one token.

    Decoding of one text multiplies every weight by one vector, so that its time is bounded below by the time in which
    memory delivers them. Keys and values of earlier tokens come in addition.

    Attributes:
        ffn: Of feed-forward networks.
        model: Of the whole model: all but tables of embeddings, of which a token reads one row.
        gated: Whether all feed-forward networks are gated.
    """

    ffn: int
    model: int
    gated: bool

    def share(self, sparsity: Mapping[str, float]) -> float:
        """Share of the model's bytes that is read with a sparsity by place, see :func:`read_share`.

        >>> WeightBytes(ffn=60, model=100, gated=True).share({"intermediate": 0.5})
        0.9
        """
        return 1 - self.ffn / self.model * (1 - read_share(sparsity, gated=self.gated))

    def ceiling(self, sparsity: Mapping[str, float]) -> float:
        """Largest speed-up of decoding by reading fewer weights: ``1 / share``.

        >>> round(WeightBytes(ffn=60, model=100, gated=True).ceiling({"intermediate": 1.0}), 6)  # no more than 1.25
        1.25
        """
        return 1 / self.share(sparsity)


def count_bytes(model: nn.Module) -> WeightBytes:
    """Count the weights of a dense decoder; weights used twice, such as tied embeddings, count once.

    Raises:
        UnsupportedError: A model without feed-forward networks.

    >>> block = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    >>> count_bytes(nn.Sequential(nn.Embedding(100, 4), block, nn.Linear(4, 100, bias=False)))
    WeightBytes(ffn=256, model=1856, gated=False)
    """
    ffns = find_dense_ffns(model)
    layers = [layer for ffn in ffns for layer in (ffn.up, ffn.gate, ffn.down) if layer is not None]
    ffn = sum(part.nbytes for layer in layers for part in layer if part is not None)
    # A tied table is also the weight of a head, which reads all of it.
    read = {
        id(weight): weight.nbytes
        for part in model.modules()
        if not isinstance(part, nn.Embedding)
        for weight in part.parameters(recurse=False)
    }
    return WeightBytes(ffn=ffn, model=sum(read.values()), gated=all(one.gate is not None for one in ffns))
