"""Negative log-likelihood and perplexity of texts, against the formulas written longhand."""

from __future__ import annotations

import math

import pytest
import torch

from clframe.errors import ConfigError, DataError
from clframe.functional.language import (
    Likelihood,
    next_token_targets,
    perplexity,
    strided_windows,
    token_nll,
)


@pytest.mark.parametrize("tokens", [2, 3, 7, 8, 9, 30])
@pytest.mark.parametrize("window, stride", [(2, 1), (5, 1), (5, 3), (5, 4), (8, 7)])
def test_every_token_but_the_first_is_scored_once_with_the_promised_context(tokens, window, stride):
    scored = []
    for start, stop, first in strided_windows(tokens, window=window, stride=stride):
        assert 0 <= start < first < stop <= tokens and stop - start <= window
        for token in range(first, stop):
            scored.append(token)
            context = token - start
            assert context == token if start == 0 else context >= window - stride
    assert scored == list(range(1, tokens))


def test_windows_out_of_range_are_refused():
    for window, stride in ((1, 1), (5, 0), (5, 5)):
        with pytest.raises(ConfigError):
            strided_windows(9, window=window, stride=stride)
    with pytest.raises(DataError, match="found 1 tokens"):
        strided_windows(1, window=5, stride=3)


def test_likelihood_is_the_formula():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], dtype=torch.float64)
    nll_N = token_nll(logits, torch.tensor([1, 0]))
    longhand = [-math.log(math.exp(2) / (math.exp(1) + math.exp(2) + math.exp(0.5))),
                -math.log(1 / (1 + math.exp(-1) + math.exp(3)))]  # fmt: skip
    assert nll_N.tolist() == pytest.approx(longhand, rel=1e-6)
    long, short = Likelihood.of(nll_N), Likelihood(0.5, 6)
    joined = Likelihood.joined([long, short])
    assert joined.mean == pytest.approx((sum(longhand) + 0.5) / 8)  # by token, not by text
    assert joined.perplexity == pytest.approx(math.exp((sum(longhand) + 0.5) / 8))
    assert math.isnan(Likelihood().mean) and perplexity(1e4) == math.inf


def test_targets_are_the_next_ids_of_each_window():
    ids = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]], dtype=torch.int32)
    assert next_token_targets(ids).tolist() == [1, 4, 1, 9, 2, 6]
