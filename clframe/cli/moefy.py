"""``clframe moefy``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from clframe.errors import ConfigError

NAME = "moefy"
HELP = "turn a trained dense model into experts and measure accuracy against cost"
WORDS = "RUN_OR_MODEL [benchmark.KEY=VALUE ...]"
DESCRIPTION = """\
Converts the feed-forward networks of a trained model to experts, of which each token runs as many as it needs, and
says what accuracy is left at which cost. The model itself, moefy.json, curve.csv, moefy.md and figures go to
RUN/moefy/<id> (or --output); clframe.load of that folder gives a model to predict with.

RUN_OR_MODEL is a run folder, or the folder or hub name of a model of transformers or timm (then with --data).

Steps: [--projections: attention projections become networks] -> fine-tuning with a penalty that leaves few neurons
active (--sparsify epochs) -> split into experts -> training of routers -> sweep of the gate's setting. Settings are
chosen on validation data, read off on test data. MACs count routers, experts that ran and everything else.

  clframe moefy runs/quickstart/20260101-120000-seed0                     d2dmoe, on what the run's memory keeps
  clframe moefy RUN --experts 16 --epochs 10 --strength 0.02              more, sparser
  clframe moefy RUN --sparsify 0                                          split and routers only
  clframe moefy RUN --method moefication                                  the baseline: k experts for every token
  clframe moefy RUN --on all                                              all training data: no longer continual
  clframe moefy ./minilm --data clinc150 benchmark.data_dir=DIR           a text encoder
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its options; what is not given is as :class:`~clframe.moe.conversion.options.Options` has it."""
    given: dict[str, Any] = {"default": argparse.SUPPRESS}
    add = parser.add_argument
    add("--method", metavar="NAME", help="d2dmoe (default) or moefication", **given)
    add("--on", metavar="DATA", help="train on a run's memory (default), last experience, or all its data", **given)
    add("--projections", action="store_true", help="make networks of attention projections first", **given)
    add("--projection-epochs", type=int, metavar="N", help="epochs of their distillation (3)", **given)
    add("--projection-lr", type=float, metavar="RATE", help="its learning rate (1e-3)", **given)
    add("--sparsify", type=int, metavar="N", help="epochs of fine-tuning with the penalty (3); 0 for none", **given)
    add("--sparsify-lr", type=float, metavar="RATE", help="its learning rate (3e-4)", **given)
    add("--strength", type=float, metavar="W", help="weight of the penalty (0.01; moefication 0)", **given)
    add("--regularizer", metavar="NAME", help="hoyer (default), l1, displaced, displaced_l1", **given)
    add("--schedule", metavar="NAME", help="of the strength: warmup (default), linear, constant", **given)
    add("--relu", action=argparse.BooleanOptionalAction, help="swap activations for ReLU (where fine-tuned)", **given)
    add("--experts", type=int, metavar="N", help="experts of each network (as many as divide it, 24 at most)", **given)
    add("--expert-size", "--expert_size", type=int, metavar="N", help="or the neurons of one", **given)
    add("--split", metavar="NAME", help="kmeans (default), random, coactivation", **given)
    add("--router", metavar="NAME", help="norm or activation (by the method)", **given)
    add("--router-width", "--router_width", type=int, metavar="N", help="hidden units of a router (d_ff / 24)", **given)
    add("--epochs", type=int, metavar="N", help="epochs of router training (7)", **given)
    add("--lr", type=float, metavar="RATE", help="its learning rate (1e-3)", **given)
    add("--samples", type=int, metavar="N", help="train projections and routers on so many samples; 0: all", **given)
    add("--gate", metavar="NAME", help="dynamic_k, cumulative, top_k (by the method)", **given)
    add("--tau", type=float, metavar="T", help="setting that the model is left with (half the cost)", **given)
    add("--k", type=int, metavar="K", help="likewise for top_k", **given)
    add("--batch", type=int, metavar="N", help="samples of a batch (64)", **given)
    add("--limit", type=int, metavar="N", help="at most so many validation and test samples each", **given)
    add("--seed", type=int, metavar="N", help="of all that is drawn (0)", **given)
    parser.add_argument("--data", metavar="CONFIG", help="benchmark for a model that is no run, such as clinc150")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, mps, auto")
    parser.add_argument("--output", metavar="DIR", help="folder to write to (default: RUN/moefy/<id>)")
    parser.add_argument("--quiet", action="store_true", help="print the folder only")


def act(options: argparse.Namespace) -> int:
    """Convert, measure, write, print."""
    from dataclasses import fields

    from clframe.moe.conversion.options import Options
    from clframe.moe.conversion.output import summary
    from clframe.moe.conversion.study import moefy_target, record
    from clframe.targets.folders import folder_for, write_conversion
    from clframe.targets.opening import open_target

    if not options.words:
        raise ConfigError("moefy: found no model; give a run folder, or a model's folder or name on the hub")
    wanted = Options(**{key: value for key, value in vars(options).items() if key in {f.name for f in fields(Options)}})
    target = open_target(options.words[0], data=options.data, overrides=options.words[1:], device=options.device)
    folder = folder_for(target, wanted, output=options.output)
    with _bars(quiet=options.quiet) as tick:
        study = moefy_target(target, wanted, tick=tick)
    write_conversion(study, folder)
    if not options.quiet:
        print(f"{summary(record(study))}\n")
    print(folder)
    return 0


@contextmanager
def _bars(*, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each step, on terminals only."""
    if quiet:
        yield None
        return
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def tick(step: str, done: int, whole: int) -> None:
        if step not in bars:
            for bar in bars.values():
                bar.close()
            bars[step] = tqdm(desc=step, disable=None, leave=False, dynamic_ncols=True)
        bar = bars[step]
        bar.total = whole if step != "sweep" else None
        bar.update(done - bar.n)

    try:
        yield tick
    finally:
        for bar in bars.values():
            bar.close()
