"""The same command again: ``--folder`` continues an unfinished run of the same config; without it, the run is named."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest

from clframe.run_folder import RunFolder

OPTIONS = ["backbone=mlp", "backbone.width=4", "trainer.epochs=1", "benchmark.experiences=2", "trainer.figures=none"]
RUN = ["run", "quickstart", *OPTIONS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run."""
    import clframe

    output = tmp_path_factory.mktemp("whole")
    return clframe.run("quickstart", OPTIONS, folder=output / "mine").run_folder


@pytest.fixture
def cut(whole, here):
    """One stopped after its first experience, in the folder ``mine``."""
    folder = shutil.copytree(whole, here / "mine")
    (folder / "results.json").rename(here / "expected.json")
    (folder / "checkpoints" / "experience_002.ckpt").unlink()
    return folder


def test_it_continues_and_then_is_finished(call, cut, here):
    expected = json.loads((here / "expected.json").read_text())
    code, _, err = call(*RUN, "--folder", "mine")
    assert code == 0
    assert "found an unfinished run of this config in mine; continuing from the start of experience 2\n" in err
    found = json.loads((cut / "results.json").read_text())
    assert found["accuracy_matrix"] == expected["accuracy_matrix"] and found["steps"] == expected["steps"]
    before = (cut / "metrics.csv").read_bytes()
    code, out, err = call(*RUN, "--folder", "mine")
    assert code == 0 and "mine: is finished; nothing to train\n" in err and "unfinished" not in err
    assert "run folder" in out and (cut / "metrics.csv").read_bytes() == before


@pytest.mark.slow
def test_it_continues_inside_an_experience(call, here, monkeypatch):
    import clframe
    from clframe.training.monitor import Monitor

    class Killed(BaseException):
        pass

    count, on_step = [0], Monitor.on_step

    def counted(self, *values, **options):
        count[0] += 1
        if count[0] == 8:
            raise Killed
        return on_step(self, *values, **options)

    options = [*OPTIONS, "trainer.checkpoint.every=3"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Monitor, "on_step", counted)
        clframe.run("quickstart", options, folder="mine")
    assert (
        "found an unfinished run of this config in mine; continuing from experience 1, epoch 1, step 6\n"
        in call("run", "quickstart", *options, "--folder", "mine").err
    )


@pytest.mark.usefixtures("no_training")
def test_another_config_is_refused(refused, cut):
    refused([*RUN, "trainer.epochs=2", "--folder", "mine"],
            "folder: mine has a run of another config (trainer.epochs: 1 there, 2 here); give another folder")  # fmt: skip
    refused([*RUN, "strategy=er(memory=50)", "--folder", "mine"], "folder: mine has a run of another config (",
            "give another folder")  # fmt: skip


@pytest.mark.usefixtures("no_training")
def test_other_spellings_of_one_config_are_equal(cut, call):
    with pytest.raises(pytest.fail.Exception, match="a session was made"):
        call(*RUN, "strategy=lwf + er", "output=elsewhere", "--folder", "mine")


@pytest.mark.usefixtures("no_training")
def test_other_folders_are_refused(refused, here):
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("mine")
    (here / "file").write_text("mine")
    refused([*RUN, "--folder", "full"], "folder: full has other files than those of a run; give another folder")
    refused([*RUN, "--folder", "file"], "folder: file cannot be listed (Not a directory); give another")
    refused([*RUN, "--folder", ""], "--folder: found ''; give a folder for the run")
    refused([*RUN, "--folder", "a", "--output", "b"], "--folder: found --output as well; leave one of them out")
    refused([*RUN, "--folder", "a", "--seeds", "0..2"], "--folder: found --seeds as well; leave one of them out")
    refused(["run", "--resume", "a", "--folder", "b"], "--resume: found --folder as well; leave it out")


@pytest.mark.usefixtures("no_training")
def test_a_finished_run_without_checkpoints_is_not_trained_again(refused, cut, here):
    shutil.copy(here / "expected.json", cut / "results.json")
    shutil.rmtree(cut / "checkpoints")
    refused([*RUN, "--folder", "mine"], "folder: mine has a finished run without checkpoints; give another folder")


def test_a_locked_folder_is_refused(refused, cut):
    with RunFolder(cut).lock():
        refused([*RUN, "--folder", "mine"], "mine: process ", "is writing to it; wait for it or stop it")


def test_a_run_that_cannot_begin_leaves_nothing(refused, here):
    """A failure after the folder has been created: TensorBoard has nothing to show."""
    refused(
        [*RUN, "trainer.loggers=[csv]", "--tensorboard", "--folder", "a/new"], "--tensorboard: found trainer.loggers"
    )
    (here / "empty").mkdir()
    assert RunFolder.is_unused(here / "empty") and RunFolder.is_unused(here / "a")


def test_without_a_folder_an_unfinished_run_is_named(call, cut, here):
    from clframe.config.load import load_config
    from clframe.targets.unfinished import find_unfinished

    place = here / "runs" / "quickstart" / "20260101-120000-seed0"
    place.parent.mkdir(parents=True)
    cut.rename(place)
    config = load_config("quickstart", OPTIONS)
    shown = place.relative_to(here)
    assert find_unfinished(config) == shown
    assert find_unfinished(load_config("quickstart", [*OPTIONS, "seed=1"])) is None
    with RunFolder(place).lock():
        assert find_unfinished(config) is None  # in progress
    code, _, err = call(*RUN, "trainer.epochs=1")
    assert code == 0
    assert (
        f"found an unfinished run of this config in {shown}; a new run is started, continue that one with clframe run "
        f"--resume {shlex.quote(str(shown))}\n" in err
    )
    assert len(list(place.parent.iterdir())) == 2 and not (place / "results.json").exists()
    (place / "results.json").write_text("{}")
    assert find_unfinished(config) is None


def test_of_several_the_newest_is_named(cut, here):
    """Folders of this version and of earlier ones, which were called by their time."""
    from clframe.config.load import load_config
    from clframe.targets.unfinished import find_unfinished

    parent = here / "runs" / "quickstart"
    names = ["er+lwf-seed0-20260103-120000", "20260102-120000-seed0", "lwf-seed0-20260101-120000"]
    for name in names:
        shutil.copytree(cut, parent / name)
    config = load_config("quickstart", OPTIONS)
    for name in names:
        found = find_unfinished(config)
        assert found is not None and found.name == name
        shutil.rmtree(parent / name)
