"""Seconds to open a data set of many small image files: without a cache, with a new one, and with one that exists.

    python perf/image_files.py                        # 60,000 PNG files of 32x32 pixels, made in a temporary folder
    python perf/image_files.py --path FOLDER          # FOLDER/train/CLASS and FOLDER/test/CLASS

Listing is part of every row: it is what `class_folders` takes alone. Each row is a process, so that nothing is decoded
or imported before; the files have been read once before, so that the disk is not what is measured. Processor time is
that of all threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CODE = """
import json, sys, time
from pathlib import Path
import torch
from clframe.data import SOURCES
from clframe.data.sources.paths import class_folders

image_folder = SOURCES.get("image_folder")
kind, path, cache = sys.argv[1:]
start = time.perf_counter(), time.process_time()
if kind == "listing":
    count = sum(len(files) for part in ("train", "test") for files in class_folders(Path(path) / part).values())
else:
    source = image_folder(path=path, cache=Path(cache) if cache else None)
    count = len(source.train) + len(source.test)
print(json.dumps([count, time.perf_counter() - start[0], time.process_time() - start[1]]))
"""


def make_files(folder: Path, count: int) -> None:
    """Write smooth random images: five training files to each test file, in 100 classes."""
    draw = np.random.default_rng(0)
    for i in range(count):
        place = folder / ("test" if i % 6 == 5 else "train") / f"{i // 6 % 100:03d}"
        place.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(place / f"{i}.png")


def measure(kind: str, path: str, cache: str = "") -> tuple[int, float, float]:
    """Number of files, wall seconds and processor seconds of a process."""
    done = subprocess.run([sys.executable, "-c", CODE, kind, path, cache], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    count, wall, cpu = json.loads(done.stdout.splitlines()[-1])
    return int(count), float(wall), float(cpu)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=60_000, help="at least 600, for 100 classes in both parts")
    parser.add_argument("--path", help="a folder of images, in the place of generated ones")
    options = parser.parse_args()
    if options.files < 600:
        parser.error(f"--files: found {options.files}; give at least 600")
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        path = options.path or str(home / "images")
        if options.path is None:
            start = time.perf_counter()
            make_files(home / "images", options.files)
            print(f"made the files in {time.perf_counter() - start:.0f} s")
        measure("decoded", path)
        cache = str(home / "cache")
        rows = [
            ("listing alone", measure("listing", path)),
            ("without a cache", measure("decoded", path)),
            ("cache written", measure("decoded", path, cache)),
            ("cache read", measure("decoded", path, cache)),
        ]
    print(f"{rows[0][1][0]:,} files\n\n| | wall s | processor s |\n|---|---:|---:|")
    for name, (_, wall, cpu) in rows:
        print(f"| {name} | {wall:.2f} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
