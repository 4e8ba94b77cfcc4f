"""Checks that several devices compute what one does; see data_parallel.py."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_parallel_settings import Settings, build
from torch import distributed as dist
from torch import nn

from clframe.data import Source, TensorSamples, class_incremental
from clframe.nn import BACKBONES
from clframe.training.distributed import Group
from clframe.training.scores import Scores
from clframe.training.synchronization import as_bytes

CHECKED = ("naive", "er(memory=20)", "derpp(memory=20)", "lwf", "er(memory=20) + exits", "er(memory=20) + moe(samples=16)")
CHECKED_IMAGES = {
    "vit_b_16": (
        "naive", "er(memory=20)", "derpp(memory=20)", "lwf", "er(memory=20) + exits(every=3)",
        "er(memory=20) + moe(samples=16, epochs=1)",
    ),
    "resnet32": CHECKED[:-1],  # experts need feed-forward networks
}  # fmt: skip
RECORDED = ("naive", "er(memory=20)", "derpp(memory=20)", "lwf", "er(memory=20) + exits")
TOLERANCES = {"64-true": 1e-6, "32-true": 1e-2}
"""Largest difference, relative to the value where that is above 1, of weights and states from those of one device."""


@dataclass(frozen=True)
class Checked:
    """Data, network and precision of a check."""

    name: str
    """Of the backbone; empty for the small network."""
    data: Any
    make: Callable[[], Any]
    precision: str = "64-true"
    batch: int = 8
    epochs: int = 2
    rate: float = 0.01


def small_check() -> Checked:
    """Return a small transformer, on generated images."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(6).repeat(13)
    samples = TensorSamples(torch.randn(len(y), 3, 8, 8, generator=generator) + y.reshape(-1, 1, 1, 1), y)
    data = class_incremental(Source("blobs", samples, samples, classes=6), experiences=3, order="sorted")
    return Checked("", data, partial(BACKBONES.get("vit_tiny"), data.input_shape, patch=4, width=8, depth=2, heads=2))


def image_check(
    settings: Settings, *, precision: str, experiences: int, classes: int, images: int, epochs: int, rate: float
) -> Checked:
    """Return a backbone of the measurements, on a few images of Split CIFAR-100."""
    data = settings.selection(experiences=experiences, classes=classes, images=images)
    return Checked(settings.backbone, data, settings.make, precision=precision, epochs=epochs, rate=rate)


