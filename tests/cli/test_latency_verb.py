"""``clframe latency``: what is asked for, what is printed, and one line for what cannot be."""

from __future__ import annotations

import argparse

import pytest
import torch

from clframe.cli import latency
from clframe.errors import ConfigError
from clframe.report.latency import Setting, Timed, Timings
from clframe.targets import latency as study

SETTING = Setting(device="cpu", processor="x", threads=1, torch="2", dtype="float32", warmup=5, repeats=3, samples=9)
TIMINGS = Timings(
    setting=SETTING, rows=(Timed(way="policy", batch=8, p50=0.0025, p95=0.004, throughput=3200.0, macs=1234.0),)
)


def called(*words: str) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    latency.add_options(parser)
    return latency.act(parser.parse_args(words))


def test_it_asks_and_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, dict[str, object], int]] = []

    def time_run(run: str, **options: object) -> Timings:
        asked.append((run, options, torch.get_num_threads()))
        return TIMINGS

    monkeypatch.setattr(study, "time_run", time_run)
    before = torch.get_num_threads()
    assert called("a", "b", "--batches", "8,64", "--repeats", "3", "--threads", "1") == 0
    options = {"batches": (8, 64), "device": "cpu", "repeats": 3, "overrides": []}
    assert asked == [("a", options, 1), ("b", options, 1)] and torch.get_num_threads() == before
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "a: cpu, 1 thread, float32, 3 calls each"
    assert out[2].split() == ["policy", "8", "2.500", "4.000", "3,200", "1,234"]
    called("a", "benchmark.data_dir=d")
    assert asked[-1][1]["overrides"] == ["benchmark.data_dir=d"]


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "found no run"), (("a", "--batches", "1,x"), "--batches: found '1,x'"), (("a", "--threads", "0"), "--threads: found 0; give a number from 1 to 1024"),
     (("a", "--threads", "1000000000"), "--threads: found 1000000000; give a number from 1 to 1024")],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        called(*words)
