"""Plain trees, typed configs and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import yaml

from clframe.config.schema import BackboneConfig, BenchmarkConfig, Config, EarlierConfig, OptimizerConfig
from clframe.config.trainer import AverageConfig, BudgetConfig, CheckpointConfig, MemoryConfig, TrainerConfig
from clframe.config.typed import as_tree, block_keys, check_typed, from_mapping, to_yaml
from clframe.errors import ConfigError

SMALL = {"benchmark": {"name": "digits"}, "backbone": {"name": "mlp"}}


def round_trip(config: Config) -> Config:
    return from_mapping(yaml.safe_load(to_yaml(config)))


def test_every_field_survives_a_round_trip():
    """No value here is its field's default."""
    config = Config(
        name="n", seed=2**63 - 1, strategy="er", components={"er": {"memory": 3}, "lwf": {}},
        benchmark=BenchmarkConfig(name="b", experiences=3, class_order=(2, 0, 1), augment=("crop", "flip"),
                                  workers=2, options={"x": [1, None, "y"]}),
        backbone=BackboneConfig(name="c", options={"width": 1.5}),
        optimizer=OptimizerConfig(name="sgd", lr=1e-05, momentum=0.5, weight_decay=1e-9, schedule="multistep",
                                  milestones=(1, 7), gamma=0.25),
        trainer=TrainerConfig(engine="trainer", accelerator="cpu", devices=(3,), precision="64-true", epochs=1,
                              batch_size=2, eval_batch_size=3, gradient_clip=0.5, accumulate=4, eval_every=5,
                              log_every=6,
                              fast_dev_run=True, channels_last=True, threads=7, deterministic=False, progress=False,
                              callbacks={"Timer": {"duration": {"days": 1}}}, loggers=("csv",), drop_last=True,
                              on_nonfinite="warn", figures="none", record_activity=True, capture=False,
                              checkpoint=CheckpointConfig(every="2h"), ema=AverageConfig(decay=0.5, warmup=False),
                              strategy="ddp", sync_batchnorm=True, memory=MemoryConfig(bytes=2e6)),
        output="o", imports=("a.b",),
        earlier=(EarlierConfig(run="/r", checkpoint="experience_002.ckpt", sha256="0f", experiences=((0, 2), (1,)),
                               class_names=("0", "no", "1e3"), input_shape=(1, 8, 8), dtype="uint8",
                               mean=(0.1 + 0.2, 1e-05), std=(1 / 3,), inputs={"kind": "image", "size": None},
                               benchmark=BenchmarkConfig(name="b", options={"path": "p", "x": [1, "y"]})),),
    )  # fmt: skip
    plain = Config(benchmark=BenchmarkConfig(name="digits"), backbone=BackboneConfig(name="mlp"))
    for block in (None, "trainer"):
        one, other = (getattr(c, block) if block else c for c in (config, plain))
        same = [f.name for f in dataclasses.fields(one) if getattr(one, f.name) == getattr(other, f.name)]
        assert same == (["compile", "budget"] if block else [])  # which exclude sync_batchnorm and the engine
    assert round_trip(config) == config
    for trainer in (
        TrainerConfig(budget=BudgetConfig(macs=2e9)), TrainerConfig(budget=BudgetConfig(relative=0.5)), TrainerConfig(compile=True)
    ):  # fmt: skip
        other = dataclasses.replace(plain, trainer=trainer)
        assert round_trip(other) == other


def test_every_field_of_the_optimizer_survives_a_round_trip():
    """Several configs, since no schedule uses all fields; together they change every default."""
    optimizers = [
        OptimizerConfig(lr=1e-05, momentum=0.5, weight_decay=1e-9, schedule="multistep", milestones=(1, 7), gamma=0.25),
        OptimizerConfig(name="adamw", betas=(0.8, 0.5), schedule="step", step=2, warmup=1, fused=True),
        OptimizerConfig(name="RMSprop", schedule="plateau", factor=0.25, patience=2, options={"alpha": 0.9},
                        groups={"heads": {"lr": {"first": 0.1, "later": 0.01}, "eps": 1e-3}}),
    ]  # fmt: skip
    for f in dataclasses.fields(OptimizerConfig):
        assert any(getattr(one, f.name) != getattr(OptimizerConfig(), f.name) for one in optimizers), f.name
    for one in optimizers:
        assert round_trip(dataclasses.replace(from_mapping(SMALL), optimizer=one)).optimizer == one


