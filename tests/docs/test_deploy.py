"""docs/deploy.md, command by command, on small images: the numbers of each step agree with those of the others."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clframe
from clframe.cli import main
from clframe.results import Result
from clframe.targets import doctor
from clframe.targets.runner import StagedModel

pytestmark = pytest.mark.slow  # thirteen commands, two of which train

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven")
FASTER = {"run": ["trainer.epochs=6", "backbone.width=8"], "explain": ["backbone.width=8"], "extend": ["trainer.epochs=6"]}
"""Overrides of the commands, since the tests are on small images."""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)


def write_photos():
    """Photographs of digits, 30 of each class, some of them in gray and others in color."""
    digits = clframe.data.digits()
    images, labels = digits.train.x[:, 0].float(), digits.train.y
    for label, name in enumerate(NAMES):
        folder = Path("photos" if label < 6 else "new_photos") / name
        folder.mkdir(parents=True)
        scale = 255 / float(images.max())
        for i in (labels == label).nonzero().flatten()[:30].tolist():
            image = Image.fromarray((images[i] * scale).byte().numpy()).resize((32, 32))
            (image.convert("RGB") if i % 2 else image).save(folder / f"{i:04d}.png")


def digests(folder):
    """Checksum of every file below a folder, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """Working folder, run, extended run, and what each command printed, after all commands of the document."""
    folder, printed = tmp_path_factory.mktemp("deploy"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(doctor, "check_trial", lambda run: doctor.Finding("small run", True, "replaced"))
        patch.setattr(doctor, "LEAST_GB", 0.0)
        patch.setattr(doctor, "available_cores", lambda: 256.0)
        write_photos()
        Path("photos.yaml").write_text(blocks("yaml")[0])
        for line in "".join(blocks("bash")).splitlines():
            _, verb, *words = shlex.split(line)
            runs = sorted(Path("runs/photos").glob("*"), key=lambda path: path.stat().st_ctime)
            known = dict(zip(("RUN", "EXTENDED"), sorted(map(str, runs)), strict=False))
            if verb in ("export", "card") and not all(map(find_spec, ("onnx", "onnxscript", "safetensors"))):
                continue
            if verb == "extend":
                Path("runs/before.json").write_text(json.dumps(digests(Path(known["RUN"]))))
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                code = main([verb, *(known.get(word, word) for word in words), *FASTER.get(verb, [])])
            assert code == 0, f"{line}: {out.getvalue()}"
            printed[line] = out.getvalue()
    return folder, *(folder / path for path in known.values()), printed


def test_the_extended_run_knows_old_and_new_classes(deployed):
    _, run, extended, printed = deployed
    before, after = (Result.from_json(path / "results.json") for path in (run, extended))
    assert set(before.class_names) == set(NAMES[:6]) and set(after.class_names) == set(NAMES)
    assert after.class_names[:6] == before.class_names
    assert len(before.accuracy_matrix) == 3 and len(after.accuracy_matrix) == 4
    assert after.accuracy_matrix[:3] == tuple((*row, 0.0) for row in before.accuracy_matrix)
    assert before.final_average_accuracy > 0.6 and after.accuracy_matrix[3][3] > 0.6
    (text,) = (printed[line] for line in printed if " extend " in line)
    assert "new classes: seven (6), six (7)" in text


def test_the_confusion_matrix_has_the_names_of_folders(deployed):
    _, run, _, _ = deployed
    result = Result.from_json(run / "results.json")
    page = (run / "report" / "report.html").read_text()
    with open(run / "report" / "tables" / "confusion_matrix.csv") as file:
        rows = [line.strip().split(",") for line in file]
    assert rows[0][1:] == [result.class_label(c) for c in result.class_order]
    for i, (name, *counts) in enumerate(rows[1:]):
        c = result.class_names.index(name)
        assert float(counts[i]) / sum(map(float, counts)) == pytest.approx(result.accuracy_by_class[c])
    assert "<h2>Confusion matrix</h2>" in page


def test_predictions_from_files_are_those_of_the_evaluation(deployed):
    _, run, _, printed = deployed
    result = Result.from_json(run / "results.json")
    (text,) = (printed[line] for line in printed if " evaluate " in line)
    assert f"{100 * result.final_weighted_accuracy:.1f}" in text


def test_a_new_photograph_is_predicted_as_its_class_by_model_and_export(deployed):
    folder, _, extended, _ = deployed
    model = clframe.load(extended)
    files = sorted((folder / "new_photos" / "six").glob("*.png"))[:12]
    found = model.predict([str(file) for file in files])
    assert [row.class_name for row in found].count("six") >= 8
    if not (extended / "export").is_dir():
        pytest.skip("the extra export is not installed")
    staged = StagedModel(extended / "export" / "onnx-staged")
    x = np.stack([np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1) for file in files])
    answers = staged(x)
    assert [dict(zip(staged.classes, staged.names, strict=True))[int(c)] for c in answers.classes] == found.class_names
    assert np.abs(answers.probabilities.max(1) - [row.probability for row in found]).max() < 1e-4
    assert answers.macs.tolist() == [row.macs for row in found]
    again = clframe.load(extended / "export" / "safetensors").predict([str(file) for file in files])
    assert [row.class_name for row in again] == found.class_names
    description = json.loads((extended / "export" / "onnx" / "model.json").read_text())
    assert set(NAMES) <= set(map(str, re.findall(r"\w+", json.dumps(description))))
    card = (extended / "card" / "README.md").read_text()
    assert "license: mit" in card and all(name in card for name in NAMES)


def test_the_run_is_not_changed_by_its_extension(deployed):
    _, run, extended, _ = deployed
    kept = run.parent.parent / "before.json"
    assert json.loads(kept.read_text()) == digests(run) and "log.txt" in digests(run)
    assert sorted(path.name for path in (extended / "checkpoints").iterdir())[-1] == "experience_004.ckpt"
