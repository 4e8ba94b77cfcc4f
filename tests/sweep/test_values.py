"""Values on the command line and in files, and their combinations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from omegaconf import OmegaConf

from clframe.config.load import load_config
from clframe.errors import ConfigError, UnknownNameError
from clframe.sweep.file import find_sweep, read_sweep
from clframe.sweep.space import Range, Space, label_of
from clframe.sweep.values import as_text, parse_seeds, parse_words, split_values


@pytest.mark.parametrize(
    "text, values",
    [
        ("er", ["er"]),
        ("er,'er + exits'", ["er", "'er + exits'"]),
        ("er(memory=5, at=(1, 2)),lwf", ["er(memory=5, at=(1, 2))", "lwf"]),
        ("[2,3],[5]", ["[2,3]", "[5]"]),
        ("{first: 0.1, later: 0.01},0.1", ["{first: 0.1, later: 0.01}", "0.1"]),
        ("exits(at=('a, b',)),\"x, y\"", ["exits(at=('a, b',))", '"x, y"']),
        ("/home/o'neil,/data", ["/home/o'neil", "/data"]),
        ("", [""]),
    ],
)
def test_commas_in_brackets_and_quotes_belong_to_a_value(text, values):
    assert split_values(text, where="k") == values


@pytest.mark.parametrize("text", ["[1,2", "1]", "(1]", "'a,b", '"a'])
def test_brackets_and_quotes_close(text):
    with pytest.raises(ConfigError, match=r"^k: found '.*', whose brackets or quotes do not match; close them"):
        split_values(text, where="k")


def test_words():
    axes, seeds = parse_words(["strategy=er,'er + exits'", 'name="a b"', "seed=0..2,7"])
    assert axes == {"strategy": ("er", "er + exits"), "name": ('"a b"',)} and seeds == (0, 1, 2, 7)
    for words, message in [
        (["er"], "sweep: found 'er', not key=values; write it"),
        (["=3"], "sweep: found '=3', not key=values; write it"),
        (["a=1", "a=2"], "a: is given twice; write its values in one word"),
        (["seed=1", "seed=2"], "seed: is given twice"),
        (["a=1,,2"], "a: found '1,,2', which has an empty value"),
        (["a=1,2,1"], "a: found '1' twice; give each value once"),
        (["seed=a"], "seed: found 'a'; give a range such as 0..4"),
    ]:
        with pytest.raises(ConfigError) as refused:
            parse_words(words)
        assert str(refused.value).startswith(message)
    assert parse_seeds("3,0..1", where="s") == [3, 0, 1]
    with pytest.raises(ConfigError, match="^s: found '0..2,1', a seed twice; give each once$"):
        parse_seeds("0..2,1", where="s")


@pytest.mark.parametrize("value", [1, 0.001, 1e-8, True, None, "er + exits", "1", "1e-8", "null", "a: b", [2, 3], {"first": 0.1}])
def test_values_of_a_file_are_read_back_by_an_override(value):
    text = as_text(value, where="k")
    read = OmegaConf.to_container(OmegaConf.from_dotlist([f"k={text}"]))["k"]
    assert read == value and type(read) is type(value)


def test_the_config_has_the_type_of_the_file():
    text = as_text([2, 3, 5], where="benchmark.counts")
    assert load_config("quickstart", [f"benchmark.counts={text}"]).benchmark.counts == (2, 3, 5)


def space(**changes):
    return replace(Space(config="quickstart"), **changes)


def test_every_combination():
    found = space(grid={"a": ("1", "2"), "b": ("x", "y")}, rows=({"c": ("3",)}, {"c": ("4", "5")})).settings()
    assert len(found) == 2 * 2 * 3 and found[0] == {"a": "1", "b": "x", "c": "3"}
    assert len({tuple(setting.items()) for setting in found}) == 12
    assert space().settings() == [{}]


def test_values_of_one_strategy_replace_others():
    found = space(
        grid={"strategy": ("er + exits", "lwf"), "optimizer.lr": ("1",)},
        strategies={"er+exits": {"optimizer.lr": ("2", "3"), "components.er.memory": ("5",)}},
    )
    assert found.settings() == [
        {"strategy": "er + exits", "optimizer.lr": "2", "components.er.memory": "5"},
        {"strategy": "er + exits", "optimizer.lr": "3", "components.er.memory": "5"},
        {"strategy": "lwf", "optimizer.lr": "1"},
    ]
    assert found.varied() == ("strategy", "optimizer.lr", "components.er.memory")
    assert label_of(found.settings()[0], found.varied()) == "er + exits, lr 2, memory 5"
    with pytest.raises(ConfigError, match=r"^strategies\.lwff: .* that no cell has; did you mean 'lwf'\?$"):
        space(grid={"strategy": ("lwf",)}, strategies={"lwff": {"a": ("1",)}}).settings()


def test_billions_of_combinations_are_refused():
    with pytest.raises(ConfigError, match=r"^sweep: more than 20,000 combinations; give fewer values$"):
        space(grid={f"k{i}": tuple("0123456789") for i in range(9)}).settings()


FILE = """
config: quickstart
grid: {strategy: [er, er + exits], trainer.epochs: 3, benchmark.validation: 0.1}
list:
  - {components.er.memory: 100}
  - {components.er.memory: [200, 300]}
