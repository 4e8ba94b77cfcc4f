"""Prompt pools for frozen vision transformers, and the losses of Learning to Prompt.

Shape suffixes: B batch, C classes, N prompts selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError, UnsupportedError
from clframe.nn.backbones.base import Backbone

if TYPE_CHECKING:
    from typing_extensions import Self

    from clframe.nn.network import Network


def key_loss(similarity_BN: Tensor) -> Tensor:
    """Distance of queries to their selected keys: ``mean_b sum_n (1 - cos(q_b, key_n))``, of shape [].

    Wang et al., "Learning to Prompt for Continual Learning" (2022), equation 5, with the cosine distance.

    Args:
        similarity_BN: Cosine similarities of queries and selected keys.
    """
    return (1 - similarity_BN).sum(1).mean()


def mask_outside(logits_BC: Tensor, y_B: Tensor, *, outside_C: Tensor) -> Tensor:
    """Mask the logits of the classes outside with ``-inf``, except for samples of such a class.

    >>> import torch
    >>> mask_outside(torch.zeros(2, 2), torch.tensor([0, 1]), outside_C=torch.tensor([True, False])).tolist()
    [[0.0, 0.0], [-inf, 0.0]]
    """
    hidden_BC = outside_C & ~outside_C[y_B][:, None]
    return logits_BC.masked_fill(hidden_BC, -inf)


QUERY, PROMPT = "query", "prompt"
"""Names of the two added stages."""
Read = Literal["prompts", "first"]
"""Input of the classifier: the mean of the prompt tokens, or the first token (the class token)."""


class Frozen(nn.Module):
    """A frozen stage: no gradients, always in evaluation mode.

    Args:
        stage: The stage to freeze.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage
        self.freeze()

    def freeze(self) -> None:
        """Freeze the stage again, after other components may have unfrozen it."""
        self.stage.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Keep the stage in evaluation mode."""
        super().train(mode)
        self.stage.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage."""
        out: Tensor = self.stage(x)
        return out


