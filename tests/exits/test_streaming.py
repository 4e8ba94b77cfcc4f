"""Requests one by one: every answer is that of a batch of one, and an early one does not wait for later stages.

The order of events is tested, never a time: a stage that must not have run is held until the answer has arrived.
"""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
import torch
from exit_networks import inputs, network, reference, split
from exit_requests import EASY, HARD, Held, run, turns, two_segments
from recorded_graphs import RecordedGraphs

from clframe.errors import ConfigError, DataError
from clframe.exits import segment_runners
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.policies import ExitPolicy
from clframe.exits.segment_runners import GraphRunner, PlainRunner
from clframe.exits.streaming import BusyError, ExitServer


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("kind", "variant", "name", "fallback"),
    [("cnn", "plain", "margin", "last"), ("masked", "cascade", "patience", "confident"),
     ("mlp", "geometric", "patience", "last")],
)  # fmt: skip
@pytest.mark.parametrize("slack", [0.0, 1e9])
def test_answers_are_those_of_the_plain_reference(kind, variant, name, fallback, slack, graphs, monkeypatch):
    monkeypatch.setattr(segment_runners, "WARM", 0)
    net = network(kind, variant)
    confidence, thresholds = split(net, name, inputs(net, 33))
    dynamic = DynamicNetwork(net, ExitPolicy(measure=confidence, thresholds=thresholds, fallback=fallback))
    runner = GraphRunner(dynamic, max_batch=5, concurrent=not slack, graphs=RecordedGraphs()) if graphs else None
    x = inputs(net, 23)

    async def main():
        async with ExitServer(dynamic, max_batch=5, slack=slack, runner=runner) as server:
            server._on_cuda = graphs  # launched from the event loop, as graphs are
            return await asyncio.gather(*(server.predict(sample) for sample in x)), list(server.events)

    answers, events = run(main())
    expected = reference(net, dynamic.policy, x)
    assert [answer.exit for answer in answers] == expected.exit_B.tolist()
    torch.testing.assert_close(torch.stack([answer.scores_C for answer in answers]), expected.scores_BC)
    assert len({answer.exit for answer in answers}) > 1
    assert max(len(numbers) for _, numbers in events) == 5
    assert runner is None or (runner.recorded and not runner.failure)


