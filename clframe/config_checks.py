"""Checks of combinations: options that exclude each other, the data, the network and this machine.

Each raises for what a run would be refused for. Options alone are checked by :mod:`clframe.config`.
"""

from __future__ import annotations

import logging

import torch

from clframe.config.named import named_plugins
from clframe.config.schema import Config
from clframe.core import Composition
from clframe.data import Source
from clframe.data.samples import TensorSamples
from clframe.device_defaults import on_cuda
from clframe.errors import ConfigError, Problems, UnsupportedError
from clframe.nn import Network
from clframe.nn.backbones.from_transformers import TextEmbed
from clframe.training.compiled import require_compiler
from clframe.training.devices import process_count

_log = logging.getLogger(__name__)


def check_trainer(whole: Config) -> None:
    """Refuse options of the trainer that this machine cannot satisfy, or that exclude each other."""
    config = whole.trainer
    wanted = config.accelerator
    if wanted in ("cuda", "gpu") and not torch.cuda.is_available():
        raise UnsupportedError(f"trainer.accelerator: found {wanted}, but torch sees no GPU here; use cpu or auto")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UnsupportedError("trainer.accelerator: found mps, but this machine has none; use cpu or auto")
    on_gpu = on_cuda(config)
    if isinstance(config.devices, tuple):
        found, count = f"trainer.devices: found {list(config.devices)}", torch.cuda.device_count()
        if not on_gpu:
            raise UnsupportedError(f"{found}, indices of GPUs, but the run is not on CUDA; give a number")
        if max(config.devices) >= count:
            raise UnsupportedError(f"{found}, but torch sees {count} GPUs; count from 0")
    if config.precision == "16-mixed" and not on_gpu and wanted != "mps":
        raise UnsupportedError("trainer.precision: found 16-mixed on the CPU, which has none; use bf16-mixed")
    if config.precision == "16-mixed" and whole.optimizer.fused is True:
        raise UnsupportedError(
            "optimizer.fused: found true with trainer.precision=16-mixed, where a fused update leaves the gradients "
            "scaled, which clipping, logs and components read; set optimizer.fused=false"
        )
    if config.compile:
        require_compiler(cuda=on_gpu)


def check_online(config: Config) -> None:
    """Refuse options that need experiences of more than a few batches."""
    if config.benchmark.online is None:
        return
    for key, found, wanted in (
        ("trainer.engine", config.trainer.engine, "fabric"),
        ("trainer.eval_every", config.trainer.eval_every, -1),
        ("trainer.callbacks", config.trainer.callbacks, {}),
        ("optimizer.schedule", config.optimizer.schedule, "constant"),
        ("optimizer.warmup", config.optimizer.warmup, 0),
    ):
        if found != wanted:
            raise ConfigError(f"{key}: found {found} for an online stream of small experiences; set {wanted}")


def check_callbacks(config: Config) -> None:
    """Refuse callbacks that the engine does not take, or whose metric a run does not have."""
    if config.trainer.callbacks:
        from clframe.training.trainer_options import check_monitors, early_stopping

        if config.trainer.engine != "trainer":
            early_stopping(config.trainer.callbacks)  # refuses options that it does not take
        check_monitors(config.trainer.callbacks, validation=config.benchmark.validation > 0)


def check_named_plugins(config: Config) -> None:
    """Refuse Avalanche plugins that do not exist, or whose options are wrong."""
    named = named_plugins(config.components)
    if named:
        from clframe.avalanche_bridge.plugins import check_plugins

        check_plugins(named)


def check_token_ids(source: Source, network: Network) -> None:
    """Refuse a text backbone on inputs that are not token ids, which it would round to ids, or ids it does not have."""
    embed = network.backbone.stages[0]
    if not isinstance(embed, TextEmbed):
        return
    if not source.are_token_ids():
        raise ConfigError(
            f"backbone.name: found a text backbone for {source.name}, whose inputs are not token ids; set "
            f"benchmark.kind=tokens (npz) or benchmark.tokens=MODEL (clinc150, banking77), or use another backbone"
        )
    words = getattr(embed.embeddings, "word_embeddings", None)
    inputs = [samples.x for samples in (source.train, source.test) if isinstance(samples, TensorSamples)]
    largest = max((int(x.max()) for x in inputs if len(x)), default=0)
    if isinstance(words, torch.nn.Embedding) and largest >= words.num_embeddings:
        raise ConfigError(
            f"backbone.vocabulary: found token id {largest} in {source.name} for a vocabulary of "
            f"{words.num_embeddings}; give at least {largest + 1}, or the tokenizer of the backbone"
        )


