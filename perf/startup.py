"""Seconds from a command to its first training step and to its end.

    python perf/startup.py                                          # quickstart as a development run
    python perf/startup.py --repeats 5 split_cifar100 backbone=resnet32 trainer.fast_dev_run=true

Each repetition is a process. Wall time depends on what else the machine does; processor time does less so. The first
row, `import torch`, is what no change of clframe can shorten. Compiled modules are kept in a separate folder, as an
installed package has them; the first process, which compiles them, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

TORCH = """
import json, sys, time
import torch
print(json.dumps({"import torch": [time.time() - float(sys.argv[1]), time.process_time()]}), file=sys.stderr)
"""
RUN = """
import json, sys, time
from clframe.cli import main

times = {}

def note(name):
    times.setdefault(name, [time.time() - float(sys.argv[1]), time.process_time()])

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "clframe.training.launch":  # torch is imported: this registers the hook before any step
            from torch.optim.optimizer import register_optimizer_step_post_hook
            register_optimizer_step_post_hook(lambda *_: note("first training step"))

sys.meta_path.insert(0, Watch())
code = main(["run", *sys.argv[2:]])
note("end of the command")
print(json.dumps(times), file=sys.stderr)
sys.exit(code)
"""


def measure(code: str, arguments: list[str], *, cache: str) -> dict[str, list[float]]:
    """Run code in a process; returns wall and processor seconds by name."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", code, str(time.time()), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, list[float]] = json.loads(done.stderr.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("words", nargs="*", default=["quickstart", "trainer.fast_dev_run=true"])
    options = parser.parse_args()
    rows: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*options.words, "--output", f"{folder}/runs", "--quiet"]
        for repetition in range(options.repeats + 1):
            for code, given in ((TORCH, []), (RUN, arguments)):
                for name, seconds in measure(code, given, cache=f"{folder}/compiled").items():
                    if repetition:
                        rows.setdefault(name, []).append(seconds)
    print(f"median of {options.repeats} (smallest to largest), seconds\n")
    print("| | wall | processor |\n|---|---:|---:|")
    for name, found in rows.items():
        cells = [f"{statistics.median(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in zip(*found, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
