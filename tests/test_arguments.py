"""Arguments of public functions from Python: values of another type are refused in one line before any work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import clframe
from clframe.data import Benchmark, digits
from clframe.errors import ClframeError
from clframe.exits import (
    DynamicNetwork,
    ExitEvaluation,
    ExitPolicy,
    LearnedConfidence,
    evaluate_thresholds,
    patience_threshold,
    solve,
)
from clframe.files import to_path
from clframe.moe import DynamicK
from clframe.nn import GrowingLinear, Network
from clframe.nn.backbones import mlp
from clframe.seeding import derive_seed
from clframe.targets.evaluation import evaluate
from clframe.targets.exit_points import solve_run
from clframe.targets.export import export
from clframe.targets.latency import time_run


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(ClframeError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("config", [None, 3, b"quickstart", {"name": "x"}])
def test_configs_are_names_paths_or_typed(config: Any) -> None:
    found = {None: "null", 3: "3"}.get(config, "") if not isinstance(config, dict) else "{'name': 'x'} (a mapping)"
    advice = "give the name or path of a config"
    assert message(lambda: clframe.run(config)).startswith(f"run: found {found}") and advice in message(lambda: clframe.run(config))
    assert message(lambda: clframe.explain(config)).startswith(f"explain: found {found}")
    assert message(lambda: clframe.load_config(config)).startswith(f"config: found {found}")


def test_a_path_is_a_config_as_its_text_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("defaults: [experiment/quickstart]\nseed: 7\n")
    assert clframe.load_config(file) == clframe.load_config(str(file))
    assert clframe.load_config(file).seed == 7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"folder": 3}, "folder: found 3; give a path"),
        ({"folder": "a\0b"}, "folder: found 'a\\x00b', which no path can be; give another"),
        ({"output": 3}, "output: found 3; give a path"),
        ({"resume": b"runs"}, "resume: found b'runs'; give a path"),
        (
            {"resume": "runs", "output": "other"},
            "output: found resume as well; leave it out, as a resumed run stays in its folder",
        ),
        ({"on_built": 3}, "run: on_built: found 3; give a function"),
        ({"on_evaluated": "print"}, "run: on_evaluated: found 'print' (text); give a function"),
    ],
)
def test_arguments_of_a_run(options: dict[str, Any], expected: str) -> None:
    assert message(lambda: clframe.run("quickstart", **options)) == expected


@pytest.mark.parametrize("run", [None, 3, b"runs"])
def test_a_run_is_a_path(run: Any) -> None:
    assert message(lambda: clframe.load(run)) == f"load: found {run!r}; give a path"
    assert message(lambda: clframe.api.extend(run, digits())) == f"extend: found {run!r}; give a path"


def test_paths_may_be_objects(tmp_path: Path) -> None:
    assert to_path(tmp_path, where="x") == to_path(str(tmp_path), where="x") == tmp_path


@pytest.mark.parametrize("device", ["cpuu", None, 3, "meta"])
def test_a_model_is_loaded_to_a_device_that_exists(tmp_path: Path, device: Any) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    found = message(lambda: clframe.load(tmp_path, device=device))
    assert found.startswith(f"load: device: found {device}") and found.endswith("cpu, cuda, cuda:N or mps")


@pytest.mark.parametrize("text", [None, 3, ["er"]])
def test_a_strategy_is_text(text: Any) -> None:
    assert message(lambda: clframe.parse(text)).startswith("strategy: found ")


@pytest.mark.parametrize("options", [["er"], {"er": None}, {"er": [50]}])
def test_options_of_components_are_mappings(options: Any) -> None:
    assert message(lambda: clframe.parse("er", options)).endswith("give options by component, such as {'er': {'memory': 50}}")


@pytest.fixture(scope="module")
def benchmark() -> Benchmark:
    return clframe.class_incremental(digits(), experiences=5)


def network() -> Network:
    return Network(mlp((1, 8, 8), width=8), exits=[("layer1", GrowingLinear(8))])


MODULE: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": None}, "optimizer: found none; give a function that creates one for the parameters in each experience, such as partial(SGD, lr=0.1)"),
    ({"optimizer": SGD([nn.Parameter(torch.zeros(1))])}, "optimizer: found an optimizer; give a function that creates one for the parameters in each experience, such as partial(SGD, lr=0.1)"),
    ({"optimizer": "sgd"}, "optimizer: found 'sgd' (text); give a function"),
    ({"scheduler": 3}, "scheduler: found 3; give a function"),
    ({"groups": 3}, "groups: found 3; give a function"),
    ({"seed": "3"}, "seed: found '3' (text); give a whole number or null"),
    ({"seed": 1.5}, "seed: found 1.5; give a whole number or null"),
    ({"clip": 0}, "clip: found 0; give a number above 0, or None for no clipping"),
    ({"clip": "1"}, "clip: found '1' (text); give a number or null"),
    ({"clip": float("nan")}, "clip: found nan; give a finite number"),
    ({"average": 0.9}, "average: found 0.9; give a WeightAverage"),
    ({"network": nn.Linear(2, 3)}, "network: found Linear(in_features=2, out_features=3, bias=True); give a Network"),
    ({"network": None}, "network: found none; give a Network"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), MODULE)
def test_arguments_of_a_module(options: dict[str, Any], expected: str) -> None:
    given = {"network": network(), "optimizer": partial(SGD, lr=0.1), **options}
    assert message(lambda: clframe.ContinualModule(**given)) == f"ContinualModule.{expected}"


STRATEGY: list[tuple[dict[str, Any], str]] = [
    ({"drop_last": "no"}, "LightningStrategy.drop_last: found 'no' (text); give true or false"),
    ({"compile": 3}, "LightningStrategy.compile: found 3; give true or false or text"),
    ({"eval_every": -2}, "LightningStrategy.eval_every: found -2; give at least -1"),
    ({"trainer": 3}, "LightningStrategy.trainer: found 3; give a mapping or null"),
    ({"early_stopping": 3}, "LightningStrategy.early_stopping: found 3; give an EarlyStopping"),
    ({"benchmark": 3}, "LightningStrategy.benchmark: found 3; give a Benchmark"),
    ({"optimizer": 3}, "LightningStrategy.optimizer: found 3; give an Optimizer"),
    ({"criterion": "ce"}, "LightningStrategy.criterion: found 'ce' (text); give a function"),
    ({"plugins": 3}, "LightningStrategy.plugins: found 3; give a Sequence"),
    ({"plugins": ["er"]}, "LightningStrategy.plugins[0]: found 'er' (text); give a plugin of Avalanche"),
    ({"model": "mlp"}, "LightningStrategy.model: found 'mlp' (text); give a Module"),
]


@pytest.mark.parametrize(("options", "expected"), STRATEGY)
def test_arguments_of_a_strategy(benchmark: Benchmark, options: dict[str, Any], expected: str) -> None:
    module = clframe.ContinualModule(network(), optimizer=partial(SGD, lr=0.1))
    given = {"model": module, "benchmark": benchmark, "evaluator": None, **options}
    assert message(lambda: clframe.LightningStrategy(**given)) == expected


def test_a_strategy_needs_a_device_that_exists(benchmark: Benchmark) -> None:
    module = clframe.ContinualModule(network(), optimizer=partial(SGD, lr=0.1))
    found = message(lambda: clframe.LightningStrategy(model=module, benchmark=benchmark, device="cpuu"))
    assert found.startswith("device: found cpuu, but ")


@pytest.mark.parametrize("thresholds", ["0.5", None, True, (0.5, "a"), [0.5, None], float("nan")])
def test_thresholds_of_a_policy_are_numbers(thresholds: Any) -> None:
    found = message(lambda: ExitPolicy(thresholds=thresholds))
    assert found.startswith("policy: found thresholds ") and found.endswith("; give numbers")


@pytest.mark.parametrize("thresholds", [[0.5, 0.75], np.array([0.5, 0.75]), torch.tensor([0.5, 0.75])])
def test_thresholds_may_be_lists_and_arrays(thresholds: Any) -> None:
    assert ExitPolicy(thresholds=thresholds) == ExitPolicy(thresholds=(0.5, 0.75))
    assert ExitPolicy(thresholds=np.float64(0.5)) == ExitPolicy(thresholds=torch.tensor(0.5)) == ExitPolicy(thresholds=0.5)


@pytest.mark.parametrize("measure", ["entropy", None, LearnedConfidence])
def test_a_measure_is_a_function(measure: Any) -> None:
    found = message(lambda: ExitPolicy(thresholds=0.5, measure=measure))
    assert found.startswith("policy: found measure ")
    assert found.endswith("give a function, such as CONFIDENCE_MEASURES.get('entropy'), or an object of a fitted one")


@pytest.mark.parametrize("agreements", [-1, 0.5, "1"])
def test_patience_is_a_count(agreements: Any) -> None:
    assert message(lambda: patience_threshold(agreements)).startswith("patience_threshold: agreements: found ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"exits": 0}, "dynamic: found exits 0; give a list of indices or names"),
        ({"exits": "layer1"}, "dynamic: found exits 'layer1' (text); give a list of indices or names"),
        ({"exits": [0.5]}, "dynamic: found exit 0.5; give its index or name"),
        ({"exits": [True]}, "dynamic: found exit true; give its index or name"),
        ({"compact": "a"}, "dynamic: found compact=a; give a share of 0 or more"),
        ({"adjust": 3}, "dynamic: found adjust=3; give a function of exit, logits and taps"),
        ({"policy": 0.5}, "dynamic: found a float; give the ExitPolicy"),
        ({"network": nn.Linear(2, 2)}, "dynamic: found a Linear; give the Network"),
    ],
)
def test_arguments_of_a_dynamic_network(options: dict[str, Any], expected: str) -> None:
    given = {"network": network(), "policy": ExitPolicy(thresholds=0.5), **options}
    assert message(lambda: DynamicNetwork(**given)) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"format": None}, "export: --format: unknown format 'None'; "),
        ({"dtype": torch.float16}, "export: --input: unknown type 'torch.float16'; did you mean 'float32'?"),
        ({"staged": "yes"}, "export: --staged: found 'yes' (text); give true or false"),
        ({"staged": True, "threshold": "0.5"}, "export: --threshold: found '0.5' (text); give a probability from 0 to 1"),
        ({"staged": True, "threshold": float("inf")}, "export: --threshold: found inf; give a probability from 0 to 1"),
        ({"opset": "18"}, "export: --opset: found '18' (text); give a whole number or null"),
    ],
)
def test_arguments_of_an_export(options: dict[str, Any], expected: str) -> None:
    model: Any = None
    assert message(lambda: export(model, "exported", **options)).startswith(expected)


def test_seeds_of_numpy_are_those_of_python() -> None:
    assert derive_seed(np.int64(3), "order", np.int32(2)) == derive_seed(3, "order", 2)  # type: ignore[arg-type]


EVALUATION = ExitEvaluation(
    confidence_KN=torch.tensor([[0.9, 0.4], [0.8, 0.7]]), correct_KN=torch.tensor([[True, False], [True, True]]), cost_K=(10, 40)
)  # fmt: skip


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: solve(EVALUATION, budget="25"), "budget: found '25' (text); give a number"),  # type: ignore[arg-type]
        (lambda: solve(EVALUATION, accuracy=True), "accuracy: found true; give a number"),
        (lambda: solve(EVALUATION, budget=25, fallback="lst"), "fallback: found 'lst' (text); give 'last' or 'confident'"),  # type: ignore[arg-type]
        (lambda: evaluate_thresholds(EVALUATION, [0.5], fallback="lst"), "fallback: found 'lst' (text); give 'last' or 'confident'"),  # type: ignore[arg-type]
        (lambda: evaluate_thresholds(EVALUATION, 0.5), "thresholds: found 0.5; give a list, one for each exit but the last"),  # type: ignore[arg-type]
    ],
)
def test_goals_of_thresholds(call: Callable[[], Any], expected: str) -> None:
    assert message(call) == expected


@pytest.mark.parametrize(
    ("exits", "expected"),
    [
        (None, "exits: found null; give a list of (tap, head)"),
        ("layer1", "exits: found 'layer1' (text); give a list of (tap, head)"),
        (["layer1"], "exits: found 'layer1' (text); give each exit as (tap, head)"),
        ([("layer1", nn.Linear(8, 3))], "exits: found a Linear at tap 'layer1'; give a Head, such as GrowingLinear"),
        ([("layer1", None)], "exits: found a NoneType at tap 'layer1'; give a Head, such as GrowingLinear"),
    ],
)
def test_exits_of_a_network_are_pairs(exits: Any, expected: str) -> None:
    assert message(lambda: Network(mlp((4,), width=8), exits=exits)) == expected
    wrong: Any = nn.Linear(2, 2)
    assert message(lambda: Network(wrong)) == "network: found a Linear as backbone; give a Backbone"


@pytest.mark.parametrize("classes", [["a"], [1.5], [True], [0, None]])
def test_classes_are_whole_numbers(classes: Any) -> None:
    assert message(lambda: network().grow(classes)) == f"classes: found {classes[-1]!r}; give whole numbers from 0"
    assert network().grow(np.arange(3)) and network().grow([np.int64(2)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: solve_run("x", budgets=["0.5"]), "--budget[0]: found '0.5' (text); give a number"),  # type: ignore[list-item]
        (lambda: solve_run("x", budgets=0.5), "--budget: found 0.5; give a list"),  # type: ignore[arg-type]
        (lambda: solve_run("x", drops=[2]), "--drop: found 2; give a share from 0 to below 1, such as 0.01"),
        (lambda: time_run("x", batches="1"), "latency: batches: found '1' (text); give a list"),  # type: ignore[arg-type]
        (lambda: time_run("x", repeats=2.5), "latency: repeats: found 2.5; give a whole number"),  # type: ignore[arg-type]
        (lambda: evaluate("x", batch_size=0), "--batch-size: found 0; give at least 1"),
        (lambda: DynamicK(tau="0.5"), "moe.tau: found '0.5' (text); give a number from 0 (one expert a token) to 1 (all of them)"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_studies(call: Callable[[], Any], expected: str) -> None:
    assert message(call) == expected
