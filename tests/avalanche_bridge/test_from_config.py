"""``components.avalanche.plugins``: the same weights as the same plugins from Python, and one line for what is wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.training import plugins as P

import clframe
from clframe.avalanche_bridge.plugins import plugin_names
from clframe.build import build
from clframe.config.load import load_config
from clframe.config.typed import from_mapping, to_yaml
from clframe.core import COMPONENTS, Component
from clframe.data import digits
from clframe.errors import ClframeError, ConfigError, UnknownNameError, UnsupportedError
from clframe.nn import BACKBONES, Network
from clframe.training.checkpoint import load_latest
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

# Avalanche calls functions of its own that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated function:DeprecationWarning")

TINY = [
    "backbone=mlp", "backbone.width=16", "benchmark.classes=4", "benchmark.experiences=2", "trainer.epochs=1",
    "trainer.batch_size=64",
    "trainer.progress=false", "trainer.loggers=[]", "optimizer={name: adam, lr: 0.002}",
]  # fmt: skip
LONGER = ("benchmark.classes=6", "benchmark.experiences=3")
BOTH = "er(memory=20) + lwf"
RAR = {"batch_size_mem": 10, "mem_size": 20, "name_ext_layer": "network.backbone.stages.0", "iter_fgsm": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "AGEMPlugin": {"patterns_per_experience": 10, "sample_size": 10},
    "BiCPlugin": {"mem_size": 40, "stage_2_epochs": 3, "val_percentage": 0.3},
    "CWRStarPlugin": {},
    "EWCPlugin": {"ewc_lambda": 10},
    "FromScratchTrainingPlugin": {},
    "GDumbPlugin": {"mem_size": 40},
    "GEMPlugin": {"patterns_per_experience": 10, "memory_strength": 0.5},
    "GSS_greedyPlugin": {"mem_size": 200, "mem_strength": 2, "input_size": [1, 8, 8]},
    "LwFPlugin": {"alpha": 2, "temperature": 1.5},
    "MASPlugin": {"lambda_reg": 0.1},
    "MIRPlugin": {"batch_size_mem": 10, "mem_size": 40, "subsample": 20},
    "RARPlugin": RAR,
    "RWalkPlugin": {"delta_t": 2},
    "ReplayPlugin": {"mem_size": 40},
    "SynapticIntelligencePlugin": {"si_lambda": 1},
}


def overrides(*plugins: str, strategy: str = BOTH) -> list[str]:
    block = f"components.avalanche.plugins=[{', '.join(plugins)}]"
    return [*TINY, f"strategy={strategy}", block]


def written(name: str) -> str:
    """A plugin as a command line would have it: its options as YAML's flow style, its name alone without any."""
    options = ", ".join(f"{key}: {value}" for key, value in OPTIONS[name].items())
    return f"{{{name}: {{{options}}}}}" if options else name


def weights_of(run: str) -> dict[str, torch.Tensor]:
    content = load_latest(Path(run) / "checkpoints", device=torch.device("cpu"))
    assert content is not None
    return dict(content["network"])


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, torch.Tensor]]:
    """The weights of a strategy's run without any plugin, found out once."""

    def run(strategy: str, *stream: str) -> dict[str, torch.Tensor]:
        options = [*TINY, f"strategy={strategy}", *stream]
        result = clframe.run("quickstart", options, output=tmp_path_factory.mktemp("runs"))
        return weights_of(result.run_folder)

    return functools.cache(run)


def test_every_plugin_that_may_be_named_is_tried_here() -> None:
    assert sorted(OPTIONS) == sorted(plugin_names())


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "RARPlugin")) for n in OPTIONS])
def test_a_config_gives_the_weights_of_the_same_plugin_from_python(
    tmp_path: Any, without: Callable[..., dict[str, torch.Tensor]], name: str
) -> None:
    # MIR draws no samples of the classes in the last batch: after er, whose batches have all classes, none would be left.
    # Its first draw is in the third experience.
    strategy, stream = ("lwf", LONGER) if name == "MIRPlugin" else (BOTH, ())
    result = clframe.run("quickstart", [*overrides(written(name), strategy=strategy), *stream], output=tmp_path)
    parts = build(load_config("quickstart", [*overrides(strategy=strategy), *stream]))
    benchmark, network = parts.benchmark, parts.network
    optimizer = partial(torch.optim.Adam, lr=0.002)
    module = ContinualModule(network, parts.composition, optimizer=optimizer, seed=parts.config.seed)
    # What a run does before it trains: evaluate once, with outputs for the first experience.
    module.learner.seed_everything("experience", 0)
    network.grow(benchmark.classes[0])
    options = {"model": module, **OPTIONS[name]} if name == "CWRStarPlugin" else OPTIONS[name]
    trained = LightningStrategy(
        model=module, benchmark=benchmark, train_mb_size=64, eval_mb_size=256, evaluator=None,
        plugins=[getattr(P, name)(**options)],
    )  # fmt: skip
    for experience in benchmark.avalanche.train_stream:
        trained.train(experience)
        trained.eval(benchmark.avalanche.test_stream)
    ended, direct = weights_of(result.run_folder), network.state_dict()
    assert ended.keys() == direct.keys()
    assert all(torch.equal(ended[key], direct[key]) for key in ended)
    assert any(not torch.equal(ended[key], without(strategy, *stream)[key]) for key in ended)