class Query(nn.Module):
    """Computes the query, the features of the backbone without prompts, as its tap, and passes the tokens on.

    Args:
        rest: The frozen stages after the first. They belong to the backbone and are not submodules of this one.
    """

    def __init__(self, rest: Sequence[nn.Module]) -> None:
        super().__init__()
        self._rest = tuple(rest)  # a tuple, because a ModuleList would register every weight twice

    @torch.no_grad()
    def forward(self, tokens_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return query_BD and tokens_BTD."""
        value = tokens_BTD
        for stage in self._rest:
            value = stage(value)
        return value, tokens_BTD


class PromptPool(nn.Module):
    """A pool of prompts with one key each; those nearest to the query are inserted after the first token.

    Keys and prompts are drawn from U(-1, 1) on the CPU, from torch's global generator.

    Args:
        width: D.
        pool: P, number of prompts.
        length: L, tokens per prompt.
        top: N, number of selected prompts.

    >>> pool = PromptPool(8, pool=4, length=3, top=2)
    >>> pool((torch.randn(5, 8), torch.zeros(5, 10, 8))).shape, pool.added
    (torch.Size([5, 16, 8]), 6)
    """

    def __init__(self, width: int, *, pool: int, length: int, top: int) -> None:
        super().__init__()
        self.top = top
        self.added = top * length
        self.keys = nn.Parameter(torch.empty(pool, width, device="cpu").uniform_(-1, 1))
        self.prompts = nn.Parameter(torch.empty(pool, length, width, device="cpu").uniform_(-1, 1))

    def select(self, query_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Select the N nearest prompts: their cosine similarities similarity_BN and indices index_BN."""
        similarity_BP = F.normalize(query_BD, dim=1) @ F.normalize(self.keys, dim=1).T
        similarity_BN, index_BN = similarity_BP.topk(self.top, dim=1)
        return similarity_BN, index_BN

    def forward(self, value: tuple[Tensor, Tensor]) -> Tensor:
        """Insert prompts: tokens_BTD with the first token, the prompts, the other tokens."""
        query_BD, tokens_BTD = value
        _, index_BN = self.select(query_BD)
        prompts_BTD = self.prompts[index_BN].flatten(1, 2).to(tokens_BTD.dtype)
        return torch.cat([tokens_BTD[:, :1], prompts_BTD, tokens_BTD[:, 1:]], dim=1)


class PromptMean(nn.Module):
    """The mean of the last stage over single prompt tokens.

    Args:
        last: The frozen last stage.
        added: Number of prompt tokens after the first token.
    """

    def __init__(self, last: nn.Module, *, added: int) -> None:
        super().__init__()
        self.last = last
        self.added = added

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Compute features_BD of tokens_BTD."""
        prompts_BTD = tokens_BTD[:, 1 : 1 + self.added]
        features: Tensor = self.last(prompts_BTD.reshape(-1, 1, prompts_BTD.shape[2]))
        return features.reshape(tokens_BTD.shape[0], self.added, -1).mean(1)


def add_prompts(network: Network, pool: PromptPool, *, read: Read, where: str) -> None:
    """Freeze the backbone and insert prompts into its tokens; exits keep their taps.

    Stages become ``embed``, ``query`` (tap (D,)), ``prompt``, and the other stages unchanged. From ``prompt`` on, taps
    of shape (T, D) become (T + N L, D), with the first token still first.

    Args:
        network: Changed in place.
        pool: The prompt pool.
        read: Input of the classifier.
        where: Prefix of messages.

    Raises:
        UnsupportedError: A backbone that is not a vision transformer, or whose last stage cannot read a single token.
        ConfigError: Prompts of another width, or a backbone that already has prompts.
    """
    old = network.backbone
    if PROMPT in old.names:
        raise ConfigError(f"{where}: found prompts in the backbone already; add them once")
    tokens, width = _tokens_of(old, where=where)
    if pool.keys.shape[1] != width:
        raise ConfigError(f"{where}: found prompts of width {pool.keys.shape[1]}; give the tokens' {width}")
    first, *body, last = (Frozen(stage) for stage in old.stages)
    end = last if read == "first" else PromptMean(last, added=pool.added)
    if read == "prompts":
        _check_reads_one_token(last, width, where=where)
    shapes = [(tokens + pool.added, width)] * (len(body) + 1)
    names = (old.names[0], QUERY, PROMPT, *old.names[1:])
    stages = (first, Query([*body, last]), pool, *body, end)
    taps = [(tokens, width), (width,), *shapes, (width,)]
    exits = list(zip(network.exit_taps[:-1], network.heads[:-1], strict=True))
    network.backbone = Backbone(list(zip(names, stages, taps, strict=True)), input_shape=old.input_shape)
    network.attach(exits)  # type: ignore[arg-type]  # a ModuleList does not declare the type of its items


def prompt_pool(network: Network) -> PromptPool:
    """The prompt pool that :func:`add_prompts` added."""
    pool = network.backbone.stages[network.backbone.tap(PROMPT)]
    assert isinstance(pool, PromptPool)
    return pool


def _tokens_of(backbone: Backbone, *, where: str) -> tuple[int, int]:
    """(T, D) of an image backbone whose taps are all tokens, except for a flat last one of the same width."""
    shapes = [backbone.tap_shapes[name] for name in backbone.names]
    same = len({*shapes[:-1]}) == 1 and len(shapes[0]) == 2 and shapes[-1] == shapes[0][1:]
    if not same or len(backbone.input_shape) != 3:
        raise UnsupportedError(
            f"{where}: found a backbone with taps {shapes[0]} to {shapes[-1]}; prompts need the tokens of a vision "
            f"transformer, such as vit_b_16 or vit_tiny"
        )
    return shapes[0][0], shapes[0][1]


@torch.no_grad()
def _check_reads_one_token(last: nn.Module, width: int, *, where: str) -> None:
    parameter = next(last.parameters(), torch.zeros(1))
    features = last(torch.ones(2, 1, width, dtype=parameter.dtype, device=parameter.device))
    if features.shape != (2, width) or not bool(torch.isfinite(features).all()):
        raise UnsupportedError(f"{where}: found a backbone that cannot read single tokens; set read=first")
