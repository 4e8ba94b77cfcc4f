"""Public functions that take a config: train, extend and explain a run."""

from __future__ import annotations

import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clframe.accounting import count_macs, count_parameters, stage_macs
from clframe.build import Setup, build, lightning_options, load_checked, on_cuda
from clframe.config.load import change_config
from clframe.config.named import named_plugins
from clframe.config.schema import Config
from clframe.config.trainer import TrainerConfig
from clframe.config.typed import PLACEMENT, as_tree, to_yaml
from clframe.core import Composition
from clframe.data.benchmark import Benchmark
from clframe.data.source import Source
from clframe.errors import ClframeError, ConfigError, DivergenceError, Interrupted, RunFolderError, UnsupportedError
from clframe.files import write_atomically
from clframe.metrics.confusion import MOST_SHOWN
from clframe.optimization import build_average, build_groups, build_optimizer, build_scheduler
from clframe.planning import fit_memory, plan_training
from clframe.report.confusion import write_confusion
from clframe.report.explanation import explanation
from clframe.report.writing import write_figures
from clframe.results import Result, summarize
from clframe.run_folder import DEVELOPMENT, RunFolder, strategy_label
from clframe.seeding import torch_settings
from clframe.stream import check_trained_data
from clframe.training.devices import process_count, threads_of_process, training_devices

if TYPE_CHECKING:
    from clframe.targets.extension import Extension
    from clframe.training.budget import TrainingPlan
    from clframe.training.distributed import Group
    from clframe.training.peers import Peers
    from clframe.training.session import Progress, Session

_log = logging.getLogger(__name__)
DEVELOPMENT_BATCHES = 2
"""Batches of an epoch, and of the evaluation of an experience, in a development run."""


def run(
    config: str | Config = "quickstart",
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    folder: str | Path | None = None,
    on_built: Callable[[Setup], None] | None = None,
    on_evaluated: Callable[[Progress], None] | None = None,
) -> Result:
    """Train and evaluate on every experience of a benchmark; what ``clframe run`` does.

    Args:
        config: A config's name, path, or typed config.
        overrides: Like those of the command line, ``"trainer.epochs=3"``.
        output: Folder for run folders; None takes the config's (``runs``).
        resume: A run folder to resume; its own config is used and ``config`` is ignored. Of the overrides only
            ``trainer.devices`` and ``trainer.strategy`` are allowed.
        folder: Folder of this run. The same call again continues the run in it, if it is not finished; a run of
            another config is refused. None creates a folder below ``output``, named by strategy, seed and time.
        on_built: Called once with the objects of the run, before any training.
        on_evaluated: Called with the progress after every experience.

    Returns:
        The result, as written to ``results.json``.

    Raises:
        ClframeError: Anything a user can fix, in one line.
        Interrupted: A KeyboardInterrupt during training; its ``folder`` can be resumed.
    """
    if folder is not None and (resume is not None or output is not None):
        raise ConfigError(f"folder: found {'resume' if resume is not None else 'output'} as well; give one of them")
    if resume is not None:
        other = [text for text in overrides if text.partition("=")[0].strip() not in PLACEMENT]
        if other:
            raise ConfigError(
                f"resume: found {other[0]}; leave it out, as a resumed run uses the config it started with on other "
                f"devices at most ({', '.join(PLACEMENT)})"
            )
        from clframe.targets.loading import read_config
        from clframe.targets.portable import is_portable

        place = RunFolder.open(Path(resume))
        if is_portable(place.path):
            raise RunFolderError(
                f"resume: {resume} is a copy of a model without the state of its run; resume the run itself"
            )
        config = read_config(place)
        if overrides:
            config = change_config(config, overrides, benchmark={})
        _refuse_plugins(config, place)
    elif isinstance(config, str):
        config = load_checked(config, overrides)
    elif overrides:
        raise ConfigError("run: overrides need a config's name; change a typed config with dataclasses.replace")
    if output is not None and resume is None:
        config = replace(config, output=str(output))
    setup = build(config, needs_earlier=resume is None)
    if resume is None:  # the config of a run has the size that was chosen
        setup = fit_memory(setup, _session)
    resumes = resume is not None
    if resume is None:
        place, resumes = _new_folder(setup.config, folder)
    try:
        if on_built is not None:
            on_built(setup)
    except BaseException:
        place.discard()
        raise
    return _execute(setup, place, resumes=resumes, claimed=resumes and resume is None, on_evaluated=on_evaluated)


