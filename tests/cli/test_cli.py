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
from pathlib import Path

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


def test_explain_tells_all_and_writes_nothing(call, here):
    code, out, err = call("explain", "quickstart", "seed=7")
    assert (code, err) == (0, "")
    titles = re.findall(r"^(\w.*)$", out, re.M)
    assert titles == ["config", "stream of experiences", "strategy", "hooks (which component acts where)",
                      "loss terms", "slots", "network with all classes"]  # fmt: skip
    assert "  seed: 7\n" in out
    assert "\n  er + lwf\n" in out
    assert "\n  loss/task/ce\n  loss/lwf/distill\n" in out
    assert "\n  batch        er\n  classifier   -\n  exit_weights -\n" in out
    assert (
        "\n  step_values          every step: numbers of the step -"
        "\n  task_loss            every step: loss on the targets -"
        "\n  losses               every step: loss terms          lwf\n"
    ) in out
    assert len(re.findall(r"^  experience +\d +\d+ train +\d+ test +classes \d \d$", out, re.M)) == 5
    assert list(here.iterdir()) == []


def test_explain_counts_what_the_layers_say(call):
    """Two 3x3 convolutions on 8x8 and 4x4 pixels, one hidden layer of 2x2x64 inputs, ten classes."""
    out = call("explain", "quickstart").out
    macs = 64 * 32 * 9 * 1 + 16 * 64 * 9 * 32 + 128 * 256 + 10 * 128
    parameters = 32 * (9 * 1 + 1) + 64 * (9 * 32 + 1) + 128 * (256 + 1) + 10 * (128 + 1)
    assert re.search(rf"^  MACs per sample +{macs:,} ", out, re.M)
    assert re.search(rf"^  parameters +{parameters:,}$", out, re.M)
    out = call("explain", "quickstart", "backbone=mlp", "backbone.width=7", "backbone.depth=1").out
    assert re.search(rf"^  MACs per sample +{64 * 7 + 7 * 10:,} ", out, re.M)
    assert re.search(rf"^  parameters +{65 * 7 + 8 * 10:,}$", out, re.M)


@pytest.mark.parametrize(("strategy", "heads"), [("er + exits", 5), ("joint + exits", 1), ("er + exits(heads=growing)", 1)])
def test_explain_counts_the_heads_of_all_experiences(call, strategy, heads):
    """64 inputs, two layers of 7, 10 classes; an exit at the first layer with 3 hidden units in each of its heads."""
    head = "components.exits.head=hidden", "components.exits.hidden=3"
    out = call("explain", "quickstart", "backbone=mlp", "backbone.width=7", "backbone.depth=2", f"strategy={strategy}", *head).out
    macs = 64 * 7 + 7 * 7 + 7 * 10 + heads * 7 * 3 + 3 * 10
    parameters = 65 * 7 + 8 * 7 + 8 * 10 + heads * 8 * 3 + 4 * 10
    assert re.search(rf"^  MACs per sample +{macs:,} ", out, re.M)
    assert re.search(rf"^  parameters +{parameters:,}$", out, re.M)


def test_explain_trains_nothing_and_makes_no_folder_for_lightning_loggers(call, here, monkeypatch):
    monkeypatch.setattr("clframe.training.session.Session.run", lambda *_: pytest.fail("it trained"))
    code, out, _ = call("explain", "quickstart", "trainer.engine=trainer", "trainer.loggers=[CSVLogger]",
                        "trainer.callbacks.Timer={duration: '00:01:00:00'}")  # fmt: skip
    assert code == 0 and "CSVLogger" in out
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["trainer.capture=true"], "trainer.capture: found true with a cpu device"),
        (["strategy=exits(at=[nope])"], "components.exits: unknown tap 'nope'"),
        (["optimizer.groups.er.lr=0.1"], "optimizer.groups.er: found no parameters of it in the network; leave it out"),
    ],
)
def test_explain_finds_what_only_the_start_of_a_run_refuses(call, here, overrides, message):
    code, out, err = call("explain", "quickstart", *overrides)
    assert (code, out) == (2, "") and err.startswith(f"clframe: error: {message}") and err.count("\n") == 1
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "what, names",
    [
        ("strategies", ["cumulative", "er", "joint", "lwf", "naive"]),
        ("benchmarks", ["digits"]),
        ("backbones", ["mlp", "resnet18", "resnet20", "resnet32", "small_cnn", "timm", "vit_tiny"]),
        ("configs", ["backbone/mlp", "benchmark/digits", "experiment/quickstart", "smoke/quickstart"]),
    ],
)
def test_list(what, names, call):
    code, out, err = call("list", what)
    assert (code, err) == (0, "")
    listed = {line.split()[0]: line for line in out.splitlines()}
    assert set(names) <= set(listed)
    assert list(listed) == sorted(listed)
    assert all(len(line.split()) > 2 for line in listed.values())