seeds: 0..4
select:
  over: {optimizer.lr: [0.01, 0.03], benchmark.augment: [null, cifar]}
  seeds: [100, 101]
"""


def read(path, text, **changes):
    return read_sweep({**yaml.safe_load(text), **changes}, path / "s.yaml")


def test_a_file(tmp_path):
    found = read(tmp_path, FILE).space
    assert found.seeds == (0, 1, 2, 3, 4) and len(found.settings()) == 6
    assert found.select.over == {"optimizer.lr": ("0.01", "0.03"), "benchmark.augment": ("null", "cifar")}
    assert found.select.seeds == (100, 101) and found.select.metric == "final_average_accuracy"
    drawn = {"over": {"optimizer.lr": {"low": 1e-4, "high": 0.1, "log": True}}, "seeds": 9, "sampler": "optuna", "trials": 3}
    assert read(tmp_path, FILE, select=drawn).space.select.over == {"optimizer.lr": Range(low=1e-4, high=0.1, log=True)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gird": {}}, "unknown key 'gird'; did you mean 'grid'?"),
        ({"config": 3}, "config is 3; give a config's name or file"),
        ({"grid": [1]}, "grid: found [1]; give a mapping"),
        ({"grid": {"a": []}}, "grid.a: found an empty list; give a value"),
        ({"grid": {"seed": 3}}, "grid.seed: found seeds among the values; give them as seeds"),
        ({"grid": {"a": [1, 1]}}, "grid.a: found '1' twice"),
        ({"grid": {"components.er.memory": 1}}, "components.er.memory is in grid and in list; leave it out"),
        ({"grid": {"optimizer.lr": 1}}, "grid: found optimizer.lr, which select.over chooses; leave it out"),
        ({"grid": {"benchmark.evaluate": "test"}}, "grid: found benchmark.evaluate, which the selection sets"),
        ({"list": "er"}, "list is 'er'; give a list of mappings"),
        ({"seeds": "4..0"}, "seeds: found '4..0', which counts down"),
        ({"select": {"over": {"a": [1]}}}, "select: has no seeds; give one, such as seeds: [100, 101]"),
        ({"select": {"seeds": 9}}, "select: has no over; give one, such as over"),
        ({"select": {"over": {"a": 1}, "seeds": [9, 3]}}, "select.seeds: found 3, which is a test seed as well"),
        ({"select": {"over": {"a": 1}, "seeds": 9, "trials": 3}}, "trials: found 3 with the sampler grid"),
        ({"select": {"over": {"a": 1}, "seeds": 9, "sampler": "optuna"}}, "trials: found None; give optuna a number"),
        ({"select": {"over": {"a": 1}, "seeds": 9, "sampler": "tpe"}}, "sampler: found 'tpe'; give grid or optuna"),
        ({"select": {"over": {"a": {"low": 1, "high": 2}}, "seeds": 9}}, "over.a: found a range with the sampler grid"),
        ({"select": {"over": {"a": {"low": 0, "high": 2, "log": True}}, "seeds": 9, "sampler": "optuna", "trials": 1}},
         "low below high, and with log no step and low above 0"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_one_line(tmp_path, changes, message):
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, FILE, **changes)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_unknown_metric_is_refused(tmp_path):
    select = {"over": {"a": 1}, "seeds": 9, "metric": "forgeting"}
    with pytest.raises(UnknownNameError, match=r"select\.metric: unknown metric 'forgeting'; did you mean 'forgetting'\?"):
        read(tmp_path, FILE, select=select)


def test_sweep_files_are_told_from_configs(here):
    (here / "s.yaml").write_text(FILE)
    (here / "c.yaml").write_text("defaults: [benchmark/digits, backbone/mlp]\n")
    assert find_sweep("s.yaml").space.seeds == (0, 1, 2, 3, 4)
    assert find_sweep("c.yaml") is None and find_sweep("quickstart") is None and find_sweep("no such") is None
    assert find_sweep("digits").path == find_sweep("sweep/digits").path
    with pytest.raises(UnknownNameError, match=r"no file 'n\.yaml'"):
        find_sweep("n.yaml")
