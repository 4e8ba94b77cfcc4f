"""Decoding that skips inactive neurons of a language model: its score and its time against the dense model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch

from clframe.data.target import IGNORED, Batches, SplitName, Target
from clframe.environment import versions
from clframe.errors import ConfigError
from clframe.moe.conversion.sweep import time_decoding
from clframe.nn.frozen import evaluating
from clframe.sparse_decode import Rule, calibrate, sparse_decoder
from clframe.sparse_decode.calibration import find_points
from clframe.sparse_decode.cost import count_bytes
from clframe.sparse_decode.rules import PLACES, Place, expand_places
from clframe.sparsity.masking import Masker, replacing
from clframe.sparsity.scores import language_scores, token_sums
from clframe.tables import Cell, Table, to_csv, to_markdown
from clframe.targets.folders import write_files

SPARSITIES: Final = (0.25, 0.5, 0.75, 0.9)
TEXTS: Final = 64
"""Texts whose tokens give the thresholds."""

PlaceRules = Mapping[str, Mapping[str, Rule]]


@dataclass(frozen=True, kw_only=True)
class DecodeTiming:
    """One place and sparsity.

    Attributes:
        place: Name of a place, or ``all``.
        asked: Sparsity for which thresholds were chosen.
        sparsity: Zeros on the scored texts by place, means over layers.
        perplexity: On these texts.
        dense: Tokens per second of the dense model.
        sparse: Tokens per second of the sparse one.
        speedup: Median over pairs of calls.
        read: Share of the model's weights that is read.
        ceiling: Speed-up if time were that of reading weights.
    """

    place: str
    asked: float
    sparsity: Mapping[str, float]
    perplexity: float
    dense: float
    sparse: float
    speedup: float
    read: float
    ceiling: float


@dataclass(frozen=True, kw_only=True)
class DecodeStudy:
    """Results of :func:`study_decoding`.

    Attributes:
        target: Its name.
        part: Scored data.
        perplexity: Of the dense model.
        ffn_share: Share of feed-forward networks in the weights that a token reads.
        context: Tokens before the first timed one.
        threads: Of PyTorch.
        device: Device of the measurement.
        dtype: Type of the weights.
        timings: One per place and sparsity.
    """

    target: str
    part: SplitName
    perplexity: float
    ffn_share: float
    context: int
    threads: int
    device: str
    dtype: str
    timings: tuple[DecodeTiming, ...]


def require_places(target: Target, names: Sequence[str]) -> dict[str, tuple[Place, ...]]:
    """Return the places of each name, or refuse names and targets that cannot be measured.

    Raises:
        ConfigError: No language model, no names, or a place that the model lacks.
        UnknownNameError: An unknown name.
    """
    if target.kind != "causal":
        raise ConfigError(f"--decode: found {target.name}, which is not a language model; leave it out")
    wanted = expand_places(names, where="--decode")
    for place in dict.fromkeys(place for places in wanted.values() for place in places):
        find_points(target.model, place, where="--decode")
    return wanted


def study_decoding(
    target: Target,
    names: Sequence[str],
    *,
    sparsities: Sequence[float] = SPARSITIES,
    limit: int | None = None,
    size: int | None = None,
    pairs: int = 30,
    on_pass: Callable[[int, int], None] | None = None,
) -> DecodeStudy:
    """Score and time a language model of transformers that skips the weights of small activations when it decodes.

    Each network has its own thresholds, from training texts (of questions: from the questions). Scores are those of the
    model that masks these activations in all tokens, times those of one token after the first text.

    Args:
        target: A causal language model.
        names: Places, or ``all`` for input and intermediate together.
        sparsities: Shares of zeros for which thresholds are chosen.
        limit: Texts to score on; None for all.
        size: Texts per batch; None: 16.
        pairs: Timed pairs of calls.
        on_pass: Called with the finished and the total number of measurements.

    Raises:
        ConfigError: See :func:`require_places`.
        DivergenceError: Logits with NaN.
    """
    groups = require_places(target, names)
    part: SplitName = "test" if target.splits.validation is None else "validation"
    batches = target.batches(part, size=size or 16, limit=limit)
    training = target.batches("fit", size=size or 16, limit=TEXTS)
    inputs = target.batches(part, size=1, limit=1)[0].inputs
    assert isinstance(inputs, Mapping)
    weights, dense = count_bytes(target.model), _score(target, batches, {})[0]
    timings, total = list[DecodeTiming](), len(groups) * len(sparsities)
    for name, places in groups.items():
        found = calibrate(target.model, training, sparsities=sparsities, places=places, predict=target.predict)
        for asked, rules in zip(sparsities, found, strict=True):
            perplexity, sparsity = _score(target, batches, rules)
            took = time_decoding(target.model, sparse_decoder(target.model, rules), inputs, batch=1, pairs=pairs)
            timings.append(
                DecodeTiming(
                    place=name, asked=asked, sparsity=sparsity, perplexity=perplexity, dense=1 / took.dense,
                    sparse=1 / took.converted, speedup=took.speedup, read=weights.share(sparsity),
                    ceiling=weights.ceiling(sparsity),
                )
            )  # fmt: skip
            if on_pass is not None:
                on_pass(len(timings), total)
    weight = next(target.model.parameters())
    return DecodeStudy(
        target=target.name, part=part, perplexity=dense, ffn_share=weights.ffn / weights.model,
        context=inputs["input_ids"].shape[1], threads=torch.get_num_threads(), device=str(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."), timings=tuple(timings),
    )  # fmt: skip


def _score(target: Target, batches: Batches, rules: PlaceRules) -> tuple[float, dict[str, float]]:
    """Perplexity of the masked model, and zeros by place."""
    assert target.logits_at is not None
    maskers = {
        place: [
            Masker(point, kind=rules[place][name].kind, value=rules[place][name].value)
            for name, point in find_points(target.model, place).items()
        ]
        for place in PLACES
        if place in rules
    }
    every, sums = [one for found in maskers.values() for one in found], []
    with evaluating(target.model), replacing([(one.point, one) for one in every]):
        for inputs, targets, mask in batches:
            assert targets is not None
            for one in every:
                one.masks = mask if isinstance(mask, Mapping) else {"all": mask}
            valid = targets != IGNORED
            sums.append(token_sums(target.logits_at(target.model, inputs, valid), targets[valid]))
    zeros: dict[str, float] = {
        place: sum(one.sparsity() for one in found) / len(found) for place, found in maskers.items()
    }
    return language_scores(sums).perplexity, zeros


def decode_table(study: DecodeStudy) -> Table:
    """Make a row per place and sparsity."""
    rows: list[tuple[Cell, ...]] = [
        (
            one.place, " and ".join(f"{100 * share:.1f}" for share in one.sparsity.values()), f"{one.perplexity:,.4g}",
            f"{one.dense:,.1f}", f"{one.sparse:,.1f}", f"{one.speedup:.2f}", f"{100 * one.read:.1f}",
            f"{one.ceiling:.2f}",
        )
        for one in study.timings
    ]  # fmt: skip
    note = (
        f"One text, a token after {study.context} others, with KV cache; {study.device}, {study.threads} threads, "
        f"{study.dtype}. Feed-forward networks are {100 * study.ffn_share:.1f} % of the weights that a token reads; "
        f"the ceiling is the speed-up if only reading weights took time. Perplexity of the dense model "
        f"{study.perplexity:,.4g}."
    )
    columns = (
        "place", "zeros, %", "perplexity", "dense, tokens/s", "sparse, tokens/s", "speed-up", "weights read, %",
        "ceiling",
    )  # fmt: skip
    return Table(name="decode", title="Decoding without the zeros", note=note, columns=columns, rows=tuple(rows))


def write_decode_study(study: DecodeStudy, folder: Path, *, command: Sequence[str]) -> None:
    """Write ``decode.json``, ``decode.csv`` and ``decode.md``.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    table, content = decode_table(study), {"command": list(command), "versions": versions(), **asdict(study)}
    for one in (content, *content["timings"]):  # a perplexity may exceed the range of a float
        one["perplexity"] = one["perplexity"] if math.isfinite(one["perplexity"]) else None
    files = {"decode.csv": to_csv(table), "decode.md": to_markdown(table)}
    write_files(folder, {**files, "decode.json": json.dumps(content, indent=1, allow_nan=False) + "\n"})
