"""Generation with exits: the state of skipped blocks, and self-speculation against the full model."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from recorded_graphs import RecordedGraphs

from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.exits import make_head
from clframe.nn import Network, generation
from clframe.nn.backbones import mlp
from clframe.nn.backbones.decoder import decoder
from clframe.nn.generation import LazyDecoder, generate, speculate

V, CONTEXT = 23, 40
PROMPT = (3, 1, 4, 1, 5)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    backbone = decoder((CONTEXT + 1,), vocabulary=V, width=12, depth=3, heads=2)
    heads = [(tap, make_head("token", (CONTEXT, 12), per_token=True)) for tap in ("block1", "block2")]
    net = Network(backbone, exits=heads).double()
    with torch.no_grad():
        for p in net.backbone.parameters():  # larger weights, so that exits disagree
            p.mul_(6)
    return net.eval()


class CountedGraphs(RecordedGraphs):
    """Counts recordings and replays."""

    def __init__(self):
        super().__init__()
        self.recorded = self.replayed = 0

    def record(self, work):
        self.recorded += 1
        replay = super().record(work)

        def counted():
            self.replayed += 1
            replay()

        return counted


def exit_logits(network, ids):
    """Logits of every exit at the last of ``ids``, all blocks computed for all of them."""
    window = torch.tensor([[*ids, 0]])
    with torch.no_grad():
        return [logits[-1] for logits in network(window).logits]


def test_greedy_tokens_are_those_of_the_whole_model_without_a_cache(network):
    ids = list(PROMPT)
    for _ in range(20):
        ids.append(int(exit_logits(network, ids)[-1].argmax()))
    found = generate(network, PROMPT, 20)
    assert list(found.ids) == ids[5:] and len(set(found.ids)) > 3
    assert found.positions == (24, 24, 24, 24) and found.passes == (20, 20, 20, 20)  # the last token is not read


def test_early_tokens_are_chosen_by_the_first_confident_exit_and_leave_the_state_exact(network):
    ids, exits, first = [*PROMPT, *generate(network, PROMPT, 20).ids], [], []
    for length in range(5, 25):
        first.append(float(exit_logits(network, ids[:length])[0].softmax(0).max()))
    first.sort()
    at = max(range(10, 17), key=lambda place: first[place + 1] - first[place])  # rounding differs between CPUs
    threshold, ids = (first[at] + first[at + 1]) / 2, list(PROMPT)
    for _ in range(25):
        logits = exit_logits(network, ids)
        sure = [float(each.softmax(0).max()) >= threshold for each in logits]
        exits.append(next((k for k, found in enumerate(sure) if found), 2))
        ids.append(int(logits[exits[-1]].argmax()))
    found = generate(network, PROMPT, 25, threshold=threshold)
    assert list(found.ids) == ids[5:] and list(found.exits) == exits
    assert {0, 2} <= set(exits)
    assert found.positions[:2] == (29, 29) and found.positions[3] <= found.positions[2] <= 29
    deepest = max(n for n, exit in enumerate(exits) if exit == 2)
    assert found.positions[3] == 5 + deepest  # skipped positions up to the last full token, each once
    assert found.passes[3] == exits.count(2) < 25


@pytest.mark.parametrize("exit", [0, 1])
@pytest.mark.parametrize("draft", [1, 3, 8])
def test_self_speculation_gives_the_tokens_of_the_full_model(network, exit, draft):
    for tokens in (1, 2, 17):
        full, found = generate(network, PROMPT, tokens), speculate(network, PROMPT, tokens, exit=exit, draft=draft)
        assert found.ids == full.ids
    assert found.passes[3] <= full.passes[3] == 17


def test_a_draft_of_a_perfect_exit_needs_one_pass_for_each_draft(network):
    torch.manual_seed(1)
    backbone = decoder((CONTEXT + 1,), vocabulary=V, width=12, depth=2, heads=2)
    net = Network(backbone, exits=[("block1", make_head("token", (CONTEXT, 12), per_token=True))]).double()
    with torch.no_grad():  # the second block adds nothing
        block = net.backbone.stages[2][0]
        block.attention.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    found = speculate(net, PROMPT, 20, draft=4)
    assert found.ids == generate(net, PROMPT, 20).ids
    assert found.passes[2] == 4  # 5 tokens each: 4 drafted and 1 of the last exit


def test_truncated_positions_are_computed_again(network):
    state = LazyDecoder(network)
    state.append(PROMPT)
    before = state.logits(2, 4)
    state.append([7, 7])
    state.logits(1, 6)
    state.truncate(5)
    state.append([9])
    expected = exit_logits(network, (*PROMPT, 9))
    torch.testing.assert_close(state.logits(2, 5)[-1], expected[2])
    torch.testing.assert_close(before[-1], exit_logits(network, PROMPT)[2])


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_recorded_passes_give_the_tokens_of_plain_ones(network, monkeypatch, threshold):
    """On a stand-in for CUDA graphs, which undoes what a recording writes and refuses to wait for a value."""
    runs = [partial(generate, network, PROMPT, 20, threshold=threshold),
            partial(speculate, network, PROMPT, 20, exit=1, draft=3)]  # fmt: skip
    plain = [run() for run in runs]
    made = []
    monkeypatch.setattr(generation, "graphs_for", lambda network: made.append(CountedGraphs()) or made[-1])
    assert [run() for run in runs] == plain
    assert [run(graphs=False) for run in runs] == plain and len(made) == 2
    assert made[0].recorded == (1 if threshold is None else 3) and made[1].recorded == 1
    assert made[0].replayed > (15 if threshold is None else 5)


def test_a_network_that_waits_for_the_device_is_not_recorded(network, monkeypatch, caplog):
    waiting = copy.deepcopy(network)
    waiting.backbone.stages[1].mlp.register_forward_hook(lambda module, x, out: out * float(out.isfinite().all()))
    monkeypatch.setattr(generation, "graphs_for", lambda network: RecordedGraphs())
    assert generate(waiting, PROMPT, 20) == generate(network, PROMPT, 20, graphs=False)
    assert [r.getMessage() for r in caplog.records] == [
        "generate: CUDA graphs are not used, as the network cannot be recorded (aten::_local_scalar_dense waits for the "
        "device)"
    ]


def test_nothing_is_recorded_on_a_cpu(network):
    assert generation.graphs_for(network) is None


def test_what_cannot_be_generated_is_refused(network):
    with pytest.raises(DataError, match="found 41 tokens for a context of 40"):
        generate(network, PROMPT, 37)
    with pytest.raises(ConfigError, match="found no ids"):
        generate(network, (), 3)
    with pytest.raises(ConfigError, match="generate.threshold: found 1.5"):
        generate(network, PROMPT, 3, threshold=1.5)
    with pytest.raises(ConfigError, match="speculate.exit: found 2 of 3 exits"):
        speculate(network, PROMPT, 3, exit=2)
    with pytest.raises(ConfigError, match="speculate.draft: found 0"):
        speculate(network, PROMPT, 3, draft=0)
    with pytest.raises(UnsupportedError, match="not a decoder"):
        generate(Network(mlp((4,))), PROMPT, 3)


@pytest.mark.parametrize(
    ("prompt", "tokens", "expected"),
    [
        ((1, V), 3, f"generate.prompt: found id {V}; give ids from 0 to {V - 1}, those of the vocabulary"),
        ((-1,), 3, f"generate.prompt: found id -1; give ids from 0 to {V - 1}, those of the vocabulary"),
        ([1.5], 3, "generate.prompt: found [1.5] (a list); give the ids of one text"),
        ("ab", 3, "generate.prompt: found 'ab' (text); give the ids of one text"),
        (torch.tensor([[1, 2]]), 3, "generate.prompt: found [[1, 2]] (a list); give the ids of one text"),
        (PROMPT, -1, "generate.tokens: found -1; give at least 0"),
        (PROMPT, 1.5, "generate.tokens: found 1.5; give a whole number of at least 0"),
    ],
)
@pytest.mark.parametrize("function", [generate, speculate])
def test_prompts_are_ids_of_the_vocabulary(network, function, prompt, tokens, expected):
    with pytest.raises(ConfigError) as error:
        function(network, prompt, tokens)
    assert str(error.value) == expected


def test_prompts_may_be_tensors_and_arrays(network):
    expected = generate(network, PROMPT, 3).ids
    assert generate(network, torch.tensor(PROMPT), 3).ids == generate(network, np.array(PROMPT), 3).ids == expected
