"""Models loaded from run folders: predictions, dynamic inference, inputs, and refusals."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import clframe
from clframe.errors import DataError, RunFolderError, UnknownNameError, UnsupportedError
from clframe.exits import DynamicNetwork, ExitPolicy, select
from clframe.report.terminal import exits_text
from clframe.training.prediction_cost import policy_of, prediction_cost

FAST = ["backbone=mlp", "backbone.width=8", "trainer.epochs=1", "trainer.progress=false", "trainer.loggers=[]",
        "benchmark.experiences=2"]  # fmt: skip


def test_a_plain_model_predicts_as_it_was_evaluated(tmp_path):
    result = clframe.run("quickstart", [*FAST, "strategy=naive", "seed=3"], output=tmp_path)
    model, test = clframe.load(result.run_folder), clframe.data.digits().test
    right = (model.classify(test.x) == test.y).float().mean().item()
    assert right == pytest.approx(result.final_weighted_accuracy, abs=1e-6)
    assert model.class_order == result.class_order
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    with pytest.raises(UnsupportedError, match="no early_exit; give a threshold"):
        model.dynamic()


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(RunFolderError, match=r"^load: no folder"):
        clframe.load(tmp_path / "nothing")
    with pytest.raises(RunFolderError, match=r"^load: .* has no config\.yaml"):
        clframe.load(tmp_path)
    result = clframe.run("quickstart", FAST, output=tmp_path)
    for path in tmp_path.rglob("*.ckpt"):
        path.unlink()
    with pytest.raises(RunFolderError, match="has no checkpoint yet"):
        clframe.load(result.run_folder)


def test_exits_are_recorded_after_every_experience(tmp_path):
    more = ["strategy=er(memory=40) + exits", "benchmark.validation=0.2", "benchmark.experiences=3"]
    result = clframe.run("quickstart", [*FAST, *more], output=tmp_path)
    assert result.exit_names == ("layer1", "final") and len(result.exits) == 3
    for i, record in enumerate(result.exits):
        assert record.macs_K[0] < record.macs_K[1]
        seen = [result.test_samples[e] for e in range(i + 1)]
        for k in range(2):
            mean = sum(a * n for a, n in zip(record.accuracy_KE[k], seen, strict=False)) / sum(seen)
            assert record.accuracy_K[k] == pytest.approx(mean, abs=1e-9)
        assert record.accuracy_KE[-1] == pytest.approx(result.accuracy_matrix[i])
        assert record.static["oracle"] >= max(record.accuracy_K)
        assert [point.name for point in record.points.points] == ["25%", "50%", "75%", "100%", "max"]
        assert record.curve.costs[-1] == pytest.approx(record.macs_K[-1] / record.backbone_macs)
    assert result.exits[0].similarity_K == pytest.approx((1.0, 1.0))
    assert all(0 < value < 1 for value in result.exits[-1].similarity_K)
    matrix = [record.accuracy_KE[0] for record in result.exits]
    longhand = sum(max(matrix[i][j] for i in range(j, 2)) - matrix[2][j] for j in range(2)) / 2
    assert result.exit_forgetting[0] == pytest.approx(longhand)
    assert str(clframe.Result.from_json(f"{result.run_folder}/results.json")) == str(result)  # NaN differs from itself


def test_a_plain_network_has_one_exit_and_no_validation_pass(tmp_path):
    result = clframe.run("quickstart", [*FAST, "strategy=naive"], output=tmp_path)
    (record,) = {len(record.macs_K) for record in result.exits}
    assert record == 1 and result.exit_names == ("final",)
    last = result.exits[-1]
    assert last.points.points is None and "validation" in last.points.undefined
    assert last.overthinking == 0 and last.macs_K == (last.backbone_macs,)


def test_a_run_with_exits_resumes_bit_for_bit(tmp_path, monkeypatch):
    from clframe.training.monitor import Monitor

    more = ["strategy=er(memory=40) + exits(ensemble='geometric', fit_epochs=1, regime='mixed') + early_exit(budget=0.9)",
            "benchmark.validation=0.2", "benchmark.experiences=3", "trainer.epochs=2"]  # fmt: skip
    whole = clframe.run("quickstart", [*FAST, *more], output=tmp_path / "whole")

    class Killed(BaseException):
        pass

    original, seen = Monitor.begin_experience, []

    def begin(self, index, **kwargs):
        seen.append(index)
        if len(seen) == 3:
            raise Killed
        original(self, index, **kwargs)

    monkeypatch.setattr(Monitor, "begin_experience", begin)
    with pytest.raises(Killed):
        clframe.run("quickstart", [*FAST, *more], output=tmp_path / "broken")
    monkeypatch.undo()
    (folder,) = (tmp_path / "broken").glob("quickstart/*")
    resumed = clframe.run(resume=folder)
    assert resumed.accuracy_matrix == whole.accuracy_matrix
    assert str(resumed.exits) == str(whole.exits)  # NaN differs from itself
    ours, theirs = (clframe.load(r.run_folder).network.state_dict() for r in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


CORRECTING = {
    "bic": "bic(memory=60)",
    "icarl": "er(memory=60, selection=herding) + icarl",
    "ncm": "ncm",
    "wa": "er(memory=60) + wa",
    "ranpac": "ranpac(projection=64)",
    "simplecil": "simplecil",
    "slda": "slda",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("ncm", "ranpac", "simplecil"))) for name in CORRECTING],
)
def test_corrections_are_applied_exit_by_exit_in_dynamic_inference(name, tmp_path):
    strategy = f"{CORRECTING[name]} + exits + early_exit(threshold=0.5)"
    more = [f"strategy={strategy}", "backbone.depth=3", "benchmark.validation=0.1"]
    result = clframe.run("quickstart", [*FAST, *more], output=tmp_path)
    model, test = clframe.load(result.run_folder), clframe.data.digits().test
    scores = model.outputs(test.x).logits
    uncorrected = model.network.ensemble(model.network(model.prepare(test.x)).logits)
    assert (name == "wa") == all(torch.equal(a, b) for a, b in zip(scores, uncorrected, strict=True))  # wa scales rows
    # thresholds at which all three exits are used, and the run's own policy
    between = [scores_BC.softmax(1).amax(1).quantile(0.6).item() for scores_BC in scores[:-1]]
    for policy in (model.dynamic().policy, ExitPolicy(thresholds=tuple(between))):
        dynamic = DynamicNetwork(model.network, policy, adjust=model.learner.exit_corrector())
        found, expected = dynamic(model.prepare(test.x)), select(scores, policy)
        assert torch.equal(found.exit_B, expected.exit_B)
        assert torch.equal(found.scores_BC.argmax(1), expected.scores_BC.argmax(1))
        torch.testing.assert_close(found.scores_BC, expected.scores_BC, rtol=1e-4, atol=1e-4)
    assert len(found.exit_B.unique()) == 3
    assert torch.equal(model.ids(model.dynamic()(model.prepare(test.x)).scores_BC), model.classify(test.x))
    one = model.dynamic(threshold=between[1], exits=[1])(model.prepare(test.x))
    only = select(scores, ExitPolicy(thresholds=(2.0, between[1])))
    assert torch.equal(one.exit_B, only.exit_B) and set(one.exit_B.tolist()) == {1, 2}
    with pytest.raises(UnknownNameError, match=r"^unknown exit 'layer9'"):
        model.dynamic(threshold=0.5, exits=["layer9"])
    assert policy_of(model.learner) is not None
    cost = prediction_cost(model.learner, model.prepare(test.x[:1]))
    assert cost.cost_K[0] < cost.cost_K[1] < cost.cost_K[2]
    assert result.exits[-1].simulated == ""


def test_a_correction_of_all_exits_together_is_marked_as_simulated(tmp_path):
    from clframe.core import COMPONENTS, Component, register

    @register
    class Centered(Component):
        """Subtracts the mean over exits: no exit can be corrected before the others are computed."""

        name, slots = "centered", frozenset({"logits"})

        def adjust_logits(self, output, state):
            mean_BC = torch.stack(output.logits).mean(0)
            return output._replace(logits=tuple(logits_BC - mean_BC for logits_BC in output.logits))

    try:
        strategy = "strategy=centered + exits + early_exit(threshold=0.5)"
        result = clframe.run("quickstart", [*FAST, strategy], output=tmp_path)
        assert result.exits[-1].simulated == "centered corrects the logits of all exits together"
        with pytest.raises(UnsupportedError, match=r"^strategy: centered corrects the logits of all exits together, so "):
            clframe.load(result.run_folder).dynamic()
        assert "Simulated: centered" in exits_text(result)
    finally:
        COMPONENTS._entries.pop("centered")


def test_arrays_single_samples_and_layouts_are_classified_alike(tmp_path):
    result = clframe.run("quickstart", [*FAST, "strategy=naive"], output=tmp_path)
    model, x = clframe.load(result.run_folder), clframe.data.digits().test.x[:5]
    assert tuple(x.shape[1:]) == model.network.input_shape == (1, 8, 8)
    expected = model.classify(x)
    for same in (x.numpy(), x.double().numpy(), x.squeeze(1), x.movedim(1, -1).numpy(), x.tolist()):
        assert torch.equal(model.classify(same), expected)
    for one in (x[0], x[0].numpy(), x[0, 0], x[0].movedim(0, -1).numpy()):
        assert torch.equal(model.classify(one), expected[:1])
    for wrong in (torch.zeros(2, 3, 8, 8), np.zeros((4, 4)), torch.zeros(2, 1, 16, 16), torch.zeros(64)):
        message = rf"^classify: found inputs of shape \({wrong.shape[0]}.*; give a batch \(N, 1, 8, 8\) or one sample \(1, 8, 8\)"
        with pytest.raises(DataError, match=message):
            model.classify(wrong)
    with pytest.raises(DataError, match="NaN"):
        model.classify(torch.full((1, 1, 8, 8), float("nan")))
    for wrong, found in ((x / 16, "fractions from 0 to 1"), (x.int() - 1, "values from -1 to 15"), (17 + x[:1], "values from 17 to")):
        with pytest.raises(DataError, match=f"^classify: found {found}.*, but the model was trained on whole numbers from 0 to 16; g"):
            model.classify(wrong)


@pytest.mark.parametrize("strategy", ["naive", "er + exits"])
def test_training_a_loaded_model_is_refused(strategy, tmp_path):
    result = clframe.run("quickstart", [*FAST, "strategy=er(memory=40) + exits"], output=tmp_path)
    network = clframe.load(result.run_folder).network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sgd = partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(UnsupportedError, match=r"^ContinualModule: found a network without trainable parameters"):
        clframe.ContinualModule(network, strategy, optimizer=sgd)
    network.requires_grad_(True)
    if strategy == "er + exits":
        with pytest.raises(UnsupportedError, match=r"^components\.exits: found a network that has learned 10 classes"):
            clframe.ContinualModule(network, strategy, optimizer=sgd)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
