"""Exports of every kind of strategy: corrections, ensembles, calibration and experts are in the graph, or it is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from exported_models import BATCHES, SOURCE, assert_staged, assert_whole, images, learn
from torch.torch_version import TorchVersion

from clframe.accounting import cumulative_macs
from clframe.core import Component, parse
from clframe.errors import UnsupportedError
from clframe.exits import ALWAYS
from clframe.exits.clearance import clear_threshold
from clframe.exits.learned import confidences
from clframe.nn import BACKBONES, Network
from clframe.targets import runner
from clframe.targets.export import example_inputs, export
from clframe.targets.export_graphs import WholeModel, divide, stored_dtype, traceable
from clframe.targets.export_programs import trace
from clframe.targets.prediction import predict
from clframe.targets.runner import StagedModel
from clframe.training.learner import Learner
from clframe.training.trained import TrainedModel


def traced(model, *, example=None):
    """The whole graph, not written to a file."""
    with traceable(model.network):
        return trace(WholeModel(model).eval(), [images(5)[0] if example is None else example], what="it").module()


def in_stages(model, *, threshold=None, example=None):
    """The runner over the stages as modules, not traced: decisions and carried tensors are those of an export."""
    dynamic = model.dynamic(threshold=threshold)
    example = images(2)[0] if example is None else example
    parts = divide(model, dynamic, example)
    made = StagedModel.__new__(StagedModel)
    made.stages = [{**vars(spec), "macs": spec.macs} for _, spec in parts]
    made.description = {
        "format": "pt2", "rule": {"fallback": dynamic.policy.fallback},
        "input": {"shape": [*example.shape[1:]], "dtype": str(example.dtype).removeprefix("torch.")},
    }  # fmt: skip
    made.classes = list(model.class_order)
    made._graphs = runner._TorchGraphs([])
    made._graphs.modules = [stage for stage, _ in parts]
    return made


VIT = {"backbone": "vit_tiny", "patch": 4, "width": 16, "depth": 2}
VARIANTS = {
    "bias correction": ("bic + exits", {}),
    "nearest class means": ("icarl + er + exits", {}),
    "discriminant analysis": ("slda + exits", {}),
    "geometric": ("er + exits(ensemble='geometric', fit_on='training', fit_epochs=9) + early_exit(threshold=0.6)", {}),
    "product, patience": ("exits(ensemble='product') + early_exit(threshold=0.5, measure='patience')", {}),
    "cascade, most confident": ("exits(cascade=True) + early_exit(threshold=0.6, fallback='confident')", {}),
    "boosted": ("exits(ensemble='boosted') + early_exit(threshold=0.6)", {}),
    "isotonic": ("exits(calibration='isotonic') + early_exit(threshold=0.5)", {"held_out": True}),
    "temperature, gate": (
        "exits(calibration='temperature') + early_exit(measure='gate', threshold=0.5)", {"held_out": True},
    ),
    "experts": ("exits + moe(experts=4, epochs=1) + early_exit(threshold=0.4)", VIT),
}  # fmt: skip


OLD = TorchVersion(torch.__version__) < "2.7"
NOT_IN_OLD = (
    "bias correction", "nearest class means", "discriminant analysis", "isotonic", "temperature, gate", "experts",
)  # fmt: skip
"""Variants that torch 2.6 does not trace with a dynamic batch; ``clframe export`` then refuses them with one line."""
SLOW = ("product, patience", "boosted", "nearest class means", "discriminant analysis", "isotonic")
"""The default suite exports one of each kind: bias correction, a geometric ensemble, a cascade, a temperature, experts."""


def marks_of(name):
    skipped = [pytest.mark.skipif(OLD, reason="torch 2.6")] * (name in NOT_IN_OLD)
    return [*skipped, *[pytest.mark.slow] * (name in SLOW)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in VARIANTS])
def test_corrections_ensembles_calibration_and_experts_are_part_of_the_graph(name):
    strategy, options = VARIANTS[name]
    model = learn(strategy, **options)
    threshold = None if model.learner.composition.owner("prediction") is not None else 0.5
    graph, stages = traced(model), in_stages(model, threshold=threshold)
    for count in BATCHES:
        for x in images(count):
            assert_whole(model, graph(x), x)
            with traceable(model.network):
                assert_staged(model, stages, x, threshold=threshold)


COUNTED = {
    "failure": ("er + exits(cascade=True) + early_exit(measure='failure')", {"held_out": True}, True),
    "gate": ("er + exits + early_exit(measure='gate')", {"held_out": True}, True),
    "ncm": ("er + ncm + exits + early_exit", {}, True),
    "geometric": ("er + exits(ensemble='geometric', fit_on='training', fit_epochs=9) + early_exit", {}, False),
    "most confident": ("er + exits + early_exit(measure='margin', fallback='confident')", {}, False),
    "never at the first": ("er + exits(at=['block1', 'block2']) + early_exit(threshold=[2.0, 0.5])", {}, False),
}  # fmt: skip
"""Strategies, options of the model, and whether predictions cost more than backbone and heads."""


@pytest.mark.parametrize("name", COUNTED)
def test_stages_cost_what_predict_reports(name):
    strategy, options, more = COUNTED[name]
    model, x = learn(strategy, **options), SOURCE.test.x[:200]
    state = model.learner.state["early_exit"]
    confidence_KN = confidences(model.dynamic().measure, model.outputs(x).logits)[:-1].double()
    middle = tuple(clear_threshold(float(confidence_N.median()), confidence_N) for confidence_N in confidence_KN)
    state["thresholds"] = (2.0, *middle[1:]) if name == "never at the first" else middle
    found, expected = in_stages(model)(x), predict(model, x)
    assert found.macs.tolist() == [row.macs for row in expected]
    assert len(set(found.macs.tolist())) == (2 if name == "never at the first" else len(middle) + 1)
    heads = cumulative_macs(model.network)[-1]
    assert (int(found.macs.max()) > heads) == more
    if name == "never at the first":
        assert found.macs.max() < heads


def test_the_description_of_stages_has_their_costs_and_plain_json(tmp_path):
    model = learn("er + exits(at=['block1', 'block2']) + early_exit(measure='gate', threshold=[2.0, 0.5])", held_out=True)
    model.learner.state["early_exit"]["thresholds"] = (2.0, ALWAYS)
    folder = export(model, tmp_path / "staged", format="pt2", staged=True)
    described = json.loads((folder / "model.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    (row,) = predict(model, SOURCE.test.x[:1])
    assert described["rule"]["thresholds"] == [None, 0.0]
    assert [stage["threshold"] for stage in described["stages"]] == [0.0, None]
    first, last = (stage["macs"] for stage in described["stages"])
    assert [entry["macs"] for entry in described["exits"]] == [None, first, last]
    assert (row.exit, row.macs) == ("block2", first)
    found = StagedModel(folder)(SOURCE.test.x[:9])
    assert (found.exits.tolist(), found.macs.tolist()) == ([1] * 9, [first] * 9)


@pytest.mark.parametrize("rule", ["vote", "mean"])
def test_a_rule_over_all_exits_is_exported_whole_and_refused_in_stages(rule, tmp_path):
    model = learn(f"exits + early_exit(rule='{rule}')")
    graph = traced(model)
    for x in images(33):
        assert_whole(model, graph(x), x)
    with pytest.raises(UnsupportedError, match=f"--staged cannot stop early here: rule '{rule}' uses all exits"):
        export(model, tmp_path / "staged", format="pt2", staged=True)
    assert not (tmp_path / "staged").exists()


@dataclass(frozen=True, kw_only=True)
class Joint(Component):
    """Replaces the logits of every exit by their mean over the exits."""

    name: ClassVar[str] = "joint_logits"
    slots: ClassVar[frozenset[str]] = frozenset({"logits"})

    def adjust_logits(self, output, state):
        mean = torch.stack(output.logits).mean(0)
        return output._replace(logits=(mean,) * len(output.logits))


@dataclass(frozen=True, kw_only=True)
class Branching(Component):
    """Corrects logits by a branch on their values."""

    name: ClassVar[str] = "branching"
    slots: ClassVar[frozenset[str]] = frozenset({"logits"})

    def adjust_exit_logits(self, exit, logits_BC, taps, state):
        return 2 * logits_BC if float(logits_BC.sum()) > 0 else logits_BC


def test_a_correction_of_all_exits_together_is_exported_whole_and_refused_in_stages(tmp_path):
    model = learn((*parse("exits"), Joint()))
    graph = traced(model)
    for x in images(33):
        assert_whole(model, graph(x), x)
    with pytest.raises(UnsupportedError, match="joint_logits corrects the logits of all exits together"):
        export(model, tmp_path / "staged", format="pt2", staged=True, threshold=0.5)


def test_a_strategy_that_branches_on_values_is_refused_in_one_line(tmp_path):
    model = learn((*parse("exits"), Branching()))
    with pytest.raises(UnsupportedError, match="cannot be traced to a graph with a dynamic batch") as caught:
        export(model, tmp_path / "here" / "deep", format="pt2")
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(OLD, reason="torch 2.6 does not trace it with a dynamic batch")
def test_text_models_take_token_ids():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = BACKBONES.get("bert")((7,), vocabulary=50, width=16, depth=2)
    learner = Learner(Network(backbone), parse("exits + early_exit(threshold=0.4)"), seed=0)
    learner.network.grow(range(4))
    for head in learner.network.heads:  # untrained heads predict almost uniformly
        for parameter in head.parameters():
            parameter.data.mul_(8)
    learner.network.eval().requires_grad_(False)
    model = TrainedModel(learner, (0, 1, 2, 3), (), ())
    ids = torch.randint(1, 50, (33, 7), generator=torch.Generator().manual_seed(0))
    ids[::2, 4:] = 0  # padding
    assert stored_dtype(model) == "int64"
    drawn = example_inputs(model, 20, dtype="int64")
    assert drawn.shape == (20, 7) and 20 < drawn.max() < 50
    graph, stages = traced(model, example=ids[:5]), in_stages(model, example=ids[:5])
    for x in (ids, ids[:1]):
        assert_whole(model, graph(x), x)
        assert_staged(model, stages, x)


@pytest.mark.parametrize("strategy", ["bic + exits", "icarl + er + exits"])
def test_states_that_change_predictions_are_kept_and_samples_are_not(strategy, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    from clframe.config.load import load_config
    from clframe.targets.portable import read_portable, write_portable
    from clframe.training.trained import restore_model

    model = learn(strategy)
    write_portable(model, load_config("quickstart"), tmp_path)
    content, recipe, _ = read_portable(tmp_path)
    assert recipe is None
    fresh = Network(BACKBONES.get("small_cnn")((1, 8, 8), width=8))
    restored = restore_model(fresh, parse(strategy), content)
    x = SOURCE.test.x[:50]
    assert all(torch.equal(*pair) for pair in zip(restored.outputs(x).logits, model.outputs(x).logits, strict=True))
    with safetensors.safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in list(file.keys())]
    assert not [shape for shape in shapes if shape[1:] == (1, 8, 8)]


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_networks_with_one_exit_have_no_stages(threshold, tmp_path):
    with pytest.raises(UnsupportedError, match="found one exit; train with exits, or leave --staged out"):
        export(learn("er"), tmp_path / "out", format="pt2", staged=True, threshold=threshold)
