"""The comparison of a kernel with plain operations at its first call."""

from __future__ import annotations

import pytest
import torch

from clframe.accounting.mac_counter import MacCounter
from clframe.nn import kernels
from clframe.nn.kernels import is_compiling, kernel_agrees

X = torch.ones(2, 2)


@pytest.fixture(autouse=True)
def _nothing_compared(monkeypatch):
    monkeypatch.setattr(kernels, "_agrees", {})


def agrees(run=lambda: X @ X, find_fault=lambda found: "", **options):
    return kernel_agrees("part: the kernel", (2,), X, run=run, find_fault=find_fault, fallback="others are used", **options)


def test_each_kind_is_compared_once_and_reported_once(caplog):
    calls = []
    for _ in range(3):
        assert agrees(run=lambda: calls.append(1))
        assert not kernel_agrees("part: the kernel", (3,), X, run=int, find_fault=lambda found: f"gives {found}", fallback="none")
    assert calls == [1]
    assert caplog.messages == [
        "part: the kernel gives 0 on cpu; none; please report this with the versions of torch and triton"
    ]


@pytest.mark.parametrize("recording", [True, False])
def test_nothing_is_compared_while_a_graph_is_recorded(monkeypatch, recording):
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert agrees(run=lambda: pytest.fail("compared"), recording=recording) is recording
    assert not agrees(find_fault=lambda found: "differs")  # nothing was remembered


def test_lack_of_memory_says_nothing_about_a_kernel(caplog):
    def full():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        agrees(run=full)
    assert agrees() and not caplog.messages


def test_counters_of_operations_do_not_see_a_comparison():
    with MacCounter() as counter:
        agrees(find_fault=lambda found: "" if torch.equal(found, X @ X) else "differs")
    assert counter.macs == 0


def test_what_the_compiler_leaves_to_python_is_compiled_too_where_it_is_called_from_a_compiled_function():
    from torch._dynamo.decorators import skip

    seen = []

    @skip
    def left_to_python(x):  # what is called from here is traced again: launches of kernels, too
        seen.append((torch.compiler.is_compiling(), is_compiling()))
        return x + 1

    assert torch.compile(lambda x: left_to_python(2 * x), backend="eager")(X).equal(2 * X + 1)
    assert seen == [(False, True)] and not is_compiling()


def test_traced_functions_know_that_they_are_compiled():
    def find_sign(x):
        return x if is_compiling() else -x

    assert torch.compile(find_sign, backend="eager", fullgraph=True)(X).equal(X)
    assert find_sign(X).equal(-X)
