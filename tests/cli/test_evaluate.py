"""``clframe evaluate``: own test data as in results.json, other data by class name, and bad input in one line."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from earlier_versions import remove_digests
from PIL import Image

import clframe
from clframe.data import digits
from clframe.exits.bootstrap import bootstrap
from clframe.exits.curves import wilson_interval
from clframe.targets.evaluation import evaluate
from clframe.targets.evaluation_output import exits_table

FAST = ["backbone=mlp", "backbone.width=8", "trainer.epochs=1", "trainer.progress=false", "trainer.loggers=[]"]


def draw(x, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((x.numpy() * (255 / 16)).round().astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    more = ["benchmark.experiences=2", "benchmark.validation=0.2", "strategy=er + exits"]
    return clframe.run("quickstart", [*FAST, *more], output=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Test digits of three classes as files, in folders named after the classes."""
    root, test = tmp_path_factory.mktemp("digits"), digits().test
    for c in (1, 4, 7):
        for i, x in enumerate(test.x[test.y == c][:9, 0]):
            draw(x, root / str(c) / f"{i}.png")
    return root


def test_on_its_own_test_data_the_numbers_are_those_of_the_results(result):
    found = evaluate(result.run_folder)
    record = result.exits[-1]
    assert found.samples == sum(result.test_samples)
    assert found.accuracy == pytest.approx(result.final_weighted_accuracy, abs=1e-12)
    assert found.accuracy_by_class == pytest.approx(result.accuracy_by_class, abs=1e-12)
    assert [right / n for n, right in found.experiences] == pytest.approx(result.accuracy_matrix[-1], abs=1e-12)
    assert found.interval == wilson_interval(found.correct, found.samples)
    assert found.macs_K == record.macs_K and found.macs == found.backbone_macs == record.backbone_macs
    common = set(found.exits.metrics) & set(record.metrics)
    assert common >= {"accuracy", "ece", "brier", "nll", "auroc", "aurc", "augrc", "fpr95", "eefp"}
    for name, values in ((name, found.exits.metrics[name]) for name in common):
        assert values == pytest.approx(record.metrics[name], abs=1e-6, nan_ok=True), name
    confidence, right = found.exits.evaluation.confidence_KN[0], found.exits.evaluation.correct_KN[0]
    assert found.exits.intervals["auroc"][0] == bootstrap(confidence, right, metric="auroc")
    if result.confusion:
        assert found.confusion == result.confusion
    for row, c in zip(found.confusion, found.class_order, strict=True):
        one = next(each for each in found.classes if each.class_id == c)
        assert sum(row) == one.samples and row[found.class_order.index(c)] == one.correct


def test_where_the_last_checkpoint_is_damaged_the_one_before_is_evaluated_on_what_it_has_learned(result, tmp_path):
    run = shutil.copytree(result.run_folder, tmp_path / "run")
    last = run / "checkpoints" / "experience_002.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    found = evaluate(run)
    assert found.experiences == ((result.test_samples[0], round(result.accuracy_matrix[0][0] * result.test_samples[0])),)


def test_a_threshold_costs_what_its_exits_cost(result):
    record = result.exits[-1]
    point = next(each for each in record.points.points if each.name == "100%")
    found = evaluate(result.run_folder, threshold=point.threshold)
    assert found.accuracy == pytest.approx(point.accuracy, abs=1e-12)
    assert found.macs / record.backbone_macs == pytest.approx(point.cost, rel=1e-9)
    by_budget = evaluate(result.run_folder, budget=1.0)
    assert (by_budget.threshold, by_budget.correct) == (point.threshold, found.correct)
    assert sum(found.decided_K) == found.samples


