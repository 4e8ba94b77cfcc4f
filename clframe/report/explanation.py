"""Text of ``clframe explain`` and ``clframe list``: the plan of a run, and the registered names with their options."""

from __future__ import annotations

import inspect
import itertools
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from clframe.accounting import count_macs, count_parameters, stage_macs
from clframe.config.files import REGISTRIES, Registered, known_configs
from clframe.core import COMPONENTS, HOOKS, SLOTS, Composition
from clframe.data import SOURCES, Benchmark
from clframe.exits.diagnostics import EXIT_METRICS
from clframe.exits.policies import CONFIDENCE_MEASURES
from clframe.metrics import METRICS
from clframe.nn import BACKBONES, Network
from clframe.options import REQUIRED, option_types
from clframe.registry import Registry

_SECTION = re.compile(r"^(Args|Class attributes|Example|Examples|Raises|Returns|Yields):$")
_ENTRY = re.compile(r"^ {4}(\w+): (.*)$")


@dataclass(frozen=True)
class Option:
    """One keyword option: type in words, default in YAML (None if required), and description."""

    name: str
    kind: str
    default: str | None
    text: str


@dataclass(frozen=True)
class Described:
    """Parsed docstring of a class or function: summary, further paragraphs, and options."""

    summary: str
    paragraphs: tuple[str, ...]
    options: tuple[Option, ...]


def described(entry: Callable[..., Any]) -> Described:
    """Parse the docstring and the annotations of ``entry``.

    >>> def make(shape: tuple[int, ...], *, width: int = 8, path: str | None = None):
    ...     '''A layer.
    ...
    ...     Cheap, and
    ...     small.
    ...
    ...     Args:
    ...         shape: Of inputs.
    ...         width: Units; more
    ...             learn more.
    ...     '''
    >>> described(make).paragraphs
    ('Cheap, and small.',)
    >>> described(make).options[0]
    Option(name='width', kind='whole number', default='8', text='Units; more learn more.')
    """
    sections = _sections(inspect.getdoc(entry) or "")
    summary, *paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", sections[""])]
    texts = _entries(sections.get("Args", ""))
    options = tuple(
        Option(name, in_words(annotation), None if default is REQUIRED else as_yaml(default), texts.get(name, ""))
        for name, (annotation, default) in option_types(entry).items()
    )
    return Described(summary, tuple(paragraph for paragraph in paragraphs if paragraph), options)


def in_words(annotation: Any) -> str:
    """Describe a type in the words of a config.

    >>> in_words(float | None), in_words(Literal["all", "past"])
    ('number or null', 'all or past')
    """
    origin = get_origin(annotation) or annotation
    if origin is Literal:
        return " or ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(choice) for choice in get_args(annotation)))
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null"}
    if origin in names:
        return names[origin]
    return "mapping" if isinstance(origin, type) and issubclass(origin, dict) else "list"


def as_yaml(value: Any) -> str:
    """Format a default as YAML.

    >>> as_yaml(None), as_yaml(True), as_yaml(("crop", 2)), as_yaml("")
    ('null', 'true', '[crop, 2]', "''")
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_yaml, value))}]"
    return str(value) or "''"


def _sections(text: str) -> dict[str, str]:
    """Split a docstring at its headings; the text before the first has the key ''."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in text.splitlines():
        heading = _SECTION.match(line)
        if heading:
            current = heading[1]
        found.setdefault(current, [])
        if not heading:
            found[current].append(line)
    return {name: "\n".join(lines).strip("\n") for name, lines in found.items()}


