"""Checkpoints of finished experiences: what they contain, and how a run continues from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clframe.accounting import Ledger
from clframe.data.benchmark import Benchmark
from clframe.data.digests import StreamDigest
from clframe.errors import RunFolderError, reason_of
from clframe.training.activity_recorder import ActivityRecorder
from clframe.training.checkpoint import decode, encode, load_latest, save_checkpoint
from clframe.training.cost_recorder import CostRecorder
from clframe.training.exit_recorder import ExitRecorder
from clframe.training.run_progress import Progress
from clframe.training.saver import RESTORE_ERRORS, refuse_other_config, refuse_other_samples
from clframe.training.strategy import LightningStrategy
from clframe.training.trained import describe_data, recorded_digest


class RunSaver:
    """Writes and reads the checkpoints of a run between experiences.

    Args:
        strategy: The strategy, whose network, components and clock are saved.
        benchmark: The stream.
        costs: The recorder, whose ledger is saved.
        exits: The recorder of exits, which compares with representations after the first experience.
        activity: The recorder of activity, which compares with the neurons active right after learning an experience.
        records_activity: Whether the run records activity.
        folder: Folder of checkpoints.
        config: The resolved config as text; a checkpoint of another one is refused.
    """

    def __init__(
        self,
        strategy: LightningStrategy,
        benchmark: Benchmark,
        *,
        costs: CostRecorder,
        exits: ExitRecorder,
        activity: ActivityRecorder,
        records_activity: bool,
        folder: Path,
        config: str,
    ) -> None:
        assert strategy.learner is not None
        self._strategy, self._learner, self._benchmark = strategy, strategy.learner, benchmark
        self._costs, self._exits, self._activity = costs, exits, activity
        self._records_activity = records_activity
        self._folder, self._config = folder, config
        self._recorded: StreamDigest | None = None  # of the checkpoint that the run continues from

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint after the newest experience; returns its path."""
        learner = self._learner
        content: dict[str, Any] = {
            **progress.as_content(),
            "config": self._config,
            "torch": str(torch.__version__),
            "taps": dict(self._exits.reference),
            "active": [dict(rates) for rates in self._activity.learnt],
            "data": describe_data(self._benchmark, recorded=self._recorded),
            "past": learner.past,
            "ledger": self._costs.ledger.as_tree(),
            "network": dict(learner.network.state_dict()),
            "components": learner.state,
            # The scale of 16-bit mixed precision, which a Trainer shares with Fabric; empty without one.
            "precision": dict(self._strategy.fabric._precision.state_dict()),
        }
        if learner.average is not None:
            content["average"] = learner.average.state_dict(learner.network)
        try:
            return save_checkpoint(self._folder, content, finished=progress.finished)
        except RunFolderError:
            for name, state in learner.state.items():
                _name_component(name, state)
            raise

    def load(self) -> Progress | None:
        """Restore the newest checkpoint; returns the progress, None without a checkpoint.

        Raises:
            RunFolderError: It is of another config or of other data, or does not fit.
        """
        content = load_latest(self._folder, device=self._strategy.device)
        if content is None:
            return None
        refuse_other_config(content, self._config, folder=self._folder)
        self._check_tokenizer(content)
        self._recorded = recorded_digest(content)
        refuse_other_samples(content, self._benchmark, folder=self._folder, begun=content["finished"])
        try:
            return self._restore(content)
        except RESTORE_ERRORS as error:
            reason = reason_of(error, most=200)
            raise RunFolderError(
                f"{self._folder}: the newest checkpoint does not fit this run ({reason}); delete it to resume "
                f"from the one before"
            ) from error

    def _check_tokenizer(self, content: Mapping[str, Any]) -> None:
        """Refuse text whose ids mean something else: a tokenizer that is trained on the text changes with it."""
        recorded = dict(content.get("data", {}).get("inputs", {})).get("tokenizer", "")
        if self._benchmark.vocabulary and recorded not in ("", self._benchmark.inputs.tokenizer):
            raise RunFolderError(
                f"{self._folder}: the text has changed since the run began, and with it the tokenizer and the meaning "
                f"of ids; restore the text"
            )

    def _restore(self, content: Mapping[str, Any]) -> Progress:
        strategy, learner = self._strategy, self._learner
        progress = Progress.of(content, experiences=len(self._benchmark), records_activity=self._records_activity)
        learner.network.load_state_dict(content["network"])
        strategy.model.to(strategy.device)
        learner.past = tuple(content["past"])
        learner.state = decode(content["components"], learner.network)
        if learner.average is not None:
            learner.average.load_state_dict(content.get("average"), learner.network)
        self._exits.reference = content["taps"]
        self._activity.learnt = list(content.get("active", ()))
        if "ledger" in content:
            self._costs.ledger = Ledger.of(content["ledger"])
            # A checkpoint cannot hold its own size, so the row that follows it in an uninterrupted run is added here.
            self._costs.ledger.add_bytes("checkpoint", bytes=content["file_bytes"], experience=progress.finished - 1)
        if content.get("precision"):
            strategy.fabric._precision.load_state_dict(content["precision"])
        clock = strategy.clock
        clock.train_iterations = clock.total_iterations = progress.steps
        clock.train_exp_counter = self._benchmark.sub_experiences(progress.finished - 1).stop
        return progress


def _name_component(component: str, state: Any) -> None:
    """Name the component whose state has a value that no checkpoint holds.

    Raises:
        RunFolderError: It is this one.
    """
    try:
        encode(state)
    except RunFolderError as error:
        raise RunFolderError(f"component '{component}': {error}") from None
