"""Studies of sparsity: networks whose numbers are known, and what is written."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from clframe.data import TensorSamples
from clframe.data.target import Batch, Batches, DataSplits, SampleSplit, Target
from clframe.errors import ConfigError, UnknownNameError, UnsupportedError
from clframe.metrics.continual import forgetting_E
from clframe.sparsity import activity, analyze, overlap
from clframe.sparsity.functional import baseline_sparsity, keep
from clframe.sparsity.study import study_sparsity
from clframe.targets import open_target
from clframe.targets.folders import analysis_root, default_folder, write_sparsity_study


class Mirror(nn.Module):
    """``relu(x) - relu(-x) = x``: of 8 hidden neurons exactly 4 are silent, whatever x without zeros."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)
        both = torch.cat((torch.eye(4), -torch.eye(4)))
        self.up.weight.data, self.down.weight.data = both, both.T.clone()

    def forward(self, x):
        return self.down(self.act(self.up(x)))


X = torch.tensor([[1.0, 8, 3, 2], [2, 1, 3, 9], [1, 2, 5, 3], [3, 7, 2, 1], [1, 2, 3, 6]])


def mirror(x=X, y=None, net=None):
    part = SampleSplit([TensorSamples(x, x.argmax(1) if y is None else y)], place=lambda x: x)
    return Target(name="mirror", kind="images", model=net or Mirror(), body_name="", predict=lambda m, x: m(x), splits=DataSplits(part, None, part))


def test_a_network_whose_critical_sparsity_is_known():
    study = study_sparsity(mirror(), rules=["top_k"], roles=["intermediate"])
    (curve,) = study.report.curves
    assert (study.part, study.samples, study.tokens, study.score, study.report.dense) == ("test", 5, None, "accuracy", 1)
    # 7 of 8 may go: one neuron keeps the largest. With none left every answer is 0, which is never right.
    assert curve.achieved[0] == 0.5 and max(s for s, score in zip(curve.achieved, curve.scores, strict=True) if score == 1) == 7 / 8
    assert curve.scores[-1] == 0 and curve.achieved[-1] == 1
    assert curve.critical == pytest.approx(7 / 8 + 0.01 / 8) == pytest.approx(curve.critical_layers[""])
    # A Gaussian vector loses by top-k what the rule leaves out: 1 - k/8, also between the points.
    assert curve.critical_gaussian == pytest.approx(curve.critical) and curve.excess == pytest.approx(0)
    assert [curve.values[at] for at in (0, 25)] == [1, 0] and 0 < curve.critical_value < 0.1


def test_top_p_beside_the_gaussian_and_ranks():
    study = study_sparsity(mirror(), roles=["input", "intermediate"])
    by_role = {curve.role: curve for curve in study.report.curves}
    for role, values in (("input", X), ("intermediate", torch.cat((X, torch.zeros(5, 4)), 1))):
        curve = by_role[role]
        for at in (0, 5, 13):
            zeros = ~keep(values, curve.values[at], kind="top_p") | (values == 0)
            assert curve.achieved[at] == pytest.approx(zeros.double().mean().item())
            expected = baseline_sparsity(curve.values[at], kind="top_p", neurons=values.shape[1])
            assert curve.gaussian[at] == pytest.approx(expected) == pytest.approx(curve.gaussian_layers[""][at])
        assert study.report.ranks[role][""] == pytest.approx(study.report.ranks["input"][""])
    assert by_role["intermediate"].achieved[0] == 0.5 and by_role["intermediate"].gaussian[0] == 0


def test_all_roles_and_passes():
    seen = []
    study = study_sparsity(mirror(), rules=["threshold"], on_pass=lambda done, all: seen.append((done, all)))
    assert [(c.kind, c.role) for c in study.report.curves] == [
        ("threshold", role) for role in ("input", "intermediate", "all inputs")
    ]
    assert seen[0] == (1, 1) and seen[1:] == [(n, 79) for n in range(2, 80)]


def test_without_labels_the_dense_model_is_the_measure():
    target = mirror()
    bare = Batches([lambda at=at: Batch(X[at : at + 2], None, None) for at in (0, 2, 4)])
    part = type("Bare", (), {"batches": lambda self, size, limit: bare, "__len__": lambda self: 5})()
    from dataclasses import replace

    found = study_sparsity(replace(target, splits=DataSplits(part, None, part)), roles=["intermediate"])
    labeled = study_sparsity(target, roles=["intermediate"])
    assert found.score == "agreement" and found.report.curves[0].scores == labeled.report.curves[0].scores
    with pytest.raises(ConfigError, match="--score: found accuracy for data without labels"):
        study_sparsity(replace(target, splits=DataSplits(part, None, part)), score="accuracy")


def test_prompt_and_generated_tokens_of_a_gated_model(llama, texts):
    target = open_target(str(llama), data="clinc150", overrides=[f"benchmark.data_dir={texts}"], generate=4)
    both = study_sparsity(target, roles=["gate", "intermediate"], score="agreement")
    assert [curve.role for curve in both.report.curves] == ["gate", "intermediate"] and both.report.dense == 1
    for name, score in (("prompt", "agreement"), ("generated", None)):
        alone = study_sparsity(target, roles=["intermediate"], tokens=[name], score=score)
        (curve,) = alone.report.curves
        assert list(curve.parts) == [name] and curve.achieved == pytest.approx(curve.parts[name])
        assert curve.parts[name] == pytest.approx(both.report.curves[1].parts[name])
        # What the model wrote itself it writes again.
        assert alone.report.dense == 1 and alone.score == (score or "accuracy")
    (batch,) = target.batches("test")
    assert both.tokens == int(batch.inputs["attention_mask"].sum())
    assert study_sparsity(target, roles=["up"], tokens=["generated"]).tokens == int(batch.tokens["generated"].sum())