def _new_folder(config: Config, path: str | Path | None) -> tuple[RunFolder, bool]:
    """The folder of a run that is not resumed by name, and whether the run in it has been started before."""
    from clframe.targets.unfinished import claim_folder, find_unfinished

    if path is not None:
        place, started = claim_folder(Path(path), config)
        if started:
            _refuse_plugins(config, place)
        return place, started
    unfinished = find_unfinished(config)
    if unfinished is not None:
        _log.info(
            "found an unfinished run of this config in %s; a new run is started, continue that one with clframe run "
            "--resume %s", unfinished, shlex.quote(str(unfinished)),
        )  # fmt: skip
    label = strategy_label(config.strategy, plugins=[name for name, _ in named_plugins(config.components)])
    return RunFolder.create(Path(config.output), name=config.name, seed=config.seed, label=label), False


def extend(
    run: str | Path,
    data: Source | Benchmark | Sequence[str] | str,
    overrides: Sequence[str] = (),
    *,
    earlier: Sequence[str] = (),
    output: str | Path | None = None,
    on_planned: Callable[[Extension], None] | None = None,
    on_evaluated: Callable[[Progress], None] | None = None,
) -> Result:
    """Learn new experiences on top of a finished run, in a new run folder; what ``clframe extend`` does.

    The strategy, with its buffers, teachers, importances, exits, calibration and experts, continues as it is. Classes
    are matched by name: a known name adds samples to its class. Inputs are normalized as those of the first data. A
    chain of extensions equals one run over the same stream.

    Args:
        run: Folder of the finished run, which is not changed.
        data: The new data: overrides such as ``["benchmark=image_folder", "benchmark.path=photos"]``, or a source or
            benchmark in memory.
        overrides: Further overrides: of the trainer, the optimizer and the benchmark.
        earlier: Other locations of earlier data that are not where the config says: ``benchmark.path=DIR``.
        output: Folder for run folders; None takes that of the run's config.
        on_planned: Called with what will be learned, before anything is written.
        on_evaluated: Called with the progress after every experience.

    Returns:
        The result over old and new experiences, as written to ``results.json``.

    Raises:
        ClframeError: Anything a user can fix, in one line.
        Interrupted: A KeyboardInterrupt during training; its ``folder`` can be resumed.
    """
    from clframe.targets.extension import plan_extension

    listed: list[str] = []
    source: Source | Benchmark | None = None
    if isinstance(data, (Source, Benchmark)):
        source = data
    else:
        listed = [data] if isinstance(data, str) else list(data)
    planned = plan_extension(run, [*listed, *overrides], data=source, earlier=earlier, output=output)
    if source is not None and process_count(planned.setup.config.trainer) > 1:
        raise UnsupportedError(
            "extend: found data in memory for several devices, each of whose processes reads its data; write the data "
            "to files, or set trainer.devices=1"
        )
    fit_memory(planned.setup, _session)  # refuses a limit, since the buffer has its size already
    if on_planned is not None:
        on_planned(planned)
    return _execute(planned.setup, planned.create(), resumes=True, on_evaluated=on_evaluated)


