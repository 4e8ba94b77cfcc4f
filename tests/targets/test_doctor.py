"""Checks of an installation: what is reported, and what is advised."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest

from clframe.targets import doctor
from clframe.targets.doctor import (
    check_data,
    check_extras,
    check_folder,
    check_packages,
    check_python,
    check_threads,
    check_trial,
    is_safe,
)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these versions are installed."""

    def install(**versions):
        monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name.replace("-", "_")))

    return install


def test_this_installation_is_sound():
    findings = [check_python(), *check_packages(), check_extras()]
    assert [finding.check for finding in findings if not finding.ok] == []
    assert is_safe(findings)


def test_packages_are_compared_with_the_requirements(installed):
    installed(torch="2.5.1", lightning="2.6.4", numpy="2.0")
    requirements = ["torch>=2.6", "lightning>=2.6.4", "omegaconf<2.5,>=2.3", "numpy", "tqdm", 'timm>=1; extra == "timm"']
    lines = [str(finding) for finding in check_packages(requirements)]
    assert lines == [
        'fix  torch          2.5.1, but >=2.6 is supported; pip install "torch>=2.6"',
        "ok   lightning      2.6.4",
        'fix  omegaconf      not installed; pip install "omegaconf<2.5,>=2.3"',
        'fix  tqdm           not installed; pip install "tqdm"',
    ]


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_the_malicious_releases_are_refused_before_anything_is_imported(version, installed):
    installed(lightning=version)
    (finding, _) = check_packages(["lightning>=2.6.0"])
    assert not is_safe([finding])
    assert finding.found == f"{version}, a release that steals credentials"
    assert finding.advice.startswith("do not import it: pip uninstall lightning, change the secrets of this machine")


def test_extras_are_no_fault(installed):
    installed(timm="0.9")
    finding = check_extras(['timm>=1; extra == "timm"', 'quadprog; extra == "gem"', "torch"])
    assert finding.ok
    assert finding.found == 'installed: none; optional: gem, timm (pip install "clframe[gem]")'
    installed(timm="1.2", quadprog="0.1")
    assert check_extras(['timm>=1; extra == "timm"', 'quadprog; extra == "gem"']).found == "installed: gem, timm"


def test_threads_are_compared_with_the_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert check_threads(threads=8, cores=8).ok
    assert check_threads(threads=2, cores=1.5).ok
    finding = check_threads(threads=8, cores=2)
    assert str(finding).endswith("torch uses 8 on 2 cores (OMP_NUM_THREADS=8); set OMP_NUM_THREADS=2 or trainer.threads")


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5e9))
    finding = check_folder("output", tmp_path / "a" / "b")
    assert (finding.ok, finding.found) == (True, f"{tmp_path / 'a' / 'b'}, will be made, 5.0 GB free")
    assert not (tmp_path / "a").exists() and not os.listdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    assert (check_folder("output", tmp_path).ok, check_folder("output", tmp_path).advice) == (False, "free some space")
    (tmp_path / "file").write_text("")
    assert check_folder("output", tmp_path / "file" / "runs").found == f"{tmp_path / 'file'} is a file"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    finding = check_folder("output", tmp_path)
    assert str(finding) == f"fix  output         {tmp_path} cannot be written (Permission denied); choose another folder"


def test_data(tmp_path):
    (there,) = check_data({"path": str(tmp_path), "size": 8}, name="image_folder")
    assert there.ok
    (missing,) = check_data({"path": str(tmp_path / "x")}, name="image_folder")
    assert missing.advice == "give an existing one as benchmark.path=PATH"
    (no_download,) = check_data({"data_dir": str(tmp_path / "x"), "download": False}, name="cub200")
    assert no_download.advice == "give the folder of cub200 as benchmark.data_dir=DIR"
    (download,) = check_data({"data_dir": str(tmp_path / "x"), "download": True}, name="cub200")
    assert download.ok and "will be made" in download.found


def test_the_small_run(tmp_path):
    def run(name, overrides, *, output):
        assert os.path.isdir(output) and "trainer.accelerator=auto" in overrides
        return SimpleNamespace(accuracy_matrix=[[accuracy]], train_seconds=1.25, steps=12)

    accuracy = 0.9
    finding = check_trial(run)
    assert finding.ok and finding.found.endswith("1.2 s training of 12 steps, accuracy 90 % on the first five digits")
    accuracy = 0.2
    assert not check_trial(run).ok


def test_a_run_that_fails_is_one_line():
    def run(name, overrides, *, output):
        raise RuntimeError("CUDA error:\nno kernel image")

    assert str(check_trial(run)) == (
        "fix  small run      RuntimeError: CUDA error: no kernel image; repeat it with clframe run quickstart --debug"
    )


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "570.1")
    finding = doctor.check_gpu()
    assert not finding.ok and finding.found == f"NVIDIA driver 570.1, but torch {torch.__version__} sees no GPU"
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "")
    assert doctor.check_gpu() == doctor.Finding("GPU", True, "none: runs use the CPU")
