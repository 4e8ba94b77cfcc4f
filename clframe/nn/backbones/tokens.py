"""Stages of transformers' encoders: the library's own modules, called with what the stage before returns.

Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

Pooling = Literal["pooler", "cls", "mean"]
"""How one vector comes of the tokens."""
Masked = tuple[Tensor, Tensor]
"""tokens_BTD and the mask keep_B11T, true where a token may be attended to."""


class TextEmbed(nn.Module):
    """Token ids to embedded tokens and their mask.

    Args:
        embeddings: The model's own.
    """

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, x: Tensor) -> Masked:
        """Tokens and mask of ids_BT."""
        ids_BT = x.long()
        keep_BT = ids_BT != 0
        keep_BT[:, 0] = True
        return self.embeddings(ids_BT), keep_BT[:, None, None]


class TextLayer(nn.Module):
    """One encoder layer that hands the mask on.

    Args:
        layer: The model's own.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, value: Masked) -> Masked:
        """The layer's tokens and the same mask."""
        tokens_BTD, keep_B11T = value
        return _tensor(self.layer(tokens_BTD, keep_B11T)), keep_B11T


class TextPool(nn.Module):
    """One vector a text.

    Args:
        pooling: As in :func:`~clframe.nn.backbones.from_transformers.bert`.
        pooler: The model's own pooler, for ``pooler``.
    """

    def __init__(self, *, pooling: Pooling, pooler: nn.Module | None) -> None:
        super().__init__()
        self.pooling = pooling
        self.pooler = pooler

    def forward(self, value: Masked) -> Tensor:
        """features_BD of tokens_BTD and their mask."""
        tokens_BTD, keep_B11T = value
        if self.pooler is not None:
            pooled: Tensor = self.pooler(tokens_BTD)
            return pooled
        if self.pooling == "cls":
            return tokens_BTD[:, 0]
        weights_BT1 = keep_B11T.flatten(1)[..., None].to(tokens_BTD.dtype)
        return (tokens_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)


class ImageEmbed(nn.Module):
    """Images to tokens, positions interpolated where the size is not the model's.

    Args:
        embeddings: The model's own.
    """

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, x: Tensor) -> Tensor:
        """tokens_BTD of images_BCHW."""
        out: Tensor = self.embeddings(x, interpolate_pos_encoding=True)
        return out


class ImageLayer(nn.Module):
    """One encoder layer.

    Args:
        layer: The model's own.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """tokens_BTD of tokens_BTD."""
        return _tensor(self.layer(x))


def _tensor(out: Any) -> Tensor:
    """What a layer returns: before transformers 5 a tuple of one."""
    tensor: Tensor = out if isinstance(out, Tensor) else out[0]
    return tensor
