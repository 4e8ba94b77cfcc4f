"""Deferred packages and stand-ins: imported when used, once, as the package itself."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from clframe.lazy_imports import Deferred, defer_package, use_stand_in, without_collection

NAME = "clframe_slow_package"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that is not imported yet, with one class, and submodules that count how often they run."""
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "__init__.py").write_text(f"from {NAME}.part import Part, VALUE\nLOADED = True\n\nclass Model:\n    size = 3\n")
    (folder / "part.py").write_text("import sys\nVALUE = 5\nsys.part_runs = getattr(sys, 'part_runs', 0) + 1\n"
                                    "class Part: pass\n")  # fmt: skip
    (folder / "other.py").write_text(f"import {NAME}\nSEEN = {NAME}.LOADED\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield NAME
    sys.meta_path[:] = before
    for name in (NAME, f"{NAME}.part", f"{NAME}.other"):
        sys.modules.pop(name, None)
    if hasattr(sys, "part_runs"):
        del sys.part_runs


def test_looking_for_the_module_of_an_object_loads_no_deferred_package(package: str) -> None:
    with defer_package(package, {}):
        module = __import__(package)
    assert inspect.getmodule(types.FunctionType(compile("0", "nowhere.py", "exec"), {})) is None  # asks all modules
    assert "LOADED" not in module.__dict__ and module.LOADED is True


def test_a_missing_package_is_missing_as_ever() -> None:
    with use_stand_in("clframe_no_such_package", ["Model"]), pytest.raises(ModuleNotFoundError):
        import clframe_no_such_package
    with defer_package("clframe_no_such_package", {}), pytest.raises(ModuleNotFoundError):
        import clframe_no_such_package  # noqa: F401


def test_a_deferred_package_imports_only_the_submodule_of_an_attribute(package: str) -> None:
    with defer_package(package, {"Part": f"{package}.part"}, {"early": 7}):
        namespace: dict[str, object] = {}
        exec(f"from {package} import Part, early", namespace)
    module = sys.modules[package]
    assert namespace["early"] == 7 and namespace["Part"] is sys.modules[f"{package}.part"].Part
    assert "LOADED" not in module.__dict__
    assert module.Model.size == 3 and module.Part is namespace["Part"]  # __init__ has run in the same module
    assert sys.modules[package] is module and type(module).__name__ == "module" and sys.part_runs == 1


@pytest.mark.parametrize("submodule", ["part", "other"])
def test_a_submodule_that_is_imported_later_runs_init_first_and_itself_once(package: str, submodule: str) -> None:
    with defer_package(package, {}):
        __import__(package)
    found = importlib.import_module(f"{package}.{submodule}")
    assert sys.modules[package].LOADED is True and sys.part_runs == 1
    assert getattr(sys.modules[package], submodule) is found is sys.modules[f"{package}.{submodule}"]
    assert found.__spec__.loader.__class__.__name__ == "SourceFileLoader"
    if submodule == "part":
        assert sys.modules[package].Part is found.Part


def test_a_deferred_package_has_no_submodules_that_it_does_not_have(package: str) -> None:
    with defer_package(package, {}):
        __import__(package)
    assert importlib.util.find_spec(f"{package}.missing") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{package}.missing")
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        sys.modules[package].missing  # noqa: B018


def test_a_deferred_package_that_fails_fails_like_any_other(package: str) -> None:
    path = Path(str(importlib.util.find_spec(package).origin))
    path.write_text("raise ValueError('broken')")
    with defer_package(package, {}):
        module = __import__(package)
    with pytest.raises(ValueError, match="broken"):
        module.Model  # noqa: B018
    assert package not in sys.modules


def test_init_of_a_deferred_package_runs_in_its_context(package: str) -> None:
    entered: list[bool] = []

    @contextlib.contextmanager
    def within():
        entered.append("LOADED" in sys.modules[package].__dict__)
        yield
        entered.append("LOADED" in sys.modules[package].__dict__)

    with defer_package(package, {}, within=within):
        __import__(package)
    assert entered == [] and sys.modules[package].LOADED is True and entered == [False, True]


@pytest.mark.parametrize("inside", [False, True])
def test_a_submodule_of_a_deferred_package_has_a_stand_in(package: str, inside: bool) -> None:
    with defer_package(package, {}), use_stand_in(f"{package}.part", ["Part"]):
        namespace: dict[str, object] = {}
        exec(f"import {package}.part as part\nfrom {package}.part import Part", namespace)
        assert "LOADED" not in sys.modules[package].__dict__
        if inside:  # something else in the block needs the package
            sys.modules[package].LOADED  # noqa: B018
    module = sys.modules[package]
    found = importlib.import_module(f"{package}.part")
    assert module.LOADED is True and module.part is found and sys.part_runs == 1
    assert namespace["part"].VALUE == 5 and isinstance(namespace["Part"](), found.Part)


def test_a_stand_in_gives_objects_that_import_on_first_use(package: str) -> None:
    with use_stand_in(package, ["Model"]):
        namespace: dict[str, object] = {}
        exec(f"from {package} import Model", namespace)
        assert importlib.util.find_spec(package) is not None
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


def test_a_stand_in_for_a_submodule_imports_neither_it_nor_its_package(package: str) -> None:
    with use_stand_in(package, []), use_stand_in(f"{package}.part", ["Part"]):
        namespace: dict[str, object] = {}
        exec(f"import {package}.part as part\nfrom {package} import part as same\nfrom {package}.part import Part", namespace)
        assert namespace["part"] is namespace["same"] is sys.modules[f"{package}.part"]
    assert not hasattr(sys, "part_runs")
    assert namespace["part"].VALUE == 5 and sys.part_runs == 1  # type: ignore[attr-defined]


def test_instances_are_looked_for_where_the_class_may_be(package: str) -> None:
    part = Deferred(f"{package}.part", "Part", home=package)
    assert not isinstance(3, part) and not hasattr(sys, "part_runs")  # type: ignore[arg-type]
    real = importlib.import_module(f"{package}.part").Part
    assert isinstance(real(), part) and isinstance(type("Own", (real,), {})(), part)  # type: ignore[arg-type]
    assert not isinstance(importlib.import_module(package).Model(), part)  # type: ignore[arg-type]


def test_the_collector_is_left_as_it_was() -> None:
    import gc

    assert gc.isenabled()
    with without_collection(), without_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def python(code: str) -> str:
    """Run code in a new process; returns what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_deferred_packages_work_when_they_are_used() -> None:
    code = """
import sys, warnings
import clframe.avalanche_bridge.imports, torch
assert not [n for n in ("matplotlib", "scipy.signal", "torch._dynamo.utils", "transformers") if n in sys.modules]
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.Adam([weight])
assert "torch._dynamo.utils" not in sys.modules
from torchmetrics.aggregation import MeanMetric
import torchmetrics
assert torchmetrics.MeanMetric is MeanMetric
assert torchmetrics.Metric is sys.modules["torchmetrics.metric"].Metric and issubclass(MeanMetric, torchmetrics.Metric)
from avalanche.evaluation.metrics import TopkAccuracy
metric = TopkAccuracy(1)
metric.update(torch.eye(3), torch.tensor([0, 1, 1]), 0)
assert abs(metric.result_task_label(0)[0] - 2 / 3) < 1e-6
from avalanche.logging.tensorboard_logger import Figure
import matplotlib.figure
assert isinstance(matplotlib.figure.Figure(), Figure) and not isinstance(weight, Figure)
compiled = torch.compile(lambda x: x * 2, backend="eager")
assert compiled(torch.ones(2)).tolist() == [2, 2] and "torch._dynamo.utils" in sys.modules
from lightning.fabric.wrappers import OptimizedModule
assert isinstance(torch.compile(torch.nn.Linear(1, 1), backend="eager"), OptimizedModule)
assert not isinstance(torch.nn.Linear(1, 1), OptimizedModule)
weight.grad = torch.ones(2)
optimizer.step()
optimizer.zero_grad()
assert weight.grad is None and torch._dynamo.disable.__module__ == "torch._dynamo.decorators"
print("done")
"""
    assert python(code) == "done"
