"""Candidates of a selection drawn by Optuna; see https://optuna.org.

One study for each combination of the other values, all in the file ``.sweep/optuna.log`` of the sweep. A trial is a
candidate with all its runs; one that was running when a sweep was killed is drawn again first.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clframe.errors import UnsupportedError
from clframe.metrics.registry import METRICS
from clframe.run_folder import SWEEP_RECORDS
from clframe.sweep.space import Candidate, Range, Selection, Setting

Evaluate = Callable[[Sequence[Setting]], list[Candidate]]
"""Trains the runs of candidates; returns each with its metric."""


def sample(sweep: Path, base: Setting, chosen: Selection, evaluate: Evaluate, *, jobs: int) -> list[Candidate]:
    """Draw and evaluate ``chosen.trials`` candidates; returns all of them, in the order in which they were drawn.

    Args:
        sweep: Folder of the sweep.
        base: The other values.
        chosen: The selection.
        evaluate: Trains candidates.
        jobs: Candidates that are drawn before the first of them is finished.

    Raises:
        UnsupportedError: Optuna is not installed.
    """
    optuna = _import()
    assert chosen.trials is not None
    study = _study(optuna, sweep, base, chosen)
    found: dict[int, Candidate] = {}
    finished = [t for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
    settings = [_as_setting(trial.params, chosen) for trial in finished]
    if settings:  # their runs are finished, and are read
        found = dict(zip([trial.number for trial in finished], evaluate(settings), strict=True))
    while len(found) < chosen.trials:
        trials = [_ask(study, chosen) for _ in range(min(jobs, chosen.trials - len(found)))]
        candidates = evaluate([_as_setting(trial.params, chosen) for trial in trials])
        for trial, candidate in zip(trials, candidates, strict=True):
            value = candidate.value
            if math.isnan(value):  # worse than any other, so that the sampler avoids its surroundings
                value = math.inf if METRICS.get(chosen.metric).better == "lower" else -math.inf
            study.tell(trial, value, skip_if_finished=True)  # by another sweep on the folder
            found[trial.number] = candidate
    return [found[number] for number in sorted(found)]


def _import() -> Any:
    try:
        import optuna
    except ImportError:
        raise UnsupportedError(
            "select.sampler: optuna is not installed; pip install 'clframe[optuna]', or set sampler: grid"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, sweep: Path, base: Mapping[str, str], chosen: Selection) -> Any:
    """Open the study of a combination; its name has a digest of everything that its trials depend on."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    what = [dict(base), list(chosen.seeds), chosen.metric, {key: repr(value) for key, value in chosen.over.items()}]
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    (sweep / SWEEP_RECORDS).mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(sweep / SWEEP_RECORDS / "optuna.log")))
    study = optuna.create_study(
        study_name=name, storage=storage, load_if_exists=True,
        direction="minimize" if METRICS.get(chosen.metric).better == "lower" else "maximize",
    )  # fmt: skip
    # The number of trials is part of the seed: a sampler that starts again would repeat its first draws.
    study.sampler = optuna.samplers.TPESampler(seed=chosen.seeds[0] + len(study.get_trials(deepcopy=False)))
    for trial in study.get_trials(deepcopy=False):
        if trial.state == optuna.trial.TrialState.RUNNING:
            study.enqueue_trial(trial.params, skip_if_exists=False)
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
    return study


def _ask(study: Any, chosen: Selection) -> Any:
    trial = study.ask()
    for key, values in chosen.over.items():
        if not isinstance(values, Range):
            trial.suggest_categorical(key, list(values))
        elif values.whole:
            step = 1 if values.step is None else int(values.step)
            trial.suggest_int(key, int(values.low), int(values.high), step=step, log=values.log)
        else:
            trial.suggest_float(key, values.low, values.high, step=values.step, log=values.log)
    return trial


def _as_setting(params: Mapping[str, Any], chosen: Selection) -> Setting:
    return {key: params[key] if isinstance(params[key], str) else json.dumps(params[key]) for key in chosen.over}
