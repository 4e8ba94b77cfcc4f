"""``clframe analyze``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from clframe.cli.context import notices
from clframe.cli.numbers import decimal
from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.printable import printable
from clframe.progress import progress_bars

NAME = "analyze"
HELP = "measure activation sparsity, or exits: calibration, failure prediction, budgets"
WORDS = "{sparsity TARGET | exits RUN ... | proxy RUN ...} [benchmark.KEY=VALUE ...]"
DESCRIPTION = """\
exits: calibration (ECE, Brier, NLL) and failure prediction (AUROC, AURC, AUGRC, EEFP) of every exit of runs with
exits, with intervals, and accuracy on test data at budgets solved on validation data; writes tables, figures and
exits.json to RUN/exits. proxy: correlation of each metric with the accuracy that early exit reaches, over the
calibrations, confidence measures and experiences of many runs. Scores are cached in each run's folder.

  clframe analyze exits runs/quickstart/er+lwf-seed0-20260101-120000
  clframe analyze proxy runs/quickstart --output proxy

sparsity: measures which share of the inputs and outputs of the hidden layers of a trained model's feed-forward
networks can be set to zero before its score is more than 1 % worse (--tolerance). Nothing is trained and the model is
not changed. A rule keeps the largest entries of each token, with one value for all layers, swept over 26 values. Each
sparsity is compared with that of a dense Gaussian vector under the same rule: only the excess is a property of the
model. A table of the neurons that batches of 1, 2, 4 ... tokens or samples activate shows up to which batch size
skipping them saves.

TARGET is a run folder, scored on its validation data if it has some, else on test data; for several experiences,
active neurons, their overlap and forgetting are compared. Or TARGET is the folder or hub name of a model of
transformers (text encoder, causal language model; extra transformers) or timm (extra timm), measured on --data. An
encoder without a classifier predicts the class of the nearest mean embedding of 20 training samples per class.

  clframe analyze sparsity runs/quickstart/er+lwf-seed0-20260101-120000
  clframe analyze sparsity sentence-transformers/all-MiniLM-L6-v2 --data clinc150 --limit 1500
  clframe analyze sparsity ./my_encoder --data banking77 --rule top_p,max_p --roles input,intermediate
  clframe analyze sparsity Qwen/Qwen3-0.6B --data prompts.txt --generate 16
  clframe analyze sparsity ./my_language_model --data news.txt,code.txt --document file --score perplexity
  clframe analyze sparsity timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --data cifar100 --limit 2000

Rules, token by token: top_p keeps the smallest set of largest |v| with a share p of their sum; top_k the k largest;
max_p |v| >= p max|v|; threshold |v| >= t. Roles: input of the feed-forward network; up and gate, the two factors of a
gated one; intermediate, the input of its last layer; all, input and intermediate together. On request also attention,
the input of an attention's projections, and heads, the outputs of its heads.

Scores (--score): accuracy, the share of right predictions, of a language model those of the next token (default where
there are labels); perplexity, exp of the mean negative log-likelihood per token in nats, all tokens weighed alike
(language models); agreement, the share of predictions equal to the dense model's. A language model reads texts longer
than --length tokens in windows that begin every --stride tokens; each token but the first of a text is scored once,
with at least length - stride tokens before it. Accuracy and agreement may fall, perplexity may rise, by --tolerance
times the dense value. A dense model near chance is reported. Several files are domains: their active neurons are
compared. On questions (--data FILE.jsonl, lines {"question": "...", "choices": ["...", "..."], "answer": 0}): choices,
the share of questions whose right choice has the highest log-likelihood given the question, a sum over its tokens;
choices_normalized, the same with sums divided by the number of characters of the choice.

Decoding (--decode intermediate,input,gate,up,all; language models of transformers): thresholds by layer that make 25,
50, 75 and 90 % of the named activations 0 (all: of input and intermediate); perplexity, and tokens per second of one
text with KV cache when the weights that belong to zeros are not read, against the dense model. Gains are bounded by
the share of the weights that is still read (ceiling).

