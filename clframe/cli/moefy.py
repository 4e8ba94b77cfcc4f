"""``clframe moefy``."""

from __future__ import annotations

import argparse
from typing import Any

from clframe.errors import ConfigError
from clframe.progress import progress_bars

NAME = "moefy"
HELP = "turn a trained dense model into experts and measure accuracy against cost"
WORDS = "RUN_OR_MODEL [benchmark.KEY=VALUE ...]"
DESCRIPTION = """\
Converts the feed-forward networks of a trained model to experts, of which each token runs as many as it needs, and
reports accuracy against cost. The model, moefy.json, curve.csv, moefy.md and figures are written to RUN/moefy/<id>,
or to moefy/MODEL-DATA/<id> for other models (or --output); clframe.load of the folder of a converted run returns it.

RUN_OR_MODEL is a run folder, or the folder or hub name of a model of transformers or timm (with --data).

Steps: [--projections: attention projections become networks] -> fine-tuning with a sparsity penalty (--sparsify
epochs) -> split into experts -> training of routers -> sweep of the gate's setting. Settings are chosen on validation
data and evaluated on test data. MACs include routers, active experts and the rest of the model.

  clframe moefy RUN                                                       d2dmoe, on the run's replay buffer
  clframe moefy RUN --experts 16 --epochs 10 --strength 0.02              more, sparser
  clframe moefy RUN --sparsify 0                                          split and routers only
  clframe moefy RUN --method moefication                                  baseline: k experts for every token
  clframe moefy RUN --on all                                              all training data, no longer continual
  clframe moefy ./minilm --data clinc150 benchmark.data_dir=DIR           a text encoder
  clframe moefy ./llama --data texts.txt --document file --length 256     a causal language model

A language model is converted on the first 60 % of the texts (of the text, with --document file), settings are chosen
on the next 20 % and measured on the last 20 %: perplexity and next-token accuracy against MACs per token as the gate's
setting moves, and with top-k instead of it. Windows as in clframe analyze sparsity. The folder has the config and the
tokenizer: clframe.targets.converted.load_language_model(FOLDER) returns a model whose generate works with its cache.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; defaults are those of :class:`~clframe.moe.conversion.options.Options`."""
    given: dict[str, Any] = {"default": argparse.SUPPRESS}
    add = parser.add_argument
    add("--method", metavar="NAME", help="d2dmoe (default) or moefication", **given)
    add("--on", metavar="DATA", help="train on a run's replay memory (default), last experience, or all data", **given)
    add("--projections", action="store_true", help="replace attention projections by networks first", **given)
    add("--projection-epochs", type=int, metavar="N", help="epochs of their distillation (3)", **given)
    add("--projection-lr", type=float, metavar="RATE", help="its learning rate (1e-3)", **given)
    add("--sparsify", type=int, metavar="N", help="epochs of fine-tuning with the penalty (3); 0 for none", **given)
    add("--sparsify-lr", type=float, metavar="RATE", help="its learning rate (3e-4)", **given)
    add("--strength", type=float, metavar="W", help="weight of the penalty (0.01; moefication 0)", **given)
    add("--regularizer", metavar="NAME", help="hoyer (default), l1, displaced, displaced_l1", **given)
    add("--schedule", metavar="NAME", help="of the weight: warmup (default), linear, constant", **given)
    add("--ramp", metavar="NAME", help="change the weight every step (default) or epoch", **given)
    add("--relu", action=argparse.BooleanOptionalAction, help="replace activations by ReLU (if fine-tuned)", **given)
    add("--experts", type=int, metavar="N", help="experts of each network (the largest divisor up to 24)", **given)
    add("--expert-size", "--expert_size", type=int, metavar="N", help="or the neurons of an expert", **given)
    add("--split", metavar="NAME", help="kmeans (default), random, coactivation", **given)
    add("--router", metavar="NAME", help="norm or activation (by the method), analytical (untrained, as CMoE)", **given)
    add("--router-width", "--router_width", type=int, metavar="N", help="hidden units (max(16, d_ff // 24))", **given)
    add("--shared", type=int, metavar="N", help="experts that always run, of the most active neurons (0)", **given)
    add("--epochs", type=int, metavar="N", help="epochs of router training (7)", **given)
    add("--lr", type=float, metavar="RATE", help="its learning rate (1e-3)", **given)
    add("--samples", type=int, metavar="N", help="training samples of projections and routers; 0: all", **given)
    add("--gate", metavar="NAME", help="dynamic_k, cumulative, top_k (by the method)", **given)
    add("--tau", type=float, metavar="T", help="setting of the converted model (half the cost)", **given)
    add("--k", type=int, metavar="K", help="the same for top_k", **given)
    add("--batch", type=int, metavar="N", help="batch size (64)", **given)
    add("--limit", type=int, metavar="N", help="maximum number of validation and of test samples", **given)
    add("--seed", type=int, metavar="N", help="random seed (0)", **given)
    parser.add_argument("--data", metavar="CONFIG", help="data of a model that is not a run: clinc150, texts.txt")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a window of text (64, or the context)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (half of --length)")
    parser.add_argument("--document", default="line", metavar="UNIT", help="a text is a line (default) or a file")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, mps, auto")
    parser.add_argument("--output", metavar="DIR", help="folder to write to (default: RUN/moefy/<id>)")
    parser.add_argument("--quiet", action="store_true", help="print the folder only")


def act(options: argparse.Namespace) -> int:
    """Convert, evaluate, write and print."""
    from dataclasses import fields

    from clframe.moe.conversion.options import Options
    from clframe.moe.conversion.output import summary
    from clframe.moe.conversion.study import moefy_target, record
    from clframe.targets.folders import folder_for, write_conversion
    from clframe.targets.opening import open_target

    if not options.words:
        raise ConfigError("moefy: found no model; give a run folder, or a model's folder or hub name")
    wanted = Options(**{key: value for key, value in vars(options).items() if key in {f.name for f in fields(Options)}})
    target = open_target(
        options.words[0], data=options.data, overrides=options.words[1:], device=options.device, stride=options.stride,
        max_length=options.length, document=options.document, divide=True,
    )  # fmt: skip
    folder = folder_for(target, wanted, output=options.output)
    with progress_bars() as show:

        def progress(step: str, done: int, total: int) -> None:
            show(step, done, None if step == "sweep" else total)  # a sweep adds settings as it goes

        study = moefy_target(target, wanted, progress=None if options.quiet else progress)
    write_conversion(study, folder)
    if not options.quiet:
        print(f"{summary(record(study))}\n")
    print(folder)
    return 0
