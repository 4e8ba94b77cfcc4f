"""The verbs explain and list, and that configs run no code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


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