Writes sparsity.json, decode.json, tables (CSV, Markdown) and figures (SVG, PNG) to RUN/sparsity, or
sparsity/MODEL-DATA-ID. See docs/analysis.md.
"""

_KINDS = ("sparsity", "exits", "proxy")
_ONLY_SPARSITY = (
    "rule", "power", "roles", "data", "tokens", "generate", "length", "stride", "document", "score", "share",
    "tolerance", "batch", "decode",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("--rule", metavar="NAME", default="top_p", help="top_p, top_k, max_p, threshold, or several: top_p,max_p")
    add("--power", metavar="X", help="of |v| in top_p: shares of the sum of |v|^X (default: 1)")
    add("--roles", metavar="NAMES", default="", help="input,up,gate,intermediate,all (default), attention,heads")
    add("--data", metavar="NAME", help="benchmark, text files (a.txt,b.txt) or questions (.jsonl) for a hub model")
    add("--limit", metavar="N", help="samples to score on, evenly spaced (default: all)")
    add("--texts", metavar="N", dest="limit", help="the same as --limit")
    add("--tokens", metavar="NAMES", default="prompt,generated", help="kinds of tokens of a language model")
    add("--generate", metavar="N", default="0", help="tokens to generate after each text (default: 0)")
    add("--length", metavar="N", help="tokens of a text, or of a window of a longer one (default: 64, or the context)")
    add("--stride", metavar="N", help="tokens from one window of a text to the next (default: half of --length)")
    add("--document", metavar="UNIT", default="line", help="a text is a line (default) or a file")
    add("--score", metavar="NAME", help="accuracy, perplexity, or agreement with the dense model (see above)")
    add("--tolerance", metavar="X", help="loss relative to the dense score that is tolerated (default: 0.01)")
    add("--share", metavar="X", help="1 - tolerance: share of the dense score to keep (default: 0.99)")
    add("--decode", metavar="NAMES", help="also time decoding without the zeros of: intermediate,input,gate,up,all")
    add("--batch", metavar="N", help="samples per batch (default: 64; 16 for a language model)")
    add("--device", metavar="NAME", default="cpu", help="cpu, cuda, cuda:1, mps or auto (default: cpu)")
    add("--output", metavar="DIR", help="folder to write to (default: RUN/sparsity, or sparsity/MODEL-DATA-ID)")


def act(options: argparse.Namespace) -> int:
    """Measure, write files, and print the tables."""
    what, *rest = options.words or [""]
    if what not in _KINDS:
        if not what:
            raise ConfigError("analyze: found nothing to analyze; give sparsity TARGET, exits RUN or proxy RUN")
        raise UnknownNameError(unknown_name("analysis", what, _KINDS, where="analyze"))
    if not rest:
        raise ConfigError("analyze: found no target; give a run folder, or a model's folder or hub name")
    if what != "sparsity":
        return _analyze_exits(options, what, rest)
    numbers = {name: _number(options, name) for name in ("limit", "generate", "length", "stride", "batch")}
    share, power = _share(options), decimal("--power", options.power)
    from pathlib import Path

    from clframe.files import require_writable
    from clframe.sparsity.output import describe_study, tables
    from clframe.sparsity.study import study_sparsity
    from clframe.tables import to_text
    from clframe.targets.decode_study import decode_table, require_places, study_decoding, write_decode_study
    from clframe.targets.folders import analysis_root, default_folder, write_sparsity_study
    from clframe.targets.opening import open_target

    target_name, *overrides = rest
    folder = None if options.output is None else Path(options.output).expanduser()
    require_writable(folder or analysis_root(target_name))
    with notices(quiet=False) as spoken:
        target = open_target(
            target_name, data=options.data, overrides=overrides, device=options.device,
            max_length=numbers["length"], generate=numbers["generate"] or 0, stride=numbers["stride"],
            document=options.document,
        )  # fmt: skip
        spoken.show()
        if options.decode is not None:
            require_places(target, _names(options.decode))
        with progress_bars(unit="pass") as show:
            study = study_sparsity(
                target, rules=_names(options.rule), roles=_names(options.roles), tokens=_names(options.tokens),
                score=options.score, share=share, limit=numbers["limit"], size=numbers["batch"],
                power=1.0 if power is None else power, on_pass=partial(show, "sweep"),
            )  # fmt: skip
        if options.decode is not None:
            with progress_bars(unit="timing") as show:
                decoding = study_decoding(
                    target, _names(options.decode), limit=numbers["limit"], size=numbers["batch"],
                    on_pass=partial(show, "decode"),
                )  # fmt: skip
    folder, command = folder or default_folder(target), _command(options)
    written = write_sparsity_study(study, folder, command=command)
    print(f"{describe_study(study)}\n")
    shown = [table for table in tables(study) if table.name in ("critical", "parts", "experiences", "domains", "union")]
    print("\n\n".join(to_text(replace(table, note="")) for table in shown))
    if options.decode is not None:
        write_decode_study(decoding, folder, command=command)
        print(f"\n{to_text(decode_table(decoding))}")
    print(f"\n{written}")
    return 0


def _analyze_exits(options: argparse.Namespace, what: str, words: Sequence[str]) -> int:
    """Study the exits of runs, or metrics as proxies over runs."""
    for name in _ONLY_SPARSITY:
        if getattr(options, name) != options.parser.get_default(name):
            raise ConfigError(f"--{name}: has no effect on analyze {what}; leave it out")
    limit = _number(options, "limit")
    if what == "proxy" and limit is not None:
        raise ConfigError("--limit: has no effect on analyze proxy; leave it out")
    from pathlib import Path

    from clframe.exits import output
    from clframe.files import require_writable
    from clframe.report.loading import find_runs
    from clframe.tables import to_text
    from clframe.targets import exit_studies

    overrides = [word for word in words if word.startswith("benchmark.") and "=" in word]
    found_runs = find_runs([Path(word) for word in words if word not in overrides])
    runs = [str(run) for group in found_runs for run in group]
    given = None if options.output is None else Path(options.output).expanduser()
    if given is not None:
        require_writable(given)
        if what == "exits" and len(runs) > 1:
            raise ConfigError(f"--output: found one folder for {len(runs)} runs; leave it out, or give one run")
    if what == "proxy":
        with progress_bars(unit="run") as show:
            found = exit_studies.study_proxies(runs, overrides=overrides, device=options.device, progress=show)
        folder = given or Path("proxy")
        written = exit_studies.write_proxy_study(found, folder, command=_command(options))
        for run, reason in found.skipped.items():
            print(printable(f"clframe: left out {run} ({reason})"), file=sys.stderr)
        print("\n\n".join(to_text(table) for table in exit_studies.proxy_tables(found)))
        print(f"\n{written}")
        return 0
    for run in runs:
        with progress_bars(unit="batch") as show:
            study = exit_studies.study_run(run, overrides=overrides, device=options.device, limit=limit, progress=show)
        folder = given or Path(run) / "exits"
        written = exit_studies.write_exit_study(study, folder, command=_command(options))
        shown = [table for table in output.tables(study) if table.name in ("exit_metrics", "exit_budgets")]
        print(f"{run}\n\n" + "\n\n".join(to_text(table) for table in shown) + f"\n\n{written}")
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


def _share(options: argparse.Namespace) -> float:
    """Share of the dense score to keep, from one of ``--share`` and ``--tolerance``."""
    if options.share is not None and options.tolerance is not None:
        raise ConfigError("--tolerance: found one next to --share, which is 1 - tolerance; give one of them")
    name, given = ("tolerance", options.tolerance) if options.share is None else ("share", options.share)
    try:
        number = 0.01 if given is None else float(given)
    except ValueError:
        number = -1.0
    if name == "tolerance" and 0 <= number < 1:
        return 1 - number
    if name == "share" and 0 < number <= 1:
        return number
    range_ = "a share above 0, at most 1" if name == "share" else "0 or more, less than 1"
    raise ConfigError(f"--{name}: found '{given}'; give {range_}")


def _command(options: argparse.Namespace) -> list[str]:
    """Return the command that reproduces the study: all options that differ from their defaults."""
    words = ["clframe", NAME, *options.words]
    for action in options.parser._actions:
        value = getattr(options, action.dest, None)
        relevant = action.option_strings and action.dest not in ("help", "debug", "output")
        if relevant and value is not None and value != action.default and action.option_strings[0] not in words:
            words += [action.option_strings[0], value]
    return _without_alias(words)


def _without_alias(words: Sequence[str]) -> list[str]:
    """Remove ``--texts`` where ``--limit``, of which it is an alias, is present."""
    at = words.index("--texts") if "--texts" in words and "--limit" in words else len(words)
    return [*words[:at], *words[at + 2 :]]
