"""Layers: how files, groups and overrides add up, and that nothing in them is called."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import clframe
from clframe.build import build
from clframe.config.files import (
    REGISTRIES,
    Registered,
    config_folders,
    find_config,
    known_configs,
    read_yaml,
    shipped_configs,
)
from clframe.config.load import load_config
from clframe.config.schema import Config
from clframe.config.typed import as_tree, from_mapping, same_config, to_yaml
from clframe.core import Component
from clframe.errors import ConfigError, UnknownNameError
from clframe.nn.backbones import mlp
from clframe.targets.evaluation import evaluate
from clframe.targets.opening import relocate_data


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


BASE = "defaults: [benchmark/digits, backbone/mlp]\n"


def test_a_file_alone_has_the_defaults_of_the_schema():
    config = load_config(write("one.yaml", "benchmark: {name: digits}\nbackbone: {name: mlp}\n"))
    assert config.name == "one"  # the file's name
    assert (config.seed, config.strategy, config.components, config.output) == (0, "naive", {}, "runs")
    assert config.optimizer.lr == 0.05 and config.trainer.epochs == 10
    assert config.benchmark.options == config.backbone.options == {}


def test_mappings_merge_and_scalars_and_lists_replace():
    write(
        "low.yaml",
        BASE + "components: {er: {memory: 30, ratio: 2.0}, lwf: {alpha: 3.0}}\nstrategy: er + lwf\n"
        "optimizer: {name: sgd, schedule: multistep, milestones: [2, 4, 6], lr: 1.0}\n",
    )
    write(
        "high.yaml",
        "defaults: [low.yaml]\ncomponents: {er: {memory: 50}, joint: {}}\nstrategy: er\n"
        "optimizer: {milestones: [3], lr: 0.5}\n",
    )
    config = load_config("high.yaml")
    assert config.components == {"er": {"memory": 50, "ratio": 2.0}, "lwf": {"alpha": 3.0}, "joint": {}}
    assert config.optimizer.milestones == (3,) and config.optimizer.lr == 0.5
    assert config.optimizer.schedule == "multistep"
    assert config.strategy == "er" and config.name == "high"


def test_later_defaults_win_and_the_file_itself_wins_over_them():
    write("a.yaml", BASE + "seed: 1\noutput: a\ntrainer: {epochs: 1, batch_size: 1}\n")
    write("b.yaml", "seed: 2\noutput: b\ntrainer: {epochs: 2}\n")
    config = load_config(write("c.yaml", "defaults: [a.yaml, b.yaml]\nseed: 3\n"))
    assert (config.seed, config.output) == (3, "b")
    assert (config.trainer.epochs, config.trainer.batch_size) == (2, 1)
    assert load_config(write("d.yaml", "defaults: [b.yaml, a.yaml]\n")).seed == 1


def test_one_file_may_be_named_twice():
    write("base.yaml", BASE + "seed: 1\n")
    write("left.yaml", "defaults: [base.yaml]\ntrainer: {epochs: 2}\n")
    write("right.yaml", "defaults: [base.yaml]\ntrainer: {batch_size: 2}\n")
    config = load_config(write("both.yaml", "defaults: [left.yaml, right.yaml]\n"))
    assert (config.seed, config.trainer.epochs, config.trainer.batch_size) == (1, 2, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda found: load_config("quickstart", found),
        lambda found: clframe.run("quickstart", found),
        lambda found: clframe.run(resume="run", overrides=found),
        lambda found: clframe.explain("quickstart", found),
        lambda found: clframe.api.extend("run", ["benchmark=digits"], found),
        lambda found: evaluate("run", found),
        lambda found: relocate_data(load_config("quickstart"), found),
    ],
)
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("trainer.epochs=2", "'trainer.epochs=2' (text)"),
        ({"trainer.epochs": 2}, "{'trainer.epochs': 2} (a mapping)"),
    ],
)
def test_overrides_are_a_list(call, given, found):
    with pytest.raises(ConfigError) as refused:
        call(given)
    assert str(refused.value) == f"overrides: found {found}; give a list such as ['trainer.epochs=2']"


def test_overrides_are_a_list_of_texts():
    with pytest.raises(ConfigError, match=r"overrides: found \['a', 1\].*; give a list such as \['trainer.epochs=2'\]"):
        load_config("quickstart", [["a", 1]])
    with pytest.raises(ConfigError, match=r"data: found {'benchmark': 'digits'} .*; give a list .* \['benchmark=digits'\]"):
        clframe.api.extend("run", {"benchmark": "digits"})
    with pytest.raises(ConfigError, match="explain: overrides need a config's name"):
        clframe.explain(load_config("quickstart"), ["trainer.epochs=2"])


def test_overrides_win_and_the_last_one_wins():
    config = load_config("quickstart", ["trainer.epochs=3", "seed=5", "trainer.epochs=4", "components.er.ratio=2"])
    assert (config.trainer.epochs, config.seed) == (4, 5)
    assert config.components["er"] == {"memory": 200, "ratio": 2}
    assert load_config("quickstart", ["components={er: {memory: 20}}"]).components["lwf"] == {
        "alpha": 1.0, "temperature": 2.0,
    }  # fmt: skip
    assert load_config("quickstart", [" trainer.epochs = 7 "]).trainer.epochs == 7


@pytest.mark.parametrize(
    "text, value",
    [("1e-3", 0.001), ("1E2", 100.0), ("2", 2.0), (".5", 0.5), ("1.0e-5", 0.00001)],
)
def test_numbers_as_people_write_them(text, value):
    config = load_config("quickstart", [f"optimizer.lr={text}"])
    assert config.optimizer.lr == value and type(config.optimizer.lr) is float


def test_a_strategy_with_equals_signs_is_one_value():
    assert (
        load_config("quickstart", ["strategy=er(memory=20) + lwf(alpha=2)"]).strategy == "er(memory=20) + lwf(alpha=2)"
    )


def test_a_group_file_takes_the_place_of_the_block():
    config = load_config("quickstart", ["backbone=mlp"])
    assert (config.backbone.name, config.backbone.options) == ("mlp", {})
    write("wide.yaml", "defaults: [experiment/quickstart]\nbackbone: {width: 8}\nbenchmark: {test_fraction: 0.5}\n")
    assert load_config("wide.yaml").backbone.options == {"width": 8}
    swapped = load_config("wide.yaml", ["backbone=mlp", "benchmark=benchmark/digits"])
    assert swapped.backbone.options == swapped.benchmark.options == {}
    assert swapped.optimizer == load_config("wide.yaml").optimizer


@pytest.mark.parametrize("overrides", [["backbone=mlp", "backbone.width=9"], ["backbone.width=9", "backbone=mlp"]])
def test_a_group_comes_before_keys_whatever_the_order(overrides):
    config = load_config("quickstart", overrides)
    assert (config.backbone.name, config.backbone.options) == ("mlp", {"width": 9})


def test_a_group_file_of_yours_by_name_and_by_path():
    write("configs/backbone/tiny.yaml", "backbone: {name: mlp, width: 3}\n")
    write("elsewhere.yaml", "backbone: {name: mlp, width: 4}\ntrainer: {epochs: 2}\n")
    assert load_config("quickstart", ["backbone=tiny"]).backbone.options == {"width": 3}
    config = load_config("quickstart", ["backbone=elsewhere.yaml"])
    assert config.backbone.options == {"width": 4} and config.trainer.epochs == 2


def test_a_block_as_a_mapping_merges():
    config = load_config("quickstart", ["backbone={width: 5}"])
    assert (config.backbone.name, config.backbone.options) == ("small_cnn", {"width": 5})


def test_your_folder_comes_first_and_hides_the_shipped_file():
    assert config_folders() == [shipped_configs()]
    write("configs/benchmark/digits.yaml", "benchmark: {name: digits, experiences: 2}\n")
    assert config_folders() == [Path("configs"), shipped_configs()]
    assert find_config("benchmark/digits") == Path("configs/benchmark/digits.yaml")
    assert known_configs()["benchmark/digits"] == Path("configs/benchmark/digits.yaml")
    assert known_configs()["backbone/timm"] == shipped_configs() / "backbone" / "timm.yaml"
    assert known_configs()["backbone/mlp"] == Registered("backbone", "mlp")
    assert load_config("quickstart").benchmark.experiences == 2  # also where the shipped experiment names it


def test_a_group_of_your_own():
    write("configs/optimizer/fast.yaml", "optimizer: {name: sgd, lr: 1.0}\n")
    config = load_config(write("mine.yaml", "defaults: [experiment/quickstart, optimizer/fast]\n"))
    assert (config.optimizer.name, config.optimizer.lr) == ("sgd", 1.0)
    assert set(known_configs("optimizer")) == {"optimizer/fast"}


@pytest.mark.parametrize("name", ["quickstart", "experiment/quickstart"])
def test_names_of_shipped_configs(name):
    assert find_config(name) == shipped_configs() / "experiment" / "quickstart.yaml"
    assert find_config("mlp", group="backbone") == find_config("backbone/mlp")


def test_a_yaml_path_may_be_absolute(here):
    write("deep/base.yml", BASE + "seed: 6\n")
    assert load_config(str(here / "deep" / "base.yml")).seed == 6
    assert load_config(write("top.yaml", f"defaults: ['{here}/deep/base.yml']\n")).seed == 6
    assert load_config(write("deep/side.yaml", "defaults: [base.yml]\n")).seed == 6  # relative to the file that lists it


def test_a_path_that_comes_back_to_itself_is_a_circle_however_it_is_written():
    write("deep/round.yaml", "defaults: [../deep/round.yaml]\n")
    with pytest.raises(ConfigError, match=r"^deep/\.\./deep/round\.yaml: defaults form a circle \(round > round\)"):
        load_config("deep/round.yaml")


def test_references_to_keys_are_followed():
    config = load_config(
        write("refer.yaml", BASE + "seed: 4\nname: run-${seed}-${backbone.name}\n"
              "trainer: {epochs: 6, eval_every: '${.epochs}', threads: '${seed}'}\n"
              "optimizer: {schedule: multistep, milestones: [2, '${trainer.epochs}']}\n"
              "components: {er: '${components.lwf}', lwf: {}}\n"),
    )  # fmt: skip
    assert config.name == "run-4-mlp"
    assert (config.trainer.eval_every, config.trainer.threads) == (6, 4)
    assert config.optimizer.milestones == (2, 6)
    assert config.components == {"er": {}, "lwf": {}}
    assert load_config("refer.yaml", ["seed=9"]).name == "run-9-mlp"
    assert load_config("quickstart", ["components.er.memory=${trainer.epochs}"]).components["er"]["memory"] == 10


@pytest.mark.parametrize("text", ["${probe:}", "${probe:1}", "${seed}${probe:1}", "a ${probe: b} c", "${probe:${seed}}",
                                  "${${name}:1}", "\\\\${probe:1}", "${ probe:1}", "${seed}${ probe : 1}"])  # fmt: skip
def test_no_resolver_is_ever_called(text):
    calls = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # 2.4 has a new name for it, which means another thing in 2.3
        OmegaConf.register_new_resolver("probe", lambda *arguments: calls.append(arguments) or "x", replace=True)
    try:
        for place in (
            "strategy: '{}'",
            "trainer: {{callbacks: {{A: {{b: ['{}']}}}}}}",
            "components: '{}'",
            "defaults: ['{}']",
        ):
            write("call.yaml", f"seed: 1\nname: probe\n{place.format(text)}\n")
            write("over.yaml", "defaults: [experiment/quickstart, call.yaml]\ncomponents: {er: {memory: 20}}\n")
            for name in ("call.yaml", "over.yaml"):
                with pytest.raises(ConfigError):
                    load_config(name)
        with pytest.raises(ConfigError):
            load_config("quickstart", ["seed=1", f"strategy={text}"])
    finally:
        OmegaConf.clear_resolver("probe")
    assert calls == []


def test_a_reference_that_leads_nowhere_names_its_key():
    with pytest.raises(ConfigError, match=r"^trainer\.epochs: Interpolation key 'nowhere' not found; refer to"):
        load_config("quickstart", ["trainer.epochs=${nowhere}"])


def test_a_message_names_the_file_that_the_key_stands_in():
    write("low.yaml", BASE + "trainer: {epoch: 3}\n")
    write("high.yaml", "defaults: [low.yaml]\n")
    with pytest.raises(ConfigError, match=r"^low\.yaml: unknown key 'trainer\.epoch'; did you mean 'trainer\.epochs'"):
        load_config("high.yaml")


def test_reading_yaml_executes_nothing(here):
    write("hack.yaml", f"name: !!python/object/apply:os.mkdir ['{here}/hacked']\n")
    with pytest.raises(ConfigError, match=r"^hack\.yaml: invalid YAML \(could not determine a constructor"):
        read_yaml(Path("hack.yaml"))
    assert not (here / "hacked").exists()


def test_a_file_without_rights_says_so(monkeypatch):
    write("mine.yaml", "seed: 3\n")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("clframe.config.files.read_text", refuse)
    with pytest.raises(ConfigError, match=r"^mine\.yaml: cannot be read \(Permission denied\); check its permissions$"):
        load_config("mine.yaml")


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UnknownNameError, match=r"^config: unknown config 'quikstart'; did you mean 'quickstart'"):
        find_config("quikstart")
    with pytest.raises(UnknownNameError, match=r"^x: unknown config 'backbone/mpl'; did you mean 'backbone/mlp'"):
        find_config("backbone/mpl", where="x")


@pytest.fixture
def third_party(monkeypatch):
    """A backbone, a data set and a component of another package, registered without any YAML file."""
    for group, name, entry in (
        ("backbone", "lenet", lambda shape, *, width=8: mlp(shape, width=width)),
        ("benchmark", "blobs", lambda *, seeds=2: None),
        ("strategy", "anchor", type("Anchor", (Component,), {"name": "anchor"})),
    ):
        REGISTRIES[group].names()
        monkeypatch.setitem(REGISTRIES[group]._entries, name, entry)


@pytest.mark.usefixtures("third_party")
def test_a_registered_name_needs_no_file():
    config = load_config("quickstart", ["backbone=lenet", "backbone.width=9", "benchmark=blobs", "strategy=anchor"])
    assert (config.backbone.name, config.backbone.options) == ("lenet", {"width": 9})
    assert (config.benchmark.name, config.benchmark.options) == ("blobs", {})
    assert config.strategy == "anchor" and config.components == load_config("quickstart").components
    named = load_config(write("mine.yaml", "defaults: [benchmark/blobs, backbone/lenet, strategy/anchor]\n"))
    assert (named.benchmark.name, named.backbone.name, named.strategy) == ("blobs", "lenet", "anchor")
    assert {"backbone/lenet", "benchmark/blobs", "strategy/anchor"} <= set(known_configs())
    with pytest.raises(UnknownNameError, match=r"unknown backbone 'lenett'; did you mean 'lenet'\?"):
        load_config("quickstart", ["backbone=lenett"])
    with pytest.raises(UnknownNameError, match=r"'lenet' is not a benchmark; did you mean 'backbone/lenet'\?"):
        load_config("quickstart", ["benchmark=lenet"])


@pytest.mark.usefixtures("third_party")
def test_a_file_comes_before_a_registered_name():
    write("configs/backbone/lenet.yaml", "backbone: {name: lenet, width: 3}\n")
    assert load_config("quickstart", ["backbone=lenet"]).backbone.options == {"width": 3}


def test_files_only_where_they_set_more_than_the_name():
    for group in ("backbone", "benchmark"):
        for name, config in known_configs(group).items():
            if isinstance(config, Path):
                assert set(read_yaml(config)[group]) > {"name"}, name


SHIPPED = sorted(key for key in known_configs() if key.split("/")[0] in ("experiment", "smoke"))
GROUPS = sorted(key for key in known_configs() if key.split("/")[0] in ("benchmark", "backbone"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_experiment_builds_and_round_trips(name):
    config = load_config(name)
    assert isinstance(config, Config)
    Path("again.yaml").write_text(to_yaml(config))
    assert load_config("again.yaml") == config
    assert from_mapping(as_tree(config)) == config
    if config.benchmark.name == "digits":  # tests/packaging builds the others on small files
        parts = build(config)
        assert same_config(to_yaml(parts.config), to_yaml(config))
        assert len(parts.benchmark) == (int(config.trainer.fast_dev_run) or config.benchmark.experiences)


@pytest.mark.parametrize("name", GROUPS)
def test_every_shipped_group_file_loads_in_an_experiment(name):
    group, _, short = name.partition("/")
    config = load_config("quickstart", [f"{group}={short}"])
    assert getattr(config, group).name
    assert config.strategy == load_config("quickstart").strategy


@pytest.mark.parametrize(
    ("value", "base"), [("010", 8), ("[3, 00]", 8), ("1:30", 60), ("{macs: 1:30.5}", 60), ("-0_7", 8)]
)
def test_numbers_in_another_base_than_their_digits_suggest_are_refused(tmp_path, value, base):
    """YAML 1.1 makes 8 of 010, and 90 of 1:30."""
    found = value.strip("[]{}").split(", ")[-1].removeprefix("macs: ")
    with pytest.raises(ConfigError) as refused:
        load_config("quickstart", [f"trainer.budget={value}"])
    assert str(refused.value) == (
        f"override 'trainer.budget={value}': found {found}, which YAML reads in base {base}; fix the value or put it in quotes"
    )
    file = tmp_path / "mine.yaml"
    file.write_text(f"defaults: [experiment/quickstart]\ntrainer: {{budget: {value}}}\n")
    with pytest.raises(ConfigError) as refused:
        load_config(str(file))
    assert str(refused.value) == (
        f"{file}: invalid YAML (found {found} in line 2, which YAML reads in base {base}); fix the file"
    )


def test_numbers_in_other_notations_are_read():
    assert load_config("quickstart", ["seed=0x10", "trainer.batch_size=1_000"]).seed == 16
    assert load_config("quickstart", ["optimizer.lr=00.5"]).optimizer.lr == 0.5
    assert load_config("quickstart", ["name='010'"]).name == "010"


@pytest.mark.parametrize(
    ("override", "comment"),
    [("benchmark.path=photos #2", "'#2'"), ("strategy=er # + lwf", "'# + lwf'"), ("benchmark.counts=[5, 5]  #x", "'#x'")],
)
def test_overrides_have_no_comments_that_would_be_dropped(override, comment):
    with pytest.raises(ConfigError) as refused:
        load_config("quickstart", [override])
    assert str(refused.value) == f"override '{override}': found {comment}, a comment; fix the value or put it in quotes"


def test_a_quoted_number_sign_is_part_of_the_value():
    assert load_config("quickstart", ["benchmark=image_folder", "benchmark.path='photos #2'"]).benchmark.options == {"path": "photos #2"}
    assert load_config("quickstart", ["name=a#2"]).name == "a#2"
