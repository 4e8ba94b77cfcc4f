"""Two processes that share every batch compute what one process computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conformance_runs import NEEDS_TOKENS
from device_pair import BATCH, differences, expression_of, run_pair, train_case
from torch import nn

from clframe.config.schema import Config
from clframe.config.trainer import TrainerConfig
from clframe.config.typed import from_mapping
from clframe.core import COMPONENTS, parse
from clframe.errors import ClframeError
from clframe.training import reduction
from clframe.training.devices import check_devices, process_count, training_devices
from clframe.training.distributed import Group, learning_norms
from clframe.training.reduction import GradientReduction, in_memory_order
from clframe.training.shares import divide
from clframe.training.synchronization import fingerprint

SMALL = {"per_class": 5, "epochs": 1, "experiences": 2}
CASES = {
    "naive": {"expression": "naive", **SMALL},
    "er + lwf + exits + sparsity": {"expression": "er(memory=12) + exits + lwf + sparsity", **SMALL},
    "ewc": {"expression": "ewc", **SMALL},
}
"""Runs of the default suite, in one pair of processes: 10 samples an experience, so a shared batch and a whole one."""
REFUSED = ("gss", "mir")
"""Components that choose samples inside a step by numbers that a GPU rounds."""
SLOW = {
    **{name: {"expression": expression_of(name), "backbone": "vit_tiny" if name in NEEDS_TOKENS else "mlp"}
       for name in COMPONENTS.names() if name not in REFUSED},
    "herding": {"expression": "er(memory=12, selection=herding) + icarl"},
    "experts and replay": {"expression": "er(memory=12) + moe(samples=16)", "backbone": "vit_tiny"},
    "read from files": {"expression": "er(memory=12)", "lazy": True},
    "read from files with the buffer": {"expression": "er(memory=12, replay=concatenate)", "lazy": True},
    "accumulation": {"expression": "er", "accumulate": 2},
    "clipping, projected gradients": {"expression": "agem", "clip": 0.5},
    "projected and accumulated": {"expression": "agem", "accumulate": 2},
    "apart, even": {"expression": "er(batches=apart) + sparsity"},
    "apart, odd": {"expression": "er(batches=apart, ratio=0.4) + sparsity"},
    "reservoir": {"expression": "derpp(update=step, selection=reservoir)"},
    "float32": {"expression": "er + exits + lwf", "precision": "32-true"},
    "compiled": {"expression": "er + exits + lwf", "compile": "aot_eager"},
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Results of both processes by case."""
    return run_pair(CASES, tmp_path_factory.mktemp("pair"))


def test_shares_are_a_partition_and_the_order_restores_the_batch() -> None:
    for size, parts, world in ((8, (), 2), (7, (), 3), (10, (6, 4), 2), (5, (3, 2), 2), (9, (), 4)):
        shares = [divide(size, parts, rank=rank, world=world) for rank in range(world)]
        assert sorted(row for share in shares for row in share.rows.tolist()) == list(range(size))
        most = shares[0].most
        gathered = torch.full((world * most,), -1)
        for rank, share in enumerate(shares):
            gathered[rank * most : rank * most + share.count] = share.rows
            assert sum(share.parts) == (share.count if parts else 0)
        assert all(gathered[share.order].tolist() == list(range(size)) for share in shares)


def test_batches_too_small_or_uneven_are_computed_whole() -> None:
    group = Group(1, [torch.device("cpu")] * 2)
    assert group.share(3, least=2) is None
    share = group.share(5, least=2)
    assert share is not None and share.rows.tolist() == [1, 3]
    assert group.share(9, (4, 5), least=2) is None  # means over parts are not weighted means over shares
    share = group.share(8, (4, 4), least=2)
    assert share is not None and share.rows.tolist() == [1, 3, 5, 7] and share.parts == (2, 2)


def test_a_fingerprint_notices_a_changed_or_exchanged_tensor() -> None:
    a, b = torch.randn(3), torch.randn(4)
    assert fingerprint([a, b]) == fingerprint([a.clone(), b.clone()])
    assert fingerprint([a, b]) != fingerprint([b, a])
    assert fingerprint([a + 1e-6, b]) != fingerprint([a, b])
    assert fingerprint([]) == 0


