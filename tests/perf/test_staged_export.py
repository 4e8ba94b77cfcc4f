"""Times of an exported graph and of its stages."""

import numpy as np
import pytest

import clframe


@pytest.mark.slow
def test_a_run_is_exported_and_timed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    import staged_export

    monkeypatch.setattr(staged_export, "REPEATS", 1)
    tiny = ["backbone=mlp", "backbone.width=8", "strategy=exits", "trainer.fast_dev_run=true", "trainer.figures=none"]
    run = clframe.run("quickstart", tiny, output=tmp_path).run_folder
    np.save(tmp_path / "x.npy", np.zeros((64, 1, 8, 8), dtype="uint8"))
    staged_export.main(str(run), str(tmp_path / "x.npy"), "0")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("mean MACs") and lines[-3].endswith("exits [64]")
    assert [line.partition(":")[0] for line in lines[-2:]] == ["batch 1", "batch 32"]
