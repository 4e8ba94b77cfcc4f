"""``clframe extend`` as a user calls it, on folders of images."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import clframe
from clframe.cli import main

CLASSES = ("zero", "one", "two", "three", "four")
QUICK = ("backbone=mlp", "backbone.width=16", "trainer.epochs=2", "trainer.loggers=[]", "trainer.threads=1",
         "trainer.accelerator=cpu", "trainer.progress=false")  # fmt: skip


def write_photos(folder: Path, *classes: int, mode: str = "L", side: int = 8, start: int = 0, named: str = "") -> None:
    """Write twelve digits of each class as PNG files."""
    data = load_digits()
    for c in classes:
        (here := folder / (named or CLASSES[c])).mkdir(parents=True)
        for i in np.where(data.target == c)[0][start : start + 12]:
            image = Image.fromarray((data.images[i] * 15).astype(np.uint8)).convert(mode)
            image.resize((side, side)).save(here / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos of three classes and a finished run on them."""
    folder = tmp_path_factory.mktemp("extend")
    write_photos(folder / "photos", 0, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clframe.execution.write_figures", lambda *_: None)
        clframe.run(
            "quickstart",
            ["benchmark=image_folder", f"benchmark.path={folder / 'photos'}", "benchmark.experiences=1", "name=photos",
             "strategy=er", *QUICK],
            output=folder / "runs",
        )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clframe.execution.write_figures", lambda *_: None)


def run_of(folder: Path) -> str:
    return str(next((folder / "runs" / "photos").iterdir()))


def newest(folder: Path) -> Path:
    return max((folder / "photos").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def test_photos_of_a_new_class(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Other size and channels, and more samples of a known class: converted and matched by name.
    write_photos(tmp_path / "new", 3, mode="RGB", side=11)
    write_photos(tmp_path / "new", 0, start=12)
    run = run_of(place)
    before = {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()}
    code = main(["extend", run, "benchmark=image_folder", f"benchmark.path={tmp_path / 'new'}",
                 "trainer.epochs=3", "--output", str(tmp_path)])  # fmt: skip
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"extending {run}: 1 experiences, 1 more"
    assert lines[1:3] == ["new classes: three (3)", "more samples of known classes: zero (2)"]
    assert lines[3].startswith("experience 2/2: ")
    child = newest(tmp_path)
    result = json.loads((child / "results.json").read_text())
    assert result["class_names"] == ["one", "two", "zero", "three"]
    assert result["benchmark"] == "photos + new" and len(result["accuracy_matrix"]) == 2
    assert {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()} == before
    config = clframe.load(child).config
    assert config.benchmark.options["size"] == 8 and config.benchmark.options["channels"] == 1
    assert config.trainer.epochs == 3 and config.earlier[0].run == run
    # A second extension, of the extended run, and the report of all.
    write_photos(tmp_path / "newer", 4)
    assert main(["extend", str(child), f"benchmark.path={tmp_path / 'newer'}", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and 0 <= float(out) <= 1
    assert main(["report", str(newest(tmp_path)), "--output", str(tmp_path / "report")]) == 0


def test_photos_that_have_moved(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(tmp_path / "new", 3)
    run, new, photos = run_of(place), f"benchmark.path={tmp_path / 'new'}", place / "photos"
    photos.rename(place / "moved")
    try:
        assert main(["extend", run, new, "--output", str(tmp_path / "gone")]) == 0
        gone = capsys.readouterr()
        assert main(["extend", run, new, "--earlier", f"benchmark.path={place / 'moved'}", "--output",
                     str(tmp_path / "found")]) == 0  # fmt: skip
        found = capsys.readouterr()
    finally:
        (place / "moved").rename(photos)
    assert f"earlier data: {photos}: no such folder" in gone.err and "its experience is not evaluated" in gone.err
    assert "not evaluated: experience 1, whose data are gone" in gone.out
    assert "final average accuracy" in gone.out
    assert found.err == "" and "not evaluated" not in found.out


def test_an_interrupted_extension_is_saved_and_resumed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from clframe.training.monitor import Monitor

    write_photos(tmp_path / "new", 3)
    on_step = Monitor.on_step

    def interrupt(self: Monitor, *values: Any, **named: Any) -> None:
        on_step(self, *values, **named)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Monitor, "on_step", interrupt)
    code = main(["extend", run_of(place), f"benchmark.path={tmp_path / 'new'}", "--output", str(tmp_path / "runs")])
    monkeypatch.setattr(Monitor, "on_step", on_step)
    child = newest(tmp_path / "runs")
    printed = capsys.readouterr()
    assert code == 128 + signal.SIGINT and "classes are numbered" not in printed.err
    assert "saved at experience 2, epoch " in printed.err
    assert printed.err.endswith(f"clframe: interrupted; resume with clframe run --resume {child}\n")
    # What it has learned so far answers, with a warning.
    assert main(["predict", str(child), str(tmp_path / "new")]) == 0
    warning = f"{child}: has learned 1 of 2 experiences; finish it with clframe run --resume {child}"
    assert warning in caplog.messages
    capsys.readouterr()
    # Resumed without the classes' numbers of the sources; the second time there is nothing to do.
    assert main(["run", "--resume", str(child)]) == 0
    first = capsys.readouterr().err
    assert "resumed at experience 2" in first and "numbered" not in first and "is finished" not in first
    assert main(["run", "--resume", str(child)]) == 0
    assert capsys.readouterr().err == f"{child}: is finished; nothing to train\n"


def test_photos_that_the_run_has_learned(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = place / "photos"
    assert main(["extend", run_of(place), f"benchmark.path={photos}", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().err == f"{photos}: are data that the run has already learned; they are learned again\n"


def test_bad_input_is_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, photos = run_of(place), place / "photos"
    write_photos(tmp_path / "cases", 0, named="Zero")
    write_photos(tmp_path / "numbers", 3, named="3")
    (tmp_path / "empty").mkdir()
    write_photos(photos, 3)  # a class that is new in the folder of the run itself
    out = ["--output", str(tmp_path / "out")]
    try:
        for words, message in (
            ((), "extend: found no run; begin with a run folder"),
            (("benchmark=image_folder",), "extend: found 'benchmark=image_folder' instead of a run; begin with a run"),
            ((str(tmp_path / "none"), "benchmark.path=x"), "extend: no folder"),
            ((str(tmp_path / "empty"), "benchmark.path=x"), "has no config.yaml; give the folder of a run"),
            ((run,), "extend: found no new data; give them, such as benchmark=image_folder"),
            ((run, f"benchmark.path={tmp_path / 'none'}"), "no such folder"),
            ((run, f"benchmark.path={tmp_path / 'empty'}"), f"{tmp_path / 'empty'}: "),
            ((run, f"benchmark.path={tmp_path / 'cases'}"), "earlier data: photos has the classes three, unlike"),
            (
                (run, f"benchmark.path={photos}", "backbone.width=3"),
                "backbone.width is part of what the run has learned",
            ),
            ((run, f"benchmark.path={photos}", "--earlier", "x=1"), "--earlier: found 'x=1'; give a location such as"),
            ((run, f"benchmark.path={photos}", "--device", "gpux"), "--device: found 'gpux'; did you mean 'gpu'?"),
        ):
            assert main(["extend", *words, *out]) == 2
            printed = capsys.readouterr()
            assert message in printed.err and printed.err.count("\n") == 1, (words, printed.err)
    finally:
        for path in (photos / "three").iterdir():
            path.unlink()
        (photos / "three").rmdir()
    for folder, message in (
        ("cases", "cases: found the class 'Zero', but the run knows 'zero'; name it 'zero' if they are the same"),
        ("numbers", "numbers: found the class '3', a number, but the classes of the run have names (one, two, zero)"),
    ):
        assert main(["extend", run, f"benchmark.path={tmp_path / folder}", *out]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