@pytest.mark.parametrize("fallback", ["last", "confident"])
def test_segments_are_recorded_before_requests_arrive(fallback):
    net = network("cnn", "cascade")
    confidence, thresholds = split(net, "patience", inputs(net, 33))
    dynamic = DynamicNetwork(net, ExitPolicy(measure=confidence, thresholds=thresholds, fallback=fallback))
    runner = GraphRunner(dynamic, max_batch=9, graphs=RecordedGraphs())
    runner.prepare(inputs(net, 2))
    assert runner.sizes == (1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert runner.recorded == len(runner.sizes) * runner.segments and runner.eager == 0
    x = inputs(net, 14)

    async def main():
        async with ExitServer(dynamic, max_batch=9, runner=runner) as server:
            server._on_cuda = True
            return await asyncio.gather(*(server.predict(sample) for sample in x))

    answers = run(main())
    assert [answer.exit for answer in answers] == reference(net, dynamic.policy, x).exit_B.tolist()
    assert runner.eager == 0


def test_an_early_answer_arrives_before_the_next_segment_has_run():
    dynamic = two_segments()
    runner = Held(dynamic, segment=1)

    async def main():
        async with ExitServer(dynamic, runner=runner) as server:
            hard, easy = (asyncio.create_task(server.predict(x)) for x in (HARD, EASY))
            assert (await easy).exit == 0  # would never arrive if it waited for segment 1
            assert not hard.done()
            runner.release.set()
            assert (await hard).exit == 1
            assert list(server.events) == [(0, (0, 1)), (1, (0,))]

    run(main())


@pytest.mark.parametrize(
    ("slack", "expected"),
    [(0.0, [(0, (0,)), (1, (0,)), (0, (1,)), (1, (1,))]), (1e9, [(0, (0,)), (0, (1,)), (1, (0, 1))])],
)
def test_new_requests_join_at_the_first_segment(slack, expected):
    dynamic = two_segments()
    runner = Held(dynamic, segment=0)

    async def main():
        async with ExitServer(dynamic, slack=slack, runner=runner) as server:
            first = asyncio.create_task(server.predict(HARD))
            await runner.reached()
            second = asyncio.create_task(server.predict(HARD))
            await turns()
            runner.release.set()
            assert [(await task).exit for task in (first, second)] == [1, 1]
            assert list(server.events) == expected

    run(main())


class Lanes(GraphRunner):
    """Segments at the same time: the results of a run are ready after some turns of the event loop, if it is not held."""

    def __init__(self, dynamic, *, max_batch, polls):
        super().__init__(dynamic, max_batch=max_batch, concurrent=True, graphs=RecordedGraphs())
        self.polls, self.computed, self.most = polls, [], 0

    def is_held(self, segment):
        return False

    def launch(self, segment, parts):
        assert segment not in self.computed, "launched again before its results were there"
        self.computed.append(segment)
        self.most = max(self.most, len(self.computed))
        run, left = super().launch(segment, parts), itertools.count(self.polls(segment), -1)

        def is_ready():
            if self.is_held(segment) or next(left) > 0:
                return False
            self.computed.remove(segment)
            return True

        run.copy.is_ready = is_ready
        return run


def test_an_easy_request_does_not_wait_for_the_segment_of_a_hard_one(monkeypatch):
    monkeypatch.setattr(segment_runners, "WARM", 0)
    dynamic, held = two_segments(), [True]
    runner = Lanes(dynamic, max_batch=2, polls=lambda segment: segment)
    others = torch.stack([HARD, EASY, HARD + 1, EASY])

    async def main():
        async with ExitServer(dynamic, max_batch=2, runner=runner) as server:
            server._on_cuda = True
            try:
                tasks = [asyncio.create_task(server.predict(others[0]))]
                await turns()
                assert list(server.events) == [(0, (0,)), (1, (0,))]
                tasks += [asyncio.create_task(server.predict(x)) for x in others[1:]]
                await turns()
                assert [task.done() for task in tasks] == [False, True, False, True]
                # The third request waits for segment 1, also while segment 0 overwrites what it left for it.
                assert list(server.events)[2:] == [(0, (1, 2)), (0, (3,))]
            finally:
                held.clear()
            return await asyncio.gather(*tasks), list(server.events)

    runner.is_held = lambda segment: bool(segment and held)
    answers, events = run(main())
    assert events[4:] == [(1, (2,))]
    expected = reference(dynamic.network, dynamic.policy, others)
    assert [answer.exit for answer in answers] == expected.exit_B.tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(torch.stack([answer.scores_C for answer in answers]), expected.scores_BC)


@pytest.mark.parametrize("seed", range(4))
def test_answers_of_segments_at_the_same_time_are_those_of_the_plain_reference(seed, monkeypatch):
    """Whatever segment is complete first; new requests arrive meanwhile and overwrite what waits unless it is copied."""
    monkeypatch.setattr(segment_runners, "WARM", 0)
    net, chance = network("cnn", "cascade"), random.Random(seed)
    confidence, thresholds = split(net, "margin", inputs(net, 33))
    dynamic = DynamicNetwork(net, ExitPolicy(measure=confidence, thresholds=thresholds))
    runner = Lanes(dynamic, max_batch=3, polls=lambda segment: chance.randrange(1 + 3 * segment))
    x = inputs(net, 31)

    async def main():
        async with ExitServer(dynamic, max_batch=3, runner=runner) as server:
            server._on_cuda = True
            tasks = []
            for sample in x:
                tasks.append(asyncio.create_task(server.predict(sample)))
                await turns(chance.randrange(4))
            return await asyncio.gather(*tasks)

    answers, expected = run(main()), reference(net, dynamic.policy, x)
    assert [answer.exit for answer in answers] == expected.exit_B.tolist()
    scores_BC = torch.stack([answer.scores_C for answer in answers])
    torch.testing.assert_close(scores_BC, expected.scores_BC, rtol=1e-5, atol=1e-4)  # rounding of other batch sizes
    assert runner.most > 1 and len({answer.exit for answer in answers}) > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("concurrent", [True, False])
@pytest.mark.parametrize(("kind", "variant"), [("cnn", "cascade"), ("masked", "plain")])
def test_answers_on_a_gpu(kind, variant, concurrent, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net, chance = network(kind, variant), random.Random(0)
    confidence, thresholds = split(net, "margin", inputs(net, 33))
    dynamic = DynamicNetwork(net.cuda(), ExitPolicy(measure=confidence, thresholds=thresholds))
    runner = GraphRunner(dynamic, max_batch=5, concurrent=concurrent)
    x = inputs(net, 300).cuda()
    runner.prepare(x[:5])

    async def main():
        async with ExitServer(dynamic, max_batch=5, runner=runner) as server:
            tasks = []
            for sample in x:
                tasks.append(asyncio.create_task(server.predict(sample)))
                await turns(chance.randrange(30))
            return await asyncio.gather(*tasks)

    answers, expected = run(main()), reference(net, dynamic.policy, x)
    assert runner.eager == 0 and not runner.failure
    assert [answer.exit for answer in answers] == expected.exit_B.tolist()
    scores_BC = torch.stack([answer.scores_C for answer in answers])
    torch.testing.assert_close(scores_BC, expected.scores_BC.cpu(), rtol=1e-4, atol=1e-3)


def test_batches_are_bounded_and_so_is_the_queue():
    dynamic = two_segments()
    runner = Held(dynamic, segment=0)

    async def main():
        async with ExitServer(dynamic, max_batch=2, max_waiting=5, runner=runner) as server:
            tasks = [asyncio.create_task(server.predict(EASY)) for _ in range(5)]
            await turns()
            with pytest.raises(BusyError, match=r"^server: found 5 requests waiting; try again later or raise max_wai"):
                await server.predict(EASY)
            runner.release.set()
            await asyncio.gather(*tasks)
            assert (await server.predict(EASY)).exit == 0  # answered requests wait no longer
            assert [len(numbers) for _, numbers in server.events] == [2, 2, 1, 1]

    run(main())


def test_an_error_of_one_sample_leaves_the_others_alone():
    dynamic = two_segments()

    class Failing(PlainRunner):
        def run(self, segment, rows):
            if bool(rows.value.isnan().any()):
                raise ValueError("not a number")
            return super().run(segment, rows)

    async def main():
        async with ExitServer(dynamic, runner=Failing(dynamic)) as server:
            samples = [EASY, torch.full((6,), torch.nan), HARD, EASY]
            found = await asyncio.gather(*(server.predict(x) for x in samples), return_exceptions=True)
            assert [getattr(answer, "exit", None) for answer in found] == [0, None, 1, 0]
            assert isinstance(found[1], ValueError)
            with pytest.raises(DataError, match=r"^server: found an input of shape \(5,\); give one sample of shape \(6,\)$"):
                await server.predict(torch.zeros(5))
            assert (await server.predict(HARD)).exit == 1

    run(main())


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_waiting": 0}, {"slack": -1.0}, {"slack": float("nan")}])
def test_limits_that_do_not_fit_are_one_line(wrong):
    with pytest.raises(ConfigError, match=r"^server: found max_batch=.*; give limits of 1 or more and 0 seconds or more$"):
        ExitServer(two_segments(), **wrong)


def test_a_slack_without_effect_is_refused():
    dynamic = two_segments()
    runner = GraphRunner(dynamic, max_batch=4, graphs=RecordedGraphs())
    assert runner.concurrent  # of two segments; more run in turn if nothing is said
    more = DynamicNetwork(network("mlp"), ExitPolicy(thresholds=0.5))
    assert [GraphRunner(more, max_batch=1, concurrent=wish, graphs=RecordedGraphs()).concurrent for wish in (None, True)] == [False, True]
    with pytest.raises(ConfigError, match=r"found slack=0.1 and a runner that computes segments at the same time"):
        ExitServer(dynamic, max_batch=4, slack=0.1, runner=runner)
