"""docs/analysis.md says what there is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from clframe.exits.failure import LABELS, LOWER_IS_BETTER
from clframe.exits.proxy import CALIBRATIONS, MEASURES
from clframe.sparsity import SparsityCurve
from clframe.sparsity.functional import baseline_sparsity
from clframe.sparsity.study import RULES

TEXT = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text(encoding="utf-8")


def test_its_python_runs(capsys):
    for code in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(compile(code, "analysis.md", "exec"), {})
    assert "beyond a Gaussian vector" in capsys.readouterr().out


def test_it_names_every_rule_and_number():
    named = set(re.findall(r"`(\w+)`", TEXT))
    assert set(RULES) <= named and {field.name for field in fields(SparsityCurve)} - {"role", "kind"} <= named
    found = [round(100 * baseline_sparsity(p, kind="top_p", neurons=512)) for p in (0.99, 0.95, 0.9, 0.8)]
    assert "{}, {}, {} and {} % for top-p at 0.99".format(*found) in TEXT


def test_it_defines_every_metric_of_exits_with_its_direction():
    rows = dict(re.findall(r"^\| ([^|]+) \| `(\w+)` \|.*\|$", TEXT, flags=re.MULTILINE))
    defined = {name: label.removesuffix(", nats") for name, label in LABELS.items()}
    # Smooth ECE is computed by the study only.
    assert {name: label for label, name in rows.items()} == {**defined, "smooth_ece": "smooth ECE"}
    lower = set(re.findall(r"^\| [^|]+ \| `(\w+)` \|.*\| lower \|$", TEXT, flags=re.MULTILINE))
    assert lower == LOWER_IS_BETTER | {"smooth_ece"}
    assert all(f"`{name}`" in TEXT for name in (*CALIBRATIONS, *MEASURES))
