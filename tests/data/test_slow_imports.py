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
    "torchvision.models", "torchvision.ops", "torch.onnx",
)
print([name for name in unused if name in sys.modules])
"""
    assert _python(code).splitlines()[-1] == "[]"


@pytest.mark.slow  # the default suite uses much of torchvision after such an import
def test_torchvision_is_whole_when_something_in_it_is_used() -> None:
    code = (
        "import sys, torch\nfrom clframe.data.avalanche import import_avalanche\nimport_avalanche()\n"
        "import clframe.avalanche_bridge.imports\nimport avalanche.models.slda_resnet as slda\n"
        "assert not any(n in sys.modules for n in ('torchvision.models', 'torchvision.ops'))\n"
        "import torchvision.models\nfrom torchvision import ops\n"
        "from avalanche.training.plugins.rar import get_graph_node_names\n"
        "assert torchvision.models is sys.modules['torchvision.models'] and torchvision.__version__\n"
        "assert slda.models.resnet18 is torchvision.models.resnet18\n"
        "assert get_graph_node_names(torchvision.models.mobilenet_v2())[0][0] == 'x'\n"
        "assert ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0.5]), 0.5).tolist() == [0]\n"
        "print('torch._dynamo.utils' in sys.modules)"
    )
    assert _python(code) == "False"


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