def test_experiences_of_a_run_beside_forgetting(finished):
    target = open_target(finished.run_folder)
    study = study_sparsity(target, roles=["intermediate"], limit=30, size=30)
    assert study.part == "validation" and study.samples == 30
    batches = [[(b.inputs, None) for b in part.batches(limit=30)] for part in target.experiences]
    found = [activity(target.body, each) for each in batches]
    for layer, jaccard in overlap(found).items():
        assert study.experiences.overlap[layer] == tuple(map(tuple, jaccard.tolist()))
        assert study.experiences.sparsity[layer] == tuple(one.sparsity[layer] for one in found)
    layers = list(study.experiences.sparsity.values())
    assert study.experiences.mean_sparsity[1] == pytest.approx(sum(layer[1] for layer in layers) / len(layers))
    assert study.experiences.gaussian == pytest.approx(0.1127, abs=1e-3)
    lost = forgetting_E(finished.accuracy_matrix)[0].value
    assert study.experiences.forgetting == (pytest.approx(lost), None)


def test_what_is_written_is_what_python_gives(finished, tmp_path):
    target = open_target(finished.run_folder)
    study = study_sparsity(target, rules=["top_k"], limit=25)
    written = write_sparsity_study(study, tmp_path / "out", command=["clframe", "analyze"])
    content = json.loads(written.read_text())
    plain = analyze(
        target.model, target.batches("validation", limit=25), kinds=["top_k"], roles=["intermediate"], inside=target.body
    )
    assert content["dense"] == plain.dense and content["schema_version"] == 1 and content["command"] == ["clframe", "analyze"]
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    for found, expected in zip(content["curves"], plain.curves, strict=True):
        assert found.pop("excess") == pytest.approx(expected.excess)
        assert found == json.loads(json.dumps(asdict(expected)))
    assert content["effective_rank"] == plain.ranks and content["experiences"]["forgetting"][1] is None
    names = {path.name for path in (tmp_path / "out").iterdir()}
    drawn = {"curves_top_k", "layers_top_k", "overlap", "experiences", "union"}
    made = {"critical", "layers", "experiences", "points", "union"}
    assert names == {"sparsity.json", *(f"{n}.{e}" for n in drawn for e in ("svg", "png")), *(f"{n}.{e}" for n in made for e in ("csv", "md"))}
    union = content["union"]
    rows = list(csv.DictReader((tmp_path / "out" / "union.csv").read_text().splitlines()))
    assert [int(row["batch size"]) for row in rows] == union["sizes"] == [1, 2, 4, 8, 16]
    assert [float(row["active by tokens"]) for row in rows] == union["mean_tokens"] == sorted(union["mean_tokens"])
    assert union["tokens"] == union["samples"]  # images have one token each in this network
    assert union["largest_that_pays"]["tokens"] == study.union.largest_that_pays(study.union.mean_tokens)
    rows = list(csv.DictReader((tmp_path / "out" / "critical.csv").read_text().splitlines()))
    assert [float(row["critical"]) for row in rows] == [curve.critical for curve in plain.curves]
    assert [float(row["excess"]) for row in rows] == [pytest.approx(curve.excess) for curve in plain.curves]


def test_what_is_refused():
    target = mirror()
    for options, kind, said in (
        (dict(rules=["top"]), UnknownNameError, "--rule: unknown rule 'top'; did you mean 'top_p'"),
        (dict(roles=["gates"]), UnknownNameError, "--roles: unknown roles 'gates'; did you mean 'gate'"),
        (dict(roles=["gate"]), ConfigError, "--roles: found gate, which mirror lacks; choose from input, intermediate, all"),
        (dict(tokens=["p"]), UnknownNameError, "--tokens: unknown tokens 'p'"),
        (dict(tokens=["generated"]), ConfigError, "--tokens: found generated for .*, which is not a language model"),
        (dict(share=0.0), ConfigError, "--share: found 0.0"),
        (dict(limit=0), ConfigError, "limit: found 0"),
    ):
        with pytest.raises(kind, match=said):
            study_sparsity(target, **options)
    with pytest.raises(ConfigError, match="mirror: its test data are empty"):
        study_sparsity(mirror(X[:0], torch.zeros(0, dtype=torch.long)))
    with pytest.raises(ConfigError, match=r"found 0\.0 for the dense model"):
        study_sparsity(mirror(y=torch.zeros(5, dtype=torch.long)))
    with pytest.raises(UnsupportedError, match="found neither a feed-forward network"):
        study_sparsity(mirror(net=nn.Linear(4, 4)))
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(UnsupportedError, match="on the meta device, without weights"):
        study_sparsity(mirror(net=bare), score="accuracy")


def test_folders(finished, tmp_path, monkeypatch):
    assert default_folder(open_target(str(finished.run_folder))) == Path(finished.run_folder) / "sparsity"
    assert analysis_root(str(finished.run_folder)) == Path(finished.run_folder) / "sparsity"
    hub = replace(mirror(), name="org/model-1.5b", origin={"model": "org/model-1.5b", "data": {"name": "clinc150"}})
    assert re.fullmatch("org-model-1.5b-clinc150-[0-9a-f]{8}", default_folder(hub).name)
    assert default_folder(hub).parent == analysis_root(hub.name) == Path("sparsity")


def test_nothing_is_written_where_drawing_fails(finished, tmp_path, monkeypatch):
    import clframe.targets.folders as files

    study = study_sparsity(mirror(), roles=["input"])
    monkeypatch.setattr(files, "render_picture", lambda picture: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_sparsity_study(study, tmp_path / "out", command=[])
    assert not (tmp_path / "out").exists()
