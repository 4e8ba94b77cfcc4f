"""A report in a real browser, if there is one: no console message, as wide as a telephone and a desk, light and dark."""

from __future__ import annotations

import html
import itertools
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from clframe.accounting import Ledger
from clframe.report import write_report
from clframe.report.latency import Setting, Timed, Timings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]

FRAME = """\
<!DOCTYPE html><title>-</title><body style="margin:0">
<iframe style="border:0;width:{width}px;height:9000px" srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const inside = frame.contentDocument, root = inside.documentElement;
  const figures = [...inside.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
  document.title = [root.scrollWidth, figures.length, Math.min(...figures.map(f => f.width)),
                    Math.max(...figures.map(f => f.right)), getComputedStyle(inside.body).backgroundColor].join(" | ");
}};
</script>
"""
"""Shows a page at any width; browsers do not make a window as narrow as a telephone."""


def browse(address, *options):
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
         *options, str(address)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


SETTING = Setting(device="cpu", processor="x", threads=1, torch="2", dtype="float32", warmup=5, repeats=30, samples=9)
TIMINGS = Timings(
    setting=SETTING,
    rows=tuple(
        Timed(way=way, batch=batch, p50=batch * macs * 1e-6, p95=batch * macs * 2e-6, throughput=1e6 / macs, macs=macs)
        for way, macs in (("whole network", 553.0), ("exit/early", 120.0), ("exit/final", 530.0), ("policy", 402.5))
        for batch in (1, 32)
    ),
)


def costs():
    ledger = Ledger()
    for index in range(2):
        ledger.add("forward", macs=1000, experience=index, samples=10, steps=2)
        ledger.add("backward", macs=1900, experience=index)
    ledger.predictions.add_part("a stage with a name that is long", kind="stage", macs=523, experience=1)
    ledger.predictions.add_part("exit/final", kind="head", macs=30, experience=1)
    ledger.predictions.add_stops(names=("early", "final"), cost_K=(123, 553), count_K=(7, 13), experience=1)
    ledger.predictions.add_products("convolution", macs=4000, effective_macs=1000, samples=4, experience=1)
    return ledger


@pytest.fixture
def page(make_run, tmp_path, exits):
    for seed in range(2):
        records = [exits(0.5, 0.9), exits(0.25, 0.75, at_half=(0.4, 0.7))]
        make_run(f"runs/a{seed}", (12 + seed, 18), seed=seed, records=records, ledger=costs(), timings=TIMINGS)
        make_run(f"runs/b{seed}", (14, 18), seed=seed, strategy="naive")
    return write_report([tmp_path / "runs"])


def test_it_is_readable(page, tmp_path):
    source = html.escape(page.read_text(encoding="utf-8"))
    frame, picture = tmp_path / "frame.html", tmp_path / "shot.png"
    for width, dark in itertools.product((390, 1280), (False, True)):
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        frame.write_text(FRAME.format(width=width, page=source), encoding="utf-8")
        found, console = browse(frame.as_uri(), scheme, "--dump-dom")
        assert console == []
        (title,) = re.findall(r"<title>([^<]*)</title>", found)
        content, figures, narrowest, right, background = title.split(" | ")
        assert int(content) <= width  # nothing to scroll sideways but tables, in their own boxes
        assert int(figures) == 21 and float(narrowest) > 300 and float(right) <= width
        assert background == ("rgb(15, 18, 21)" if dark else "rgb(245, 246, 248)")
        _, console = browse(frame.as_uri(), scheme, f"--window-size={max(width, 500)},1400", f"--screenshot={picture}")
        assert console == []
        pixels = np.asarray(Image.open(picture).convert("L"))[:, :width]
        paper, ink = np.median(pixels), pixels.max() if dark else pixels.min()
        assert (paper < 40 and ink > 180) if dark else (paper > 220 and ink < 80)
