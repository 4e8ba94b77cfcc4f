"""Method cards: docs/strategies.md, written from the docstrings and declarations of the components themselves.

    python docs/make_cards.py

A test compares the file with the code: run this again after a change of docstrings or options.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import strategies
from clframe.config.files import read_yaml, shipped_configs
from clframe.core import COMPONENTS, Component, parse
from clframe.report.explanation import described

FILE = Path(__file__).parent / "strategies.md"

FAMILIES: dict[str, tuple[str, ...]] = {
    "Bounds and baselines": ("naive", "joint", "cumulative", "freeze"),
    "Replay": ("er", "er_ace", "der", "derpp", "mir", "gss", "agem", "gdumb"),
    "Regularization": ("ewc", "si", "mas", "label_smoothing", "lora"),
    "Distillation": ("lwf", "ancl"),
    "Balance between old and new classes": ("bic", "current_classes", "icarl", "lode", "ssil", "wa", "cwr", "ncm"),
    "Representations": ("lucir", "podnet", "prd"),
    "Pre-trained backbones": ("l2p", "ranpac", "simplecil", "slda"),
    "Exits and computation": ("exits", "early_exit", "sparsity", "moe"),
}
"""Components by family; those in none are listed under "More"."""

HEAD = """\
# Strategies

<!-- Written by docs/make_cards.py from the docstrings in strategies/: change them, then run it again. -->

A strategy is a sum of the components below, such as `er + lwf(alpha=2)`. An option is set in the expression or as
`components.NAME.OPTION=VALUE`; `strategy=PRESET` takes a file of `configs/strategy`, and a preset with the name of a
component is `strategy=strategy/NAME`. Two components that own the same slot are refused; one that needs a replay buffer
reads that of another, as in `er + icarl`. Every component works with one exit and with many, and its loss terms are
logged under the names given here.

```console
$ clframe list strategies lwf
$ clframe run quickstart strategy='er + lwf(alpha=2)'
$ clframe run quickstart strategy=strategy/lwf
```
"""


def cards() -> str:
    """Return the whole document."""
    kinds = {kind.name: kind for kind in strategies.COMPONENTS}
    presets = _presets()
    grouped = dict(_grouped(kinds))
    parts = [HEAD, *(_contents(family, [kinds[name] for name in names]) for family, names in grouped.items())]
    for names in grouped.values():
        parts += [_card(kinds[name], presets.get(name, ())) for name in names]
    return "\n".join(parts)


def _grouped(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    left = sorted(names)
    for family, members in FAMILIES.items():
        found = [name for name in members if name in left]
        left = [name for name in left if name not in members]
        yield family, found
    if left:
        yield "More", left


def _contents(family: str, kinds: list[type[Component]]) -> str:
    """Return the table of a family, one row per component."""
    lines = [f"**{family}**", "", "| name | description | owns | buffer |", "|---|---|---|---|"]
    for kind in kinds:
        memory = "has one" if kind.keeps_memory else "needs one" if kind.needs_memory else ""
        summary = _markdown(described(kind).summary, cell=True)
        lines.append(f"| [{kind.name}](#{kind.name}) | {summary} | {_names(kind.slots)} | {memory} |")
    return "\n".join([*lines, ""])


def _card(kind: type[Component], presets: Iterable[str]) -> str:
    item = described(kind)
    lines = [f"## {kind.name}", "", f"**{_markdown(item.summary)}**", ""]
    for paragraph in item.paragraphs:
        lines += [_markdown(paragraph), ""]
    lines += [_facts(kind), ""]
    if item.options:
        lines += ["| option | type | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{option.name}` | {option.kind} | `{option.default}` | {_markdown(option.text, cell=True)} |"
            for option in item.options
        ]
        lines.append("")
    if presets:
        lines += ["Presets:", "", *presets, ""]
    return "\n".join(lines)


def _facts(kind: type[Component]) -> str:
    """Describe what a component declares: slots, buffer, loss terms, and the option at which it is the identity."""
    facts = [f"owns {_names(kind.slots)}" if kind.slots else "owns no slot"]
    if kind.keeps_memory:
        facts.append("has a replay buffer")
    if kind.needs_memory:
        facts.append("needs a replay buffer")
    if kind.terms:
        facts.append("logs " + ", ".join(f"`loss/{kind.name}/{term}`" for term in kind.terms))
    if kind.weight is not None:
        facts.append(f"no effect at `{kind.weight}=0`")
    return f"*Declares:* {'; '.join(facts)}."


def _presets() -> dict[str, list[str]]:
    """Collect the lines on presets by the components that they use."""
    found: dict[str, list[str]] = {}
    for path in sorted((shipped_configs() / "strategy").glob("*.yaml")):
        comment = " ".join(_comment(path.read_text(encoding="utf-8")))
        name = f"strategy/{path.stem}" if path.stem in COMPONENTS else path.stem
        expression = str(read_yaml(path)["strategy"])
        for component in parse(expression):
            found.setdefault(component.name, []).append(f"- `strategy={name}` (`{expression}`): {comment}")
    return found


def _comment(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        yield line.lstrip("# ")


def _names(slots: Iterable[str]) -> str:
    return ", ".join(f"`{slot}`" for slot in sorted(slots))


def _markdown(text: str, *, cell: bool = False) -> str:
    """Convert docstring text to Markdown: code in single backticks, bars escaped in table cells."""
    text = text.replace("``", "`")
    return text.replace("|", "\\|") if cell else text


if __name__ == "__main__":
    FILE.write_text(cards(), encoding="utf-8")
    print(FILE)
