"""Correction of logits by the owner of the slot ``logits``: of all exits, or of one where exits are skipped."""

from __future__ import annotations

from clframe.core import Composition, State
from clframe.errors import UnsupportedError
from clframe.exits.dynamic import AdjustLogits
from clframe.nn.types import Output
from clframe.training.returned import check_output


class LogitCorrection:
    """The hooks ``adjust_logits`` and ``adjust_exit_logits`` of the component that overrides one of them.

    Attributes:
        owner_name: Name of the component; empty without one: there is then no correction.
        why_joint: Reason why the logits of one exit cannot be corrected alone; empty where they can.
    """

    def __init__(self, composition: Composition) -> None:
        joint, single = (composition.acting_at(hook) for hook in ("adjust_logits", "adjust_exit_logits"))
        self._hook = "adjust_logits" if joint else "adjust_exit_logits"
        self._owner = next(iter(joint or single), None)
        self.owner_name = "" if self._owner is None else self._owner.name
        self.why_joint = f"{self.owner_name} corrects the logits of all exits together" if joint else ""

    def apply(self, output: Output, state: State) -> Output:
        """Return the output with the logits of every exit corrected, given the owner's state.

        Raises:
            ComposeError: The hook returns no output of these exits.
        """
        assert self._owner is not None, "no component corrects logits"
        return check_output(self.owner_name, self._hook, self._owner.adjust_logits(output, state), output)

    def of_one_exit(self, state: State) -> AdjustLogits:
        """Return the correction of one exit, given the owner's state.

        Raises:
            UnsupportedError: The owner corrects all exits together.
        """
        owner = self._owner
        assert owner is not None, "no component corrects logits"
        if self.why_joint:
            raise UnsupportedError(
                f"strategy: {self.why_joint}, so none can be skipped; implement adjust_exit_logits in "
                f"'{self.owner_name}', or compute all exits"
            )
        return lambda exit, logits_BC, taps: owner.adjust_exit_logits(exit, logits_BC, taps, state)
