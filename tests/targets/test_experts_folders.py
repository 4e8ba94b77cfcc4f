"""Folders of conversions: where they go, that none is half written, and models that are no run."""

import copy
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from quick_conversion import QUICK
from torch import nn

from clframe.data.target import Target
from clframe.errors import ClframeError, RunFolderError, UnsupportedError
from clframe.moe.conversion.options import Options
from clframe.moe.conversion.study import moefy_target
from clframe.targets import folders as experts_files
from clframe.targets.folders import default_folder, folder_for, restore_model, write_conversion
from clframe.targets.opening import open_target


@pytest.fixture(scope="module")
def study(vit_run):
    return moefy_target(open_target(str(vit_run)), Options(**QUICK))


def test_nothing_half_written(study, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no")

    folder = tmp_path / "new" / "m"
    monkeypatch.setattr(experts_files, "pictures", broken)
    with pytest.raises(RuntimeError):
        write_conversion(study, folder)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(experts_files, "pictures", lambda _: [])
    write_conversion(study, folder)
    kept = (folder / "moefy.json").read_bytes()
    (folder / "curve.csv").write_text("old")
    monkeypatch.setattr(experts_files, "pictures", broken)
    with pytest.raises(RuntimeError):
        write_conversion(study, folder)
    assert (folder / "moefy.json").read_bytes() == kept and (folder / "curve.csv").read_text() == "old"
    monkeypatch.setattr(experts_files, "pictures", lambda _: [])
    write_conversion(study, folder)
    assert (folder / "curve.csv").read_text() != "old" and [path.name for path in folder.parent.iterdir()] == ["m"]


def test_where_a_conversion_goes(vit_run, tmp_path):
    target, options = open_target(str(vit_run)), Options()
    own = folder_for(target, options, output=None)
    assert own.parent == vit_run / "moefy" and own.name.startswith("d2dmoe-")
    assert folder_for(target, Options(epochs=8), output=None) != own == folder_for(target, Options(), output=None)
    assert folder_for(target, options, output=tmp_path / "x") == tmp_path / "x"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="contains other files"):
        folder_for(target, options, output=tmp_path / "full")


def test_models_and_data_have_folders_of_their_own(llama, encoder, texts, tmp_path, monkeypatch):
    """Paths that end alike, other data, a changed file and a hub's revision: no conversion replaces another."""
    monkeypatch.chdir(tmp_path)
    for owner in ("a", "b"):
        shutil.copytree(llama, tmp_path / owner / "model")
    (tmp_path / "x.txt").write_text("pay my bill\nwake me up")
    (tmp_path / "y.txt").write_text("where is my card")
    here = [f"benchmark.data_dir={texts}"]
    targets = [
        open_target("a/model", data="x.txt"), open_target("b/model", data="x.txt"), open_target("a/model", data="y.txt"),
        open_target("a/model", data="clinc150", overrides=here),
        open_target("a/model", data="clinc150", overrides=[*here, "benchmark.classes=2"]),
        open_target("a/model", data="x.txt", max_length=5),
    ]  # fmt: skip
    (tmp_path / "x.txt").write_text("lost my card")
    targets.append(open_target("a/model", data="x.txt"))
    targets.append(replace(targets[0], origin={**targets[0].origin, "revision": "0a1b"}))
    for folders in ([folder_for(target, Options(), output=None) for target in targets], [*map(default_folder, targets)]):
        assert len(set(folders)) == len(targets)
        assert [re.match("model-[a-z]+", folder.parts[1])[0] for folder in folders] == [
            f"model-{data}" for data in ("x", "x", "y", "clinc", "clinc", "x", "x", "x")
        ]
    again = open_target(str(tmp_path / "a" / "model"), data=str(tmp_path / "y.txt"))
    assert folder_for(again, Options(), output=None) == folder_for(targets[2], Options(), output=None)
    assert again.origin == targets[2].origin
    assert again.origin["model"] == str(tmp_path / "a" / "model") and again.origin["data"]["path"] == str(tmp_path / "y.txt")
    assert targets[3].origin["data"]["name"] == "clinc150" and targets[3].origin["data"]["options"]["data_dir"] == str(texts)


class Encoder(nn.Module):
    """A model that clframe has not made: an embedding, a network and a classifier."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)))
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.body(x))


def test_a_model_that_is_no_run(vit_run, tmp_path, monkeypatch):
    monkeypatch.setattr(experts_files, "pictures", lambda _: [])
    torch.manual_seed(0)
    model, parts = Encoder().eval().requires_grad_(False), open_target(str(vit_run)).splits
    fresh = copy.deepcopy(model)
    target = Target(name="a/model", kind="images", model=model, body_name="body", predict=lambda m, x: m(x), splits=parts)
    study = moefy_target(target, Options(**QUICK))
    assert list(study.converted.layers) == ["body.2"] and study.experience_N is None
    tree = json.loads((write_conversion(study, tmp_path / "m") / "moefy.json").read_text())
    assert tree["exits"] is None and tree["experts_per_token"]["by_experience"] == [] and tree["options"]["on"] is None
    assert tree["dense_macs"] == 64 * 8 + 2 * 8 * 12 + 8 * 4
    restored = restore_model(tmp_path / "m", fresh)
    x = parts.test.batches(size=9)[0].inputs
    with torch.no_grad():
        assert torch.equal(restored(x), model(x))
    with pytest.raises(UnsupportedError, match="found Encoder with experts"):
        restore_model(tmp_path / "m", fresh)
    with pytest.raises(ClframeError):
        restore_model(tmp_path / "m", nn.Sequential(Encoder()))