def _entries(section: str) -> dict[str, str]:
    """Parse each ``name: text`` of an Args section, text on one line."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        entry = _ENTRY.match(line)
        if entry:
            name, found[entry[1]] = entry[1], entry[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def _measures() -> dict[str, str]:
    return {name: described(entry).summary for name, entry in CONFIDENCE_MEASURES.items()}


def _metrics(registry: Registry[Any]) -> dict[str, str]:
    """Label, unit and better direction of metrics."""
    units = {"percent": " (%)", "points": " (percentage points)"}
    directions = {"higher": "; higher is better", "lower": "; lower is better", "": ""}
    return {
        name: f"{metric.label}{units.get(metric.kind, '')}{directions[metric.better]}"
        for name, metric in registry.items()
    }


_WITH_OPTIONS: Mapping[str, Any] = {"strategies": COMPONENTS, "benchmarks": SOURCES, "backbones": BACKBONES}
_SUMMARIES: Mapping[str, Callable[[], dict[str, str]]] = {
    "metrics": partial(_metrics, METRICS),
    "exit-metrics": partial(_metrics, EXIT_METRICS),
    "confidence-measures": _measures,
    "configs": lambda: {name: _config_summary(config) for name, config in known_configs().items()},
}


def names_of(what: str) -> tuple[str, ...]:
    """Return the names of a kind."""
    return tuple(_WITH_OPTIONS[what].names() if what in _WITH_OPTIONS else _SUMMARIES[what]())


def listing(what: str, *, filter: str = "", width: int | None = None) -> list[str]:
    """List every name of a kind in one line each: name, summary and requirements.

    Args:
        what: A kind of names that ``clframe list`` knows.
        filter: A name, or a text that the line or an option must contain. If one entry with options is left, these
            follow.
        width: Columns of the terminal, beyond which lines are cut; None does not cut them.
    """
    if what not in _WITH_OPTIONS:
        comments = _SUMMARIES[what]()
        kept = [name for name in comments if filter.lower() in f"{name} {comments[name]}".lower()]
        room = None if len(kept) == 1 else width
        return [_line(name, comments[name], "", column=max(map(len, comments)), width=room) for name in kept]
    registry: Any = _WITH_OPTIONS[what]
    entries = {name: (described(entry), entry) for name, entry in registry.items()}
    kept = [name for name in entries if name == filter.lower()] or [
        name for name, (item, _) in entries.items() if filter.lower() in _searched(name, item).lower()
    ]
    room = None if len(kept) == 1 else width
    lines = []
    for name in kept:
        item, entry = entries[name]
        lines.append(_line(name, item.summary, _needs(item, entry), column=max(map(len, entries)), width=room))
    return [*lines, *_options(entries[kept[0]][0], width=width)] if len(kept) == 1 else lines


def _searched(name: str, item: Described) -> str:
    options = [f"{option.name}={option.default or ''}" for option in item.options]
    return " ".join([name, item.summary, *options])


def _needs(item: Described, entry: Callable[..., Any]) -> str:
    """List requirements: options without a default, and a memory for components that need one."""
    needs = [f"{option.name}=..." for option in item.options if option.default is None]
    if getattr(entry, "needs_memory", False):
        needs.insert(0, "a memory")
    return f" [needs {', '.join(needs)}]" if needs else ""


def _line(name: str, sentence: str, needs: str, *, column: int, width: int | None) -> str:
    """Format ``name  sentence [needs ...]``, the sentence cut so that the line fits ``width``."""
    start, sentence = f"{name:<{column}}  ", sentence.replace("``", "")
    room = None if width is None else max(width - len(start) - len(needs), 20)
    if room is not None and len(sentence) > room:
        sentence = sentence[: room - 3].rstrip(" ,;:") + "..."
    return f"{start}{sentence}{needs}".rstrip()


def _options(item: Described, *, width: int | None) -> list[str]:
    """Format every option with its default, type and text, indented and wrapped."""
    lines: list[str] = []
    for option in item.options:
        default = "..." if option.default is None else option.default
        text = f"{option.name}={default}  ({option.kind}) {option.text.replace('``', '')}"
        lines += textwrap.wrap(
            text, min(width or 100, 100), initial_indent="  ", subsequent_indent=6 * " ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return lines


def _config_summary(config: Path | Registered) -> str:
    """The comment at the top of a config file, or the summary of a registered name."""
    if isinstance(config, Registered):
        return described(REGISTRIES[config.group].get(config.name)).summary
    return _comment(config)


def _comment(path: Path) -> str:
    """Return the comment at the top of a config."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # running the config reports the error
        return ""
    return " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))


_WHEN = {
    "setup_network": "once, before training",
    "init_state": "once, before training",
    "training_experiences": "start of experience: data",
    "training_set": "start of experience: samples",
    "add_classes": "start of experience: outputs",
    "before_experience": "start of experience: state",
    "before_epoch": "start of epoch",
    "exit_loss_weights": "start of epoch: exits' weights",
    "make_batch": "every step: batch",
    "step_values": "every step: numbers of the step",
    "task_loss": "every step: loss on the targets",
    "losses": "every step: loss terms",
    "combine_losses": "every step: combining the terms",
    "modify_gradients": "every step: gradient",
    "after_step": "every step: updated weights",
    "after_experience": "end of experience",
    "adjust_logits": "every prediction: all exits",
    "adjust_exit_logits": "every prediction: each exit",
    "predict": "every prediction",
    "extra_cost": "the ledger",
}