def _execute(
    setup: Setup,
    folder: RunFolder,
    *,
    resumes: bool,
    claimed: bool = False,
    on_evaluated: Callable[[Progress], None] | None,
) -> Result:
    """Train in a run folder; one that was created for it is removed if training cannot begin.

    Args:
        setup: The objects of the run.
        folder: Its folder.
        resumes: Whether the run in the folder has been started before.
        claimed: Whether it is resumed because the same command was given again.
        on_evaluated: Called with the progress after every experience.
    """
    from clframe.targets.loading import read_config

    config, trainer = setup.config, setup.config.trainer
    with folder.lock(), _settings(trainer), ExitStack() as stack:
        try:
            if resumes:
                folder.prepare_resume()
            if not resumes or read_config(folder).trainer.devices != trainer.devices:
                folder.write_config(to_yaml(config))
                if setup.benchmark.tokenizer:
                    write_atomically(folder.path / "tokenizer.json", setup.benchmark.tokenizer)
            group, peers = None, None
            if process_count(trainer) > 1:
                group, peers = stack.enter_context(_processes(trainer, folder, resumes=resumes))
            session = _session(setup, folder, on_evaluated, group, plan=plan_training(setup, _session))
            if peers is not None:
                peers.on_stuck = session.note_stuck
        except BaseException:
            folder.discard()
            raise
        started = 0
        try:
            explained = nullcontext() if peers is None else peers.explain_failures()
            if resumes:
                with explained:
                    started = session.resume()
                count = len(setup.benchmark)
                position = session.position
                if claimed and started < count:
                    where = position or ("the start" if not started else f"the start of experience {started + 1}")
                    _log.info("found an unfinished run of this config in %s; continuing from %s", folder.path, where)
                elif position is not None:
                    _log.info("resumed at %s", position)
                remaining = [session.learner.training_experiences(i, count) for i in range(started, count)]
                check_trained_data(config, setup.benchmark, {j for sources in remaining for j in sources})
                if started == count:
                    _log.info("%s: is finished; nothing to train", folder.path)
            if trainer.fast_dev_run:
                epochs = _development_epochs(setup.composition)
                _log.info(
                    "development run: %d experience(s), %s of %d batches each, evaluation on %d batches per "
                    "experience; its results are not those of the config%s",
                    len(setup.benchmark), "one epoch" if epochs == 1 else f"{epochs} epochs", DEVELOPMENT_BATCHES,
                    DEVELOPMENT_BATCHES,
                    "; trainer.fast_dev_run=2 adds the second experience, where replay and distillation begin"
                    if trainer.fast_dev_run is True and setup.config.benchmark.experiences > 1 else "",
                )  # fmt: skip
            with nullcontext() if peers is None else peers.explain_failures():
                progress = session.run()
            stack.close()  # the other processes have nothing to do with the results
            return _finish(setup, folder, session, progress)
        except ClframeError as error:
            session.note_failure(error)
            if resumes and session.progress.finished == started and not isinstance(error, DivergenceError):
                folder.discard()  # of an extension that learned nothing; a run that existed before is kept
            raise
        except KeyboardInterrupt as stop:
            raise Interrupted(folder.path, plugins=_plugin_names(config)) from stop
        except Exception as error:
            session.note_failure(error)
            raise
        finally:
            session.close()


def _settings(trainer: TrainerConfig) -> AbstractContextManager[None]:
    """Torch's settings of a run, in each of its processes."""
    cuda = on_cuda(trainer)
    threads = threads_of_process(trainer, cuda=cuda)
    return torch_settings(threads=threads, deterministic=trainer.deterministic is True, cuda=cuda)


def _processes(
    trainer: TrainerConfig, folder: RunFolder, *, resumes: bool
) -> AbstractContextManager[tuple[Group, Peers]]:
    """The processes of a run on several devices, while it trains."""
    from clframe.training.peers import train_together

    request = {"folder": str(folder.path.resolve()), "resumes": resumes, "command": sys.argv}
    advice = f"resume with clframe run --resume {shlex.quote(str(folder.path))}"
    return train_together(training_devices(trainer, cuda=on_cuda(trainer)), request, advice=advice)


