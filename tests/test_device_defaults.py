"""Choices that a config leaves to the device of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clframe.build import check_config
from clframe.config.schema import BackboneConfig, BenchmarkConfig, Config, OptimizerConfig
from clframe.config.trainer import TrainerConfig
from clframe.config.typed import same_config, to_yaml
from clframe.device_defaults import with_device_defaults
from clframe.errors import UnsupportedError
from clframe.seeding import torch_settings

PLAIN = Config(benchmark=BenchmarkConfig(name="digits"), backbone=BackboneConfig(name="mlp"))


def chosen(config, *, cuda):
    found = with_device_defaults(config, cuda=cuda)
    return found.trainer.channels_last, found.trainer.deterministic, found.optimizer.fused


@pytest.mark.parametrize(
    "optimizer, precision, cuda, expected",
    [
        ("sgd", "32-true", False, (False, True, False)),
        ("sgd", "32-true", True, (True, False, True)),
        ("adamw", "bf16-mixed", True, (True, False, True)),
        ("sgd", "16-mixed", True, (True, False, False)),
        ("rmsprop", "32-true", True, (True, False, False)),
    ],
)
def test_auto_is_replaced_by_the_choice_for_the_device(optimizer, precision, cuda, expected):
    config = replace(PLAIN, optimizer=OptimizerConfig(name=optimizer), trainer=TrainerConfig(precision=precision))
    assert chosen(config, cuda=cuda) == expected


@pytest.mark.parametrize("cuda, shape, expected", [(False, (3, 32, 32), 256), (True, (3, 32, 32), 1024), (True, (3, 224, 224), 256)])
def test_the_batch_of_an_evaluation_fits_the_inputs(cuda, shape, expected):
    assert with_device_defaults(PLAIN, cuda=cuda, input_shape=shape).trainer.eval_batch_size == expected


@pytest.mark.parametrize("cuda", [False, True])
def test_what_a_config_says_is_kept(cuda):
    trainer = TrainerConfig(channels_last=True, deterministic=True, eval_batch_size=77)
    config = replace(PLAIN, optimizer=OptimizerConfig(fused=False), trainer=trainer)
    assert chosen(config, cuda=cuda) == (True, True, False)
    assert with_device_defaults(config, cuda=cuda).trainer.eval_batch_size == 77


def test_a_config_and_the_one_of_its_run_are_the_same():
    run = with_device_defaults(PLAIN, cuda=True)
    assert run != PLAIN and same_config(to_yaml(run), to_yaml(PLAIN)) and same_config(to_yaml(PLAIN), to_yaml(run))
    other = replace(run, trainer=replace(run.trainer, deterministic=True))
    assert not same_config(to_yaml(run), to_yaml(other))
    assert not same_config(to_yaml(run), to_yaml(replace(PLAIN, seed=7)))


def test_settings_of_cuda_are_set_and_restored():
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    for deterministic, expected in ((True, (False, False, "highest")), (False, (True, True, "high"))):
        with torch_settings(deterministic=deterministic, cuda=True):
            assert (cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()) == expected
        assert (cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before


def test_a_fused_update_is_refused_where_it_would_leave_gradients_scaled(monkeypatch):
    monkeypatch.setattr("clframe.config_checks.on_cuda", lambda trainer: True)
    scaled = replace(PLAIN, trainer=TrainerConfig(precision="16-mixed"))
    for fused in ("auto", False):
        check_config(replace(scaled, optimizer=OptimizerConfig(fused=fused)), source=False)
    with pytest.raises(UnsupportedError, match="^optimizer.fused: found true with trainer.precision=16-mixed, .* set optimizer.fused=false$"):
        check_config(replace(scaled, optimizer=OptimizerConfig(fused=True)), source=False)
