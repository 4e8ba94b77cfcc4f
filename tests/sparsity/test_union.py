"""Active neurons of batches, against all batches written out."""

from itertools import combinations

import pytest
import torch
from torch import nn

from clframe.sparsity.output import union_table
from clframe.sparsity.union import ActiveUnion, expected_union, measure_union


def longhand(active, size):
    """Mean over all subsets of rows of the share of neurons that any row of the subset activates."""
    shares = [
        sum(any(active[row][n] for row in rows) for n in range(len(active[0]))) / len(active[0])
        for rows in combinations(range(len(active)), size)
    ]
    return sum(shares) / len(shares)


@pytest.mark.parametrize("size", range(1, 8))
def test_the_expectation_is_the_mean_over_all_batches(size):
    torch.manual_seed(0)
    active = torch.rand(7, 9) < torch.linspace(0, 1, 9)
    own = expected_union(active.sum(0), 7, size)
    assert own == pytest.approx(longhand(active.tolist(), size), abs=1e-12)


class Doubled(nn.Module):
    """FFN of two neurons that fire where their input is positive."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(torch.eye(4))

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def test_counts_by_token_and_by_sample():
    # Three samples of two tokens: neuron 0 fires in every token, 1 in one, 2 in both of a sample, 3 never.
    x = torch.tensor(
        [
            [[1.0, 0, 0, 0], [1.0, 1, 0, 0]],
            [[1.0, 0, 1, 0], [1.0, 0, 1, 0]],
            [[1.0, 0, 0, 0], [1.0, 0, 0, 0]],
        ]
    ) - 1e-3  # fmt: skip
    found = measure_union(Doubled(), [(x[:2], None, None), (x[2:], None, None)], value=1.0)
    by_token = [[bool(v > 0) for v in token] for sample in x.tolist() for token in sample]
    by_sample = [[any(token[n] > 0 for token in sample) for n in range(4)] for sample in x.tolist()]
    assert found.sizes == (1, 2, 4)
    (tokens,), (samples,) = found.tokens.values(), found.samples.values()
    assert tokens == pytest.approx([longhand(by_token, size) for size in (1, 2, 4)])
    assert samples == pytest.approx([longhand(by_sample, size) for size in (1, 2)])
    assert found.mean_tokens == pytest.approx(tokens)
    # Padding does not count: without the second tokens neuron 1 never fires.
    mask = torch.tensor([[True, False]] * 3)
    masked = measure_union(Doubled(), [(x, None, {"prompt": mask, "generated": ~mask & mask})], value=1.0)
    (tokens,), (samples,) = masked.tokens.values(), masked.samples.values()
    assert tokens == pytest.approx([longhand(by_token[::2], size) for size in (1, 2)])
    assert samples == pytest.approx(tokens)


def test_the_power_of_top_p_decides_which_neurons_count():
    x = torch.tensor([[[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]]])
    # of 6: 3 is a half, 5 are 83 %; of 9 + 4 + 1 = 14: 9 are 64 %, 13 are 93 %
    shares = {power: measure_union(Doubled(), [(x, None, None)], value=0.6, power=power).mean_tokens[0] for power in (1.0, 2.0)}
    assert shares == {1.0: pytest.approx(0.5), 2.0: pytest.approx(0.25)}


def test_the_largest_batch_that_pays():
    union = ActiveUnion(value=0.99, sizes=(1, 2, 4, 8), tokens={"a": (0.2, 0.5, 0.9, 1.0), "b": (0.4, 0.7, 0.9)}, samples={})
    assert union.mean_tokens == pytest.approx((0.3, 0.6, 0.9)) and union.mean_samples == ()
    assert union.largest_that_pays(union.mean_tokens) == 4
    assert union.largest_that_pays(union.mean_tokens, least=0.5) == 1
    assert union.largest_that_pays(union.mean_tokens, least=0.8) is None


def test_the_table_has_no_rows_for_batches_larger_than_what_was_measured():
    table = union_table(ActiveUnion(value=0.99, sizes=(1, 2, 4, 8), tokens={"ffn": (0.5, 0.75)}, samples={"ffn": (0.6,)}))
    assert [row[0] for row in table.rows] == ["1", "2"]
    assert [cell.value for cell in table.rows[1][1:3]] == [0.75, 0.25]
    assert table.rows[1][3].undefined == "fewer were measured than a batch has"
