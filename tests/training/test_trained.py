"""A model that comes back from a run's folder, and what stands in the way."""

from __future__ import annotations

import pytest
import torch

import clframe
from clframe.errors import RunFolderError, UnsupportedError

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


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(RunFolderError, match=r"^load: no folder"):
        clframe.load(tmp_path / "nothing")
    with pytest.raises(RunFolderError, match=r"^load: .* holds no config\.yaml"):
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
            assert record.diagnostics.accuracy_K[k] == pytest.approx(mean, abs=1e-9)
        assert record.accuracy_KE[-1] == pytest.approx(result.accuracy_matrix[i])
        assert record.static["oracle"] >= max(record.diagnostics.accuracy_K)
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
    assert last.diagnostics.overthinking == 0 and last.macs_K == (last.backbone_macs,)


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
