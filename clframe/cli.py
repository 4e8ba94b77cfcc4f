"""The command line: ``clframe run``, ``explain`` and ``list``.

Nothing heavy is imported before a verb is known, so ``clframe --help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clframe import __version__
from clframe.errors import ClframeError, ConfigError

if TYPE_CHECKING:
    from clframe.reporting.results import Result

_DESCRIPTION = """\
Train a model class by class, compose strategies in one line, and know at the end what it forgot and what
every prediction costs.

  clframe run quickstart                               split digits, a minute, nothing downloaded
  clframe run quickstart strategy='er + lwf(alpha=2)'  another strategy
  clframe run quickstart components.er.memory=50       another option
  clframe run quickstart --seeds 0..4                  five seeds, mean and deviation
  clframe explain quickstart                           what would happen, before any training
  clframe list strategies                              what there is
"""

_RUN = """\
CONFIG is a name of `clframe list configs`, or a YAML file of yours; files in ./configs/experiment are found
by name. KEY=VALUE changes one key: lists and scalars replace, mappings merge. Results, checkpoints,
metrics.csv and TensorBoard files go to a folder of their own under ./runs.

  clframe run quickstart trainer.epochs=3 optimizer.lr=0.01
  clframe run quickstart backbone=mlp benchmark.experiences=2
  clframe run my.yaml --seed 3 --device cuda --output results
  clframe run --resume runs/quickstart/20260101-120000-seed0
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for bad input, 130 when interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.verb is None:
        parser.print_help()
        return 0
    try:
        return int(options.act(options))
    except ClframeError as error:
        if options.debug:
            raise
        print(f"clframe: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nclframe: interrupted; go on with clframe run --resume RUN", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    def verb(name: str, *, help: str, description: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name, help=help, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return made

    parser = argparse.ArgumentParser(
        prog="clframe", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"clframe {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")

    run = verb("run", help="train and evaluate on every experience of a benchmark", description=_RUN)
    _config_arguments(run)
    run.add_argument("--seeds", metavar="A..B", help="run every seed from A to B, or a list 0,3,7")
    run.add_argument("--output", metavar="DIR", help="folder for run folders (default: runs)")
    run.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    run.add_argument("--quiet", action="store_true", help="print only the final average accuracy")
    run.set_defaults(act=_act_run)

    explain = verb(
        "explain", help="what a run would do, before any training",
        description="Prints the resolved config, who learns what when, who acts where in the timetable, the "
        "loss terms, slots, parameters and MACs.",
    )  # fmt: skip
    _config_arguments(explain)
    explain.set_defaults(act=_act_explain)

    listing = verb(
        "list", help="strategies, benchmarks, backbones or configs there are",
        description="One line each; FILTER keeps the lines that contain it.",
    )  # fmt: skip
    listing.add_argument("what", choices=("strategies", "benchmarks", "backbones", "configs"))
    listing.add_argument("filter", nargs="?", default="", metavar="FILTER")
    listing.set_defaults(act=_act_list)
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a config's name or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the config")
    parser.add_argument("--seed", type=int, metavar="N", help="short for seed=N")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 or mps; sets trainer.accelerator")


def _act_run(options: argparse.Namespace) -> int:
    from clframe.config.seeds import parse_seeds

    if options.resume is not None:
        given = [o for o in ("config", "seed", "seeds", "output", "device") if getattr(options, o) is not None]
        if given or options.overrides:
            what = f"--{given[0]}" if given and given[0] != "config" else (options.config or options.overrides[0])
            raise ConfigError(f"--resume: takes nothing beside the run folder, found {what}; the run keeps its config")
        _show([_run(options, resume=options.resume)], options)
        return 0
    if options.seeds is not None and options.seed is not None:
        raise ConfigError("--seeds: found together with --seed; give one of them")
    seeds: list[int | None] = [options.seed] if options.seeds is None else [*parse_seeds(options.seeds)]
    overrides = _overrides(options)
    results = []
    for seed in seeds:
        own = [] if seed is None else [f"seed={seed}"]
        results.append(_run(options, config=_config(options), overrides=[*overrides, *own], output=options.output))
    _show(results, options)
    return 0


def _run(options: argparse.Namespace, **arguments: Any) -> Result:
    from clframe.build import run

    shown = None if options.quiet else _say_progress
    result = run(**arguments, on_evaluated=shown)
    if not options.quiet:
        from clframe.reporting.tables import accuracy_table, summary

        print(f"\n{accuracy_table(result)}\n\n{summary(result)}")
    return result


def _say_progress(progress: Any) -> None:
    tally, index = progress.tallies[-1], progress.finished - 1
    seen = [a for j, a in enumerate(tally.accuracy_E) if j <= index]
    count = len(tally.accuracy_E)
    print(
        f"experience {progress.finished}/{count}: {100 * sum(seen) / len(seen):5.1f} % over the experiences so "
        f"far, {100 * tally.accuracy_E[index]:5.1f} % on this one   ({progress.train_seconds:.1f} s training)",
        flush=True,
    )


def _show(results: Sequence[Result], options: argparse.Namespace) -> None:
    if options.quiet:
        for result in results:
            print(f"{result.final_average_accuracy:.4f}")
    if len(results) > 1:
        from clframe.reporting.tables import seeds_table

        print(f"\n{seeds_table(results)}")


def _act_explain(options: argparse.Namespace) -> int:
    from clframe.build import explain

    own = [] if options.seed is None else [f"seed={options.seed}"]
    print(explain(_config(options), [*_overrides(options), *own]))
    return 0


def _act_list(options: argparse.Namespace) -> int:
    from clframe.reporting.listing import listing

    lines = [line for line in listing(options.what) if options.filter.lower() in line.lower()]
    if not lines:
        raise ConfigError(f"list {options.what}: nothing contains '{options.filter}'; leave the filter out to see all")
    print("\n".join(lines))
    return 0


def _config(options: argparse.Namespace) -> str:
    if options.config is None:
        raise ConfigError(f"{options.verb}: no config given; try clframe {options.verb} quickstart")
    return str(options.config)


def _overrides(options: argparse.Namespace) -> list[str]:
    overrides = list(options.overrides)
    if options.device is not None:
        kind, _, index = options.device.partition(":")
        if kind not in ("cpu", "cuda", "mps", "auto") or (index and not index.isdigit()):
            raise ConfigError(f"--device: found {options.device}; give cpu, cuda, cuda:N, mps or auto")
        overrides.append(f"trainer.accelerator={kind}")
        if index:
            overrides.append(f"trainer.devices=[{index}]")
    return overrides