def train_along(folder: str, *, rank: int, port: int, resumes: bool, on_ready: Callable[[], None]) -> None:
    """Train the run in a folder together with the process that has started this one, and write nothing.

    Args:
        folder: The run folder.
        rank: Number of this process; the first one has 0.
        port: Of the store through which the processes find each other.
        resumes: Whether the run in the folder has been started before.
        on_ready: Called when everything is built.
    """
    from clframe.targets.loading import read_config
    from clframe.training.distributed import join_group, open_store
    from clframe.training.launch import launch as launch  # before it is needed: the import takes seconds

    place = RunFolder.open(Path(folder))
    setup = build(read_config(place))
    trainer = setup.config.trainer
    devices = training_devices(trainer, cuda=on_cuda(trainer))
    with _settings(trainer):
        on_ready()
        group = join_group(open_store(port, size=len(devices), first=False), rank=rank, devices=devices)
        session = _session(setup, place, None, group, plan=plan_training(setup, _session))
        if resumes:
            session.resume()
        session.run()
        group.barrier()


def explain(config: str | Config = "quickstart", overrides: Sequence[str] = ()) -> str:
    """Describe a run without training: config, stream, hooks, loss terms, slots, sizes and costs."""
    if isinstance(config, str):
        config = load_checked(config, overrides)
    setup = build(config)
    setup = fit_memory(setup, _session)
    network, plan = setup.network, plan_training(setup, _session)
    _set_up_only(setup)
    network.grow(range(len(setup.benchmark.class_order)))
    return explanation(
        config=to_yaml(setup.config),
        composition=setup.composition,
        benchmark=setup.benchmark,
        network=network,
        plugins=named_plugins(setup.config.components),
        budget="" if plan is None else plan.table(),
    )


def _set_up_only(setup: Setup) -> None:
    """Set up everything that trains, as a run does, and write nothing: what a run would refuse is refused here.

    The network gets the exits and modules of the components.
    """
    quiet = replace(setup.config.trainer, loggers=(), figures="none", progress=False)
    with tempfile.TemporaryDirectory() as folder:
        alone = replace(setup, config=replace(setup.config, trainer=quiet))
        _session(alone, RunFolder(Path(folder)), None).close()


def _session(
    setup: Setup,
    folder: RunFolder,
    on_evaluated: Callable[[Progress], None] | None,
    group: Group | None = None,
    *,
    plan: TrainingPlan | None = None,
) -> Session:
    from clframe.training.launch import launch
    from clframe.training.trainer_options import early_stopping

    config, trainer = setup.config, setup.config.trainer
    options = lightning_options(trainer, folder.path)
    return launch(
        network=setup.network,
        composition=setup.composition,
        benchmark=setup.benchmark,
        optimizer=build_optimizer(config.optimizer),
        scheduler=build_scheduler(config.optimizer, trainer.epochs),
        groups=build_groups(config.optimizer),
        seed=config.seed,
        engine=trainer.engine,
        accelerator="cuda" if trainer.accelerator == "gpu" else trainer.accelerator,
        devices=[trainer.devices[0]] if isinstance(trainer.devices, tuple) else 1,  # of one process
        precision=trainer.precision,
        epochs=_development_epochs(setup.composition) if trainer.fast_dev_run else trainer.epochs,
        batch_size=trainer.batch_size,
        drop_last=trainer.drop_last,
        eval_batch_size=_evaluation_batch(trainer),
        clip=trainer.gradient_clip,
        on_nonfinite=trainer.on_nonfinite,
        average=build_average(trainer),
        accumulate=trainer.accumulate,
        eval_every=trainer.eval_every,
        limit_batches=DEVELOPMENT_BATCHES if trainer.fast_dev_run else None,
        channels_last=trainer.channels_last is True,
        capture=trainer.capture,
        compile=trainer.compile,
        plan=plan,
        trainer_options=options,
        early_stopping=None if trainer.engine == "trainer" else early_stopping(trainer.callbacks),
        log_every=trainer.log_every,
        progress=trainer.progress,
        tensorboard="tensorboard" in trainer.loggers,
        csv="csv" in trainer.loggers,
        figures=trainer.figures,
        record_activity=trainer.record_activity,
        folder=folder.path,
        config_text=to_yaml(config),
        checkpoint_period=trainer.checkpoint.period,
        plugins=named_plugins(config.components),
        group=group,
        sync_batchnorm=trainer.sync_batchnorm,
        on_evaluated=on_evaluated,
    )


