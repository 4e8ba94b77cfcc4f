"""Dark experience replay with labels: match stored logits and learn stored labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from clframe.core.types import State, Step
from clframe.errors import ConfigError
from clframe.functional.losses import Columns, cross_entropy, logit_matching
from clframe.replay.buffers import Selection
from clframe.replay.joining import ReplayComponent


@dataclass(frozen=True, kw_only=True)
class DERpp(ReplayComponent):
    """Dark experience replay ++ (DER++): match the stored logits of replayed samples and learn their labels.

    The loss is ``CE(new) + alpha * mean (logits(m1) - stored(m1))^2 + beta * CE(m2)`` for two draws m1 and m2 from the
    buffer: every exit against its own logits, stored with each sample, and against the labels. Use it if logits fit in
    memory; it is the usual choice among replay methods. Cost: classes times exits numbers per stored sample, and
    batches longer by both draws; of a language model, the 16 largest logits of every token are stored and matched.
    Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline" (2020).

    With ``update: experience``, samples and logits are stored at the end of each experience, not augmented and in
    evaluation mode, as in the code of the paper on auxiliary classifiers (Szatkowski et al., 2025) and in Avalanche.
    The original stores them after every step, with the logits of the training pass, which ``update: step`` does. On an
    online stream with ``benchmark.boundaries: true``, the default, an experience is a whole original one, so
    ``experience`` updates the buffer once per original experience (measured: 5 updates over 137 small experiences);
    with ``boundaries: false`` once per small experience.

    Args:
        alpha: Weight of the logit term; published values are 0.1 to 0.5.
        beta: Weight of the replayed cross-entropy; published values are 0.5 and 1.
        draws: ``two``: the cross-entropy has a separate draw, as published; ``one``: both terms share one.
        memory: Buffer size in samples: total, or per class.
        budget: Unit of ``memory``; see ``er``.
        selection: Which samples are stored, see ``er``; ``reservoir`` as published.
        replay: Size of a draw. ``half``: half of every batch is new, followed by draws of the same size; ``extra``: the
            size of a full batch of new samples, times ``ratio``; ``fixed``: always ``replayed``.
        ratio: With ``extra``, samples of a draw per new one.
        replayed: Samples of a draw if ``replay`` is ``fixed``.
        update: When the buffer admits samples. ``experience``: at its end, not augmented and in evaluation mode;
            ``step``: after every step, as published for online streams, with selection ``reservoir``. Then samples of
            the current experience are replayed too, and with several epochs a sample is offered once per epoch. With
            ``trainer.accumulate`` only the last batch of each update is offered.
        batches: Whether new and replayed samples pass through the network ``joint``, or ``apart``, each with its own
            batch normalization statistics, as in the code of the paper on auxiliary classifiers.
        columns: Logits compared: those ``stored``, or all current ones with target 0 for classes learned later
            (``padded``), which is close to the original, whose network has outputs for all classes from the start.
    """

    name: ClassVar[str] = "derpp"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("logits", "replay")
    stores_logits: ClassVar[bool] = True

    alpha: float = 0.1
    beta: float = 0.5
    draws: Literal["one", "two"] = "two"
    selection: Selection = "reservoir"
    replay: Literal["half", "extra", "fixed"] = "half"
    columns: Columns = "stored"

    def __post_init__(self) -> None:
        """Validate the options."""
        super().__post_init__()
        for option, found in (("alpha", self.alpha), ("beta", self.beta)):
            if not found >= 0:
                raise ConfigError(f"components.{self.name}.{option}: found {found}; give a number of at least 0")

    @property
    def draws_per_batch(self) -> int:
        """Number of independent draws that join a batch."""
        return 2 if self.draws == "two" else 1

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the distance from the stored logits and the replayed cross-entropy, once samples are replayed."""
        stored_RKC = step.batch.extras.get("logits")
        if stored_RKC is None:
            return {}
        end, drawn = step.batch.y.shape[0], stored_RKC.shape[0]
        first = end - drawn if self.draws == "one" else end - 2 * drawn
        matched = [logits_BC[first : first + drawn] for logits_BC in step.output.logits]
        matched = self.at_stored(matched, step.batch.extras)
        replayed = [logits_BC[end - drawn :] for logits_BC in step.output.logits]
        return {
            "logits": self.alpha * logit_matching(matched, stored_RKC, columns=self.columns),
            "replay": self.beta * cross_entropy(replayed, step.batch.y[end - drawn :]),
        }