NOT_ONLY_TEXT = [
    "3", "1e-5", "1.0", "yes", "on", "null", "~", "0x10", "1_000", "12:30", "2020-01-01", "a b", "é", "#a", "a #b",
    "- a", "{a}", "true", " a", "a ", "''", "%", "@", "!!int 3",
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_ONLY_TEXT)
def test_text_that_looks_like_something_else_stays_text(text):
    config = from_mapping({**SMALL, "output": text, "components": {"x": {"y": text}}})
    again = round_trip(config)
    assert again == config
    assert again.output == again.components["x"]["y"] == text


@pytest.mark.parametrize("number", [0.1, 1e-05, 1e22, 123456789.123, 5e-324])
def test_numbers_are_exact_after_a_round_trip(number):
    again = round_trip(from_mapping({**SMALL, "optimizer": {"lr": number}}))
    assert again.optimizer.lr == number


def test_options_stand_beside_the_keys_of_their_block():
    tree = {"benchmark": {"name": "digits", "test_fraction": 0.5}, "backbone": {"name": "mlp", "width": 3}}
    config = from_mapping(tree)
    assert config.benchmark.options == {"test_fraction": 0.5} and config.backbone.options == {"width": 3}
    assert as_tree(config)["backbone"] == {"name": "mlp", "width": 3}
    assert "options" not in as_tree(config)["benchmark"]
    assert block_keys("backbone") == ("name",)


def test_an_option_may_even_be_called_options():
    """It is the data set's to refuse, not swallowed."""
    config = from_mapping({**SMALL, "backbone": {"name": "mlp", "options": {"width": 3}}})
    assert config.backbone.options == {"options": {"width": 3}}


def test_a_tree_is_not_changed():
    tree = {**SMALL, "components": {"er": {"memory": 3}}}
    from_mapping(tree)
    assert tree == {**SMALL, "components": {"er": {"memory": 3}}}


@pytest.mark.parametrize("kind", [Config, BenchmarkConfig, BackboneConfig, OptimizerConfig, TrainerConfig])
def test_configs_are_frozen_and_documented(kind):
    assert kind.__dataclass_params__.frozen
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
    config = from_mapping(SMALL)
    one = config if kind is Config else next(v for v in vars(config).values() if isinstance(v, kind))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, dataclasses.fields(kind)[0].name, "x")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trainer": 3}, r"^trainer: found 3; give a mapping$"),
        ({"trainer": None}, r"^trainer: found null; give a mapping$"),
        ({"trainer": {"options": {}}}, r"^config: unknown key 'trainer\.options'; "),
        ({"components": {"er": [1]}}, r"^components\.er: found \[1\] \(a list\); give a mapping of options"),
        ({"trainer": {"callbacks": "Timer"}}, r"^trainer\.callbacks: found 'Timer' \(text\); give a mapping of names"),
        ({3: 4}, r"^config: unknown key '3'; keys are backbone, "),
        ({"name": None}, r"^name: found null; give text$"),
    ],
)
def test_what_is_no_config_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping({**SMALL, **change})


@pytest.mark.parametrize("missing", ["benchmark", "backbone"])
def test_benchmark_and_backbone_must_be_there(missing):
    tree = {key: value for key, value in SMALL.items() if key != missing}
    with pytest.raises(ConfigError, match=f"^config: has no {missing}; set {missing}=NAME, or put {missing}/NAME"):
        from_mapping(tree)
    with pytest.raises(ConfigError, match=rf"^{missing}\.name: found '' \(text\); give a name from clframe list {missing}s"):
        from_mapping({**SMALL, missing: {}})


def test_the_key_that_has_another_home_is_named():
    for key, home in {"epochs": "trainer.epochs", "lr": "optimizer.lr", "experiences": "benchmark.experiences"}.items():
        with pytest.raises(ConfigError, match=f"^config: unknown key '{key}'; did you mean '{home}'"):
            from_mapping({**SMALL, key: 1})