def explanation(
    *,
    config: str,
    composition: Composition,
    benchmark: Benchmark,
    network: Network,
    plugins: Sequence[tuple[str, Mapping[str, Any]]] = (),
    budget: str = "",
) -> str:
    """Render the plan of a run: resolved config, stream, hooks, loss terms, slots, parameters and MACs.

    ``network`` has already grown to all classes of the benchmark; ``plugins`` are Avalanche's, by class name;
    ``budget`` is the table of what a training budget affords, if there is one.
    """
    return "\n\n".join(
        f"{title}\n{_indent(body)}"
        for title, body in (
            ("config", config.strip()),
            ("stream of experiences", _stream(benchmark)),
            ("strategy", str(composition)),
            ("hooks (which component acts where)", _timetable(composition)),
            ("loss terms", "\n".join(_terms(composition))),
            ("slots", _aligned([(slot, _owner(composition, slot)) for slot in SLOTS])),
            *([("Avalanche plugins, in addition to the components", _plugins(plugins))] if plugins else ()),
            ("network with all classes", _network(network)),
            *([("training within the budget", budget)] if budget else ()),
        )
    )


def _stream(benchmark: Benchmark) -> str:
    lines = []
    for i in range(len(benchmark)):
        sizes = f"{sum(len(benchmark.train[k]) for k in benchmark.sub_experiences(i)):>7,} train "
        if benchmark.validation:
            sizes += f"{len(benchmark.validation[i]):>7,} validation "
        sizes += f"{len(benchmark.test[i]):>7,} test"
        lines.append(f"experience {i:>3} {sizes}   {benchmark.title(i)}")
    online = benchmark.online
    if online is not None:
        known = "known" if online.boundaries else "unknown"
        parts = " + ".join(str(len(benchmark.sub_experiences(i))) for i in range(len(benchmark)))
        lines.append(f"online: {parts} small experiences of {online.size} samples, boundaries {known}")
    if benchmark.domains:
        lines.append(f"every experience brings all {len(benchmark.class_order)} classes")
    if benchmark.task_labels:
        lines.append("every experience has its number as task label")
    lines.append(f"accuracies are measured on {benchmark.evaluate} data")
    return "\n".join(lines)


def _timetable(composition: Composition) -> str:
    names = {hook: " + ".join(component.name for component in composition.acting_at(hook)) for hook in HOOKS}
    return _aligned([(hook, _WHEN[hook], names[hook] or "-") for hook in HOOKS])


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Render rows of texts with every column but the last as wide as its longest entry.

    >>> print(_aligned([("a", "x"), ("bcd", "y")]))
    a   x
    bcd y
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join(" ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows)


def _terms(composition: Composition) -> list[str]:
    own = [f"loss/{c.name}/{term}" for c in composition for term in c.terms]
    return ["loss/task/ce", *own]


def _plugins(plugins: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    lines = [f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})" for name, options in plugins]
    lines += [
        "their loss is not among the loss terms above, and their memory not among the costs",
        "their state is not in checkpoints: the run cannot be resumed, and clframe.load returns the bare network",
    ]
    return "\n".join(lines)


def _owner(composition: Composition, slot: str) -> str:
    owner = composition.owner(slot)
    return "-" if owner is None else owner.name


def _network(network: Network) -> str:
    shape = network.input_shape
    macs = stage_macs(network)
    lines = [
        f"parameters       {count_parameters(network):,}",
        f"MACs per sample  {count_macs(network, shape):,} (one multiply-add = 1; FLOPs = 2 x MACs)",
        f"input            {' x '.join(map(str, shape))}",
    ]
    width = max(len(name) for name in macs)
    for name, count in macs.items():
        tap = network.backbone.tap_shapes.get(name)
        shown = f"  tap {' x '.join(map(str, tap))}" if tap else ""
        lines.append(f"  {name:<{width}} {count:>14,}{shown}")
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
