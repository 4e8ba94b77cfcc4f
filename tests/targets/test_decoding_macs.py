"""MACs of generated text by formula, against a counter that sees every operator."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from clframe.accounting import MacCounter
from clframe.exits import make_head
from clframe.nn import Network
from clframe.nn.backbones.decoder import decoder
from clframe.nn.generation import generate, speculate
from clframe.targets.decoding_macs import DecodingMacs


@pytest.mark.parametrize("tied", [True, False])
def test_macs_are_those_that_are_counted(tied):
    torch.manual_seed(0)
    backbone = decoder((31,), vocabulary=23, width=12, depth=3, heads=2, tied=tied)
    heads = [(tap, make_head("token", (30, 12), per_token=True)) for tap in ("block1", "block2")]
    network = Network(backbone, exits=heads)
    runs = [partial(generate, threshold=0.0), generate, partial(generate, threshold=0.05),
            partial(speculate, exit=0, draft=3), partial(speculate, exit=1, draft=1)]  # fmt: skip
    cost = DecodingMacs(network)
    for run in runs:
        for prompt, tokens in (((3, 1, 4), 20), ((5,), 1)):
            with MacCounter() as counter:
                found = run(network, prompt, tokens)
            assert cost.of(found) == counter.macs > 0


def test_the_macs_of_one_token_by_hand():
    network = Network(decoder((2,), vocabulary=23, width=12, depth=1, heads=2, hidden=16))  # a context of one token
    block = 4 * 12 * 12 + 3 * 12 * 16 + 2 * 12  # projections, gated FFN, attention to itself
    assert DecodingMacs(network).of(generate(network, (4,), 1)) == block + 12 * 23
