"""Requests that are canceled, and servers that are closed: every request gets an answer or an error."""

from __future__ import annotations

import asyncio

import pytest
from exit_requests import EASY, HARD, Held, run, turns, two_segments

from clframe.exits.streaming import ClosedError, ExitServer


def test_a_cancelled_request_is_dropped_before_the_next_segment():
    dynamic = two_segments()
    runner = Held(dynamic, segment=0)

    async def main():
        async with ExitServer(dynamic, runner=runner, max_batch=1) as server:
            tasks = [asyncio.create_task(server.predict(HARD)) for _ in range(3)]
            await runner.reached()
            for task in tasks[:2]:  # one that is computed, and one that waits
                task.cancel()
            await turns()
            runner.release.set()
            assert (await tasks[2]).exit == 1
            assert all(task.cancelled() for task in tasks[:2])
            assert list(server.events) == [(0, (0,)), (0, (2,)), (1, (2,))]

    run(main())


@pytest.mark.parametrize("waiting", ["answer", "refuse"])
def test_closing_answers_or_refuses_what_waits(waiting):
    dynamic = two_segments()
    runner = Held(dynamic, segment=0)

    async def main():
        server = ExitServer(dynamic, runner=runner, max_batch=1)
        tasks = [asyncio.create_task(server.predict(x)) for x in (HARD, EASY, EASY)]
        await runner.reached()
        closing = asyncio.create_task(server.close(waiting=waiting))
        await turns()
        with pytest.raises(ClosedError, match=r"^server: found a request after it was closed; make another server$"):
            await server.predict(EASY)
        runner.release.set()
        await closing
        found = await asyncio.gather(*tasks, return_exceptions=True)
        if waiting == "answer":
            assert [answer.exit for answer in found] == [1, 0, 0]
        else:
            assert [type(answer) for answer in found] == [ClosedError] * 3
            assert list(server.events) == [(0, (0,))]
        await server.close()  # a second time changes nothing

    run(main())


@pytest.mark.parametrize("within", ["timeout", "context"])
def test_a_cancelled_close_leaves_the_requests_to_the_worker(within):
    dynamic = two_segments()
    runner = Held(dynamic, segment=0)
    server = ExitServer(dynamic, runner=runner, max_batch=1)

    async def serve():
        async with server:
            await asyncio.Event().wait()

    async def main():
        tasks = [asyncio.create_task(server.predict(x)) for x in (HARD, EASY, EASY)]
        if within == "timeout":
            await runner.reached()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(server.close(), 0.001)
        else:
            serving = asyncio.create_task(serve())
            await runner.reached()
            for _ in range(2):  # the first cancellation begins to close, the second one ends that
                serving.cancel()
                await turns()
            assert serving.cancelled()
        runner.release.set()
        assert [answer.exit for answer in await asyncio.gather(*tasks)] == [1, 0, 0]
        await asyncio.gather(server.close(), server.close())
        assert server._worker is None and server._thread is None

    run(main())


def test_a_cancelled_close_can_be_followed_by_one_that_refuses():
    dynamic = two_segments()
    runner = Held(dynamic, segment=0)

    async def main():
        server = ExitServer(dynamic, runner=runner, max_batch=1)
        tasks = [asyncio.create_task(server.predict(x)) for x in (HARD, EASY)]
        await runner.reached()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(server.close(), 0.001)
        closing = asyncio.create_task(server.close(waiting="refuse"))
        await turns()
        runner.release.set()
        await closing
        assert [type(found) for found in await asyncio.gather(*tasks, return_exceptions=True)] == [ClosedError] * 2
        assert list(server.events) == [(0, (0,))]

    run(main())


@pytest.mark.parametrize("cancelled", [True, False])
def test_requests_that_are_computed_get_an_error_as_well_if_the_server_ends(cancelled, monkeypatch):
    dynamic = two_segments()
    runner = Held(dynamic, segment=0)
    server = ExitServer(dynamic, runner=runner, max_batch=2)

    async def broken(*_):
        raise RuntimeError("of the server itself")

    async def main():
        if not cancelled:
            runner.release.set()
        if not cancelled:
            monkeypatch.setattr(server, "_finish", broken)
        tasks = [asyncio.create_task(server.predict(x)) for x in (HARD, EASY, EASY)]
        await turns()
        if cancelled:
            await runner.reached()
            server._worker.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        reason = "its task was cancelled" if cancelled else "ended by RuntimeError"
        text = f"server: {reason} before the answer; make another server"
        assert [(type(each), str(each)) for each in found] == [(ClosedError, text)] * 3
        with pytest.raises(ClosedError, match="found a request after it was closed"):
            await server.predict(EASY)
        runner.release.set()
        if cancelled:
            await server.close()
        else:
            with pytest.raises(RuntimeError, match="of the server itself"):
                await server.close()

    run(main())
