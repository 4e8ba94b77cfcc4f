"""Losses of prompts: keys drawn to queries, and samples that compete within their experience.

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


def pull(similarity_BN: Tensor) -> Tensor:
    """``mean_b sum_n (1 - cos(q_b, key_n))``, of shape []: how far queries are from the keys they select.

    Wang et al., "Learning to Prompt for Continual Learning" (2022), equation 5, with the cosine distance.

    Args:
        similarity_BN: Cosines of queries and selected keys.
    """
    return (1 - similarity_BN).sum(1).mean()


def among(logits_BC: Tensor, y_B: Tensor, *, outside_C: Tensor) -> Tensor:
    """The logits with ``-inf`` for the classes outside, but for samples that are of such a class themselves.

    >>> import torch
    >>> among(torch.zeros(2, 2), torch.tensor([0, 1]), outside_C=torch.tensor([True, False])).tolist()
    [[0.0, 0.0], [-inf, 0.0]]
    """
    hidden_BC = outside_C & ~outside_C[y_B][:, None]
    return logits_BC.masked_fill(hidden_BC, -inf)


QUERY, PROMPT = "query", "prompt"
"""Names of the two stages."""
Read = Literal["prompts", "first"]
"""What the last tap is made of: the mean of the prompt tokens, or the first token (the class token)."""


class Frozen(nn.Module):
    """A stage that no longer learns: its weights take no gradient and it stays in evaluation mode.

    Args:
        stage: The stage.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage
        self.hold()

    def hold(self) -> None:
        """Freeze again what somebody else may have thawed."""
        self.stage.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode, whatever is asked for."""
        super().train(mode)
        self.stage.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """What the stage returns."""
        out: Tensor = self.stage(x)
        return out


class Query(nn.Module):
    """The untouched backbone's features, its tap; the tokens travel on with them.

    Args:
        rest: The frozen stages after the first. They belong to the backbone, and are neither parts of this
            module nor copied by it.
    """

    def __init__(self, rest: Sequence[nn.Module]) -> None:
        super().__init__()
        self._rest = tuple(rest)  # a tuple hides them from torch, which would list every weight twice

    @torch.no_grad()
    def forward(self, tokens_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """query_BD and tokens_BTD."""
        value = tokens_BTD
        for stage in self._rest:
            value = stage(value)
        return value, tokens_BTD


class PromptPool(nn.Module):
    """A pool of prompts with a key each: those whose keys are nearest to the query come behind the first token.

    Keys and prompts are drawn from U(-1, 1) on the CPU, from torch's global generator.

    Args:
        width: D.
        pool: P, prompts to choose from.
        length: L, tokens of each.
        top: N, how many are selected.

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
        """similarity_BN, the largest cosines of the query with the keys, and index_BN of these prompts."""
        similarity_BP = F.normalize(query_BD, dim=1) @ F.normalize(self.keys, dim=1).T
        similarity_BN, index_BN = similarity_BP.topk(self.top, dim=1)
        return similarity_BN, index_BN

    def forward(self, value: tuple[Tensor, Tensor]) -> Tensor:
        """tokens_BTD of query and tokens: the first token, the prompts, the other tokens."""
        query_BD, tokens_BTD = value
        _, index_BN = self.select(query_BD)
        prompts_BTD = self.prompts[index_BN].flatten(1, 2).to(tokens_BTD.dtype)
        return torch.cat([tokens_BTD[:, :1], prompts_BTD, tokens_BTD[:, 1:]], dim=1)


class PromptMean(nn.Module):
    """The mean of what the last stage makes of each prompt token by itself.

    Args:
        last: The frozen last stage.
        added: How many prompt tokens come behind the first token.
    """

    def __init__(self, last: nn.Module, *, added: int) -> None:
        super().__init__()
        self.last = last
        self.added = added

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """features_BD of tokens_BTD."""
        prompts_BTD = tokens_BTD[:, 1 : 1 + self.added]
        features: Tensor = self.last(prompts_BTD.reshape(-1, 1, prompts_BTD.shape[2]))
        return features.reshape(len(tokens_BTD), self.added, -1).mean(1)


def add_prompts(network: Network, pool: PromptPool, *, read: Read, where: str) -> None:
    """Freeze the backbone and put prompts among its tokens; exits stay on their taps.

    Stages become ``embed``, ``query`` (tap (D,)), ``prompt``, and the others as they were: from ``prompt`` on,
    taps of shape (T, D) are (T + N L, D), the first token still first.

    Args:
        network: Edited in place.
        pool: The prompts.
        read: What the last tap is made of.
        where: What messages begin with.

    Raises:
        UnsupportedError: A backbone that is no vision transformer of tokens, or whose last stage does not read
            one token.
        ConfigError: Prompts of another width, or a backbone that has prompts already.
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
    network.attach(exits)  # type: ignore[arg-type]  # heads are heads, which a ModuleList does not tell


def prompt_pool(network: Network) -> PromptPool:
    """The prompts that :func:`add_prompts` gave a network."""
    pool = network.backbone.stages[network.backbone.tap(PROMPT)]
    assert isinstance(pool, PromptPool)
    return pool


def _tokens_of(backbone: Backbone, *, where: str) -> tuple[int, int]:
    """(T, D) of a backbone of images whose taps are all tokens, but for the last, which is one of their width."""
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
        raise UnsupportedError(f"{where}: found a backbone that does not read single tokens; set read=first")
