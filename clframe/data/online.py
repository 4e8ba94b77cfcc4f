"""Online streams: each sample once, in small experiences, with sharp or blurry boundaries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from clframe.data.benchmark import Benchmark, Online
from clframe.data.samples import concatenate
from clframe.errors import ConfigError
from clframe.functional.seeding import generator_for


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
