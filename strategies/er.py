"""Experience replay: join batches with samples from a replay buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clframe.errors import ConfigError
from clframe.replay.joining import ReplayComponent


@dataclass(frozen=True, kw_only=True)
class ER(ReplayComponent):
    """Experience replay (ER): join every batch with samples of earlier classes from a small replay buffer.

    A batch of B new samples is followed by replayed ones, drawn with replacement; the cross-entropy is taken over
    both. Rolnick et al., "Experience Replay for Continual Learning" (2019); Chaudhry et al., "On Tiny Episodic
    Memories in Continual Learning" (2019).

    Use it wherever samples may be stored: it is the first method to try, and the buffer from which other components
    read replayed samples. Cost: the buffer, stored in the data's own format, and training on the replayed samples:
    batches twice as long with the defaults, or more steps, depending on ``replay``.

    Args:
        memory: Buffer size in samples: total, or per class.
        budget: ``total`` divides ``memory`` among the classes seen so far, ``per_class`` gives it to each.
        selection: ``balanced`` stores the same number per class, at random; ``herding`` those nearest to the class mean
            in feature space (iCaRL); ``random`` the same number per experience; ``reservoir`` every sample seen so far
            with the same probability.
        replay: How the buffer joins training. ``extra`` replays ``ceil(ratio * B)`` samples with each batch of
            B = ``trainer.batch_size`` new ones, ``fixed`` always ``replayed``. ``half`` keeps joined batches at
            ``trainer.batch_size``: half new (rounded up) and half replayed, so an epoch has twice the steps (ER and
            DER++ as in the literature). ``concatenate`` merges the buffer with the new data; every epoch visits each
            sample of both once, in one shuffled order (iCaRL, BiC, "LwF + memory").
        ratio: With ``extra``, replayed samples per new one; 1 makes half of every joined batch old, in batches of
            twice ``trainer.batch_size``.
        replayed: Samples replayed with each batch if ``replay`` is ``fixed``.
        update: When the buffer admits samples. ``experience``: at its end, chosen from all its samples; ``step``: after
            every step, as published for online streams, with selection ``reservoir``. Then samples of the current
            experience are replayed too, and with several epochs a sample is offered once per epoch. With
            ``trainer.accumulate`` only the last batch of each update is offered.
        batches: Whether new and replayed samples pass through the network ``joint``, or ``apart``, each with its own
            batch normalization statistics.
        scale: Weight of a replayed sample in the cross-entropy; a new one has weight 1. ``concatenate`` does not
            distinguish them, so it accepts 1 only.
    """

    name: ClassVar[str] = "er"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    weight: ClassVar[str] = "scale"

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Validate the options."""
        super().__post_init__()
        where = f"components.{self.name}.scale"
        if not self.scale >= 0:
            raise ConfigError(f"{where}: found {self.scale}; give a number of at least 0")
        if self.replay == "concatenate" and self.scale not in (0, 1):
            raise ConfigError(
                f"{where}: found {self.scale} with replay concatenate, which gives all samples the same weight; "
                f"leave it at 1, or use replay extra, fixed or half"
            )

    @property
    def replay_weight(self) -> float:
        """Weight of a replayed sample in the cross-entropy."""
        return self.scale

    def check(self, *, classes: int) -> None:
        """Raise ConfigError if a buffer divided among classes has no room for one sample of each."""
        if self.selection in ("balanced", "herding"):
            super().check(classes=classes)
