"""Imports of Avalanche and torchmetrics without the packages they hardly use; each case in a separate process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clframe.data.slow_imports import defer_imports, use_stand_in


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that is not imported yet, with one class and one submodule."""
    folder = tmp_path / "clframe_slow_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("LOADED = True\n\nclass Model:\n    size = 3\n")
    (folder / "part.py").write_text("VALUE = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder.name
    for name in (folder.name, f"{folder.name}.part"):
        sys.modules.pop(name, None)


def test_a_deferred_package_loads_on_first_use_and_is_then_the_package(package: str) -> None:
    with defer_imports([package]):
        module = __import__(package)
    assert type(module).__name__ == "_LazyModule"
    import importlib

    assert importlib.import_module(f"{package}.part").VALUE == 5
    assert sys.modules[package] is module and module.LOADED is True
    assert type(module).__name__ == "module"


def test_a_missing_package_is_missing_as_ever() -> None:
    with defer_imports(["clframe_no_such_package"]), pytest.raises(ModuleNotFoundError):
        import clframe_no_such_package
    with use_stand_in("clframe_no_such_package", ["Model"]), pytest.raises(ModuleNotFoundError):
        import clframe_no_such_package  # noqa: F401


def test_a_stand_in_gives_objects_that_import_on_first_use(package: str) -> None:
    with use_stand_in(package, ["Model"]):
        namespace: dict[str, object] = {}
        exec(f"from {package} import Model", namespace)
    assert package not in sys.modules  # neither the stand-in nor the package
    model = namespace["Model"]
    assert model.size == 3  # type: ignore[attr-defined]
    real = sys.modules[package].Model
    assert isinstance(model(), real)  # type: ignore[operator]


def test_another_attribute_imports_the_package_within_the_block(package: str) -> None:
    with use_stand_in(package, ["Model"]):
        namespace: dict[str, object] = {}
        exec(f"from {package} import LOADED", namespace)
    assert namespace["LOADED"] is True
    assert sys.modules[package].Model.size == 3


@pytest.mark.slow
def test_avalanche_is_imported_without_packages_that_it_does_not_use() -> None:
    code = (
        "import sys\nfrom clframe.data.avalanche import import_avalanche\nimport_avalanche()\n"
        "print([n for n in ('transformers', 'wandb.sdk', 'bs4', 'sklearn') if n in sys.modules])\n"
        "import lightning, avalanche.evaluation.metrics\n"
        "print('transformers' in sys.modules)"
    )
    assert _python(code) == "[]\nFalse"


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