@pytest.mark.parametrize(
    ("earlier", "message"),
    [
        (3, "earlier: found 3; give a list"),
        ([3], "earlier[0]: found 3; give a mapping"),
        ([{"run": "r"}], "earlier[0]: has no benchmark"),
        ([{"benchmark": {"name": "b"}, "runs": "r"}], "earlier[0].runs: unknown key"),
        ([{"benchmark": {"name": "b"}, "mean": "x"}], "earlier[0].mean: found 'x'"),
    ],
)
def test_entries_that_no_extension_writes(earlier, message):
    with pytest.raises(ConfigError) as refused:
        from_mapping({**SMALL, "earlier": earlier})
    assert message in str(refused.value)


def test_a_run_that_extends_none_does_not_mention_it():
    assert "earlier" not in as_tree(from_mapping(SMALL))


@pytest.mark.parametrize(
    ("block", "options", "message"),
    [
        ("trainer", {"engine": "Trainer"}, "found 'Trainer' (text); did you mean 'trainer'? (known: fabric, trainer)"),
        ("trainer", {"batch_size": 3.5}, "found 3.5; give a whole number"),
        ("benchmark", {"protocol": "foo"}, "found 'foo' (text); give one of them (known: class_incremental"),
        ("optimizer", {"schedule": "cosinus"}, "found 'cosinus' (text); did you mean 'cosine'?"),
    ],
)
def test_a_config_that_was_built_in_python_is_checked(block: str, options: dict[str, object], message: str):
    config = from_mapping(SMALL)
    assert check_typed(config) == config
    with pytest.raises(ConfigError) as found:
        dataclasses.replace(getattr(config, block), **options)
    assert str(found.value).startswith(f"{block}.{next(iter(options))}: {message}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainerConfig(epochs="3"), "trainer.epochs: found '3' (text); give a whole number"),
        (lambda: TrainerConfig(epochs=True), "trainer.epochs: found true; give a whole number"),
        (lambda: TrainerConfig(epochs=float("nan")), "trainer.epochs: found nan; give a whole number"),
        (lambda: TrainerConfig(loggers="csv"), "trainer.loggers: found 'csv' (text); give a list"),
        (lambda: TrainerConfig(checkpoint="5min"), "trainer.checkpoint: found '5min' (text); give CheckpointConfig"),
        (lambda: AverageConfig(decay="0.9"), "trainer.ema.decay: found '0.9' (text); give a number or null"),
        (lambda: BudgetConfig(macs=float("inf")), "trainer.budget.macs: found inf; give a finite number"),
        (lambda: MemoryConfig(bytes="1e6"), "trainer.memory.bytes: found '1e6' (text); give a number or null"),
        (lambda: CheckpointConfig(every=2.5), "trainer.checkpoint.every: found 2.5; give a whole number or text or null"),
        (lambda: OptimizerConfig(lr="0.1"), "optimizer.lr: found '0.1' (text); give a number or a mapping"),
        (lambda: OptimizerConfig(name=None), "optimizer.name: found null; give text"),
        (lambda: BackboneConfig(name="mlp", options=[1]), "backbone.options: found [1] (a list); give a mapping"),
        (lambda: BenchmarkConfig(name="b", evaluate="tets"), "benchmark.evaluate: found 'tets' (text); did you mean 'test'? (known: test, validation)"),
        (lambda: dataclasses.replace(from_mapping(SMALL), seed=1.5), "seed: found 1.5; give a whole number"),
        (lambda: dataclasses.replace(from_mapping(SMALL), components=["er"]), "components: found ['er'] (a list); give a mapping"),
        (lambda: dataclasses.replace(from_mapping(SMALL), benchmark={"name": "b"}), "benchmark: found {'name': 'b'} (a mapping); give BenchmarkConfig"),
    ],
)  # fmt: skip
def test_blocks_refuse_values_of_another_type_when_they_are_built(make: Callable[[], object], message: str):
    with pytest.raises(ConfigError) as found:
        make()
    assert str(found.value) == message


def test_blocks_store_converted_values():
    trainer = TrainerConfig(epochs=np.int64(3), devices=[0, 1], gradient_clip=1, ema=0.5)
    assert trainer == TrainerConfig(epochs=3, devices=(0, 1), gradient_clip=1.0, ema=AverageConfig(decay=0.5))
    assert [type(value) for value in (trainer.epochs, trainer.devices, trainer.gradient_clip)] == [int, tuple, float]
