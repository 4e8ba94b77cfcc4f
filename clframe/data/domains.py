"""The domains of domain-incremental streams: the same pictures, seen in another way in every experience.

A domain is a function of stored inputs, applied to each batch where it is made, so the stream keeps one copy
of the data however many domains it has.

Shape suffixes: N samples, C channels, H and W height and width, P pixels or planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from clframe.data.benchmark import Benchmark
from clframe.data.source import Source
from clframe.errors import ConfigError, DataError
from clframe.functional.seeding import generator_for

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
