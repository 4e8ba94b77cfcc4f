"""Executors chosen from measured times."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clframe.errors import UnsupportedError
from clframe.moe import DynamicK, TopK, count_usage, routed_layers, to_experts, tuning
from clframe.moe import dispatch as execute
from clframe.moe.dispatch import BREAK_EVEN, BREAK_EVEN_TF32, EXECUTORS, choose
from clframe.moe.routed import Measured
from clframe.moe.tuning import measure_layer, time_turns, tune


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)))
    to_experts(made, experts=8, split="random", router_width=16)
    return made.eval()


def test_the_fastest_is_used_for_its_gate_and_size(model):
    (layer,) = routed_layers(model).values()
    layer.gate, x = TopK(k=2), torch.randn(40, 16)
    with torch.no_grad():
        dense, routed = layer.experts(x), model(x)
    assert float((dense - routed).abs().max()) > 0.01
    threads = torch.get_num_threads()
    layer.measured = (
        Measured(TopK(k=2), 40, "grouped", threads), Measured(TopK(k=2), 100, "all", threads),
        Measured(TopK(k=3), 40, "all", threads), Measured(TopK(k=2), 40, "all", threads + 1),
        Measured(TopK(k=2), 40, "all", 0),
    )  # fmt: skip

    def computed(tokens):
        with count_usage(model) as usage, torch.no_grad():
            y = model(x[:tokens])
            (used,) = usage().values()
        return y, used.computed / tokens, used.routed

    for tokens, experts, routes in ((40, 2, True), (19, None, True), (20, 2, True)):
        y, found, routed_tokens = computed(tokens)
        torch.testing.assert_close(y, routed[:tokens])
        assert routed_tokens == (tokens if routes else 0) and (experts is None or found == experts)
    # All experts, without the router: the dense network.
    layer.measured += (Measured(TopK(k=2), 40, "all", threads),)
    y, found, routed_tokens = computed(40)
    torch.testing.assert_close(y, dense)
    assert (found, routed_tokens) == (8, 0)
    layer.measured += (Measured(TopK(k=2), 40, "plan", threads),)
    assert computed(40)[2] == 40
    layer.gate = DynamicK(tau=0.5)
    assert computed(40)[2] == 40
    assert layer.double().measured == ()  # of another dtype


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_every_candidate_runs_as_the_layer_will(model, tokens, monkeypatch):
    (layer,) = routed_layers(model).values()
    layer.gate, x = TopK(k=2), torch.randn(tokens, 16)
    before = layer.measured = (Measured(TopK(k=2), tokens, "all", torch.get_num_threads()),)
    ran, outputs = [], {}

    def clock(calls):
        for name, call in calls.items():
            ran.clear()
            outputs[name] = call()
            assert name == "all" or (name == "plan" or ran == [name]), (name, ran)
        return {name: float(10 - at) for at, name in enumerate(calls)}

    for name in ("dense", "grouped", "grouped_mm", "per_token"):
        own = EXECUTORS[name]
        monkeypatch.setitem(EXECUTORS, name, lambda *args, n=name, f=own: ran.append(n) or f(*args))
    with torch.no_grad():
        found = measure_layer(layer, x, bypass=True, clock=clock)
        plain = measure_layer(layer, x, bypass=False, clock=lambda calls: dict.fromkeys(calls, 1.0))
        reference = EXECUTORS["reference"](layer.experts.weights(), x, layer.keep(x), None)
    assert found.chosen == list(found.ms)[-1] == "all" and plain.chosen == "plan" and "all" not in plain.ms
    assert (found.tokens, found.threads, found.share) == (tokens, torch.get_num_threads(), 0.25)
    assert layer.measured == before and ("per_token" in found.ms) == (tokens <= 16)
    for name, y in outputs.items():
        torch.testing.assert_close(y, layer.experts(x) if name == "all" else reference, msg=name)


def test_another_executor_must_be_faster_than_the_plan_by_its_margin(model):
    (layer,) = routed_layers(model).values()
    layer.gate = TopK(k=2)

    def chosen(dense):
        clock = dict.fromkeys(["plan", "grouped"], 100.0) | {"dense": dense}
        return measure_layer(layer, torch.randn(3, 16), bypass=False, clock=lambda calls: clock).chosen

    assert [chosen(94.9), chosen(95.1)] == ["dense", "plan"]


def test_tuning_on_a_cpu(model, monkeypatch):
    (layer,) = routed_layers(model).values()
    layer.gate, x = TopK(k=2), torch.randn(40, 16)
    monkeypatch.setattr(tuning, "time_turns", lambda calls: {name: float(name != "grouped") for name in calls})
    before = model(x)
    found = tune(model, x)
    assert list(found) == ["0"] and found["0"].chosen == "grouped"
    assert layer.measured == (Measured(TopK(k=2), 40, "grouped", torch.get_num_threads()),)
    torch.testing.assert_close(model(x), before)
    layer.gate = DynamicK(tau=1.0)  # without routing there is nothing to choose
    assert tune(model, x) == {}


def test_turns_alternate_and_the_first_does_not_count(monkeypatch):
    order, now = [], [0.0]

    def run(name):
        def call():
            order.append(name)
            now[0] += (4 if len(order) <= 4 else 1) * {"a": 2, "b": 3}[name]  # the second turn is disturbed, too

        return call

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(tuning, "process_time", lambda: now[0])
    found = time_turns({"a": run("a"), "b": run("b")}, seconds=0, least=3)
    assert "".join(order) == "baabbaab" and found == {"a": 2000.0, "b": 3000.0}


@pytest.mark.parametrize(("threads", "resolution", "used"), [(1, 1e-9, "processor"), (2, 1e-9, "wall"), (1, 0.0156, "wall")])
def test_calls_are_timed_by_the_processor_for_one_thread_if_its_clock_is_fine(threads, resolution, used, monkeypatch):
    read = []

    def clock(name):
        return lambda: read.append(name) or float(len(read))

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(tuning, "get_clock_info", lambda name: SimpleNamespace(resolution=resolution))
    monkeypatch.setattr(tuning, "process_time", clock("processor"))
    monkeypatch.setattr(tuning, "perf_counter", clock("wall"))
    time_turns({"a": lambda: None}, seconds=0, least=2)
    assert ("processor" in read) == (used == "processor")


def test_a_model_without_experts():
    with pytest.raises(UnsupportedError, match=r"^tune: found no experts in Linear; convert it first$"):
        tune(nn.Linear(3, 3), torch.randn(4, 3))


def test_on_cuda_the_share_decides(model, monkeypatch):
    (layer,) = routed_layers(model).values()
    monkeypatch.setattr(execute, "triton_works", lambda weights, x: True)
    weights = layer.experts.weights()

    def chosen(tokens, share):
        return execute._on_cuda(weights, torch.empty(tokens, 16), share)

    assert [chosen(513, share) for share in (None, BREAK_EVEN, BREAK_EVEN + 0.01)] == ["triton", "triton", "dense"]
    assert chosen(512, 0.1) == "dense"
    monkeypatch.setattr(execute, "precision", lambda: "tf32")
    assert [chosen(513, share) for share in (BREAK_EVEN_TF32, BREAK_EVEN_TF32 + 0.01)] == ["triton", "dense"]
    seen = []
    monkeypatch.setattr(execute, "choose", lambda *args, share, **options: seen.append(share) or choose(*args, **options))
    layer.gate = TopK(k=2)
    with torch.no_grad():
        model(torch.randn(40, 16))
        layer.gate = DynamicK(tau=0.5)
        model(torch.randn(40, 16))
        with count_usage(model) as usage:
            model(torch.randn(40, 16))
            counted = usage()["0"]
        layer.gate = DynamicK(tau=0.25)
        model(torch.randn(40, 16))
        layer.gate = DynamicK(tau=0.5)
        model(torch.randn(40, 16))
    share = sum(counted.ran_E) / (40 * 8)
    assert 0 < share < 1 and seen[:2] == [0.25, None] and seen[-2:] == [None, share]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert layer._expected_share() is None  # a resumed run has counted nothing