def _development_epochs(composition: Composition) -> int:
    return max((component.fewest_epochs for component in composition), default=1)


def _evaluation_batch(trainer: TrainerConfig) -> int:
    """Samples per batch of an evaluation: on a CPU, a development run evaluates on as few as it trains on.

    On CUDA its batches are those of a complete run, because the memory that it needs is measured by development runs.
    """
    assert trainer.eval_batch_size != "auto"  # replaced when the run was built
    if trainer.fast_dev_run and not on_cuda(trainer):
        return min(trainer.eval_batch_size, trainer.batch_size)
    return trainer.eval_batch_size


def _finish(setup: Setup, folder: RunFolder, session: Session, progress: Progress) -> Result:
    config, benchmark, network = setup.config, setup.benchmark, setup.network
    confusion = [] if progress.confusion_CC is None else progress.confusion_CC.tolist()
    result = summarize(
        progress.tallies,
        # In the name, so that no table or figure shows its numbers as those of a run.
        name=f"{config.name} {DEVELOPMENT}" if config.trainer.fast_dev_run else config.name,
        strategy=setup.config.strategy,
        benchmark=benchmark.name,
        backbone=config.backbone.name,
        seed=config.seed,
        class_order=benchmark.class_order,
        experiences=benchmark.classes,
        parameters=count_parameters(network),
        macs=count_macs(network, benchmark.input_shape),
        train_seconds=progress.train_seconds,
        steps=progress.steps,
        state_bytes=session.state_bytes(),
        versions=folder.versions(),
        run_folder=folder.path,
        baseline=progress.baseline,
        loss_terms=progress.loss_terms,
        diverged=progress.diverged,
        skipped_updates=progress.skipped,
        exit_names=network.exit_names,
        exits=progress.exits,
        activity=progress.activity,
        confusion=confusion,
        class_names=benchmark.class_names,
    )
    if len(confusion) > MOST_SHOWN:
        write_confusion(confusion, benchmark.class_order, folder.path)
    write_ledger = partial(
        folder.write_ledger, network, progress.steps, progress.train_seconds, result.state_bytes,
        ledger=session.ledger, counts=stage_macs(network),
    )  # fmt: skip
    write_ledger()
    result.write(folder.path / "results.json")
    # After the results: a failure to draw must not lose a run that took hours.
    try:
        session.write_hyper_parameters(as_tree(config), result.metrics)
        if config.trainer.figures != "none":
            start = time.perf_counter()
            write_figures(result, folder.path / "figures", session.figures)
            session.ledger.add_time("figures", seconds=time.perf_counter() - start)
            write_ledger()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        _log.warning("%s: figures could not be drawn (%s); results.json is complete", folder.path, reason)
    return result


def _plugin_names(config: Config) -> str:
    return ", ".join(name for name, _ in named_plugins(config.components))


def _refuse_plugins(config: Config, folder: RunFolder) -> None:
    """Refuse to resume a run with Avalanche plugins: checkpoints do not contain their state."""
    names = _plugin_names(config)
    if names:
        raise UnsupportedError(
            f"{folder.path}: has Avalanche plugins ({names}), whose state is not in checkpoints; start a new run"
        )
