"""Imports of runs and verbs without the packages that they do not use; each case in a separate process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_avalanche_is_imported_without_packages_that_it_does_not_use() -> None:
    code = (
        "import sys\nfrom clframe.data.avalanche import import_avalanche\nimport_avalanche()\n"
        "print([n for n in ('transformers', 'wandb.sdk', 'bs4', 'sklearn') if n in sys.modules])\n"
        "import lightning, avalanche.evaluation.metrics\n"
        "print('transformers' in sys.modules)"
    )
    assert _python(code) == "[]\nFalse"


def test_a_run_imports_only_what_its_config_uses(tmp_path: Path) -> None:
    code = f"""
import sys
import clframe
overrides = ["trainer.fast_dev_run=true", "trainer.figures=none", "trainer.progress=false"]
result = clframe.run("quickstart", overrides, output={str(tmp_path)!r})
assert result.macs > 0
unused = (
    "torch._inductor", "torch._dynamo.utils", "triton", "sympy", "scipy.signal", "matplotlib", "sklearn", "pandas",
    "torchmetrics.functional", "transformers", "timm", "wandb.sdk", "bs4", "GPUtil.GPUtil", "onnx",
)
print([name for name in unused if name in sys.modules])
"""
    assert _python(code).splitlines()[-1] == "[]"


def test_verbs_that_do_not_train_import_neither_avalanche_nor_lightning() -> None:
    code = (
        "import sys\nimport clframe.targets.prediction, clframe.targets.export, clframe.targets.evaluation\n"
        "import clframe.targets.latency, clframe.report, clframe.model, clframe.api\n"
        "heavy = ('avalanche', 'lightning', 'torchmetrics', 'sklearn', 'torchvision', 'matplotlib')\n"
        "print([n for n in heavy if n in sys.modules])"
    )
    assert _python(code) == "[]"


def test_the_bundled_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    from clframe.data.sources.characters import _read_digits

    images, labels = _read_digits()
    bunch = load_digits()
    assert images[:, 0].tolist() == bunch.images.tolist()
    assert labels.tolist() == bunch.target.tolist()
