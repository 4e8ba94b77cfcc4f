"""``clframe predict``: tables, files, exit codes, and bad input in one line."""

from __future__ import annotations

import csv
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

import clframe
from clframe.data import digits


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Ten digits as image files."""
    folder = tmp_path_factory.mktemp("drawn")
    for i, x in enumerate(digits().test.x[:10, 0].numpy()):
        Image.fromarray((x * (255 / 16)).round().astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def test_a_table_a_file_of_each_kind_and_a_summary(call, here, finished, drawn):
    run = str(finished[0])
    code, out, err = call("predict", run, str(drawn), "--json", "out.json", "--csv", "out.csv", "--top", "2")
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert lines[0] == "Predictions: last exit"
    rule = next(i for i, line in enumerate(lines) if set(line) == {"-"})  # headings wider than their cells are wrapped
    headings = " ".join(lines[1:rule]).split()
    assert "input" in headings and {"next", "classes,"} <= set(headings)
    model = clframe.load(run)
    expected = model.classify(digits().test.x[:10]).tolist()
    macs = clframe.Result.from_json(finished[0] / "results.json").macs
    for i, line in enumerate(lines[rule + 1 : rule + 11]):
        assert line.split()[0].endswith(f"{i}.png") and line.split()[-1] == f"{macs:,}"
    assert lines[rule + 11] == f"10 predictions; mean MACs {macs:,}, 100.0 % of the backbone"
    content = json.loads((here / "out.json").read_text())
    assert [row["class_id"] for row in content["predictions"]] == expected
    assert [row["class"] for row in content["predictions"]] == [str(c) for c in expected]
    with open(here / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["class_id"]) for row in rows] == expected and set(rows[0]) >= {"class_2", "probability_2"}
    assert [float(row["probability"]) for row in rows] == [row["probability"] for row in content["predictions"]]


def test_json_on_the_standard_output_is_all_there_is(call, finished, drawn):
    code, out, err = call("predict", str(finished[0]), str(drawn / "3.png"), "--json", "-")
    assert code == 0 and err == ""
    assert json.loads(out)["predictions"][0]["input"] == str(drawn / "3.png")
    code, out, _ = call("predict", str(finished[0]), str(drawn / "3.png"), "--csv", "-")
    assert code == 0 and out.startswith("input,class_id,class,probability,exit,macs\n") and out.count("\n") == 2


def test_a_corrupt_file_is_skipped_with_its_own_exit_code(call, here, finished, drawn):
    (here / "bad.png").write_bytes((drawn / "0.png").read_bytes()[:50])
    code, out, err = call("predict", str(finished[0]), "bad.png", str(drawn / "1.png"))
    assert code == 3 and "\n1 prediction; mean MACs" in out
    assert err.startswith("clframe: skipped bad.png: cannot be read as an image (") and err.count("\n") == 1


def test_a_missing_file_is_skipped_as_an_unreadable_one(call, here, finished, drawn):
    (here / "empty").mkdir()
    given = ["missing.png", str(drawn / "1.png"), "empty", "none*.png"]
    code, out, err = call("predict", str(finished[0]), *given, "--csv", "-")
    assert code == 3 and out.count("\n") == 2 and out.splitlines()[1].startswith(str(drawn / "1.png"))
    assert [line.split(";")[0] for line in err.splitlines()] == [
        "clframe: skipped missing.png: no such file or folder", "clframe: skipped empty: holds no images",
        "clframe: skipped none*.png: matches no file",
    ]  # fmt: skip
    code, out, err = call("predict", str(finished[0]), "missing.png", "absent.png")
    assert code == 2 and out == "" and err.startswith("clframe: error: missing.png: no such file or folder;")


def test_one_input_that_cannot_be_read_does_not_end_the_others(call, here, finished, drawn):
    good = (drawn / "1.png").read_bytes()
    (here / "odd").mkdir()
    (here / "odd" / "good.png").write_bytes(good)
    (here / "odd" / "loop.png").symlink_to("loop.png")
    (here / "odd" / "broken.png").symlink_to("nowhere.png")
    (here / "half.npz").write_bytes(b"PK\x03\x04")
    np.savez(here / "wide.npz", x=np.zeros((1, 5, 8, 8, 8), np.uint8))
    np.savez(here / "text.npz", x=np.array(["a"]))
    np.savez(here / "good.npz", x=digits().test.x[:2].numpy())
    given = ["odd", "half.npz", "wide.npz", "text.npz", "odd/*.png", "good.npz"]
    code, out, err = call("predict", str(finished[0]), *given, "--csv", "-")
    assert code == 3
    assert [row["input"] for row in csv.DictReader(out.splitlines())] == ["odd/good.png", "good.npz[0]", "good.npz[1]"]
    reasons = {line.split(": ")[1].removeprefix("skipped "): line for line in err.splitlines()}
    assert set(reasons) == {"odd/loop.png", "odd/broken.png", "half.npz", "wide.npz", "text.npz"}
    assert "broken.png is a link to nowhere.png, which does not exist; restore it" in reasons["odd/broken.png"]
    assert "cannot be read as .npz" in reasons["half.npz"] and "found inputs of shape" in reasons["wide.npz"]
    assert "x: found an array that is not of numbers" in reasons["text.npz"]


def test_a_broken_link_is_named_as_one(refused, here, finished):
    (here / "broken.png").symlink_to("nowhere.png")
    refused(["predict", str(finished[0]), "broken.png"], "broken.png is a link to nowhere.png, which does not exist")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text on other systems")
def test_a_file_name_that_is_not_utf8_is_escaped_in_every_output(call, here, finished, drawn):
    folder = os.path.join(os.fsencode(here), b"photos")
    os.mkdir(folder)
    with open(os.path.join(folder, b"a\xff.png"), "wb") as file:
        file.write((drawn / "1.png").read_bytes())
    code, out, err = call("predict", str(finished[0]), "photos", "--json", "out.json", "--csv", "out.csv")
    assert code == 0 and err == "" and "photos/a\\udcff.png" in out
    assert r'"input": "photos/a\udcff.png"' in (here / "out.json").read_text()
    assert "photos/a\\udcff.png" in (here / "out.csv").read_text()
    (found,) = json.loads((here / "out.json").read_text())["predictions"]
    assert os.fsencode(found["input"]) == b"photos/a\xff.png"  # the name can be opened


def test_a_model_is_printed_in_one_line(finished):
    model = clframe.load(finished[0])
    names = ", ".join(model.network.exit_names)
    assert repr(model) == f"Model({str(finished[0])!r}, strategy='er + lwf', 10 classes, exits: {names})"


def test_nothing_predicted_is_bad_input(call, here, finished):
    (here / "bad.png").write_bytes(b"")
    code, out, err = call("predict", str(finished[0]), "bad.png", "--json", "out.json")
    assert code == 2 and out == "" and not (here / "out.json").exists()
    assert err.splitlines()[-1] == "clframe: error: predict: none of 1 inputs could be read; give other files"


@pytest.mark.parametrize("words, message", [
    ([], "predict: found no run; give"),
    (["RUN"], "predict: found no inputs; give"),
    (["nowhere", "a.png"], "predict: no folder nowhere; give"),
    (["RUN", "nothing.png"], "nothing.png: no such file or folder"),
    (["RUN", "empty"], "empty: holds no images; give a folder with .png, .jpg"),
    (["RUN", "RUN", "DRAWN"], ": is a run folder; give one run, then image files or folders"),
    (["RUN", "empty/*.png"], "matches no file; check"),
    (["RUN", "DRAWN", "--top", "0"], "--top: found '0'; give"),
    (["RUN", "DRAWN", "--batch-size", "-3"], "--batch-size"),
    (["RUN", "DRAWN", "--threshold", "half"], "--threshold: found 'half'; give a number"),
    (["RUN", "DRAWN", "--threshold", "0.5"], "--threshold: the model has one exit only; train with"),
    (["RUN", "DRAWN", "--budget", "0.5"], "--budget: the model has one exit only; train with"),
    (["RUN", "DRAWN", "--device", "tpu"], "--device: found tpu"),
    (["RUN", "DRAWN", "--json", "-", "--csv", "-"], "--json: found -, and --csv too; write"),
    (["RUN", "DRAWN", "--json", "x.txt", "--csv", "./x.txt"], "--json: found ./x.txt, and --csv too; write one of them to another file"),
    (["RUN", "DRAWN", "--json", ""], "--json: found '' (text); give a file, or - for the standard output"),
    (["RUN", "DRAWN", "--csv", "."], "--csv: found '.' (text); give a file, or - for the standard output"),
    (["RUN", "DRAWN", "--json", "no/such/folder.json"], "--json: no folder no/such; create it, or give another file"),
])  # fmt: skip
def test_bad_input_is_one_line(refused, here, finished, drawn, words, message):
    (here / "empty").mkdir()
    named = {"RUN": str(finished[0]), "DRAWN": str(drawn)}
    refused(["predict", *(named.get(word, word) for word in words)], message)


def test_a_run_without_a_checkpoint_is_one_line(refused, here, finished):
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_bytes((finished[0] / "config.yaml").read_bytes())
    refused(["predict", "run", "a.png"], "run: has no checkpoint yet; run it until")
