"""Public functions that take a config: train, extend and explain a run."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clframe.build import Setup, build, load_checked
from clframe.config.load import change_config, require_list
from clframe.config.named import named_plugins, plugin_list
from clframe.config.schema import Config
from clframe.config.typed import PLACEMENT, check_typed, to_yaml
from clframe.data.benchmark import Benchmark
from clframe.data.source import Source
from clframe.errors import ConfigError, RunFolderError, UnsupportedError
from clframe.execution import execute
from clframe.files import to_path
from clframe.options import format_value
from clframe.planning import fit_memory, plan_training, training_experiences
from clframe.process_state import own_process
from clframe.report.explanation import explanation
from clframe.results import Result
from clframe.run_folder import RunFolder, strategy_label
from clframe.sessions import set_up_only
from clframe.training.devices import process_count

if TYPE_CHECKING:
    from clframe.nn import Network
    from clframe.targets.extension import Extension
    from clframe.training.run_progress import Progress

_log = logging.getLogger(__name__)


@own_process("clframe.run", trains=True)
def run(
    config: str | Path | Config = "quickstart",
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
        output: Folder for run folders; None takes the config's (``runs``). Not with ``resume``.
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
    require_list(overrides)
    if resume is None:
        config = _named(config, where="run")
    for name, call in (("on_built", on_built), ("on_evaluated", on_evaluated)):
        if call is not None and not callable(call):
            raise ConfigError(f"run: {name}: found {format_value(call)}; give a function")
    if folder is not None and (resume is not None or output is not None):
        raise ConfigError(f"folder: found {'resume' if resume is not None else 'output'} as well; give one of them")
    if resume is not None:
        if output is not None:
            raise ConfigError("output: found resume as well; leave it out, as a resumed run stays in its folder")
        other = [text for text in overrides if text.partition("=")[0].strip() not in PLACEMENT]
        if other:
            raise ConfigError(
                f"resume: found {other[0]}; leave it out, as a resumed run uses the config it started with on other "
                f"devices at most ({', '.join(PLACEMENT)})"
            )
        from clframe.targets.loading import read_config
        from clframe.targets.portable import is_portable

        place = RunFolder.open(to_path(resume, where="resume"))
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
    else:
        assert isinstance(config, Config)  # paths are text by now
        config = check_typed(config)
    if output is not None:
        config = replace(config, output=str(to_path(output, where="output")))
    setup = build(config, needs_earlier=resume is None)
    if resume is None:  # the config of a run has the size that was chosen
        setup = fit_memory(setup)
    resumes = resume is not None
    if resume is None:
        place, resumes = _new_folder(setup.config, folder)
    try:
        if on_built is not None:
            on_built(setup)
    except BaseException:
        place.discard()
        raise
    return execute(setup, place, resumes=resumes, claimed=resumes and resume is None, on_evaluated=on_evaluated)


def _named(config: str | Path | Config, *, where: str) -> str | Config:
    """A typed config, or the name or path of one as text."""
    if isinstance(config, Path):
        return str(config)
    if not isinstance(config, (str, Config)):
        raise ConfigError(f"{where}: found {format_value(config)}; give the name or path of a config, or a Config")
    return config


def _new_folder(config: Config, path: str | Path | None) -> tuple[RunFolder, bool]:
    """The folder of a run that is not resumed by name, and whether the run in it has been started before."""
    from clframe.targets.unfinished import claim_folder, find_unfinished

    if path is not None:
        place, started = claim_folder(to_path(path, where="folder"), config)
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


@own_process("clframe.api.extend", trains=True)
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

    require_list(overrides)
    require_list(earlier, where="earlier")
    listed: list[str] = []
    source: Source | Benchmark | None = None
    if isinstance(data, (Source, Benchmark)):
        source = data
    else:
        given = [data] if isinstance(data, str) else data
        require_list(given, where="data")
        listed = list(given)
    planned = plan_extension(run, [*listed, *overrides], data=source, earlier=earlier, output=output)
    if source is not None and process_count(planned.setup.config.trainer) > 1:
        raise UnsupportedError(
            "extend: found data in memory for several devices, each of whose processes reads its data; write the data "
            "to files, or set trainer.devices=1"
        )
    fit_memory(planned.setup)  # refuses a limit, since the buffer has its size already
    if on_planned is not None:
        on_planned(planned)
    return execute(planned.setup, planned.create(), resumes=True, on_evaluated=on_evaluated)


@own_process("clframe.explain", trains=False)
def explain(config: str | Path | Config = "quickstart", overrides: Sequence[str] = ()) -> str:
    """Describe a run without training: config, stream, hooks, loss terms, slots, sizes and costs."""
    config = _named(config, where="explain")
    if isinstance(config, str):
        config = load_checked(config, overrides)
    elif overrides:
        raise ConfigError("explain: overrides need a config's name; change a typed config with dataclasses.replace")
    else:
        config = check_typed(config)
    setup = build(config)
    setup = fit_memory(setup)
    network, plan = setup.network, plan_training(setup)
    set_up_only(setup)
    _grow_as_trained(network, setup)
    return explanation(
        config=to_yaml(setup.config),
        composition=setup.composition,
        benchmark=setup.benchmark,
        network=network,
        plugins=named_plugins(setup.config.components),
        budget="" if plan is None else plan.table(),
    )


def _grow_as_trained(network: Network, setup: Setup) -> None:
    """Grow the heads experience by experience: an exit may have a head for the new classes of each."""
    known = set[int]()
    for sources in training_experiences(setup):
        known.update(*(setup.benchmark.classes[source] for source in sources))
        network.grow(sorted(known))


def _refuse_plugins(config: Config, folder: RunFolder) -> None:
    """Refuse to resume a run with Avalanche plugins: checkpoints do not contain their state."""
    names = plugin_list(config.components)
    if names:
        raise UnsupportedError(
            f"{folder.path}: has Avalanche plugins ({names}), whose state is not in checkpoints; start a new run"
        )
