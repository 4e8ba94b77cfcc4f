"""Random generators of the process: restored after all that sets them, and used by one thread at a time."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clframe
from clframe.errors import UnsupportedError
from clframe.process_state import RandomStreams, own_process, preserve_generators

SMALL = [
    "backbone=mlp",
    "backbone.width=8",
    "benchmark.experiences=2",
    "trainer.fast_dev_run=true",
    "trainer.figures=none",
]


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def in_thread(work: Callable[[], Any]) -> list[Any]:
    """Run ``work`` in a thread to its end; returns what it returned, or its error."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(work())
        except UnsupportedError as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found


def small_module(*, seed: int | None) -> tuple[clframe.ContinualModule, clframe.Benchmark]:
    from clframe.data import digits
    from clframe.nn import BACKBONES

    benchmark = clframe.class_incremental(digits(), experiences=5)
    network = clframe.Network(BACKBONES.get("mlp")(benchmark.input_shape, width=8))
    return clframe.ContinualModule(network, "er", optimizer=partial(torch.optim.SGD, lr=0.1), seed=seed), benchmark


def test_a_run_its_model_and_its_explanation_leave_the_generators_and_loggers_as_they_were(tmp_path: Path) -> None:
    import lightning.fabric  # sets its level when it is imported

    level = logging.getLogger(lightning.fabric.__name__).level
    draw()
    before = states()
    result = clframe.run("quickstart", [*SMALL, f"output={tmp_path}"])
    assert states() == before
    assert logging.getLogger("lightning.fabric").level == level
    clframe.load(result.run_folder)
    assert states() == before
    clframe.explain("quickstart", SMALL)
    assert states() == before


def test_generators_are_restored_after_an_error() -> None:
    before = states()
    with pytest.raises(KeyError), preserve_generators():
        draw()
        raise KeyError
    assert states() == before


def test_gpus_that_nothing_has_been_drawn_on_start_with_the_seed_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``torch.manual_seed`` has it: a call before CUDA is initialized is remembered for its generators."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with preserve_generators():
        torch.default_generator.manual_seed(11)
        with preserve_generators():
            torch.default_generator.manual_seed(12)
        assert seeds == [11]


def test_a_second_thread_is_refused_while_one_trains() -> None:
    with own_process("first", trains=True):
        (found,) = in_thread(lambda: clframe.run("quickstart", SMALL))
        assert str(found) == (
            "clframe.run: another thread of this process trains (first) and draws from the same random generators; "
            "wait until it has finished, or use another process"
        )
        with own_process("inner", trains=False):  # the same thread, such as a callback of the run
            assert isinstance(in_thread(lambda: clframe.explain("quickstart", SMALL))[0], UnsupportedError)
    assert in_thread(lambda: clframe.explain("quickstart", SMALL))[0].startswith("config")


def test_another_thread_waits_for_what_does_not_train() -> None:
    order = []

    def work() -> None:
        with own_process("second", trains=True):
            order.append("second")

    with own_process("first", trains=False):
        thread = threading.Thread(target=work)
        thread.start()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_parts_of_a_training_continue_with_its_draws_and_not_with_the_callers() -> None:
    def seed() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    with preserve_generators():
        seed()
        whole = [draw() for _ in range(2)]
    streams, parts = RandomStreams(), []
    before = states()
    with streams.part("first"):
        seed()
        parts.append(draw())
    assert states() == before
    draw()
    between = states()
    with streams.part("second"):
        parts.append(draw())
    assert (parts, states()) == (whole, between)


@pytest.mark.parametrize("seed", [3, None])
def test_a_strategy_with_a_seed_leaves_the_generators_as_they_were(seed: int | None) -> None:
    module, benchmark = small_module(seed=seed)
    strategy = clframe.LightningStrategy(model=module, benchmark=benchmark, train_mb_size=90, evaluator=None)
    before = states()
    for experience in benchmark.avalanche.train_stream[:2]:
        strategy.train(experience)
    assert (states() == before) == (seed is not None)  # without a seed it draws the caller's numbers: growing heads do
    with own_process("a run", trains=True):
        (found,) = in_thread(lambda: strategy.train(benchmark.avalanche.train_stream[2]))
    assert isinstance(found, UnsupportedError) == (seed is not None)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # Lightning's own
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_module_under_a_plain_trainer_leaves_the_generators_as_they_were() -> None:
    import lightning

    module, benchmark = small_module(seed=3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8) % 2))
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    experience = clframe.core.Experience(0, 1, (0, 1), (), (), benchmark.train[0])
    before = states()
    module.begin(experience, epochs=1)
    assert states() == before
    trainer.fit(module, loader)
    module.end()
    assert states() == before