@pytest.mark.parametrize(
    "words, message",
    [
        (["lwf"], "list: unknown kind 'lwf'; 'lwf' is one of the strategies: clframe list strategies lwf (known: "),
        (["lwff"], "list: unknown kind 'lwff'; did you mean 'lwf', one of the strategies? clframe list strategies lwf"),
        (["quickstart"], "'experiment/quickstart' is one of the configs: clframe list configs experiment/quickstart"),
        (["zzzz"], "list: unknown kind 'zzzz'; nothing is close to it (known: strategies, "),
        (["strategies", "resnet18"], "nothing contains 'resnet18'; 'resnet18' is one of the backbones: clframe list back"),
        (["benchmarks", "cifar_100x"], "nothing contains 'cifar_100x'; did you mean 'cifar100', one of the benchmarks?"),
        (["backbones", "qq"], "list backbones: nothing contains 'qq'; leave the filter out to see all"),
    ],
)
def test_list_knows_where_a_name_belongs(words, message, call):
    code, out, err = call("list", *words)
    assert (code, out) == (2, "") and message in err


def test_list_shows_options_with_defaults_and_filters(call):
    assert "  temperature=2.0  (number) T; higher values" in call("list", "strategies", "LWF").out
    assert "temperature=" not in call("list", "strategies").out
    assert {line.split()[0] for line in call("list", "backbones", "shortcut=").out.splitlines()} == {
        "resnet20", "resnet32",
    }  # fmt: skip
    assert call("list", "configs", "Split EMNIST, ").out.startswith("benchmark/emnist ")
    assert call("list", "configs", "8x8 digits of").out.startswith("benchmark/digits ")


def test_list_shows_your_own_configs_whatever_is_in_them(call, here):
    (here / "configs" / "experiment").mkdir(parents=True)
    (here / "configs" / "experiment" / "mine.yaml").write_text("# Mine.\n# And yours.\n\nseed: 3\n# seed: 4\n")
    (here / "configs" / "experiment" / "torn.yaml").write_bytes(b"\xff\xfe")
    lines = call("list", "configs", "experiment/").out.splitlines()
    assert "experiment/mine Mine. And yours." in [" ".join(line.split()) for line in lines]
    assert "experiment/torn" in [line.strip() for line in lines]


def test_your_own_configs_are_found_by_name_and_hide_the_shipped_ones(call, here):
    (here / "configs" / "experiment").mkdir(parents=True)
    (here / "configs" / "experiment" / "quickstart.yaml").write_text(
        "defaults: [benchmark/digits, backbone/mlp]\nseed: 41\nstrategy: er\n"
    )
    out = call("explain", "quickstart").out
    assert "  seed: 41\n" in out and "    name: mlp\n" in out


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


def test_a_config_cannot_run_code(call, here):
    """Each of these would leave a file behind if anything in it were called."""
    target = here / "hacked"
    for text in (
        f"strategy: !!python/object/apply:os.system ['touch {target}']",
        f"strategy: !!python/object/new:os.system ['touch {target}']",
        f"strategy: ${{oc.eval:\"open('{target}', 'w')\"}}",
        f"strategy: \"er(memory=open('{target}', 'w'))\"",
        f"components: {{er: {{_target_: os.system, command: 'touch {target}'}}}}",
        f"benchmark: {{_target_: os.system, command: 'touch {target}'}}",
        f"trainer: {{engine: trainer, callbacks: {{os.system: {{command: 'touch {target}'}}}}}}",
        f"trainer: {{engine: trainer, loggers: ['os.system(\"touch {target}\")Logger']}}",
    ):
        (here / "my.yaml").write_text(f"defaults: [experiment/quickstart]\n{text}\n")
        assert call("explain", "my.yaml").code == 2
    assert [path.name for path in here.iterdir()] == ["my.yaml"]


def test_no_environment_variable_reaches_a_run(call, monkeypatch):
    monkeypatch.setenv("CLFRAME_SECRET", "hunter2")
    secret = "${oc.env:CLFRAME_SECRET}"
    for override in (
        f"name={secret}",
        f"name=${{seed}}{secret}",
        f"strategy=${{oc.decode:{secret}}}",
        f"components={{er: {{memory: '{secret}'}}}}",
    ):
        code, out, err = call("explain", "quickstart", "seed=1", override)
        assert code == 2 and "hunter2" not in out + err


def test_paths_in_defaults_start_at_the_file_that_names_them(call, here):
    (here / "deep").mkdir()
    (here / "deep" / "base.yaml").write_text("defaults: [experiment/quickstart]\nseed: 11\n")
    Path("deep/mine.yaml").write_text("defaults: [base.yaml]\n")
    assert "  seed: 11\n" in call("explain", "deep/mine.yaml").out
