"""The measurements on language models: intervals, weights of decoders, and the order of their runs."""

import argparse
import json
import math

import language_decoders
import language_sizes
import language_streams
import pytest
import torch

from clframe.nn.backbones.decoder import decoder
from clframe.nn.network import Network


def analysis(rise, *, windows=6):
    """Curves whose loss rises by ``rise`` nats per point of sparsity from a tenth to the next."""
    dense = [2.0 + 0.1 * (at % 2) for at in range(windows)]
    achieved, gaussian = [0.0, 0.1, 0.2, 0.3], [0.0, 0.05, 0.1, 0.15]
    return {
        "domains": [0, 1] * (windows // 2), "dense": dense,
        "curves": [
            {"role": role, "achieved": achieved, "gaussian": gaussian,
             "nats": [[nat + slope * sparsity for nat in dense] for sparsity in achieved]}
            for role, slope in rise.items()
        ],
    }  # fmt: skip


def test_critical_sparsity_is_where_the_perplexity_has_risen_by_the_tolerance():
    found = language_sizes.summarize(analysis({"input": 0.5, "gate": 2.0, "up": 0.25}), 0.05, samples=50)
    rise = math.log(1.05)
    for role, slope in (("input", 0.5), ("gate", 2.0), ("up", 0.25)):
        one = found["roles"][role]
        assert one["critical"] == pytest.approx(rise / slope) and one["gaussian"] == pytest.approx(rise / slope / 2)
        assert one["low"] == pytest.approx(one["critical"]) == one["high"]  # all windows rise alike
    assert found["order"] == {"input > gate": 1.0, "input > up": 0.0}


def test_windows_are_drawn_within_their_domain():
    weight_BW = language_sizes.resample(torch.tensor([0, 0, 0, 1, 1]), 40)
    torch.testing.assert_close(weight_BW[:, :3].sum(1), torch.full((40,), 0.6, dtype=torch.float64))
    torch.testing.assert_close(weight_BW[:, 3:].sum(1), torch.full((40,), 0.4, dtype=torch.float64))
    assert len(weight_BW.unique(dim=0)) > 10


def test_a_slope_is_that_of_least_squares():
    slope, half = language_sizes.regression([(0.0, 1.0), (1.0, 2.0), (2.0, 2.0), (3.0, 4.0)])
    # residuals -0.9 + 0.9 x: 0.1, 0.2, -0.7, 0.4; sum of squares 0.7, over 2 degrees and sum of x^2 of 5
    assert slope == pytest.approx(0.9) and half == pytest.approx(4.302653 * math.sqrt(0.7 / 2 / 5), rel=1e-5)


def test_a_cell_is_expected_to_take_as_long_as_its_size_or_longer_in_proportion_to_the_weights():
    rows = [{"size": "1M", "seconds": 10.0}, {"size": "4M", "seconds": 20.0}]
    assert language_sizes.expected_seconds([], "30M") == 0
    assert language_sizes.expected_seconds(rows, "1M") == 10
    assert language_sizes.expected_seconds(rows, "12M") == pytest.approx(20 * (384**2 * 6) / (256**2 * 4))


def options(**more):
    given = {"context": 8, "vocabulary": 64, "device": "cpu", "depth": 6}
    return argparse.Namespace(**{**given, **more})


def test_weights_return_in_half_precision_from_several_files(tmp_path, monkeypatch):
    shape = language_decoders.backbone_options(options(), "tiny", "swiglu")
    network = Network(decoder((9,), **shape))
    monkeypatch.setattr(language_decoders, "SHARD", 20_000)
    language_decoders.save_weights(network, tmp_path, "tiny-swiglu", {"seed": 3})
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and json.loads((tmp_path / "tiny-swiglu.json").read_text()) == {"seed": 3}
    found = language_decoders.load_weights(options(), "tiny", "swiglu", tmp_path, "tiny-swiglu")
    for own, other in zip(network.parameters(), found.parameters(), strict=True):
        assert torch.equal(own.detach().half().float(), other)
    assert found.final.weight is found.backbone.stages[0].table.weight
    assert language_decoders.load_weights(options(), "tiny", "relu", tmp_path, "tiny-relu") is None
    assert language_decoders.load_weights(options(vocabulary=65), "tiny", "swiglu", tmp_path, "tiny-swiglu") is None


def test_exits_follow_a_third_and_two_thirds_of_the_blocks():
    assert language_streams.expression(options(), "er+exits").endswith("exits(at=[block2, block4])")
    assert language_streams.expression(options(depth=3), "er+exits").endswith("exits(at=[block1, block2])")