def check_language(config: Config, composition: Composition, source: Source, network: Network) -> None:
    """Refuse what is not defined for a language model, and a model that does not fit the text."""
    found, known = network.vocabulary, source.vocabulary
    if found and not known:
        raise ConfigError(
            f"backbone.name: found {config.backbone.name}, a language model, for {source.name}, which has one label "
            f"per sample; use another backbone, or benchmark=language_model"
        )
    if not known:
        return
    if not found:
        raise ConfigError(
            f"backbone.name: found {config.backbone.name} for {source.name}, of which every token is predicted; use "
            f"backbone=decoder"
        )
    if found != known:
        raise ConfigError(
            f"backbone.vocabulary: found {found}, but the tokenizer of {source.name} has {known} ids; set "
            f"backbone.vocabulary={known}"
        )
    problems = Problems()
    for component in composition:
        if not component.per_token:
            problems.add(ConfigError(
                f"strategy: '{component.name}' is not defined for a language model, which predicts tokens and no "
                f"classes; leave it out, or set per_token = True in its class if it is"
            ))  # fmt: skip
    if named_plugins(config.components):
        problems.add(ConfigError("components.avalanche: found plugins, which expect classes; leave them out"))
    if config.benchmark.protocol in ("permuted", "rotated"):
        problems.add(ConfigError(
            f"benchmark.protocol: found {config.benchmark.protocol} for text; use class_incremental, in which every "
            f"domain is a class"
        ))  # fmt: skip
    if process_count(config.trainer) > 1:
        found_devices = f"trainer.devices: found {config.trainer.devices} for a language model"
        problems.add(UnsupportedError(f"{found_devices}, which trains on one; set 1"))
    problems.raise_found()


def report_unused(config: Config, composition: Composition, network: Network) -> None:
    """Log the options that have no effect on this run.

    They are not refused: epochs of a complete config may be lowered for a try.

    Args:
        config: The config.
        composition: Its strategy.
        network: The network before any component has added to it.
    """
    trainer, optimizer, owner = config.trainer, config.optimizer, composition.owner("prediction")
    if len(network.heads) == 1 and hasattr(owner, "policy") and not composition.acting_at("setup_network"):
        assert owner is not None
        _log.warning(
            "components.%s: has no effect, since the network has one exit; add exits to the strategy", owner.name
        )
    for component in composition:
        for option, reason in component.unused_options.items():
            _log.warning("components.%s.%s: has no effect, since %s; leave it out", component.name, option, reason)
    for key, given in (("sync_batchnorm", trainer.sync_batchnorm), ("strategy", trainer.strategy == "ddp")):
        if given and process_count(trainer) == 1:
            _log.warning("trainer.%s: has no effect on one device; leave it out, or set trainer.devices", key)
    if trainer.channels_last is True and not any(weight.ndim == 4 for weight in network.parameters()):
        _log.warning("trainer.channels_last: has no effect, since the backbone has no convolution; leave it out")
    if trainer.budget.is_set or trainer.fast_dev_run:
        return
    for key, first in (
        ("optimizer.milestones", optimizer.milestones[0] if optimizer.milestones else None),
        ("optimizer.step", optimizer.step),
    ):
        if first is not None and first >= trainer.epochs:
            _log.warning(
                "%s: has no effect, since the rate changes after epoch %d of %d; give less, or more epochs",
                key, first, trainer.epochs,
            )  # fmt: skip
    if trainer.eval_every > trainer.epochs:
        _log.warning(
            "trainer.eval_every: has no effect, found %d for %d epochs; give at most %d",
            trainer.eval_every, trainer.epochs, trainer.epochs,
        )  # fmt: skip