class Run:
    """A run on one device, or on all of a group.

    Args:
        expression: The strategy.
        checked: What it trains on.
        device: That of this process.
        group: The processes; None for one device.

    Attributes:
        states: Weights, and tensors of the components' states, at the end.
        accuracies: After each experience.
        gradients: Of the first step of the second experience: the first one with teachers and replayed samples.
        rows: (experience, epoch, pixels) of every new sample that this process has trained on.
    """

    def __init__(self, expression: str, checked: Checked, *, device: torch.device, group: Group | None) -> None:
        scores = Scores(checked.data)
        self._loop = loop = build(
            expression, checked.data, checked.make, device=device, group=group, precision=checked.precision,
            batch=checked.batch, epochs=checked.epochs, plugins=[scores], eval_batch=7, rate=checked.rate,
            sync_batchnorm=device.type == "cuda",
        )  # fmt: skip
        self.rows: list[Any] = []
        self.gradients: list[torch.Tensor] = []
        self.accuracies: list[Any] = []
        self._new: int | None = None
        self._count_new()
        loop.on_step = self._after_step
        assert isinstance(loop.model.network, nn.Module) and loop.learner is not None
        hook = loop.model.network.register_forward_pre_hook(self._note_rows())
        for experience in checked.data.avalanche.train_stream:
            loop.train(experience)
            loop.eval(checked.data.evaluation_stream)
            assert scores.tally is not None
            self.accuracies.append(scores.tally.as_tree())
        hook.remove()
        self.states = [t.detach() for t in (*loop.model.state_dict().values(), *_tensors(loop.learner.state))]
        self.own_statistics = group is not None and any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, nn.SyncBatchNorm)
            for m in loop.model.modules()
        )

    def _count_new(self) -> None:
        """Note the new samples of every batch: they come first, replayed ones follow."""
        learner = self._loop.learner
        assert learner is not None
        make_batch = learner.make_batch

        def make(x: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> Any:
            self._new = len(y)
            return make_batch(x, y, **kwargs)

        learner.make_batch = make  # type: ignore[method-assign]

    def _note_rows(self) -> Callable[[Any, Any], None]:
        """Return the hook of the network's first pass of a step; a function, since teachers are deep copies."""

        def note(network: Any, inputs: Any) -> None:
            loop, new = self._loop, self._new
            if new is None or not network.training or not torch.is_grad_enabled():
                return
            self._new = None
            x, share = inputs[0], loop._share if loop.group is not None else None
            if loop.group is not None and share is None and not loop.group.is_first:
                return  # every process computes the whole batch
            own = x[:new] if share is None else x[share.rows < new]
            position = int(loop.clock.train_exp_counter), int(loop.clock.train_exp_epochs)
            self.rows.extend((*position, pixels) for pixels in fingerprints(own))

        return note

    def _after_step(self, loop: Any) -> None:
        if loop.clock.train_exp_counter == 1 and not self.gradients:
            parameters = loop.learner.network.parameters()
            self.gradients = [p.grad.detach().clone() for p in parameters if p.grad is not None]


def fingerprints(x: torch.Tensor) -> list[tuple[float, ...]]:
    """Return a few values of each image, by which it is recognized.

    Pixels are normalized here and there by operations that round differently; they differ by 1 / 63 or more.
    """
    values = x.flatten(1)
    step = max(1, values.shape[1] // 48) | 1  # odd: an even one may stay in one column, where many images are white
    return [tuple(row) for row in values[:, ::step].double().mul(1e3).round().tolist()]


def expected_rows(data: Any, *, epochs: int) -> list[Any]:
    """Return what :class:`Run` notes of a run in which every new sample is trained on once in an epoch."""
    found = []
    for number, samples in enumerate(data.train):
        x, _ = samples.batch(torch.arange(len(samples), device=samples.x.device))
        found += [(number, epoch, pixels) for epoch in range(epochs) for pixels in fingerprints(x)]
    return found


def once(expected: list[Any], found: list[Any]) -> bool:
    """Whether lists have the same members, each once."""
    return sorted(expected) == sorted(found) and len(set(expected)) == len(expected)


def check_strategy(expression: str, checked: Checked, *, device: torch.device, group: Group) -> dict[str, Any]:
    """Compare a run of all devices with one of one device; every process returns the same."""
    runs = {name: Run(expression, checked, device=device, group=each) for name, each in (("all", group), ("one", None))}
    everyone: list[Any] = [None] * group.size
    dist.all_gather_object(everyone, (runs["all"].accuracies, runs["all"].rows))
    largest = _largest_difference(runs["all"].states, runs["one"].states, least=1.0)
    scale = max(float(g.abs().max()) for g in runs["one"].gradients if g.numel())
    expected = expected_rows(checked.data.to(device), epochs=checked.epochs)
    fine = largest < TOLERANCES[checked.precision]
    return {
        "check": f"{expression}, {checked.name}" if checked.name else expression,
        "precision": checked.precision,
        "equal_in_all_processes": _equal_everywhere(runs["all"].states, group),
        "largest_difference_from_one_device": largest,
        # Without synchronized statistics batch normalization computes something else, by definition.
        "equal_to_one_device": None if runs["all"].own_statistics else fine,
        "largest_difference_of_gradients": _largest_difference(runs["all"].gradients, runs["one"].gradients, least=scale),
        "accuracies_equal": all(accuracies == runs["one"].accuracies for accuracies, _ in everyone),
        "new_samples": len(expected),
        "new_samples_seen": sum(len(rows) for _, rows in everyone),
        "new_samples_once_per_epoch": once(expected, [row for _, rows in everyone for row in rows])
        and once(expected, runs["one"].rows),
    }  # fmt: skip


def _equal_everywhere(states: list[torch.Tensor], group: Group) -> bool:
    """Whether tensors have the same bits in all processes."""
    shapes: list[Any] = [None] * group.size
    dist.all_gather_object(shapes, [(tuple(t.shape), str(t.dtype)) for t in states])
    if any(each != shapes[0] for each in shapes):
        return False
    different = 0
    for own in (as_bytes(t.contiguous()).to(group.device) for t in states if t.numel()):
        first = own.clone()
        dist.broadcast(first, 0)
        different += int(not torch.equal(own, first))
    return group.total(different) == 0


def _largest_difference(ours: list[torch.Tensor], others: list[torch.Tensor], *, least: float) -> float:
    """Return the largest difference, relative to the second value where that is above ``least``."""
    found = [0.0]
    for a, b in zip(ours, others, strict=True):
        if a.numel():
            a, b = a.double(), b.double()
            # Infinite or undefined in one only is a difference; in both it is none.
            same = (a == b) | (a.isnan() & b.isnan())
            found.append(float(torch.where(same, 0.0, (a - b).abs() / b.abs().clamp_min(least)).nan_to_num(torch.inf).max()))
    return max(found)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, torch.nn.Module):
        yield from state.state_dict().values()
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            yield from _tensors(state[key])
    elif isinstance(state, (list, tuple)):
        for part in state:
            yield from _tensors(part)


def check_recorded(expression: str, *, device: torch.device, group: Group) -> dict[str, Any]:
    """Compare weights after recorded steps on all devices with those after eager ones."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(6).repeat(40)
    # Of a scale at which no strategy diverges: weights that are not finite are not compared.
    samples = TensorSamples(torch.randn(len(y), 3, 8, 8, generator=generator) + y.reshape(-1, 1, 1, 1) / 5, y)
    data = class_incremental(Source("blobs", samples, samples, classes=6), experiences=3, order="sorted")
    make = partial(BACKBONES.get("small_cnn"), data.input_shape)
    weights, graphs = [], []
    for capture in (False, True):
        loop = build(
            expression, data, make, device=device, group=group, precision="32-true", batch=8, epochs=8, capture=capture
        )  # fmt: skip
        graphs.append(0)
        for experience in data.avalanche.train_stream:
            loop.train(experience)
            graphs[-1] += 0 if loop.step_capture is None else loop.step_capture.recorded
        assert loop.learner is not None
        weights.append([value.detach().double().cpu() for value in loop.learner.network.state_dict().values()])
    largest = max(float(((a - b).abs() / b.abs().clamp_min(1)).max()) for a, b in zip(*weights, strict=True) if a.numel())
    return {"check": f"recorded {expression}", "graphs": graphs, "largest_difference_from_eager": largest,
            "equal": largest == 0.0 and graphs[0] == 0 and graphs[1] > 0}  # fmt: skip


def check_resumption(*, cuda: bool, devices: int) -> dict[str, Any]:
    """Stop a run on all devices, continue it on one, finish it on all; compare with one that was not stopped."""

    import clframe

    with tempfile.TemporaryDirectory() as place:
        generator = np.random.default_rng(0)
        y = np.arange(8).repeat(20)
        x = (generator.normal(size=(160, 3, 8, 8)) + y[:, None, None, None]).astype("float32")
        np.savez(Path(place) / "data.npz", x_train=x, y_train=y, x_test=x[::2], y_test=y[::2])
        options = [
            "benchmark=npz", f"benchmark.path={place}/data.npz", "benchmark.experiences=4", "backbone=mlp",
            "backbone.width=16", "strategy=er(memory=40) + lwf", "trainer.epochs=2", "trainer.batch_size=16",
            "trainer.precision=64-true", "trainer.figures=none", "trainer.loggers=[]", "trainer.progress=false",
            f"trainer.accelerator={'cuda' if cuda else 'cpu'}", "trainer.deterministic=true", "optimizer.fused=false",
        ]  # fmt: skip

        def stop_after(count: int) -> Callable[[Any], None]:
            def stop(progress: Any) -> None:
                if progress.finished == count:
                    raise KeyboardInterrupt

            return stop

        stopped, whole = Path(place) / "stopped", Path(place) / "whole"
        for number, count in ((devices, 1), (1, 2)):
            with contextlib.suppress(KeyboardInterrupt):
                clframe.run("quickstart", [*options, f"trainer.devices={number}"], folder=stopped,
                            on_evaluated=stop_after(count))  # fmt: skip
        result = clframe.run(resume=stopped, overrides=[f"trainer.devices={devices}"])
        reference = clframe.run("quickstart", options, folder=whole)
        one, other = (clframe.load(folder).network.state_dict() for folder in (stopped, whole))
        largest = max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
        return {
            "check": f"resume {devices} -> 1 -> {devices}",
            "largest_difference_of_weights": largest,
            "accuracies_equal": result.accuracy_matrix == reference.accuracy_matrix,
            "fine": largest < 1e-6,
        }
