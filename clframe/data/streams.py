"""Online streams and domain-incremental streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from clframe.data.benchmark import Benchmark, Online
from clframe.data.samples import concatenate
from clframe.data.source import Source
from clframe.errors import ConfigError, DataError
from clframe.seeding import generator_for


def online(benchmark: Benchmark, *, size: int, seed: int = 0, boundaries: bool = True) -> Benchmark:
    """Every experience shuffled and cut into small ones of ``size`` samples; each sample comes once.

    Args:
        benchmark: Any; its evaluation data stays as it is.
        size: Samples of a small experience; the last one of each original experience may be smaller.
        seed: Of the order within an experience.
        boundaries: Whether the learner is told where an original experience begins and ends. Where it is
            not, every small experience is one of its own: teachers, memories and the like are renewed
            after each.
    """
    _check(benchmark, size)
    order = [
        torch.randperm(len(part), generator=generator_for(seed, "online", i)) for i, part in enumerate(benchmark.train)
    ]
    shuffled = [part.subset(index) for part, index in zip(benchmark.train, order, strict=True)]
    return benchmark.cut(shuffled, Online(size, boundaries))


def blurry(benchmark: Benchmark, *, size: int, blur: float = 0.5, steps: int | None = None, seed: int = 0) -> Benchmark:
    """Small experiences drawn from a mixture of neighbors that fades linearly from one to the next.

    See :func:`linear_decay`. Within one original experience samples are drawn without replacement; how many
    come of each is left to chance, so a few come twice or not at all. No boundaries are told.

    Args:
        benchmark: Any; its evaluation data stays as it is.
        size: Samples of a small experience.
        blur: Share of an experience's length over which it fades into the next, up to 1.
        steps: Small experiences for each original one; None takes as many as one pass over the data needs.
        seed: Of the draws.
    """
    _check(benchmark, size)
    sizes = [len(part) for part in benchmark.train]
    if steps is None:
        steps = -(-sum(sizes) // (size * len(sizes)))
    generator = generator_for(seed, "blurry")
    drawn = linear_decay(sizes, size=size, steps=steps, blur=blur, generator=generator)
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    everything = concatenate(benchmark.train)
    wholes = []
    for i in range(len(sizes)):
        own = drawn[i * steps : (i + 1) * steps]
        index = torch.cat([starts[experience_N] + sample_N for experience_N, sample_N in own])
        wholes.append(everything.subset(index))
    return benchmark.cut(wholes, Online(size, boundaries=False))


def linear_decay(
    sizes: Sequence[int], *, size: int, steps: int, blur: float, generator: Generator
) -> list[tuple[Tensor, Tensor]]:
    """Which samples each small experience of a blurry stream holds: (experience_N, sample_N) of each.

    Each sample's experience is drawn from :func:`mixture`; the sample then is the next one of that
    experience's random order, which begins anew where it ends. The schedule and the draws are those of
    Avalanche's ``split_continuous_linear_decay_stream`` with ``beta = 2 / blur``, after Zeno et al., "Task
    Agnostic Continual Learning Using Online Variational Bayes" (2020).

    Args:
        sizes: Samples of each original experience.
        size: Samples of each small one.
        steps: Small experiences for each original one.
        blur: See :func:`mixture`.
        generator: What is drawn from.
    """
    probability_TE = mixture(len(sizes), steps=steps, blur=blur)
    orders = [torch.randperm(n, generator=generator) for n in sizes]
    used = [0] * len(sizes)
    stream = []
    for probability_E in probability_TE:
        drawn_N = torch.multinomial(probability_E, size, replacement=True, generator=generator)
        samples = []
        for i, count in enumerate(torch.bincount(drawn_N, minlength=len(sizes)).tolist()):
            taken = orders[i][used[i] : used[i] + count]
            used[i] += count
            while len(taken) < count:
                orders[i] = torch.randperm(sizes[i], generator=generator)
                used[i] = count - len(taken)
                taken = torch.cat([taken, orders[i][: used[i]]])
            samples.append(taken)
        stream.append((drawn_N.sort().values, torch.cat(samples)))
    return stream


def mixture(experiences: int, *, steps: int, blur: float) -> Tensor:
    """probability_TE of each of E experiences at each of T = E * steps places of a blurry stream.

    Around the border between two experiences, over ``blur * steps`` places, the one fades out and the other
    fades in, both linearly; elsewhere an experience is alone.

    >>> mixture(2, steps=4, blur=0.5)[:, 0].tolist()
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    """
    if not 0 < blur <= 1:
        raise ConfigError(f"benchmark.blurry: found {blur}; give a share above 0 and up to 1")
    places, beta = experiences * steps, 2 / blur
    weight_ET = torch.zeros(experiences, places)
    for e in range(experiences):
        # Where it begins to fade in, is alone, begins to fade out, and is gone.
        rise, top, fall, end = (
            min(max(int((beta * e + k) * places / (beta * experiences)), 0), places)
            for k in (-1, 1, beta - 1, beta + 1)
        )
        weight_ET[e, rise:top] = 1.0 if e == 0 else _line(rise, top)
        weight_ET[e, top:fall] = 1.0
        weight_ET[e, fall:end] = 1.0 if e == experiences - 1 else 1 - _line(fall, end)
    return (weight_ET / weight_ET.sum(0)).T.contiguous()


def _line(start: int, end: int) -> Tensor:
    """From 0 at ``start`` towards 1 at ``end``."""
    return torch.tensor([(i - start) / (end - start) for i in range(start, end)])


def _check(benchmark: Benchmark, size: int) -> None:
    if size < 1:
        raise ConfigError(f"benchmark.online: found {size}; give at least 1 sample for each small experience")
    if benchmark.online is not None:
        raise ConfigError("benchmark.online: found a stream that is online already; make it so once")


_CHUNK = 4096  # pictures that are turned at once; in float32 they take four times the room and more


def domain_incremental(
    source: Source,
    domains: Sequence[Callable[[Tensor], Tensor] | None],
    *,
    seed: int = 0,
    validation: float = 0.0,
    task_labels: bool = False,
) -> Benchmark:
    """All classes in every experience, each of which sees the same data in a way of its own.

    Args:
        source: The data; kept once, however many experiences there are.
        domains: For each experience a function of stored inputs that keeps their shape and dtype, named by
            its ``str``; None sees them as they are.
        seed: Of the validation data, which is the same for all experiences: no picture of one experience's
            validation data is trained on in another.
        validation: Share of each class's training samples that is held out.
        task_labels: Label every experience with its number.
    """
    train, held = source.hold_out(validation, seed=seed)
    everything = tuple(range(source.classes))
    return Benchmark(
        name=source.name,
        class_order=everything,
        classes=(everything,) * len(domains),
        train=tuple(replace(train, view=domain) for domain in domains),
        test=tuple(replace(source.test, view=domain) for domain in domains),
        input_shape=source.input_shape,
        validation=() if held is None else tuple(replace(held, view=domain) for domain in domains),
        domains=tuple("as stored" if domain is None else str(domain) for domain in domains),
        task_labels=task_labels,
    )


def permuted(source: Source, *, experiences: int, seed: int = 0, validation: float = 0.0) -> Benchmark:
    """Domain-incremental: a pixel order of its own for every experience, the stored one for the first."""
    _at_least_one(experiences)
    shape = source.input_shape
    pixels = shape[-1] * shape[-2] if len(shape) > 1 else shape[0]
    domains = pixel_orders(pixels, experiences, seed=seed)
    return domain_incremental(source, domains, seed=seed, validation=validation)


def rotated(
    source: Source, *, experiences: int, angles: Sequence[float] = (), seed: int = 0, validation: float = 0.0
) -> Benchmark:
    """Domain-incremental: an angle of its own for every experience, as :func:`rotations` says."""
    _at_least_one(experiences)
    if len(source.input_shape) != 3:
        raise DataError(
            f"{source.name}: inputs of shape {list(source.input_shape)} are no pictures to rotate; take "
            f"another protocol, or inputs of channels x height x width"
        )
    domains = rotations(experiences, angles=angles)
    return domain_incremental(source, domains, seed=seed, validation=validation)


class PixelOrder:
    """Inputs with their pixels in another order, the same for every input and every channel.

    Goodfellow et al., "An Empirical Investigation of Catastrophic Forgetting" (2013).

    Args:
        order_P: Pixel p shows what is stored at pixel ``order_P[p]``. Pixels are counted row by row; an
            input without rows and columns has its features permuted.

    >>> PixelOrder(torch.tensor([3, 2, 1, 0]))(torch.tensor([[[[1, 2], [3, 4]]]]))
    tensor([[[[4, 3],
              [2, 1]]]])
    """

    def __init__(self, order_P: Tensor) -> None:
        self.order_P = order_P
        self._on: dict[torch.device, Tensor] = {}

    def __call__(self, raw: Tensor) -> Tensor:
        """``raw``, permuted."""
        order_P = self._on.get(raw.device)
        if order_P is None:
            order_P = self._on[raw.device] = self.order_P.to(raw.device)
        flat = raw.flatten(-2) if raw.ndim > 2 else raw
        return flat.gather(-1, order_P.expand(flat.shape)).reshape(raw.shape)  # a third of index_select's time

    def __str__(self) -> str:
        return "permuted pixels"


class Rotation:
    """Pictures turned counterclockwise about their center, in the dtype they are stored in.

    Quarter turns move pixels and nothing else, where they fit the picture; other angles interpolate
    bilinearly (whole numbers are rounded), and what turns in from outside is 0.
    Lopez-Paz and Ranzato, "Gradient Episodic Memory" (2017).

    Args:
        degrees: The angle.

    >>> Rotation(90.0)(torch.tensor([[[[1, 2], [3, 4]]]]))
    tensor([[[[2, 4],
              [1, 3]]]])
    """

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees
        self._grids: dict[tuple[int, int, torch.device], Tensor] = {}

    def __call__(self, raw_NCHW: Tensor) -> Tensor:
        """``raw_NCHW``, turned."""
        height, width = raw_NCHW.shape[-2:]
        quarters, rest = divmod(self.degrees % 360, 90)
        if rest == 0 and (height == width or quarters % 2 == 0):
            return torch.rot90(raw_NCHW, int(quarters), (-2, -1)).contiguous() if quarters else raw_NCHW
        return torch.cat([self._interpolated(part) for part in raw_NCHW.split(_CHUNK)])

    def __str__(self) -> str:
        return f"turned by {self.degrees:g} degrees"

    def _interpolated(self, raw_NCHW: Tensor) -> Tensor:
        height, width = raw_NCHW.shape[-2:]
        key = (height, width, raw_NCHW.device)
        grid_1HW2 = self._grids.get(key)
        if grid_1HW2 is None:
            grid_1HW2 = self._grids[key] = self._grid(height, width).to(raw_NCHW.device)
        # All pictures turn alike, so they may as well be channels of one: the grid is then read once.
        x_1PHW = raw_NCHW.reshape(1, -1, height, width).to(torch.float32)
        turned = F.grid_sample(x_1PHW, grid_1HW2, align_corners=False).reshape(raw_NCHW.shape)
        return (turned if raw_NCHW.is_floating_point() else turned.round_()).to(raw_NCHW.dtype)

    def _grid(self, height: int, width: int) -> Tensor:
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        # Coordinates run from -1 to 1 along either side, so the ratio of the sides enters.
        matrix_123 = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]])
        return F.affine_grid(matrix_123, [1, 1, height, width], align_corners=False)


def pixel_orders(pixels: int, experiences: int, *, seed: int) -> tuple[PixelOrder | None, ...]:
    """A random order for every experience but the first, which sees the data as stored."""
    return (
        None,
        *(
            PixelOrder(torch.randperm(pixels, generator=generator_for(seed, "pixel order", i)))
            for i in range(1, experiences)
        ),
    )


def rotations(experiences: int, *, angles: Sequence[float] = ()) -> tuple[Rotation | None, ...]:
    """A rotation for every experience; None where nothing turns.

    Args:
        experiences: How many; angles then go from 0 to 180 degrees in equal steps.
        angles: Degrees of each experience; take the place of ``experiences``.

    >>> [None if r is None else r.degrees for r in rotations(4)]
    [None, 60.0, 120.0, 180.0]
    """
    if not all(math.isfinite(angle) for angle in angles):
        raise ConfigError(f"benchmark.angles: found {list(angles)}; give degrees as finite numbers")
    degrees = angles or [180 * i / max(experiences - 1, 1) for i in range(experiences)]
    return tuple(Rotation(float(a)) if a % 360 else None for a in degrees)


def _at_least_one(experiences: int) -> None:
    if experiences < 1:
        raise ConfigError(f"benchmark.experiences: found {experiences}; give at least 1")
