"""Predictions from files, arrays and texts: equal to those of the evaluation on the same data."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import clframe
from clframe.accounting import cumulative_macs
from clframe.data.inputs import InputFormat
from clframe.data.sources.image_files import ImageFiles
from clframe.data.sources.paths import images_below
from clframe.data.sources.text import hash_features
from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.exits import ExitPolicy, select
from clframe.targets.evaluation import evaluate
from clframe.targets.prediction import predict, table, to_json
from clframe.targets.stored_inputs import texts_as_inputs

CLASSES = ("cat", "dog", "owl")
FAST = ["backbone=mlp", "backbone.width=8", "trainer.epochs=2", "trainer.progress=false", "trainer.loggers=[]"]


def photograph(kind, number):
    """A noisy image in the color of its class, of a size of its own."""
    random = np.random.default_rng([kind, number])
    height, width = random.integers(12, 40, 2)
    color = np.eye(3)[kind] * 140 + 50
    return Image.fromarray((color + random.normal(0, 25, (height, width, 3))).clip(0, 255).astype(np.uint8))


def rotated(image, path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


def sixteen_bits(image, path):
    gray = np.array(image.convert("L")).astype(np.uint16)
    Image.fromarray(gray * 256 + 77).save(path)


WRITERS = {
    "rgb.png": lambda image, path: image.save(path),
    "rgb.jpg": lambda image, path: image.save(path),
    "palette.png": lambda image, path: image.quantize(32).save(path),
    "palette.gif": lambda image, path: image.quantize(16).save(path),
    "clear_palette.png": lambda image, path: image.quantize(8).save(path, transparency=b"\x00\x80\xff"),
    "alpha.png": lambda image, path: Image.merge("RGBA", [*image.split(), image.getchannel(0)]).save(path),
    "gray.png": lambda image, path: image.convert("L").save(path),
    "gray_alpha.png": lambda image, path: image.convert("LA").save(path),
    "one_bit.png": lambda image, path: image.convert("1").save(path),
    "sixteen_bits.png": sixteen_bits,
    "sixteen_bits.tif": sixteen_bits,
    "cmyk.jpg": lambda image, path: image.convert("CMYK").save(path),
    "cmyk.tif": lambda image, path: image.convert("CMYK").save(path),
    "exif.jpg": rotated,
    "exif.png": rotated,
    "exif.webp": rotated,
    "color.bmp": lambda image, path: image.save(path),
}
"""A writer for each mode and format that users have."""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Training images of one format, and a test image of every mode in every class."""
    root = tmp_path_factory.mktemp("photographs")
    for kind, name in enumerate(CLASSES):
        for part in ("train", "test"):
            (root / part / name).mkdir(parents=True)
        for number in range(14):
            photograph(kind, number).save(root / "train" / name / f"{number}.png")
        for number, (file, write) in enumerate(WRITERS.items(), start=100):
            write(photograph(kind, number), root / "test" / name / file)
    return root


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory):
    more = ["benchmark=image_folder", f"benchmark.path={photographs}", "benchmark.size=10", "benchmark.channels=3",
            "benchmark.counts=[2,1]", "benchmark.validation=0.3", "strategy=er + exits"]  # fmt: skip
    return clframe.run("quickstart", [*FAST, *more], output=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def model(run):
    return clframe.load(run.run_folder)


def test_class_names_reach_results_model_and_predictions(run, model, photographs):
    assert run.class_names == model.class_names == CLASSES
    assert clframe.Result.from_json(f"{run.run_folder}/results.json").class_names == CLASSES
    found = model.predict(photographs / "test" / "owl" / "rgb.png")
    assert found[0].class_name == CLASSES[found[0].class_id] and found.class_names == [found[0].class_name]


@pytest.mark.parametrize("file", list(WRITERS))
def test_a_file_is_predicted_as_the_evaluation_predicts_it(model, photographs, file):
    paths = [str(photographs / "test" / name / file) for name in CLASSES]
    images = ImageFiles(paths, torch.arange(3), size=10, channels=3)  # what training and evaluation read
    expected = model.outputs(torch.stack([images[i] for i in range(3)])).last.softmax(1)
    found = predict(model, paths)
    assert found.class_ids == [model.class_order[c] for c in expected.argmax(1).tolist()]
    assert [row.probability for row in found] == pytest.approx(expected.max(1).values.tolist(), abs=1e-6)


def test_all_test_files_together_give_the_accuracy_of_the_run(run, model, photographs):
    found = predict(model, photographs / "test", batch_size=7)
    assert [row.input for row in found] == images_below(photographs / "test")
    right = {name: 0 for name in CLASSES}
    for row in found:
        right[row.class_name] += f"/{row.class_name}/" in row.input
    for c, name in enumerate(CLASSES):
        assert right[name] / len(WRITERS) == pytest.approx(run.accuracy_by_class[c], abs=1e-12)
    assert not found.skipped and not found.notes


def test_a_threshold_stops_samples_early_and_is_charged_for_what_ran(model, photographs):
    paths = images_below(photographs / "test")
    images = ImageFiles(paths, torch.zeros(len(paths)), size=10, channels=3)
    output = model.outputs(images.read_all(title="t"))
    middle = float(output.logits[0].softmax(1).amax(1).median())
    scores, exits = select(output.logits, ExitPolicy(thresholds=middle))
    found = predict(model, paths, threshold=middle)
    assert 0 < sum(row.exit == "layer1" for row in found) < len(paths)
    assert [row.exit for row in found] == [model.network.exit_names[k] for k in exits.tolist()]
    assert found.class_ids == [model.class_order[c] for c in scores.argmax(1).tolist()]
    assert [row.macs for row in found] == [cumulative_macs(model.network)[k] for k in exits.tolist()]
    assert [row.probability for row in found] == pytest.approx(scores.softmax(1).amax(1).tolist(), abs=1e-6)
    # Without a policy nothing but backbone and classifier runs.
    assert {row.macs for row in predict(model, paths[:2])} == {found.backbone_macs}
    assert "threshold" in found.rule and found.simulated == ""


def test_a_budget_is_the_threshold_that_the_run_recorded(run, model, photographs):
    point = next(point for point in run.exits[-1].points.points if point.name == "100%")
    found = predict(model, photographs / "test" / "dog", budget=1)
    assert found.threshold == point.threshold and "chosen on" in found.rule
    assert found.class_ids == predict(model, photographs / "test" / "dog", threshold=max(0.0, point.threshold)).class_ids
    with pytest.raises(ConfigError, match=r"^--budget: found 0\.3, the run has recorded 1; give one, or --thres"):
        predict(model, photographs, budget=0.3)
    with pytest.raises(ConfigError, match="a threshold and a budget; give one"):
        predict(model, photographs, budget=0.5, threshold=0.5)


def test_what_cannot_be_read_is_skipped_and_named(model, photographs, tmp_path):
    good, bad = tmp_path / "a.png", tmp_path / "b.png"
    photograph(0, 1).save(good)
    bad.write_bytes(good.read_bytes()[:60])
    found = predict(model, [tmp_path])
    assert [row.input for row in found] == [str(good)]
    assert list(found.skipped) == [str(bad)] and "b.png: cannot be read as an image" in found.skipped[str(bad)]


def test_the_most_probable_classes(model, photographs):
    found = predict(model, photographs / "test" / "cat", top=9)
    for row in found:
        names, shares = zip(*row.top, strict=True)
        assert sorted(names) == sorted(CLASSES) and sum(shares) == pytest.approx(1)
        assert list(shares) == sorted(shares, reverse=True) and (row.class_name, row.probability) == row.top[0]
    content = json.loads(to_json(found, run="r"))
    assert [one["class"] for one in content["predictions"]] == found.class_names
    assert content["predictions"][0]["top"][2]["probability"] == found[0].top[2][1]
    assert table(found).columns[3] == "next classes, %"


def test_patterns_lists_and_files_given_twice(model, photographs, tmp_path):
    cats = photographs / "test" / "cat"
    by_pattern = predict(model, [str(photographs / "test" / "**" / "*.jpg"), cats / "rgb.jpg"])
    assert len(by_pattern) == 3 * sum(name.endswith(".jpg") for name in WRITERS)
    (tmp_path / "list.csv").write_text(f"path,label\n{cats / 'rgb.png'},x\nmissing.png,y\n")
    listed = predict(model, tmp_path / "list.csv")
    assert [row.input for row in listed] == [str(cats / "rgb.png")]
    assert "no such file" in listed.skipped[str(tmp_path / "missing.png")]
    assert len(predict(model, str(photographs / "test" / "*"))) == 3 * len(WRITERS)  # matches folders


def test_arrays_of_any_layout_and_size(model, photographs, tmp_path):
    path = str(photographs / "test" / "dog" / "rgb.png")
    pixels = ImageFiles([path], torch.tensor([0]), size=10, channels=3)[0]
    expected = predict(model, path)[0]
    whole = np.array(Image.open(path))
    np.savez(tmp_path / "a.npz", x=pixels[None].numpy(), y=np.zeros(1))
    np.savez(tmp_path / "b.npz", anything=whole[None].astype(np.uint16))
    np.savez(tmp_path / "c.npz", x=whole[None].astype(">f8"))
    for inputs in (pixels, pixels[None], pixels.permute(1, 2, 0).numpy(), [pixels.numpy()], whole,
                   tmp_path / "a.npz", pixels.float(), tmp_path / "b.npz", tmp_path / "c.npz",
                   whole.astype(np.uint16), whole.astype(">u4"), whole.astype(">f4"), pixels.to(torch.uint64),
                   whole.astype(np.longdouble), whole[:, ::-1].copy()[:, ::-1]):  # fmt: skip
        found = predict(model, inputs)
        assert found.class_names == [expected.class_name]
        assert found[0].probability == pytest.approx(expected.probability, abs=1e-6)
    assert predict(model, tmp_path / "a.npz")[0].input == f"{tmp_path / 'a.npz'}[0]"
    gray = np.array(Image.open(photographs / "test" / "dog" / "gray.png"))
    assert predict(model, gray).class_ids == predict(model, photographs / "test" / "dog" / "gray.png").class_ids


@pytest.mark.parametrize("inputs, message", [
    (np.full((1, 3, 10, 10), 0.5), r"found fractions from 0\.5 to 0\.5, but the model was trained on whole numbers"),
    (np.full((1, 3, 10, 10), 300), r"found values from 300 to 300, but the model was trained on whole numbers from 0 t"),
    (np.zeros((1, 5, 10, 10), np.uint8), r"found inputs of shape \(1, 5, 10, 10\)"),
    (np.zeros((0, 3, 10, 10), np.uint8), "found no samples"),
    (np.full((1, 3, 10, 10), np.nan), r"^predict: found values that are not finite \(NaN or infinity\); replace them"),
    (None, "^predict: found null; give paths of files and folders, texts, or one array$"),
    ([3], "^predict: found 3; give paths of files and folders"),
    (["a.png", np.zeros(3)], "^predict: found arrays among other inputs; give"),
    ([np.zeros(3), np.zeros(4)], "^predict: found arrays of several shapes; give those of one shape together$"),
    (np.array(["a"]), "^predict: found an array that is not of numbers"),
    (np.zeros((1, 3, 10, 10), complex), r"^predict: found an array that is not of numbers \(complex128\); give"),
    (torch.zeros(1, 3, 10, 10, dtype=torch.complex64), r"not of numbers \(torch.complex64\); give whole or real"),
    (torch.zeros(1, 3, 10, 10).to(torch.float8_e4m3fn), r"not of numbers \(torch.float8_e4m3fn\)"),
    (torch.zeros(1, 3, 10, 10).to_sparse(), "found a tensor of layout torch.sparse_coo; give a dense one"),
    (np.full((1, 3, 10, 10), 2**64 - 1, np.uint64), "found integers above 9223372036854775807"),
    ([], "found no inputs"),
    ("nowhere/a.png", "no such file or folder"),
    ("nowhere/*.png", "matches no file"),
])  # fmt: skip
def test_inputs_that_the_model_was_not_trained_on(model, inputs, message):
    with pytest.raises(DataError, match=message):
        predict(model, inputs)


def test_classifying_refuses_what_predicting_does(model):
    whole = np.full((1, 3, 10, 10), 200, np.uint16)
    assert torch.equal(model.classify(whole), model.classify(whole.astype(np.uint8)))
    with pytest.raises(DataError, match=r"^classify: found an array that is not of numbers \(complex128\)"):
        model.classify(whole.astype(complex))


@pytest.mark.parametrize("options, message", [
    ({"top": 2.5}, "--top: found 2.5; give a whole number of at least 1"),
    ({"batch_size": "8"}, "--batch-size: found '8' (text); give a whole number of at least 1"),
    ({"threshold": "a"}, "--threshold: found 'a' (text); give a probability from 0 to 1"),
    ({"threshold": 2}, "--threshold: found 2; give a probability from 0 to 1"),
    ({"budget": "a"}, "--budget: found 'a' (text); give a share of the backbone's MACs above 0, such as 0.5"),
])  # fmt: skip
def test_options_that_are_not_such_numbers(model, options, message):
    with pytest.raises(ConfigError) as refused:
        predict(model, np.zeros((1, 3, 10, 10), np.uint8), **options)
    assert str(refused.value) == message


def test_dynamic_inference_takes_the_thresholds_of_predictions(model):
    for wrong in (5, -0.1, float("nan"), "a"):
        with pytest.raises(ConfigError, match=r"^dynamic: threshold: found .*; give a probability from 0 to 1$"):
            model.dynamic(threshold=wrong)
    assert model.dynamic(threshold=float("inf")).stopping_exits == ()
    assert model.dynamic(threshold=1).stopping_exits == (0,)


def test_images_of_another_size_are_counted_where_training_resized_none(tmp_path):
    """Training without benchmark.size on images that are not square; another image covers their shape."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            photograph(int(name == "b"), number).resize((14, 9)).save(tmp_path / "data" / name / f"{number}.png")
    more = ["benchmark=image_folder", f"benchmark.path={tmp_path / 'data'}", "benchmark.experiences=1", "strategy=naive"]
    found = clframe.run("quickstart", [*FAST, *more], output=tmp_path / "runs")
    trained = clframe.load(found.run_folder)
    assert trained.network.input_shape == (3, 9, 14)
    photograph(1, 77).save(tmp_path / "other.png")
    predictions = predict(trained, [tmp_path / "other.png", tmp_path / "data" / "a" / "0.png"])
    assert predictions.notes == ("1 images of another size were resized and center-cropped to 14x9",)
    with pytest.raises(UnsupportedError, match="--threshold: the model has one exit only; train with strategy="):
        predict(trained, tmp_path / "other.png", threshold=0.5)


def test_a_run_without_validation_data_has_no_budget(finished, tmp_path):
    found = clframe.run("quickstart", [*FAST, "strategy=naive + exits", "benchmark.experiences=1"], output=tmp_path)
    trained = clframe.load(found.run_folder)
    x = np.zeros((1, 8, 8), np.uint8)
    with pytest.raises(ConfigError, match=r"^--budget: the run has no thresholds \(no validation.*benchmark\.validation"):
        predict(trained, x, budget=0.5)
    # The digits of scikit-learn have 17 levels: an image file covers them with 256.
    digit = clframe.data.digits().test.x[3, 0]
    Image.fromarray((digit.numpy() * (255 / 16)).round().astype(np.uint8)).save(tmp_path / "digit.png")
    from_file, from_array = predict(trained, tmp_path / "digit.png"), predict(trained, digit)
    assert from_file.class_names == from_array.class_names
    assert from_file[0].probability == pytest.approx(from_array[0].probability, abs=1e-6)


def test_a_checkpoint_of_an_earlier_version_predicts_arrays_only(run, tmp_path):
    from dataclasses import replace

    old = replace(clframe.load(run.run_folder), inputs=None, class_names=(), budgets=None)
    photograph(0, 1).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: the run does not record how it read files"):
        predict(old, tmp_path / "a.png")
    found = predict(old, np.zeros((1, 3, 10, 10), np.uint8))
    assert found[0].class_name == str(found[0].class_id)


def test_early_exit_decides_by_its_own_policy(run, photographs, tmp_path):
    more = ["benchmark=image_folder", f"benchmark.path={photographs}", "benchmark.size=10", "benchmark.channels=3",
            "benchmark.experiences=1", "strategy=naive + exits + early_exit(threshold=0.6, fallback='confident')"]
    found = clframe.run("quickstart", [*FAST, *more], output=tmp_path)
    trained = clframe.load(found.run_folder)
    paths = images_below(photographs / "test")
    images = ImageFiles(paths, torch.zeros(len(paths)), size=10, channels=3).read_all(title="t")
    predictions = predict(trained, paths)
    assert predictions.class_ids == trained.classify(images).tolist()
    assert predictions.rule == "policy of early_exit" and "most confident exit" in predictions.simulated
    first_K = trained.outputs(images).logits[0].softmax(1).amax(1) >= 0.6
    assert [row.macs < predictions.backbone_macs for row in predictions] == first_K.tolist()
    measured = evaluate(found.run_folder)
    assert measured.macs == pytest.approx(predictions.mean_macs)
    assert measured.accuracy == pytest.approx(found.final_weighted_accuracy, abs=1e-12)


def test_texts_are_converted_as_in_training(texts, tmp_path):
    more = ["benchmark=clinc150", f"benchmark.data_dir={texts}", "benchmark.n_features=32", "strategy=naive",
            "benchmark.experiences=1"]  # fmt: skip
    trained = clframe.load(clframe.run("quickstart", [*FAST, *more], output=tmp_path).run_folder)
    lines = ["where is my card", "wake me up", "pay the rent now"]
    expected = trained.classify(hash_features(lines, n_features=32)).tolist()
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "lines.csv").write_text("number,text\n" + "".join(f"{i},{line}\n" for i, line in enumerate(lines)))
    for inputs in (lines, tmp_path / "lines.txt", tmp_path / "lines.csv"):
        found = predict(trained, inputs)
        assert found.class_ids == expected and [row.input for row in found] == lines
    assert set(found.class_names) <= {"pay", "card", "alarm"}
    with pytest.raises(DataError, match="missing.txt: cannot be read"):
        predict(trained, tmp_path / "missing.txt")


def test_one_text_file_that_cannot_be_read_does_not_end_the_others(texts, tmp_path):
    words = ["benchmark=clinc150", f"benchmark.data_dir={texts}", "benchmark.n_features=64", "strategy=naive"]
    result = clframe.run("quickstart", [*FAST, *words, "benchmark.experiences=3"], output=tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text("pay my bill\n")
    given = [str(tmp_path / name) for name in ("missing.txt", "bad.txt", "good.txt")]
    found = clframe.load(result.run_folder).predict([*given, "lost\udcff"])
    assert [row.input for row in found] == ["pay my bill"] and list(found.skipped) == [*given[:2], "lost\udcff"]
    assert "is not UTF-8 text" in found.skipped[given[1]] and "is not UTF-8 text" in found.skipped["lost\udcff"]


def test_token_ids_are_padded_as_in_training(encoder):
    form = InputFormat(kind="tokens", tokenizer=str(encoder), max_length=6)
    trained = SimpleNamespace(inputs=form, network=SimpleNamespace(input_shape=(5,)))
    ids = texts_as_inputs(["pay", "set the alarm now please"], trained)
    assert ids.shape == (2, 6) and (ids[0] != 0).sum() == 3 and (ids[1] != 0).all()
    assert texts_as_inputs(["pay"], trained).shape == (1, 5)


@pytest.mark.parametrize("strategy", [
    "ncm + exits",
    "naive + exits(ensemble='geometric', fit_epochs=9, calibration='temperature') + early_exit(rule='mean')",
    "naive + exits + early_exit(budget=0.95, measure='gate')", "naive + sparsity + moe",
])  # fmt: skip
def test_every_rule_predicts_and_costs_as_the_evaluation_says(strategy, tmp_path):
    more = ["trainer.epochs=1", "benchmark.experiences=2", "benchmark.validation=0.1", f"strategy={strategy}"]
    found = clframe.run("quickstart", [*FAST, *more], output=tmp_path)
    trained, test = clframe.load(found.run_folder), clframe.data.digits().test
    predictions, measured = predict(trained, test.x), evaluate(found.run_folder)
    assert predictions.class_ids == trained.classify(test.x).tolist()
    right = sum(a == b for a, b in zip(predictions.class_ids, test.y.tolist(), strict=True))
    assert measured.correct == right and measured.accuracy == pytest.approx(found.final_weighted_accuracy, abs=1e-12)
    assert measured.macs == pytest.approx(predictions.mean_macs, rel=0.01)  # experts are chosen batch by batch
    if "moe" in strategy:
        assert "mean of each batch" in predictions.notes[0] and predictions.mean_macs >= 0.5 * predictions.backbone_macs
    else:
        assert measured.macs == pytest.approx(predictions.mean_macs, rel=1e-12)
