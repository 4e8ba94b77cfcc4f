"""``clframe analyze``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from clframe.cli.context import notices
from clframe.errors import ConfigError, UnknownNameError, unknown_name

NAME = "analyze"
HELP = "how sparse the activations of a run or of a hub's model are"
WORDS = "sparsity TARGET [benchmark.KEY=VALUE ...]"
DESCRIPTION = """\
Measures how much of what enters and leaves the hidden layers of a trained model's feed-forward networks can be zeroed
before its score falls below 99 %: nothing is trained, the model is not changed. A rule keeps the largest entries of
each token, one value for all layers, and is swept over 26 values. Beside every figure stands what a dense Gaussian
vector loses by the same rule: only the excess over it is a finding.

TARGET is a run folder: scored on its validation data if it holds some out, else on test data; of several experiences,
active neurons and their overlap are set beside forgetting. Or it is the folder or hub name of a model of transformers
(text encoder, causal language model; extra transformers) or timm (extra timm), measured on the data of --data. An
encoder without a classifier answers with the class of the nearest mean embedding of 20 training samples each.

  clframe analyze sparsity runs/quickstart/20260101-120000-seed0
  clframe analyze sparsity sentence-transformers/all-MiniLM-L6-v2 --data clinc150 --limit 1500
  clframe analyze sparsity ./my_encoder --data banking77 --rule top_p,max_p --roles input,intermediate
  clframe analyze sparsity Qwen/Qwen3-0.6B --data prompts.txt --generate 16
  clframe analyze sparsity timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --data cifar100 --limit 2000

Rules, each token apart: top_p keeps the smallest set of largest |v| with the share p of their sum; top_k the k
largest; max_p |v| >= p max|v|; threshold |v| >= t. Roles: input, what enters the feed-forward network; up and gate, the
two factors of a gated one; intermediate, what enters its last layer; all, input and intermediate together.

Writes sparsity.json, tables (CSV, Markdown) and figures (SVG, PNG) to RUN/sparsity, or sparsity/NAME. How to read
them: docs/analysis.md.
"""

_KINDS = ("sparsity",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add = parser.add_argument
    add("--rule", metavar="NAME", default="top_p", help="top_p, top_k, max_p, threshold, or several: top_p,max_p")
    add("--roles", metavar="NAMES", default="", help="input,up,gate,intermediate,all (default: all there are)")
    add("--data", metavar="NAME", help="benchmark config that a hub's model is measured on, or a text file (.txt)")
    add("--limit", metavar="N", help="samples to score on, spread evenly (default: all)")
    add("--texts", metavar="N", dest="limit", help="the same as --limit")
    add("--tokens", metavar="NAMES", default="prompt,generated", help="of a language model that writes: which count")
    add("--generate", metavar="N", default="0", help="tokens a language model writes on after each text (default: 0)")
    add("--length", metavar="N", default="64", help="most tokens of a text (default: 64)")
    add("--score", metavar="NAME", help="accuracy, or agreement with the dense model (default where no labels are)")
    add("--share", metavar="X", default="0.99", help="share of the dense score to keep (default: 0.99)")
    add("--batch", metavar="N", default="64", help="samples of a batch (default: 64)")
    add("--device", metavar="NAME", default="cpu", help="cpu, cuda, cuda:1, mps or auto (default: cpu)")
    add("--output", metavar="DIR", help="folder to write to (default: RUN/sparsity, or sparsity/NAME)")


def act(options: argparse.Namespace) -> int:
    """Measure; write; print the table."""
    what, *rest = options.words or [""]
    if what not in _KINDS:
        if not what:
            raise ConfigError("analyze: found nothing to analyze; begin with clframe analyze sparsity TARGET")
        raise UnknownNameError(unknown_name("analysis", what, _KINDS, where="analyze"))
    if not rest:
        raise ConfigError("analyze: found no target; give a run folder, or a model's folder or name on the hub")
    numbers = {name: _number(options, name) for name in ("limit", "generate", "length", "batch")}
    share = _share(options.share)
    from pathlib import Path

    from clframe.sparsity.output import said, tables
    from clframe.sparsity.study import study_sparsity
    from clframe.targets.folders import default_folder, require_writable, write_sparsity_study
    from clframe.targets.opening import open_target

    target_name, *overrides = rest
    folder = default_folder(target_name) if options.output is None else Path(options.output).expanduser()
    require_writable(folder)
    with notices(quiet=False) as spoken:
        target = open_target(
            target_name, data=options.data, overrides=overrides, device=options.device,
            max_length=numbers["length"] or 64, generate=numbers["generate"] or 0,
        )  # fmt: skip
        spoken.show()
        with _Bar() as bar:
            study = study_sparsity(
                target, rules=_names(options.rule), roles=_names(options.roles), tokens=_names(options.tokens),
                score=options.score, share=share, limit=numbers["limit"], size=numbers["batch"] or 64,
                on_pass=bar.show,
            )  # fmt: skip
    written = write_sparsity_study(study, folder, command=_command(options))
    print(f"{said(study)}\n")
    print("\n\n".join(_shown(table) for table in tables(study) if table.name in ("critical", "parts", "experiences")))
    print(f"\n{written}")
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _number(options: argparse.Namespace, name: str) -> int | None:
    given, least = getattr(options, name), 0 if name == "generate" else 1
    if given is None:
        return None
    if not given.isascii() or not given.isdigit() or not least <= int(given) < 2**31:
        raise ConfigError(f"--{name}: found '{given}'; give a whole number of at least {least}")
    return int(given)


def _share(given: str) -> float:
    try:
        return float(given)
    except ValueError:
        raise ConfigError(f"--share: found '{given}'; give a share above 0, at most 1") from None


def _command(options: argparse.Namespace) -> list[str]:
    """The call that gives these numbers again: what differs from the defaults."""
    words = ["clframe", NAME, *options.words]
    for action in options.parser._actions:
        value = getattr(options, action.dest, None)
        told = action.option_strings and action.dest not in ("help", "debug", "output")
        if told and value is not None and value != action.default and action.option_strings[0] not in words:
            words += [action.option_strings[0], value]
    return _once(words)


def _once(words: Sequence[str]) -> list[str]:
    """Without a second name of an option that is there."""
    at = words.index("--texts") if "--texts" in words and "--limit" in words else len(words)
    return [*words[:at], *words[at + 2 :]]


class _Bar:
    """Passes done, on stderr where that is a terminal."""

    def __init__(self) -> None:
        self._start, self._open = time.monotonic(), False

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def show(self, done: int, everything: int) -> None:
        """Draw it again."""
        if not sys.stderr.isatty():
            return
        self._open = True
        width, passed = 30, time.monotonic() - self._start
        left = passed / done * (everything - done)
        full = "#" * (width * done // everything)
        print(f"\r\033[K[{full:<{width}}] {done}/{everything} passes, {left:.0f} s left", end="", file=sys.stderr,
              flush=True)  # fmt: skip


def _shown(table: Any) -> str:
    """A table as aligned text."""
    rows = [tuple(str(cell) for cell in row) for row in (table.columns, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = [all(isinstance(row[k], str) for row in table.rows) for k in range(len(widths))]

    def line(row: Sequence[str]) -> str:
        align: list[Callable[[str, int], str]] = [str.ljust if text else str.rjust for text in texts]
        return "  ".join(side(cell, width) for side, cell, width in zip(align, row, widths, strict=True)).rstrip()

    return "\n".join([table.title, *map(line, rows)])
