"""The command line as people use it: what it prints, what it writes and where."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml

import clframe
import clframe.api
from clframe.cli import main
from clframe.config.typed import from_mapping
from clframe.results import Result
from clframe.training.session import Session

TINY = ("trainer.fast_dev_run=2", "benchmark.experiences=2", "backbone.width=4")


def test_a_run_prints_the_matrix_the_summary_and_the_folder(finished):
    folder, printed, cwd = finished
    result = Result.from_json(folder / "results.json")
    assert re.findall(r"^experience (\d/\d):", printed, re.M) == ["1/2", "2/2"]
    assert "Accuracy in %" in printed
    (row,) = re.findall(r"^1 +(.*)$", printed.partition("Accuracy in %")[2], re.M)
    assert row.split()[:2] == [f"{100 * a:.1f}" for a in result.accuracy_matrix[1]]
    assert re.search(rf"final average accuracy +{100 * result.final_average_accuracy:.1f} %", printed)
    assert re.search(rf"run folder +{re.escape(str(folder.relative_to(cwd)))}$", printed, re.M)


def test_a_run_folder_holds_what_it_says(finished):
    folder, _, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "environment.json", "results.json", "metrics.csv", "ledger.json", "checkpoints",
        "tensorboard", "figures", "log.txt",
    }  # fmt: skip
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "experience_001.ckpt", "experience_002.ckpt",
    ]  # fmt: skip
    assert list((folder / "tensorboard").rglob("events.out.tfevents.*"))
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == version("torch")
    assert environment["machine"]["cores"] == os.cpu_count()
    assert json.loads((folder / "ledger.json").read_text())["training"]["steps"] == 4
    with open(folder / "metrics.csv", newline="") as file:
        assert len(list(csv.reader(file))) > 1


def test_the_config_of_a_run_is_the_whole_resolved_one(finished):
    folder, _, _ = finished
    config = from_mapping(yaml.safe_load((folder / "config.yaml").read_text()))
    assert config.name == "quickstart" and config.seed == 3 and config.output == "out"
    assert config.trainer.fast_dev_run and config.benchmark.experiences == 2
    assert config.backbone.name == "small_cnn" and config.backbone.options == {"width": 4}
    assert config.optimizer.momentum == 0.0  # a default, written out


def test_nothing_is_written_outside_the_output(finished):
    _, _, cwd = finished
    assert [path.name for path in cwd.iterdir()] == ["out"]
    assert [path.name for path in (cwd / "out").iterdir()] == ["quickstart"]


def test_seeds_give_mean_and_deviation(call, here):
    code, out, err = call("run", "quickstart", *TINY, "--seeds", "0..1")
    assert code == 0
    assert all(line.startswith("development run: 2 experience(s), ") for line in err.splitlines())
    results = [Result.from_json(path) for path in sorted(here.glob("runs/quickstart/*/results.json"))]
    assert [result.seed for result in results] == [0, 1]
    accuracies = [100 * result.final_average_accuracy for result in results]
    assert accuracies[0] != accuracies[1]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert out.count("Accuracy in %") == 2
    (row,) = re.findall(r"^er \+ lwf +2 (.*)$", out, re.M)
    assert f"{mean:.1f} ± {deviation:.1f}" in row


def test_quiet_prints_the_number_alone(call, here):
    code, out, err = call("run", "--quiet", "smoke/quickstart", *TINY[1:], "--output", "a/b")
    (path,) = here.glob("a/b/quickstart/er+lwf-seed0-*/results.json")
    assert (code, err) == (0, "")
    assert out == f"{Result.from_json(path).final_average_accuracy:.4f}\n"


def test_resume_of_a_finished_run_gives_its_result_again(finished, call, contents):
    folder, _, _ = finished
    before = Result.from_json(folder / "results.json")
    code, out, _ = call("run", "--resume", str(folder), "--quiet")
    assert (code, out) == (0, f"{before.final_average_accuracy:.4f}\n")
    assert Result.from_json(folder / "results.json").accuracy_matrix == before.accuracy_matrix


def test_python_gives_the_result_that_the_command_writes(finished, here):
    result = clframe.run("quickstart", [*TINY, "seed=3"], output=here / "out")
    assert result.accuracy_matrix == Result.from_json(finished[0] / "results.json").accuracy_matrix


@pytest.fixture
def asked(monkeypatch):
    """Calls of ``clframe.api.run``, which does nothing but stop like Ctrl-C."""
    calls = []

    def run(config="", overrides=(), *, output=None, resume=None, folder=None, on_built=None, on_evaluated=None):
        calls.append((config, list(overrides), output, resume))
        raise KeyboardInterrupt

    monkeypatch.setattr(clframe.api, "run", run)
    return calls


@pytest.mark.parametrize(
    "line, expected",
    [
        ("run q", ("q", [], None, None)),
        ("run q a=1 b=2", ("q", ["a=1", "b=2"], None, None)),
        ("run q a=1 --seed 3 b=2", ("q", ["a=1", "b=2", "seed=3"], None, None)),
        ("run --seed 3 q a=1 --quiet b=2", ("q", ["a=1", "b=2", "seed=3"], None, None)),
        ("run --output=x q a=-1", ("q", ["a=-1"], "x", None)),
        ("run q --output x a=1 --seeds 4..4 c=3", ("q", ["a=1", "c=3", "seed=4"], "x", None)),
        ("run q --device cpu", ("q", ["trainer.accelerator=cpu", "trainer.devices=1"], None, None)),
        ("run q --device cuda", ("q", ["trainer.accelerator=cuda"], None, None)),
        ("run q --device cuda:1", ("q", ["trainer.accelerator=cuda", "trainer.devices=[1]"], None, None)),
        ("run --resume there", ("", [], None, "there")),
    ],
)
def test_words_and_options_in_any_order(line, expected, asked, call):
    assert call(*line.split()).code == 130
    assert asked == [expected]


def test_a_file_with_an_equals_sign_in_its_name_is_a_config(call, here):
    (here / "lr=1.yaml").write_text("defaults: [experiment/quickstart]\nname: one\noptimizer: {lr: 1.0}\n")
    assert "    lr: 1.0\n" in call("explain", "lr=1.yaml").out


def test_an_interruption_before_training_is_one_line(asked, call):
    assert call("run", "quickstart").err == "\nclframe: interrupted\n"


@pytest.mark.parametrize("verb", [[], ["run"], ["explain"], ["list"]])
def test_help_has_examples(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*verb, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert len(re.findall(rf"^  clframe {verb[0] if verb else ''}", out, re.M)) >= 2
    assert "--debug" in out


def test_the_former_spelling_of_analyze_works_and_is_not_listed(call, capsys):
    for spelling in ("analyze", "analyse"):
        with pytest.raises(SystemExit) as ended:
            main([spelling, "--help"])
        out = capsys.readouterr().out
        assert ended.value.code == 0 and "usage: clframe analyze {sparsity TARGET" in out and "analyse" not in out
        code, out, err = call(spelling, "sparsty")
        assert code == 2 and "analyze: unknown analysis 'sparsty'; did you mean 'sparsity'?" in err
    assert call("--debug", "analyse").code == 2
    assert "analyse" not in call().out
    assert "did you mean 'analyze'?" in call("analys").err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_signal_stops_a_run_and_names_the_folder_to_resume(name, call, here, monkeypatch):
    number, run = getattr(signal, name), Session.run
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}

    def stopped(session):
        os.kill(os.getpid(), number)
        return run(session)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "run", stopped)
        code, _, err = call("run", "quickstart", *TINY)
    (folder,) = here.glob("runs/quickstart/*")
    assert code == 128 + number
    assert err.splitlines()[-1] == f"clframe: interrupted; resume with clframe run --resume {folder.relative_to(here)}"
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    assert call("run", "--resume", str(folder)).code == 0 and (folder / "results.json").is_file()


def test_an_interrupted_run_with_plugins_of_avalanche_is_to_be_started_over(call, here, monkeypatch):
    def stopped(session):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "run", stopped)
    code, _, err = call("run", "quickstart", *TINY, "strategy=naive", "components.avalanche.plugins=[{LwFPlugin: {alpha: 1.0}}]")
    (folder,) = here.glob("runs/quickstart/*")
    assert code == 130
    assert err.splitlines()[-1] == (
        "clframe: interrupted; it cannot be resumed, as checkpoints lack the state of its Avalanche plugins (LwFPlugin); "
        f"start over with clframe run {folder.relative_to(here)}/config.yaml"
    )


def test_no_verb_shows_the_help(call):
    code, out, err = call()
    assert (code, err) == (0, "")
    assert "clframe run quickstart" in out


def python(*arguments, cwd, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, **options
    )


def test_python_m_clframe(here):
    done = python("-m", "clframe", "--version", cwd=here)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"clframe {clframe.__version__}\n", "")
    done = python("-m", "clframe", "list", "strategis", cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("clframe: error: list: unknown kind 'strategis'; did you mean 'strategies'?")


def test_help_and_errors_import_nothing_heavy(here):
    code = (
        "import sys; from clframe.cli import main\n"
        "for words in (['list', 'strategis'], ['run'], ['zzz'], ['run', 'x', '--bogus'], []):\n"
        "    main(words)\n"
        "heavy = {'torch', 'numpy', 'lightning', 'avalanche', 'omegaconf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = python("-c", code, cwd=here)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of another kind")
def test_a_reader_that_goes_early_is_no_error(here, monkeypatch, capfd):
    """As ``clframe list configs | true``: the pipe is closed before anything is written, and again at exit."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["list", "configs"]) == 0
        pipe.write("what the interpreter still has to write at exit")
    assert capfd.readouterr().err == ""
