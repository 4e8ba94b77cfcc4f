"""A study of sparsity as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from clframe.analysis import Curve
from clframe.analysis.sparsity import ALL
from clframe.reporting.report.statistics import NAN
from clframe.reporting.report.table import Cell, Quantity, Table
from clframe.studies.sparsity.study import ACTIVE, SparsityStudy

SCHEMA_VERSION = 1
"""Of ``sparsity.json``; raised when a field is removed or changes its meaning."""


def to_json(study: SparsityStudy, *, command: Sequence[str], versions: Mapping[str, str]) -> str:
    """``sparsity.json``, which ``docs/analysis.md`` describes."""
    report, found = study.report, study.experiences
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "command": list(command),
        "versions": dict(versions),
        **{name: getattr(study, name) for name in ("target", "kind", "part", "samples", "tokens", "score", "share")},
        "dense": report.dense,
        "curves": [{**asdict(curve), "excess": curve.excess} for curve in report.curves],
        "effective_rank": report.ranks,
        "experiences": None,
    }
    if found is not None:
        content["experiences"] = {
            "rule": "top_p", "value": ACTIVE, **asdict(found), "mean_sparsity": found.mean_sparsity,
            "mean_overlap": found.mean_overlap,
        }  # fmt: skip
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def tables(study: SparsityStudy) -> tuple[Table, ...]:
    """The critical sparsity by role, then by layer; by part and by experience where there are any; and all points."""
    found = [critical_table(study), layers_table(study)]
    if any(len(curve.parts) > 1 for curve in study.report.curves):
        found.append(parts_table(study))
    if study.experiences is not None:
        found.append(experiences_table(study))
    return (*found, points_table(study))


def said(study: SparsityStudy) -> str:
    """What was measured on what, in a sentence."""
    tokens = "" if study.tokens is None else f", {study.tokens:,} tokens"
    of = "agreement with the dense model" if study.score == "agreement" else "accuracy"
    if study.kind == "causal" and study.score == "accuracy":
        of = "accuracy of the next token"
    return (
        f"{study.target}: {of} of the dense model {100 * study.report.dense:.2f} % on {study.samples:,} {study.part} "
        f"samples{tokens}"
    )


def critical_table(study: SparsityStudy) -> Table:
    """By rule and role: the highest sparsity that keeps the score, beside a Gaussian vector's."""
    rows = [
        (curve.kind, role_name(curve), f"{curve.critical_value:.4g}", *_beside(curve.critical, curve.critical_gaussian))
        for curve in study.report.curves
    ]
    note = (
        f"The highest achieved mean sparsity that keeps {100 * study.share:g} % of the dense score, what a dense "
        f"Gaussian vector gives by the same rule, and the excess over it. {said(study)}."
    )
    columns = ("rule", "role", "at", "critical, %", "Gaussian, %", "excess, points")
    return Table(name="critical", title="Critical sparsity by role", note=note, columns=columns, rows=tuple(rows))


def layers_table(study: SparsityStudy) -> Table:
    """The same by layer, with its effective rank."""
    rows: list[tuple[Cell, ...]] = []
    for curve in study.report.curves:
        for label, share in curve.critical_layers.items():
            layer, role = label.rsplit("/", 1) if curve.role == ALL else (label, curve.role)
            rank = study.report.ranks.get(role, {}).get(layer, NAN)
            rows.append((
                curve.kind, role_name(curve), label or "(model)",
                *_beside(share, curve.critical_gaussian_layers[label]),
                Quantity(rank, kind="decimal", undefined="of each role alone"),
            ))  # fmt: skip
    note = "Where all layers together reach the critical sparsity; the effective rank is of the dense activations."
    columns = ("rule", "role", "layer", "sparsity, %", "Gaussian, %", "excess, points", "effective rank")
    return Table(name="layers", title="Sparsity by layer at the critical point", note=note, columns=columns,
                 rows=tuple(rows))  # fmt: skip


def parts_table(study: SparsityStudy) -> Table:
    """Prompt and generated tokens apart."""
    rows = [
        (curve.kind, role_name(curve), part, *_beside(share, curve.critical_gaussian))
        for curve in study.report.curves
        for part, share in curve.critical_parts.items()
    ]
    columns = ("rule", "role", "tokens", "sparsity, %", "Gaussian, %", "excess, points")
    return Table(name="parts", title="Sparsity by kind of tokens at the critical point", columns=columns,
                 rows=tuple(rows))  # fmt: skip


def experiences_table(study: SparsityStudy) -> Table:
    """Sparsity, overlap and forgetting of each experience, means over layers."""
    found = study.experiences
    assert found is not None
    rows = []
    for e, (sparse, overlaps, lost) in enumerate(
        zip(found.mean_sparsity, found.mean_overlap, found.forgetting, strict=True)
    ):
        later = overlaps[e + 1 :]
        rows.append((
            f"{e}", *_beside(sparse, found.gaussian),
            Quantity((sum(overlaps) - overlaps[e]) / (len(found) - 1)),
            Quantity(sum(later) / len(later) if later else NAN, undefined="it is the last"),
            Quantity(NAN if lost is None else lost, kind="points",
                     undefined="it is the last" if e == len(found) - 1 else "the run is not finished"),
        ))  # fmt: skip
    note = (
        f"Neurons of the final model on test data of each experience, means over layers; active where top-p {ACTIVE} "
        f"keeps them. Overlap: Jaccard of the rates at which neurons are active."
    )
    columns = ("experience", "sparsity, %", "Gaussian, %", "excess, points", "overlap with the others, %",
               "with later ones, %", "forgetting, points")  # fmt: skip
    return Table(name="experiences", title="Active neurons by experience", note=note, columns=columns, rows=tuple(rows))


def points_table(study: SparsityStudy) -> Table:
    """Every point of every sweep."""
    rows = [
        (curve.kind, role_name(curve), f"{value:.6g}", Quantity(score), *_beside(share, gauss))
        for curve in study.report.curves
        for value, score, share, gauss in zip(curve.values, curve.scores, curve.achieved, curve.gaussian, strict=True)
    ]
    columns = ("rule", "role", "value", f"{study.score}, %", "achieved, %", "Gaussian, %", "excess, points")
    return Table(name="points", title="All points of the sweeps", note=f"{said(study)}.", columns=columns,
                 rows=tuple(rows))  # fmt: skip


def role_name(curve: Curve) -> str:
    """The role as tables call it."""
    return "input + intermediate" if curve.role == ALL else curve.role


def _beside(share: float, gaussian: float) -> tuple[Quantity, Quantity, Quantity]:
    return Quantity(share), Quantity(gaussian), Quantity(share - gaussian, kind="points")
