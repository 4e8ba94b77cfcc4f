"""Text of `clframe explain` and `clframe list`: what a run will do, and what there is to choose from."""

from __future__ import annotations

import inspect
import itertools
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from clframe.accounting import count_macs, count_parameters, stage_macs
from clframe.config.files import known_configs
from clframe.core import COMPONENTS, HOOKS, SLOTS, Composition
from clframe.data import SOURCES, Benchmark
from clframe.nn import BACKBONES, Network
from clframe.options import REQUIRED, option_types

_SECTION = re.compile(r"^(Args|Class attributes|Example|Examples|Raises|Returns|Yields):$")
_ENTRY = re.compile(r"^ {4}(\w+): (.*)$")


@dataclass(frozen=True)
class Option:
    """One keyword option: its type in words, its default as YAML writes it (None: it must be given), and its text."""

    name: str
    kind: str
    default: str | None
    text: str


@dataclass(frozen=True)
class Described:
    """A class or function in its own words: the first sentence, the paragraphs behind it, and its options."""

    summary: str
    paragraphs: tuple[str, ...]
    options: tuple[Option, ...]


def described(entry: Callable[..., Any]) -> Described:
    """What the docstring and the annotations of ``entry`` say.

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
    """A type as readers of a config know it.

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
    """A default as a config would state it.

    >>> as_yaml(None), as_yaml(True), as_yaml(("crop", 2)), as_yaml("")
    ('null', 'true', '[crop, 2]', "''")
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_yaml, value))}]"
    return str(value) or "''"


def _sections(text: str) -> dict[str, str]:
    """The docstring cut at its headings; what stands before the first is called ''."""
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
    """Text of each ``name: text`` of an Args section, on one line."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        entry = _ENTRY.match(line)
        if entry:
            name, found[entry[1]] = entry[1], entry[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def listing(what: str, *, filter: str = "", width: int | None = None) -> list[str]:
    """One line of every strategy, benchmark, backbone or config: its name, what it is and what it needs.

    Args:
        what: ``strategies``, ``benchmarks``, ``backbones`` or ``configs``.
        filter: A name, or else what the line or the name of an option has to contain. Where that leaves one, its
            options follow, unless it is a config.
        width: Columns of the terminal, beyond which lines are cut; None leaves them as they are.
    """
    if what == "configs":
        comments = {name: _comment(path) for name, path in known_configs().items()}
        kept = [name for name in comments if filter.lower() in f"{name} {comments[name]}".lower()]
        room = None if len(kept) == 1 else width
        return [_line(name, comments[name], "", column=max(map(len, comments)), width=room) for name in kept]
    registry: Any = {"strategies": COMPONENTS, "benchmarks": SOURCES, "backbones": BACKBONES}[what]
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
    """What is no good without something else: a component without a memory, a data set without its path."""
    needs = [f"{option.name}=..." for option in item.options if option.default is None]
    if getattr(entry, "needs_memory", False):
        needs.insert(0, "a memory")
    return f" [needs {', '.join(needs)}]" if needs else ""


def _line(name: str, sentence: str, needs: str, *, column: int, width: int | None) -> str:
    """``name  sentence [needs ...]``, the sentence cut so that the line fits ``width``."""
    start, sentence = f"{name:<{column}}  ", sentence.replace("``", "")
    room = None if width is None else max(width - len(start) - len(needs), 20)
    if room is not None and len(sentence) > room:
        sentence = sentence[: room - 3].rstrip(" ,;:") + "..."
    return f"{start}{sentence}{needs}".rstrip()


def _options(item: Described, *, width: int | None) -> list[str]:
    """Every option with its default, type and text, indented and folded."""
    lines: list[str] = []
    for option in item.options:
        default = "..." if option.default is None else option.default
        text = f"{option.name}={default}  ({option.kind}) {option.text.replace('``', '')}"
        lines += textwrap.wrap(
            text, min(width or 100, 100), initial_indent="  ", subsequent_indent=6 * " ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return lines


def _comment(path: Path) -> str:
    """The comment that a config begins with."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # running it will say what is wrong with it
        return ""
    return " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))


_WHEN = {
    "setup_network": "once, before training",
    "init_state": "once, before training",
    "training_experiences": "start of experience: data",
    "training_set": "start of experience: pool",
    "add_classes": "start of experience: outputs",
    "before_experience": "start of experience: state",
    "before_epoch": "start of epoch",
    "exit_loss_weights": "start of epoch: exits' weights",
    "make_batch": "every step: batch",
    "task_loss": "every step: loss on the targets",
    "losses": "every step: loss terms",
    "combine_losses": "every step: mixing the terms",
    "modify_gradients": "every step: gradient",
    "after_step": "every step: updated weights",
    "after_experience": "end of experience",
    "adjust_logits": "every prediction: each exit",
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
) -> str:
    """Resolved config, stream, timetable, loss terms, slots, parameters and MACs, as text.

    ``network`` has already grown to all classes of the benchmark; ``plugins`` are Avalanche's, by class name.
    """
    return "\n\n".join(
        f"{title}\n{_indent(body)}"
        for title, body in (
            ("config", config.strip()),
            ("stream (who learns what when)", _stream(benchmark)),
            ("strategy", str(composition)),
            ("timetable (who acts where)", _timetable(composition)),
            ("loss terms", "\n".join(_terms(composition))),
            ("slots", "\n".join(f"{slot:<10} {_owner(composition, slot)}" for slot in SLOTS)),
            *([("plugins of Avalanche's, beside the components", _plugins(plugins))] if plugins else ()),
            ("network with all classes", _network(network)),
        )
    )


def _stream(benchmark: Benchmark) -> str:
    lines = []
    for i in range(len(benchmark)):
        sizes = f"{sum(len(benchmark.train[k]) for k in benchmark.parts_of(i)):>7,} train "
        if benchmark.validation:
            sizes += f"{len(benchmark.validation[i]):>7,} validation "
        sizes += f"{len(benchmark.test[i]):>7,} test"
        lines.append(f"experience {i:>3} {sizes}   {benchmark.title(i)}")
    online = benchmark.online
    if online is not None:
        told = "told" if online.boundaries else "not told"
        parts = " + ".join(str(len(benchmark.parts_of(i))) for i in range(len(benchmark)))
        lines.append(f"online: {parts} small experiences of {online.size} samples, boundaries {told}")
    if benchmark.domains:
        lines.append(f"every experience brings all {len(benchmark.class_order)} classes")
    if benchmark.task_labels:
        lines.append("every experience has its number as task label")
    lines.append(f"accuracies are measured on {benchmark.evaluate} data")
    return "\n".join(lines)


def _timetable(composition: Composition) -> str:
    lines = []
    for hook in HOOKS:
        names = " + ".join(component.name for component in composition.acting_at(hook))
        lines.append(f"{hook:<11} {_WHEN[hook]:<30} {names or '-'}")
    return "\n".join(lines)


def _terms(composition: Composition) -> list[str]:
    own = [f"loss/{c.name}/{term}" for c in composition for term in c.terms]
    return ["loss/task/ce", *own]


def _plugins(plugins: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    lines = [f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})" for name, options in plugins]
    lines += [
        "what they add to the loss is in no loss term above and their memory in no cost",
        "their state is in no checkpoint: the run cannot be resumed, and clframe.load gives the network without them",
    ]
    return "\n".join(lines)


def _owner(composition: Composition, slot: str) -> str:
    owner = composition.owner(slot)
    return "-" if owner is None else owner.name


def _network(network: Network) -> str:
    shape = network.input_shape
    macs = stage_macs(network)
    lines = [
        f"parameters     {count_parameters(network):,}",
        f"MACs a sample  {count_macs(network, shape):,} (one multiply-add = 1; FLOPs = 2 x MACs)",
        f"input          {' x '.join(map(str, shape))}",
    ]
    width = max(len(name) for name in macs)
    for name, count in macs.items():
        tap = network.backbone.tap_shapes.get(name)
        shown = f"  tap {' x '.join(map(str, tap))}" if tap else ""
        lines.append(f"  {name:<{width}} {count:>14,}{shown}")
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
