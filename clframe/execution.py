"""Execution of a run in its folder: processes, training, results."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clframe.accounting import count_macs, count_parameters, cumulative_macs, stage_macs
from clframe.accounting.ledger_file import write_ledger
from clframe.build import Setup, build
from clframe.config.named import plugin_list
from clframe.config.trainer import TrainerConfig
from clframe.config.typed import as_tree, to_yaml
from clframe.device_defaults import on_cuda
from clframe.environment import versions
from clframe.errors import ClframeError, DivergenceError, Interrupted, reason_of
from clframe.files import write_atomically
from clframe.metrics.confusion import MOST_SHOWN
from clframe.own_code import import_options
from clframe.planning import plan_training
from clframe.report.confusion import write_confusion
from clframe.report.writing import write_figures
from clframe.results import Result, refuse_newer_results, summarize
from clframe.run_folder import DEVELOPMENT, RunFolder
from clframe.seeding import torch_settings
from clframe.sessions import DEVELOPMENT_BATCHES, development_epochs, new_session
from clframe.stream import check_trained_data
from clframe.training.devices import process_count, threads_of_process, training_devices

if TYPE_CHECKING:
    from clframe.training.distributed import Group
    from clframe.training.peers import Peers
    from clframe.training.run_progress import Progress
    from clframe.training.session import Session

_log = logging.getLogger(__name__)


def execute(
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
                refuse_newer_results(folder.path / "results.json")
                folder.prepare_resume()
            else:
                folder.write_config(to_yaml(config))
                if setup.benchmark.tokenizer:
                    write_atomically(folder.path / "tokenizer.json", setup.benchmark.tokenizer)
            group, peers = None, None
            if process_count(trainer) > 1:
                group, peers = stack.enter_context(_processes(trainer, folder, resumes=resumes))
            session = new_session(
                setup, folder, on_evaluated=on_evaluated, group=group, plan=plan_training(setup)
            )
            if peers is not None:
                peers.on_stuck = session.note_stuck
        except BaseException:
            folder.discard()
            raise
        started = 0
        try:
            explain_failures = nullcontext if peers is None else peers.explain_failures
            if resumes:
                with explain_failures():
                    started = session.resume()
                _note_resumption(setup, folder, session, started, claimed=claimed)
                # A finished run keeps the devices that it was trained on.
                if started < len(setup.benchmark) and read_config(folder).trainer.devices != trainer.devices:
                    folder.write_config(to_yaml(config))
            if trainer.fast_dev_run:
                _note_development(setup)
            with explain_failures():
                progress = session.run()
            stack.close()  # the other processes have nothing to do with the results
            return _finish(setup, folder, session, progress)
        except ClframeError as error:
            session.note_failure(error)
            if resumes and session.progress.finished == started and not isinstance(error, DivergenceError):
                folder.discard()  # of an extension that learned nothing; a run that existed before is kept
            raise
        except KeyboardInterrupt as stop:
            raise Interrupted(
                folder.path, plugins=plugin_list(config.components), options=import_options()
            ) from stop
        except Exception as error:
            session.note_failure(error)
            raise
        finally:
            session.close()


def _note_resumption(setup: Setup, folder: RunFolder, session: Session, started: int, *, claimed: bool) -> None:
    """Log where training continues, and check that the data it needs are there.

    Args:
        setup: The objects of the run.
        folder: Its folder.
        session: The resumed session.
        started: Number of finished experiences.
        claimed: As for :func:`execute`.
    """
    count, position = len(setup.benchmark), session.position
    if claimed and started < count:
        where = position or ("the start" if not started else f"the start of experience {started + 1}")
        _log.info("found an unfinished run of this config in %s; continuing from %s", folder.path, where)
    elif position is not None:
        _log.info("resumed at %s", position)
    remaining = [session.learner.training_experiences(i, count) for i in range(started, count)]
    check_trained_data(setup.config, setup.benchmark, {j for sources in remaining for j in sources})
    if started == count:
        _log.info("%s: is finished; nothing to train", folder.path)


def _note_development(setup: Setup) -> None:
    """Log that the results of a development run are not those of its config."""
    trainer, epochs = setup.config.trainer, development_epochs(setup.composition)
    _log.info(
        "development run: %d experience(s), %s of %d batches each, evaluation on %d batches per "
        "experience; its results are not those of the config%s",
        len(setup.benchmark), "one epoch" if epochs == 1 else f"{epochs} epochs", DEVELOPMENT_BATCHES,
        DEVELOPMENT_BATCHES,
        "; trainer.fast_dev_run=2 adds the second experience, where replay and distillation begin"
        if trainer.fast_dev_run is True and setup.config.benchmark.experiences > 1 else "",
    )  # fmt: skip


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

    request = {
        "folder": str(folder.path.resolve()), "devices": trainer.devices, "resumes": resumes, "command": sys.argv,
    }  # fmt: skip
    advice = f"resume with {shlex.join(['clframe', 'run', '--resume', str(folder.path), *import_options()])}"
    return train_together(training_devices(trainer, cuda=on_cuda(trainer)), request, advice=advice)


def train_along(
    folder: str,
    *,
    rank: int,
    port: int,
    devices: int | Sequence[int],
    resumes: bool,
    on_ready: Callable[[], None],
) -> None:
    """Train the run in a folder together with the process that has started this one, and write nothing.

    Args:
        folder: The run folder.
        rank: Number of this process; the first one has 0.
        port: Of the store through which the processes find each other.
        devices: ``trainer.devices``, which a resumed run records once it trains on.
        resumes: Whether the run in the folder has been started before.
        on_ready: Called when everything is built.
    """
    from clframe.targets.loading import read_config
    from clframe.training.launch import launch as launch  # before it is needed: the import takes seconds
    from clframe.training.rendezvous import join_group, open_store

    place = RunFolder.open(Path(folder))
    config, count = read_config(place), devices if isinstance(devices, int) else tuple(devices)
    setup = build(replace(config, trainer=replace(config.trainer, devices=count)))
    trainer = setup.config.trainer
    every = training_devices(trainer, cuda=on_cuda(trainer))
    with _settings(trainer):
        on_ready()
        group = join_group(open_store(port, size=len(every), first=False), rank=rank, devices=every)
        session = new_session(setup, place, group=group, plan=plan_training(setup))
        if resumes:
            session.resume()
        session.run()
        group.barrier()


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
        steps=session.ledger.steps(),
        batches=progress.steps,
        state_bytes=session.state_bytes(),
        versions=versions(),
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
    counts = stage_macs(network)
    update_ledger = partial(
        write_ledger, folder.path / "ledger.json", session.ledger, inference_macs=counts,
        exit_macs=dict(zip(network.exit_names, cumulative_macs(network, counts=counts), strict=True)),
        steps=result.steps, batches=progress.steps, train_seconds=progress.train_seconds,
        state_bytes=result.state_bytes,
    )  # fmt: skip
    update_ledger()
    result.write(folder.path / "results.json")
    # After the results: a failure to draw must not lose a run that took hours.
    try:
        session.write_hyper_parameters(as_tree(config), result.metrics)
        if config.trainer.figures != "none":
            start = time.perf_counter()
            write_figures(result, folder.path / "figures", session.figures)
            session.ledger.add_time("figures", seconds=time.perf_counter() - start)
            update_ledger()
    except Exception as error:
        reason = f"{type(error).__name__}: {reason_of(error, most=200)}"
        _log.warning("%s: figures could not be drawn (%s); results.json is complete", folder.path, reason)
    return result
