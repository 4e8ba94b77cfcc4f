"""Dark experience replay: match the logits stored with replayed samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from clframe.core.types import State, Step
from clframe.errors import ConfigError
from clframe.functional.losses import Columns, logit_matching
from clframe.replay.buffers import Selection
from clframe.replay.joining import ReplayComponent


@dataclass(frozen=True, kw_only=True)
class DER(ReplayComponent):
    """Dark experience replay (DER): penalize changes of the logits that were stored with replayed samples.

    The loss is ``CE(new) + alpha * mean (logits - stored)^2``: every exit is compared with its own logits, stored with
    each sample of the buffer; replayed samples do not enter the cross-entropy. Use it as a stronger form of replay if
    logits fit in memory. Cost: classes times exits numbers per stored sample, no teacher and no additional forward
    pass; of a language model, the 16 largest logits of every token are stored and matched. Buzzega et al., "Dark
    Experience for General Continual Learning: a Strong, Simple Baseline" (2020).

    With ``update: experience``, samples and logits are stored at the end of each experience, not augmented and in
    evaluation mode, as in the code of the paper on auxiliary classifiers (Szatkowski et al., 2025) and in Avalanche.
    The original stores them after every step, with the logits of the training pass, which ``update: step`` does. On an
    online stream with ``benchmark.boundaries: true``, the default, an experience is a whole original one, so
    ``experience`` updates the buffer once per original experience (measured: 5 updates over 137 small experiences);
    with ``boundaries: false`` once per small experience.

    Args:
        alpha: Weight of the term; published values are 0.1 to 0.5.
        memory: Buffer size in samples: total, or per class.
        budget: Unit of ``memory``; see ``er``.
        selection: Which samples are stored, see ``er``; ``reservoir`` as published.
        replay: ``half``: half of every batch is new, followed by the same number of replayed samples; ``extra``: as
            many replayed samples as a full batch of new ones, times ``ratio``; ``fixed``: always ``replayed``.
        ratio: With ``extra``, replayed samples per new one.
        replayed: Samples replayed with each batch if ``replay`` is ``fixed``.
        update: When the buffer admits samples. ``experience``: at its end, not augmented and in evaluation mode;
            ``step``: after every step, as published for online streams, with selection ``reservoir``. Then samples of
            the current experience are replayed too, and with several epochs a sample is offered once per epoch. With
            ``trainer.accumulate`` only the last batch of each update is offered.
        batches: Whether new and replayed samples pass through the network ``joint``, or ``apart``, each with its own
            batch normalization statistics.
        columns: Logits compared. ``padded``: all current ones, with target 0 for classes learned later, which is close
            to the original, whose network has outputs for all classes from the start. ``stored``: the stored ones only;
            nothing then separates old samples from later classes, unless another component does.
    """

    name: ClassVar[str] = "der"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("logits",)
    weight: ClassVar[str] = "alpha"
    stores_logits: ClassVar[bool] = True

    alpha: float = 0.3
    selection: Selection = "reservoir"
    replay: Literal["half", "extra", "fixed"] = "half"
    columns: Columns = "padded"

    def __post_init__(self) -> None:
        """Validate the options."""
        super().__post_init__()
        if not self.alpha >= 0:
            raise ConfigError(f"components.{self.name}.alpha: found {self.alpha}; give a number of at least 0")

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the distance from the stored logits, once samples are replayed."""
        stored_RKC = step.batch.extras.get("logits")
        if stored_RKC is None:
            return {}
        old = [logits_BC[-stored_RKC.shape[0] :] for logits_BC in step.output.logits]
        old = self.at_stored(old, step.batch.extras)
        return {"logits": self.alpha * logit_matching(old, stored_RKC, columns=self.columns)}
