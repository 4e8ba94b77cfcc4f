"""Tables and JSON of a sparsity study."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from clframe.metrics.statistics import NAN
from clframe.sparsity.analysis import ALL, SparsityCurve
from clframe.sparsity.part_activity import ACTIVE, Domains
from clframe.sparsity.study import SparsityStudy
from clframe.sparsity.union import PAYS, ActiveUnion
from clframe.tables import Cell, Quantity, Table

SCHEMA_VERSION = 1
"""Version of ``sparsity.json``; raised when a field is removed or changes its meaning."""


def to_json(study: SparsityStudy, *, command: Sequence[str], versions: Mapping[str, str]) -> str:
    """Return the content of ``sparsity.json``; see ``docs/analysis.md``."""
    report, found = study.report, study.experiences
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "command": list(command),
        "versions": dict(versions),
        **{
            name: getattr(study, name)
            for name in ("target", "kind", "origin", "part", "samples", "tokens", "score", "share", "tolerance")
        },
        "dense": report.dense,
        "language": None if study.language is None else asdict(study.language),
        "curves": [{**asdict(curve), "excess": curve.excess} for curve in report.curves],
        "effective_rank": report.ranks,
        "union": _union_tree(study.union),
        "experiences": None,
        "domains": None,
    }
    if found is not None:
        content["experiences"] = {
            "rule": "top_p", "value": ACTIVE, **asdict(found), "mean_sparsity": found.mean_sparsity,
            "mean_overlap": found.mean_overlap,
        }  # fmt: skip
    if study.domains is not None:
        content["domains"] = {
            "rule": "top_p", "value": ACTIVE, **asdict(study.domains), "mean_sparsity": study.domains.mean_sparsity,
            "mean_overlap": study.domains.mean_overlap,
        }  # fmt: skip
    for curve in content["curves"]:  # a perplexity may exceed the range of a float
        curve["scores"] = [score if math.isfinite(score) else None for score in curve["scores"]]
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def tables(study: SparsityStudy) -> tuple[Table, ...]:
    """Make all tables: critical sparsity by role and by layer; by kind of tokens and by experience; every sweep."""
    found = [critical_table(study), layers_table(study)]
    if any(len(curve.parts) > 1 for curve in study.report.curves):
        found.append(parts_table(study))
    if study.experiences is not None:
        found.append(experiences_table(study))
    if study.domains is not None:
        found.append(domains_table(study.domains))
    return (*found, union_table(study.union), points_table(study))


def describe_study(study: SparsityStudy) -> str:
    """Describe the target, its score and the data in one line."""
    tokens = "" if study.tokens is None else f", {study.tokens:,} tokens"
    on = f"on {study.samples:,} {study.part} samples{tokens}"
    percent = f"{100 * study.report.dense:.2f} %"
    if study.score == "agreement":
        found = f"agreement with the dense model of the dense model {percent}"
    elif study.score.startswith("choices"):
        by = " per character" if study.score == "choices_normalized" else ""
        found = f"questions whose right choice has the highest log-likelihood{by} under the dense model {percent}"
    elif study.language is None:
        found = f"accuracy of the dense model {percent}"
    else:
        scores = [f"perplexity of the dense model {study.language.perplexity:,.4g}",
                  f"accuracy of the next token {100 * study.language.accuracy:.2f} %"]  # fmt: skip
        found = " and ".join(scores if study.score == "perplexity" else scores[::-1])
    return f"{study.target}: {found} {on}"


def describe_limit(study: SparsityStudy) -> str:
    """State the tolerated loss of the score."""
    if study.score == "perplexity":
        return f"has a perplexity of at most {study.limit_score:,.5g}, {100 * study.tolerance:g} % above the dense one"
    return f"keeps {100 * study.share:g} % of the dense score"


def critical_table(study: SparsityStudy) -> Table:
    """Make a row per rule and role: critical sparsity, and that of a Gaussian vector."""
    rows = [
        (
            curve.kind, role_name(curve), f"{curve.critical_value:.4g}",
            *_with_gaussian(curve.critical, curve.critical_gaussian),
        )
        for curve in study.report.curves
    ]  # fmt: skip
    note = (
        f"The highest mean sparsity that {describe_limit(study)}, the sparsity of a dense "
        f"Gaussian vector under the same rule, and the excess over it. {describe_study(study)}."
    )
    columns = ("rule", "role", "at", "critical, %", "Gaussian, %", "excess, points")
    return Table(name="critical", title="Critical sparsity by role", note=note, columns=columns, rows=tuple(rows))


def layers_table(study: SparsityStudy) -> Table:
    """Make a row per rule, role and layer: sparsity at the critical point, and the effective rank."""
    rows: list[tuple[Cell, ...]] = []
    for curve in study.report.curves:
        for site, share in curve.critical_layers.items():
            layer, role = site.rsplit("/", 1) if curve.role == ALL else (site, curve.role)
            rank = study.report.ranks.get(role, {}).get(layer, NAN)
            rows.append((
                curve.kind, role_name(curve), site or "(model)",
                *_with_gaussian(share, curve.critical_gaussian_layers[site]),
                Quantity(rank, kind="decimal", undefined="measured for each role alone"),
            ))  # fmt: skip
    note = "At the value where all layers together reach the critical sparsity; effective rank of dense activations."
    columns = ("rule", "role", "layer", "sparsity, %", "Gaussian, %", "excess, points", "effective rank")
    return Table(name="layers", title="Sparsity by layer at the critical point", note=note, columns=columns,
                 rows=tuple(rows))  # fmt: skip


def parts_table(study: SparsityStudy) -> Table:
    """Make a row per rule, role and kind of tokens: prompt and generated."""
    rows = [
        (curve.kind, role_name(curve), part, *_with_gaussian(share, curve.critical_gaussian))
        for curve in study.report.curves
        for part, share in curve.critical_parts.items()
    ]
    columns = ("rule", "role", "tokens", "sparsity, %", "Gaussian, %", "excess, points")
    return Table(name="parts", title="Sparsity by kind of tokens at the critical point", columns=columns,
                 rows=tuple(rows))  # fmt: skip


def experiences_table(study: SparsityStudy) -> Table:
    """Make a row per experience: sparsity, overlap and forgetting, means over layers."""
    found = study.experiences
    assert found is not None
    rows = []
    for e, (sparse, overlaps, lost) in enumerate(
        zip(found.mean_sparsity, found.mean_overlap, found.forgetting, strict=True)
    ):
        later = overlaps[e + 1 :]
        rows.append((
            f"{e}", *_with_gaussian(sparse, found.gaussian),
            Quantity((sum(overlaps) - overlaps[e]) / (len(found) - 1)),
            Quantity(sum(later) / len(later) if later else NAN, undefined="the last experience"),
            Quantity(NAN if lost is None else lost, kind="points",
                     undefined="the last experience" if e == len(found) - 1 else "the run is not finished"),
        ))  # fmt: skip
    note = (
        f"Neurons of the final model on test data of each experience, means over layers; active if kept by top-p "
        f"{ACTIVE}. Overlap: Jaccard index of the rates of activity."
    )
    columns = ("experience", "sparsity, %", "Gaussian, %", "excess, points", "overlap with the others, %",
               "with later ones, %", "forgetting, points")  # fmt: skip
    return Table(name="experiences", title="Active neurons by experience", note=note, columns=columns, rows=tuple(rows))


def domains_table(found: Domains) -> Table:
    """Make a row per domain: sparsity, and the overlap of its active neurons with those of every domain."""
    rows: list[tuple[Cell, ...]] = [
        (name, *_with_gaussian(sparse, found.gaussian), *map(Quantity, overlaps))
        for name, sparse, overlaps in zip(found.names, found.mean_sparsity, found.mean_overlap, strict=True)
    ]
    note = (
        f"Neurons on each text file, means over layers; active if kept by top-p {ACTIVE}. Overlap: Jaccard index of "
        f"the rates of activity."
    )
    columns = ("domain", "sparsity, %", "Gaussian, %", "excess, points",
               *(f"overlap with {name}, %" for name in found.names))  # fmt: skip
    return Table(name="domains", title="Active neurons by domain", note=note, columns=columns, rows=tuple(rows))


def points_table(study: SparsityStudy) -> Table:
    """Make a row per point of every sweep."""
    lower = study.score == "perplexity"
    rows = [
        (
            curve.kind, role_name(curve), f"{value:.6g}",
            Quantity(score, kind="fine" if lower else "percent", undefined="not finite"), *_with_gaussian(share, gauss),
        )
        for curve in study.report.curves
        for value, score, share, gauss in zip(curve.values, curve.scores, curve.achieved, curve.gaussian, strict=True)
    ]  # fmt: skip
    score_column = study.score if lower else f"{study.score}, %"
    columns = ("rule", "role", "value", score_column, "achieved, %", "Gaussian, %", "excess, points")
    return Table(name="points", title="All points of the sweeps", note=f"{describe_study(study)}.", columns=columns,
                 rows=tuple(rows))  # fmt: skip


def union_table(union: ActiveUnion) -> Table:
    """Make a row per batch size: neurons that a batch activates, and the share of the cost that is saved."""
    rows: list[tuple[Cell, ...]] = []
    reason = "fewer were measured than a batch has"
    for at, size in enumerate(union.sizes[: max(len(union.mean_tokens), len(union.mean_samples))]):
        cells: list[Cell] = [f"{size:,}"]
        for shares in (union.mean_tokens, union.mean_samples):
            share = shares[at] if at < len(shares) else NAN
            cells += [Quantity(share, undefined=reason), Quantity(1 - share, undefined=reason)]
        rows.append(tuple(cells))
    found = [union.largest_that_pays(shares) for shares in (union.mean_tokens, union.mean_samples)]
    tokens, samples = ("none" if size is None else f"{size:,}" for size in found)
    note = (
        f"Neurons that at least one token of a random batch activates (kept by top-p {union.value:.4g}), mean over "
        f"layers; the others need not be computed, which saves that share of the layers' cost. Largest batch that "
        f"saves {100 * PAYS:g} %: {tokens} (tokens), {samples} (samples)."
    )
    columns = ("batch size", "active by tokens, %", "saved by tokens, %", "active by samples, %", "saved by samples, %")
    return Table(name="union", title="Active neurons by batch size", note=note, columns=columns, rows=tuple(rows))


def role_name(curve: SparsityCurve) -> str:
    """Return the name of a curve's role in tables."""
    return "input + intermediate" if curve.role == ALL else curve.role


def _union_tree(union: ActiveUnion) -> dict[str, Any]:
    return {
        "rule": "top_p", **asdict(union), "mean_tokens": union.mean_tokens, "mean_samples": union.mean_samples,
        "largest_that_pays": {
            "least": PAYS, "tokens": union.largest_that_pays(union.mean_tokens),
            "samples": union.largest_that_pays(union.mean_samples),
        },
    }  # fmt: skip


def _with_gaussian(share: float, gaussian: float) -> tuple[Quantity, Quantity, Quantity]:
    return Quantity(share), Quantity(gaussian), Quantity(share - gaussian, kind="points")