def test_gradients_are_written_through_their_views() -> None:
    plain, images = torch.zeros(2, 3), torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for tensor in (plain, images, torch.zeros(3, 2).t()):
        row = in_memory_order(tensor)
        row.copy_(torch.arange(tensor.numel()).view(row.shape))
        assert row.data_ptr() == tensor.data_ptr() and sorted(tensor.flatten().tolist()) == list(range(tensor.numel()))
    assert in_memory_order(images).is_contiguous() and float(images[0, 1, 0, 0]) == 1.0  # channels are neighbors


class _Twins:
    """Stands for two processes with the same gradients: a sum over them is twice the own value, seen after ``wait``."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def broadcast_object_list(self, objects, source) -> None:
        assert source == 0

    def all_reduce(self, flat, async_op):
        assert async_op
        self.sizes.append(flat.numel())
        return SimpleNamespace(wait=lambda: flat.mul_(2))


def test_sums_of_gradients_start_during_the_backward_pass(monkeypatch) -> None:
    processes = _Twins()
    monkeypatch.setattr(reduction, "dist", processes)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False), nn.Linear(5, 2, bias=False))
    unused = nn.Parameter(torch.zeros(7))
    average = GradientReduction([unused, *net.parameters()], world=2, size=20)
    x = torch.randn(6, 3)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    for step in range(3):
        net.zero_grad()
        processes.sizes.clear()
        average.begin()
        net(x).square().sum().backward()
        # Gradients of the last layer are complete first; the first pass only shows that order.
        assert processes.sizes == ([] if step == 0 else [10, 20])
        average.finish()
        assert processes.sizes == [10, 20, 19]  # 12 values of the first layer and 7 of what has no gradient
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, gradient)
        assert unused.grad is None
    average.begin()
    average.close()
    net(x).sum().backward()
    assert processes.sizes == [10, 20, 19]


def test_only_batch_normalization_of_shares_is_averaged() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.LayerNorm(2), nn.SyncBatchNorm(2), nn.BatchNorm1d(2).eval())
    assert learning_norms(net) == [net[0]]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_agree_and_equal_one(case, pair) -> None:
    first, second = ({k: v for k, v in results[case].items() if k != "seen"} for results in pair)
    one = train_case(**CASES[case])
    one.pop("seen")
    assert differences(first, second) == []
    # Losses and norms of gradients of every step, weights, buffers, teachers, importances, accuracies and costs.
    assert differences(first, one, tolerance=1e-7) == []
    assert len(first["terms"]) >= 4 and all(term["loss/task/ce"] > 0 for term, _ in first["terms"])


def test_each_sample_is_trained_on_once_per_epoch(pair) -> None:
    first, second = (results["naive"]["seen"] for results in pair)
    one = Counter(train_case(**CASES["naive"])["seen"])
    assert set(one.values()) == {1} and len(one) == 2 * 10
    # 10 samples: a batch of 8 is shared, each process computes the last one of 2 as a whole.
    shared = Counter(first) + Counter(second)
    whole = [sample for sample, count in shared.items() if count == 2]
    assert shared.keys() == one.keys() and set(shared.values()) == {1, 2}
    assert len(whole) == 2 * (10 % BATCH)
    assert len(first) == len(second) == 2 * (BATCH // 2 + 10 % BATCH)


@pytest.mark.slow
def test_every_component_agrees_with_one_process(tmp_path) -> None:
    first, second = run_pair(SLOW, tmp_path)
    wrong = {}
    for name, options in SLOW.items():
        one = train_case(**options)
        for result in (first[name], second[name], one):
            result.pop("seen")
        tolerance = 1e-3 if options.get("precision") == "32-true" else 1e-6
        found = differences(first[name], second[name]) + differences(first[name], one, tolerance=tolerance)
        if found:
            wrong[name] = found[:3]
    assert wrong == {}


@pytest.mark.slow
def test_batch_normalization_and_16_bit(tmp_path) -> None:
    cases = {
        "statistics": {"expression": "er + exits", "backbone": "resnet20", "precision": "32-true"},
        "bf16-mixed": {"expression": "er + lwf + exits", "precision": "bf16-mixed"},
        "bf16-true": {"expression": "derpp", "precision": "bf16-true"},
    }
    first, second = run_pair(cases, tmp_path)
    for name in cases:
        assert differences(first[name]["weights"], second[name]["weights"]) == [], name
        assert differences(first[name]["states"], second[name]["states"]) == [], name
        assert differences(first[name]["terms"], second[name]["terms"]) == [], name


def config(**trainer) -> Config:
    tree = {"name": "a", "benchmark": {"name": "digits"}, "backbone": {"name": "mlp"}, "trainer": trainer}
    return from_mapping(tree)


@pytest.mark.parametrize(
    ("trainer", "strategy", "cuda", "message"),
    [
        ({"devices": 2}, "er", False, None),
        ({"devices": 1, "engine": "trainer"}, "mir", False, None),
        ({"devices": 2, "engine": "trainer"}, "er", False,
         "trainer.devices: found 2 with engine trainer, which trains on one; set trainer.engine=fabric"),
        ({"devices": 2}, "mir", False,
         "trainer.devices: found 2, but the component 'mir' does not declare that it computes the same in every process; "
         "give 1, or set distributed = True in its class if it does"),
        ({"devices": 2, "batch_size": 3}, "er", False,
         "trainer.batch_size: found 3 for 2 devices, which divide a batch; give at least 4"),
        ({"devices": 2, "sync_batchnorm": True}, "er", False,
         "trainer.sync_batchnorm: found true, but torch synchronizes it on GPUs only; set false"),
        ({"devices": 2, "accelerator": "mps"}, "er", False,
         "trainer.devices: found 2 with accelerator mps, which has one device; give 1"),
        ({"devices": [0, 1]}, "er", True, "trainer.devices: found [0, 1], but torch sees 0 GPUs; give fewer"),
    ],
)  # fmt: skip
def test_what_cannot_train_on_several_devices_is_refused(trainer, strategy, cuda, message) -> None:
    if message is None:
        check_devices(config(**trainer), parse(strategy), cuda=cuda)
        return
    with pytest.raises(ClframeError) as error:
        check_devices(config(**trainer), parse(strategy), cuda=cuda)
    assert str(error.value) == message


def test_plugins_of_avalanche_and_launchers_are_refused(monkeypatch) -> None:
    tree = {"name": "a", "benchmark": {"name": "digits"}, "backbone": {"name": "mlp"}, "trainer": {"devices": 2},
            "components": {"avalanche": {"plugins": ["LwFPlugin"]}}}  # fmt: skip
    with pytest.raises(ClframeError, match="Avalanche plugin LwFPlugin, which knows one process only"):
        check_devices(from_mapping(tree), parse("naive"), cuda=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ClframeError, match="start clframe once"):
        check_devices(config(devices=2), parse("naive"), cuda=False)


def test_a_component_says_so() -> None:
    ours = [name for name in COMPONENTS.names() if COMPONENTS.get(name).__module__.startswith("strategies.")]
    assert tuple(name for name in ours if not COMPONENTS.get(name).distributed) == REFUSED


def test_devices_of_the_processes() -> None:
    assert training_devices(TrainerConfig(devices=(2, 0)), cuda=True) == (
        torch.device("cuda", 2), torch.device("cuda", 0),
    )  # fmt: skip
    assert process_count(TrainerConfig(devices=(2, 0))) == 2 and process_count(TrainerConfig(devices=3)) == 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_agree_and_equal_one(tmp_path) -> None:
    script, found = Path(__file__).parents[2] / "perf" / "data_parallel.py", tmp_path / "found.json"
    command = [sys.executable, str(script), "--only", "checks", "--minutes", "5", "--json", str(found)]
    subprocess.run(command, check=True, timeout=360)
    rows = {row["check"]: row for row in json.loads(found.read_text())["rows"]}
    resumed = rows.pop("resume 2 -> 1 -> 2")
    assert resumed["fine"] and resumed["accuracies_equal"]
    recorded = {name: row["equal"] for name, row in rows.items() if name.startswith("recorded ")}
    assert len(recorded) == 5 and all(recorded.values())
    for name in rows.keys() - recorded.keys():
        row = rows[name]
        assert row["equal_in_all_processes"] and row["equal_to_one_device"] and row["accuracies_equal"], name
        assert row["new_samples_once_per_epoch"], name
    assert len(rows) - len(recorded) == 6
