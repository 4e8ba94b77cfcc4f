"""CPU time of a whole ONNX graph and of its stages under onnxruntime, on one thread (docs/export.md).

    python perf/staged_export.py RUN INPUTS.npy [THRESHOLD]

RUN is a run with exits, INPUTS.npy a batch as its data set stores it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from clframe.targets.export import export
from clframe.targets.loading import RunModel, load_run
from clframe.targets.runner import StagedModel

REPEATS = 9


def cpu_time(call: Callable[[Any], object], batches: Sequence[Any]) -> float:
    """Least CPU time of a batch, in milliseconds."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        for batch in batches:
            call(batch)
        times.append(time.process_time() - start)
    return 1e3 * min(times) / len(batches)


def main(run: str, inputs: str, threshold: str = "0.9") -> None:
    x, limit = np.load(inputs, allow_pickle=False), float(threshold)
    model = load_run(run, kind=RunModel, where="perf")
    with tempfile.TemporaryDirectory() as folder:
        whole = export(model, Path(folder) / "whole")
        stages = StagedModel(export(model, Path(folder) / "staged", staged=True, threshold=limit), threads=1)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(whole / "model.onnx"), options, providers=["CPUExecutionProvider"])
        found = stages(x, threshold=limit)
        print(f"mean MACs {found.macs.mean() / stages.stages[-1]['macs']:.0%}, exits {np.bincount(found.exits).tolist()}")
        never = [None] * (len(stages.stages) - 1)
        for size in (1, 32):
            batches = [x[at : at + size] for at in range(0, len(x) - size + 1, max(size, 6))]
            base = cpu_time(lambda batch: session.run(None, {"inputs": batch}), batches)
            early = cpu_time(lambda batch: stages(batch, threshold=limit), batches)
            full = cpu_time(lambda batch: stages(batch, threshold=never), batches)
            print(f"batch {size}: whole {base:.2f} ms, stages {early:.2f} ms ({early / base:.0%}), no stop {full:.2f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
