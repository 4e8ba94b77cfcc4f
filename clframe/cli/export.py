"""``clframe export``."""

from __future__ import annotations

import argparse

from clframe.errors import ConfigError

NAME = "export"
HELP = "write a model as ONNX, torch.export or safetensors"
WORDS = "RUN"
DESCRIPTION = """\
Writes the trained model of a run to a new folder. A graph takes inputs as the data set stores them, such as bytes, and
returns the probabilities of every exit and the prediction; normalization, corrections of the strategy, ensembles and
calibration are part of it, and the batch size is free. model.json has classes, exits, costs and thresholds. Every graph
is compared with the model before it is written.

  clframe export RUN                                  model.onnx in RUN/export/onnx
  clframe export RUN --staged                         one graph for each exit and run_staged.py, which stops early
  clframe export RUN --staged --threshold 0.9         for a strategy without early_exit
  clframe export RUN --format pt2                     torch.export, for torch without clframe
  clframe export RUN --format safetensors             weights and config, which clframe.load reads
  clframe export RUN --format transformers            a language model as a Llama, with its tokenizer

ONNX needs the extra export: pip install 'clframe[export]'.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument(
        "--format", default="onnx", metavar="NAME", help="onnx, pt2, safetensors or transformers (default: onnx)"
    )
    parser.add_argument("--output", metavar="DIR", help="the folder to create (default: RUN/export/FORMAT[-staged])")
    parser.add_argument("--staged", action="store_true", help="one graph for each exit, with a runner that stops early")
    parser.add_argument("--threshold", metavar="P", help="confidence from which an exit stops a sample (with --staged)")
    parser.add_argument("--opset", metavar="N", help="operator set of ONNX (default: 18)")
    parser.add_argument("--input", metavar="TYPE", help="type of the inputs (default: the data set's, such as uint8)")


def act(options: argparse.Namespace) -> int:
    """Export and print what was written."""
    from clframe.targets.export import export_run

    if len(options.words) != 1:
        found = " ".join(options.words) or "nothing"
        raise ConfigError(f"export: found {found}; give one run folder, such as the one clframe run printed")
    folder = export_run(
        options.words[0],
        output=options.output,
        format=options.format,
        staged=options.staged,
        threshold=_number(options.threshold, "--threshold"),
        opset=_whole(options.opset, "--opset"),
        dtype=options.input,
    )
    for file in sorted(folder.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    return 0


def _number(text: str | None, option: str) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        raise ConfigError(f"export: {option} found '{text}'; give a number from 0 to 1") from None


def _whole(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 3:
        raise ConfigError(f"export: {option} found '{text}'; give a whole number such as 18")
    return int(text)