def test_a_config_with_plugins_is_written_and_read_back_and_an_empty_list_changes_nothing(
    tmp_path: Any, without: Callable[..., dict[str, torch.Tensor]]
) -> None:
    plugins = [{"EWCPlugin": {"ewc_lambda": 10}}, "LwFPlugin"]
    config = load_config("quickstart", overrides("{EWCPlugin: {ewc_lambda: 10}}", "LwFPlugin"))
    assert config.components["avalanche"] == {"plugins": plugins}
    assert from_mapping(config_tree(config)) == config
    result = clframe.run("quickstart", overrides(), output=tmp_path)
    ended = weights_of(result.run_folder)
    assert ended.keys() == without(BOTH).keys()
    assert all(torch.equal(value, without(BOTH)[key]) for key, value in ended.items())


def config_tree(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def test_cwr_star_consolidates_the_classifier_and_not_a_hidden_layer() -> None:
    """The last ``nn.Linear`` of this network is hidden; Avalanche would set its weights to 0."""
    benchmark = clframe.class_incremental(digits(), experiences=5, seed=0)
    network = Network(BACKBONES.get("mlp")(benchmark.input_shape, width=16))
    module = ContinualModule(network, optimizer=partial(torch.optim.SGD, lr=0.05), seed=0)
    plugin = P.CWRStarPlugin(module)
    strategy = LightningStrategy(model=module, benchmark=benchmark, train_mb_size=64, plugins=[plugin], evaluator=None)
    first, second = list(benchmark.avalanche.train_stream)[:2]
    strategy.train(first)
    hidden = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    assert all(bool(value.abs().sum() > 0) for value in hidden.values())
    kept = network.final.weight.detach()[:2].clone()
    strategy.train(second)
    assert all(torch.equal(value, hidden[name]) for name, value in network.backbone.state_dict().items())  # frozen
    assert torch.equal(network.final.weight.detach()[:2], kept)  # restored after training on the others


@pytest.mark.parametrize(
    ("plugins", "error", "message"),
    [
        ("[LwFplugin]", UnknownNameError, r"plugins\[0\]: unknown plugin of Avalanche's 'LwFplugin'; did you mean 'LwFPlugin'"),
        ("[LwFPlugin, os.system]", ConfigError, r"plugins\[1\]: found 'os.system', code that is not allowed to be imported"),
        ("[{_target_: os.system}]", ConfigError, r"plugins\[0\]._target_: found 'os.system' \(text\); give a mapping"),
        ("[avalanche.training.plugins.LwFPlugin]", ConfigError, r"\[0\]: found 'avalanche.+', code that is not allowed"),
        ("[SupervisedPlugin]", UnknownNameError, "unknown plugin"),
        ("[{EWCPlugin: {ewc_lamda: 1}}]", ConfigError, r"EWCPlugin.ewc_lamda: unknown option; did you mean 'ewc_lambda'\?"),
        ("[EWCPlugin]", ConfigError, r"EWCPlugin.ewc_lambda: is missing and has no default; give a number"),
        ("[{EWCPlugin: {ewc_lambda: much}}]", ConfigError, r"ewc_lambda: found 'much' \(text\); give a number"),
        ("[{EWCPlugin: {ewc_lambda: 1, mode: onlin}}]", ConfigError, r"mode: found 'onlin' \(text\); did you mean 'online'\?"),
        ("[{EWCPlugin: {ewc_lambda: 1, mode: online}}]", ConfigError, r"Avalanche refuses its options \(.*decay_factor.*\); change"),
        ("[{MIRPlugin: {batch_size_mem: '1'}}]", ConfigError, r"batch_size_mem: found '1' \(text\); give a whole number"),
        ("[{BiCPlugin: {storage_policy: x}}]", ConfigError, r"BiCPlugin.storage_policy: unknown option; "),
        ("[{RARPlugin: {batch_size_mem: 1}}]", ConfigError, r"RARPlugin.name_ext_layer: is missing"),
        ("[CoPEPlugin]", UnsupportedError, r"plugins\[0\].CoPEPlugin: needs .*; from Python use it on a plain module"),
        ("[LFLPlugin]", UnsupportedError, r"LFLPlugin: needs .*get_features.*; from Python use it on a plain module"),
        ("[LRSchedulerPlugin]", UnsupportedError, r"LRSchedulerPlugin: needs .*; set optimizer.schedule"),
        ("[EarlyStoppingPlugin]", UnsupportedError, r"EarlyStoppingPlugin: needs .*; from Python pass"),
        ("[{A: {}, B: {}}]", ConfigError, r"plugins\[0\]: found \{.*\}.*; give a name, or one with options as in"),
        ("[3]", ConfigError, r"plugins\[0\]: found 3; give a name"),
        ("[{LwFPlugin: 2}]", ConfigError, r"plugins\[0\].LwFPlugin: found 2; give a mapping"),
        ("LwFPlugin", ConfigError, r"plugins: found 'LwFPlugin' \(text\); give a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_before_any_training(plugins: str, error: type[ClframeError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        clframe.explain("quickstart", [*TINY, f"components.avalanche.plugins={plugins}"])
    assert str(caught.value).startswith("components.avalanche.plugins") and "\n" not in str(caught.value)


def test_other_keys_of_the_block_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^components.avalanche.plugin: unknown key; did you mean 'plugins'\?"):
        load_config("quickstart", ["components.avalanche.plugin=[LwFPlugin]"])
    with pytest.raises(ConfigError, match=r"^components.avalanche: found 'LwFPlugin' \(text\); give a mapping"):
        load_config("quickstart", ["components.avalanche=LwFPlugin"])


def test_an_option_that_names_no_layer_is_refused_and_leaves_no_run_folder(tmp_path: Any) -> None:
    plugin = "{RARPlugin: {batch_size_mem: 10, name_ext_layer: backbone.stages.0}}"
    with pytest.raises(
        ConfigError, match=r"no layer is called 'backbone.stages.0'; did you mean 'network.backbone.stages.0'"
    ):
        clframe.run("quickstart", overrides(plugin), output=tmp_path)
    assert not list(tmp_path.glob("*/*"))


def test_a_memory_that_pools_is_refused_beside_a_plugin_that_brings_a_loader(tmp_path: Any) -> None:
    """Avalanche's loader would serve the epoch without the samples of our memory."""
    config = overrides("ReplayPlugin", strategy="er(memory=20, replay='concatenate')")
    with pytest.raises(UnsupportedError, match=r"'er' changes what the loader serves, but Avalanche's own loader"):
        clframe.run("quickstart", config, output=tmp_path)


def test_a_run_with_plugins_is_not_resumed(tmp_path: Any) -> None:
    result = clframe.run("quickstart", overrides("LwFPlugin"), output=tmp_path)
    with pytest.raises(
        UnsupportedError, match=r"has Avalanche plugins \(LwFPlugin\), whose state is not in checkpoints; start a new run"
    ):
        clframe.run(resume=result.run_folder)
    model = clframe.load(result.run_folder)  # the network is there all the same
    assert model.classify(digits().test.x[:4]).shape == (4,)


def test_explain_shows_plugins_with_their_options_and_only_where_there_are_some() -> None:
    text = clframe.explain("quickstart", overrides("{EWCPlugin: {ewc_lambda: 0.1}}", "LwFPlugin"))
    _, _, part = text.partition("\nAvalanche plugins, in addition to the components\n")
    assert part.splitlines()[:2] == ["  EWCPlugin(ewc_lambda=0.1)", "  LwFPlugin()"]
    assert "cannot be resumed" in part
    assert "Avalanche plugins" not in clframe.explain("quickstart", overrides())
    assert "avalanche" not in clframe.parse("er + lwf").__str__()


def test_the_name_of_the_block_is_no_components(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="unknown component 'avalanche'"):
        clframe.explain("quickstart", [*TINY, "strategy=avalanche"])
    COMPONENTS.names()
    monkeypatch.setitem(COMPONENTS._entries, "avalanche", Component)
    with pytest.raises(ClframeError, match=r"^component 'avalanche': .*; give the component another name$"):
        clframe.explain("quickstart", TINY)
