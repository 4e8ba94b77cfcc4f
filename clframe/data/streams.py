"""Online streams and domain-incremental streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from clframe.data.benchmark import Benchmark, Online
from clframe.data.samples import concatenate
from clframe.data.source import Source
from clframe.errors import ConfigError, DataError
from clframe.options import require_count
from clframe.seeding import generator_for


def online_stream(benchmark: Benchmark, *, size: int, seed: int = 0, boundaries: bool = True) -> Benchmark:
    """Shuffle every experience and slice it into small ones of ``size`` samples; each sample occurs once.

    Args:
        benchmark: Any benchmark that is not online yet; its evaluation data is unchanged.
        size: Samples per small experience; the last one of each original experience may be smaller.
        seed: Seed of the order within an experience.
        boundaries: Whether the boundaries of the original experiences are visible. If not, every small experience
            counts as an experience: teachers, buffers and importances are updated after each.
    """
    _check_online(benchmark, size)
    order = [
        torch.randperm(len(part), generator=generator_for(seed, "online", i)) for i, part in enumerate(benchmark.train)
    ]
    shuffled = [part.subset(index) for part, index in zip(benchmark.train, order, strict=True)]
    return benchmark.slice_online(shuffled, Online(size, boundaries))


def blurry_stream(
    benchmark: Benchmark, *, size: int, blur: float = 0.5, steps: int | None = None, seed: int = 0
) -> Benchmark:
    """Sample small experiences from a mixture that shifts linearly from one original experience to the next.

    See :func:`linear_decay`. Samples of one original experience are drawn without replacement, but their number is
    random, so a few samples occur twice or not at all. Boundaries are not visible.

    Args:
        benchmark: Any benchmark that is not online yet; its evaluation data is unchanged.
        size: Samples per small experience.
        blur: Fraction of an experience's length over which it is mixed with the next, in (0, 1].
        steps: Small experiences per original one; None: enough for one pass over the data.
        seed: Seed of the draws.
    """
    _check_online(benchmark, size)
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
    return benchmark.slice_online(wholes, Online(size, boundaries=False))


def linear_decay(
    sizes: Sequence[int], *, size: int, steps: int, blur: float, generator: Generator
) -> list[tuple[Tensor, Tensor]]:
    """Samples of each small experience of a blurry stream, as (experience_N, sample_N).

    Each sample's experience is drawn from :func:`mixture_weights`; the sample is the next one in a random order of
    that experience, reshuffled once used up. The schedule and the draws are those of Avalanche's
    ``split_continuous_linear_decay_stream`` with ``beta = 2 / blur``, after Zeno et al., "Task Agnostic Continual
    Learning Using Online Variational Bayes" (2020).

    Args:
        sizes: Samples of each original experience.
        size: Samples of each small experience.
        steps: Small experiences per original one.
        blur: See :func:`mixture_weights`.
        generator: Source of all draws.
    """
    probability_TE = mixture_weights(len(sizes), steps=steps, blur=blur)
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


def mixture_weights(experiences: int, *, steps: int, blur: float) -> Tensor:
    """probability_TE of each of E experiences at each of the T = E * steps steps of a blurry stream.

    Over the ``blur * steps`` steps around the border of two experiences, the first decays and the second rises,
    both linearly; elsewhere one experience has probability 1.

    >>> mixture_weights(2, steps=4, blur=0.5)[:, 0].tolist()
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    """
    if not 0 < blur <= 1:
        raise ConfigError(f"benchmark.blurry: found {blur}; give a number above 0 and up to 1")
    length, beta = experiences * steps, 2 / blur
    weight_ET = torch.zeros(experiences, length)
    for e in range(experiences):
        # Steps at which the weight starts to rise, reaches 1, starts to fall, and reaches 0.
        rise, top, fall, end = (
            min(max(int((beta * e + k) * length / (beta * experiences)), 0), length)
            for k in (-1, 1, beta - 1, beta + 1)
        )
        weight_ET[e, rise:top] = 1.0 if e == 0 else _ramp(rise, top)
        weight_ET[e, top:fall] = 1.0
        weight_ET[e, fall:end] = 1.0 if e == experiences - 1 else 1 - _ramp(fall, end)
    return (weight_ET / weight_ET.sum(0)).T.contiguous()


def _ramp(start: int, end: int) -> Tensor:
    """Values that rise linearly from 0 at ``start`` towards 1 at ``end``, which is excluded."""
    return torch.tensor([(i - start) / (end - start) for i in range(start, end)])


def _check_online(benchmark: Benchmark, size: int) -> None:
    if size < 1:
        raise ConfigError(f"benchmark.online: found {size}; give at least 1 sample per small experience")
    if benchmark.online is not None:
        raise ConfigError("benchmark.online: found a stream that is already online; convert it once")


_CHUNK = 4096  # images rotated together: interpolation needs several float32 copies of bytes


def domain_incremental(
    source: Source,
    domains: Sequence[Callable[[Tensor], Tensor] | None],
    *,
    seed: int = 0,
    validation: float = 0.0,
    task_labels: bool = False,
) -> Benchmark:
    """Stream with all classes in every experience, each of which transforms the same data in its own way.

    Args:
        source: The data; stored once for all experiences.
        domains: For each experience a function of stored inputs that preserves shape and dtype, named by its
            ``__str__`` or its ``__name__``; None for the inputs as stored.
        seed: Seed of the validation split, which all experiences share: no validation image of one experience is
            trained on in another.
        validation: Fraction of each class's training samples that is held out.
        task_labels: Use the index of the experience as task label.
    """
    source.check_test()
    train, held_out = source.hold_out(validation, seed=seed)
    everything = tuple(range(source.classes))
    return Benchmark(
        name=source.name,
        class_order=everything,
        classes=(everything,) * len(domains),
        train=tuple(replace(train, view=domain) for domain in domains),
        test=tuple(replace(source.test, view=domain) for domain in domains),
        input_shape=source.input_shape,
        validation=() if held_out is None else tuple(replace(held_out, view=domain) for domain in domains),
        domains=tuple(map(_domain_name, domains)),
        task_labels=task_labels,
        class_names=source.class_names,
        inputs=source.inputs,
    )


def _domain_name(domain: Callable[[Tensor], Tensor] | None) -> str:
    """Name of a domain, without the address in memory that the text of a function has."""
    if domain is None:
        return "as stored"
    kind: Any = type(domain)
    if kind.__str__ is not object.__str__:
        return str(domain)
    return str(getattr(domain, "__name__", kind.__name__))


def permuted_stream(source: Source, *, experiences: int, seed: int = 0, validation: float = 0.0) -> Benchmark:
    """Domain-incremental stream with a random pixel permutation per experience, none for the first."""
    _check_experiences(experiences)
    shape = source.input_shape
    pixels = shape[-1] * shape[-2] if len(shape) > 1 else shape[0]
    domains = pixel_orders(pixels, experiences, seed=seed)
    return domain_incremental(source, domains, seed=seed, validation=validation)


def rotated_stream(
    source: Source, *, experiences: int, angles: Sequence[float] = (), seed: int = 0, validation: float = 0.0
) -> Benchmark:
    """Domain-incremental stream with a rotation angle per experience, see :func:`rotations`."""
    _check_experiences(experiences)
    if len(source.input_shape) != 3:
        raise DataError(
            f"{source.name}: found inputs of shape {list(source.input_shape)}, which cannot be rotated; use "
            f"another protocol, or inputs of shape [channels, height, width]"
        )
    domains = rotations(experiences, angles=angles)
    return domain_incremental(source, domains, seed=seed, validation=validation)


class PixelOrder:
    """Pixel permutation, the same for every input and every channel.

    Goodfellow et al., "An Empirical Investigation of Catastrophic Forgetting" (2013).

    Args:
        order_P: Pixel p of the result is pixel ``order_P[p]`` of the input, counted row by row; for vectors, feature
            p.

    >>> PixelOrder(torch.tensor([3, 2, 1, 0]))(torch.tensor([[[[1, 2], [3, 4]]]]))
    tensor([[[[4, 3],
              [2, 1]]]])
    """

    def __init__(self, order_P: Tensor) -> None:
        self.order_P = order_P
        self._on: dict[torch.device, Tensor] = {}

    def __call__(self, raw: Tensor) -> Tensor:
        """Permute the pixels of ``raw``."""
        order_P = self._on.get(raw.device)
        if order_P is None:
            order_P = self._on[raw.device] = self.order_P.to(raw.device)
        flat = raw.flatten(-2) if raw.ndim > 2 else raw
        return flat.gather(-1, order_P.expand(flat.shape)).reshape(raw.shape)  # three times as fast as index_select

    def __str__(self) -> str:
        return "permuted pixels"


class Rotation:
    """Counterclockwise rotation of images about their center; the dtype is unchanged.

    Half turns, and quarter turns of square images, only move pixels. Other angles interpolate bilinearly (integers
    are rounded) and pad with 0. Lopez-Paz and Ranzato, "Gradient Episodic Memory" (2017).

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
        """Rotate ``raw_NCHW``."""
        height, width = raw_NCHW.shape[-2:]
        quarters, rest = divmod(self.degrees % 360, 90)
        if rest == 0 and (height == width or quarters % 2 == 0):
            return torch.rot90(raw_NCHW, int(quarters), (-2, -1)).contiguous() if quarters else raw_NCHW
        return torch.cat([self._rotate(part) for part in raw_NCHW.split(_CHUNK)])

    def __str__(self) -> str:
        return f"rotated by {self.degrees:g} degrees"

    def _rotate(self, raw_NCHW: Tensor) -> Tensor:
        height, width = raw_NCHW.shape[-2:]
        key = (height, width, raw_NCHW.device)
        grid_1HW2 = self._grids.get(key)
        if grid_1HW2 is None:
            grid_1HW2 = self._grids[key] = self._grid(height, width).to(raw_NCHW.device)
        # All images share one grid: as channels of a single image, the grid is read only once.
        x_1PHW = raw_NCHW.reshape(1, -1, height, width).to(torch.float32)
        rotated = F.grid_sample(x_1PHW, grid_1HW2, align_corners=False).reshape(raw_NCHW.shape)
        return (rotated if raw_NCHW.is_floating_point() else rotated.round_()).to(raw_NCHW.dtype)

    def _grid(self, height: int, width: int) -> Tensor:
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        # Both coordinates run from -1 to 1 whatever the side lengths, so the aspect ratio enters.
        matrix_123 = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]])
        return F.affine_grid(matrix_123, [1, 1, height, width], align_corners=False)


def pixel_orders(pixels: int, experiences: int, *, seed: int) -> tuple[PixelOrder | None, ...]:
    """Random pixel permutation per experience; None for the first, which uses the data as stored."""
    return (
        None,
        *(
            PixelOrder(torch.randperm(pixels, generator=generator_for(seed, "pixel order", i)))
            for i in range(1, experiences)
        ),
    )


def rotations(experiences: int, *, angles: Sequence[float] = ()) -> tuple[Rotation | None, ...]:
    """Rotation of each experience; None for multiples of 360 degrees.

    Args:
        experiences: Number of experiences; angles are equally spaced from 0 to 180 degrees.
        angles: Degrees of each experience; overrides ``experiences``.

    >>> [None if r is None else r.degrees for r in rotations(4)]
    [None, 60.0, 120.0, 180.0]
    """
    if not all(math.isfinite(angle) for angle in angles):
        raise ConfigError(f"benchmark.angles: found {list(angles)}; give finite numbers of degrees")
    degrees = angles or [180 * i / max(experiences - 1, 1) for i in range(experiences)]
    return tuple(Rotation(float(a)) if a % 360 else None for a in degrees)


def _check_experiences(experiences: int) -> None:
    require_count(experiences, least=1, where="benchmark.experiences")