def test_the_cost_of_a_confidence_measure_is_stated_in_the_table(result, tmp_path):
    assert exits_table(evaluate(result.run_folder, threshold=0.2)).note == ""  # the largest probability costs no MACs
    more = ["benchmark.experiences=1", "benchmark.validation=0.2", "strategy=exits + early_exit(measure=failure, budget=1)"]
    found = evaluate(clframe.run("quickstart", [*FAST, *more], output=tmp_path).run_folder)
    early, last = found.decision_macs_K
    assert early > found.macs_K[0] and last - found.macs_K[1] == early - found.macs_K[0]
    mean = (found.decided_K[0] * early + found.decided_K[1] * last) / found.samples
    assert found.macs == pytest.approx(mean, rel=1e-12)
    costs = {"layer1": early, "final": last}
    shown = [f"{name} {cost:,}" for (name, cost), n in zip(costs.items(), found.decided_K, strict=True) if n]
    assert exits_table(found).note.endswith(f"which the mean includes, a decision costs: {', '.join(shown)}.")


def test_other_data_are_matched_by_class_name(result, folders, call, here):
    test = digits().test
    model = clframe.load(result.run_folder)
    right = {c: int((model.classify(test.x[test.y == c][:9]) == c).sum()) for c in (1, 4, 7)}
    other = ["benchmark=image_folder", f"benchmark.path={folders}"]
    found = evaluate(result.run_folder, other)
    assert {one.name: (one.samples, one.correct) for one in found.classes} == {str(c): (9, right[c]) for c in right}
    assert sorted(found.unseen) == ["0", "2", "3", "5", "6", "8", "9"]
    code, out, err = call("evaluate", result.run_folder, *other, "--json", "out.json", "--output", "files")
    assert code == 0 and err == ""
    assert out.startswith(f"{folders}: 27 samples of 3 classes (of 10)\naccuracy ")
    content = json.loads((here / "out.json").read_text())
    assert content == json.loads((here / "files" / "evaluation.json").read_text())
    assert content["correct"] == sum(right.values()) and content["experiences"] == []
    assert len(content["exits"]) == 2 and content["exits"][0]["intervals"]["ece"][0] >= 0
    with open(here / "files" / "classes.csv", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["1", "4", "7"]
    assert (here / "files" / "confusion_matrix.png").is_file()


def test_arrays_and_lists_count_all_their_samples(result, folders, tmp_path):
    test = digits().test
    x, y = test.x[:40].numpy(), test.y[:40].numpy()
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.savez(tmp_path / "b.npz", x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:])
    right = (clframe.load(result.run_folder).classify(test.x[:40]) == test.y[:40]).tolist()
    found = [evaluate(result.run_folder, ["benchmark=npz", f"benchmark.path={tmp_path / name}.npz"]) for name in "ab"]
    assert [(one.samples, one.correct) for one in found] == [(40, sum(right)), (20, sum(right[20:]))]
    rows = [f"{path},{path.parent.name},{'train' if path.stem == '0' else 'test'}" for path in folders.rglob("*.png")]
    (tmp_path / "list.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    listed = evaluate(result.run_folder, ["benchmark=csv", f"benchmark.path={tmp_path / 'list.csv'}"])
    assert listed.samples == 24 and "rows of the split test" in listed.data


def test_a_corrupt_file_is_skipped_and_named(result, folders, tmp_path, call):
    shutil.copytree(folders, tmp_path / "data")
    (tmp_path / "data" / "4" / "0.png").write_bytes(b"no image")
    other = ["benchmark=image_folder", f"benchmark.path={tmp_path / 'data'}"]
    code, out, err = call("evaluate", result.run_folder, *other, "--json", "-")
    assert code == 3 and json.loads(out)["samples"] == 26
    assert err.count("\n") == 1 and "0.png: cannot be read as an image" in err


@pytest.mark.parametrize("name, message", [
    ("One", "the model has no class 'One'; rename or remove it (known: 0, 1, 2"),
    ("10", "the model has no class '10'; did you mean '1'"),
])  # fmt: skip
def test_an_unknown_class_folder_is_one_line(refused, here, result, folders, name, message):
    draw(digits().test.x[0, 0], here / "data" / name / "a.png")
    refused(["evaluate", result.run_folder, "benchmark=image_folder", "benchmark.path=data"], message)


def test_a_class_name_in_another_case_is_one_line(refused, here, tmp_path):
    for name in ("cat", "Dog"):
        for i in range(4):
            draw(digits().test.x[i + 20 * (name == "cat"), 0], tmp_path / "photos" / name / f"{i}.png")
    more = ["benchmark=image_folder", f"benchmark.path={tmp_path / 'photos'}", "benchmark.experiences=1"]
    found = clframe.run("quickstart", [*FAST, *more], output=tmp_path / "runs")
    (tmp_path / "photos" / "Dog").rename(tmp_path / "photos" / "dog")
    refused(["evaluate", found.run_folder, *more[:2]], "has no class 'dog'; rename it to 'Dog', names are compared")
    refused(["evaluate", found.run_folder], "was trained on other data than its config gives now; restore the data")
    (tmp_path / "photos" / "dog").rename(tmp_path / "photos" / "Dog")
    assert "includes training samples" in " ".join(evaluate(found.run_folder, more[:2]).notes)
    for name in ("bat", "owl"):
        for i in range(4):
            draw(digits().test.x[40 + i + 20 * (name == "owl"), 0], tmp_path / "new" / name / f"{i}.png")
    new = ["benchmark=image_folder", f"benchmark.path={tmp_path / 'new'}"]
    refused(["evaluate", found.run_folder, new[1]], "add benchmark=image_folder to clframe evaluate to measure it on")
    extended = clframe.load(found.run_folder).extend([*new, "trainer.epochs=1"], output=tmp_path / "extended").run_folder
    copied = shutil.copytree(tmp_path / "new", tmp_path / "copied")
    for data, trained in ((more[:2], True), (new, True), ([new[0], f"benchmark.path={copied}"], False)):
        assert ("includes training samples" in " ".join(evaluate(extended, data).notes)) == trained, data
    (tmp_path / "photos" / "cat" / "3.png").unlink()
    for i in range(4, 12):
        draw(digits().test.x[i, 0], tmp_path / "photos" / "cat" / f"{i}.png")
    refused(["evaluate", found.run_folder], "experience 1 has 12 training samples, but had 6 when the run read its data")
    remove_digests(found.run_folder)
    refused(["evaluate", found.run_folder], "test samples, the run was evaluated on 2; restore the data, or add benchm")


@pytest.mark.parametrize("words, message", [
    ([], "evaluate: found no run; give"),
    (["nowhere"], "evaluate: no folder nowhere; give"),
    (["RUN", "photos"], "evaluate: found 'photos'; give one run"),
    (["RUN", "benchmark=image_folder"], "benchmark.path: found nothing; give the path of a folder"),
    (["RUN", "benchmark=image_folder", "benchmark.path=empty"], "empty: holds no folders; put the images"),
    (["RUN", "benchmark=image_folder", "benchmark.path=DATA", "benchmark.size=9"], "benchmark.size: has no effect"),
    (["RUN", "benchmark=image_folder", "benchmark.path=DATA", "benchmark.classes=3"], "has no effect on an evaluation"),
    (["RUN", "benchmark=image_foldr", "benchmark.path=DATA"], "did you mean 'image_folder'"),
    (["RUN", "trainer.epochs=3"], "override 'trainer.epochs=3'"),
    (["RUN", "benchmark=digits", "--threshold", "0.5", "--budget", "1"], "a threshold and a budget; give one"),
    (["RUN", "benchmark=digits", "--threshold", "5"], "--threshold: found 5; give a probability from 0 to 1"),
    (["RUN", "benchmark=digits", "--threshold", "-0.1"], "--threshold: found -0.1; give a probability from 0 to 1"),
    (["RUN", "benchmark=digits", "--threshold", "nan"], "--threshold: found nan; give a probability from 0 to 1"),
])  # fmt: skip
def test_bad_input_is_one_line(refused, here, result, folders, words, message):
    (here / "empty").mkdir()
    given = [word.replace("DATA", str(folders)) if word != "RUN" else result.run_folder for word in words]
    refused(["evaluate", *given], message)
