"""Stages of a network compiled by ``torch.compile`` once, and used while its classifiers grow.

All stages become one function of the inputs, which returns the inputs of the exits' heads and the named taps. The heads
run as they are: new classes change nothing that the compiled code depends on. Losses, components and update are not
compiled. The number of samples is symbolic, so batches of all sizes above 1 share one graph; training, evaluation and
other parameters that learn need one each.

The first step of each kind runs uncompiled, because its operators are counted (:mod:`clframe.training.step_cost`).
Teachers and what components compute between experiences are uncompiled too. Parameters and checkpoints are those of an
uncompiled network.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from clframe.core import Composition
from clframe.errors import UnsupportedError, reason_of
from clframe.nn.network import Network, StageValues

_log = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")
"""Devices for which stages are compiled."""


class CompiledStages:
    """Runs all stages of one network as compiled code; pass it to the network as ``stages``.

    Args:
        backend: Backend of ``torch.compile``.

    Attributes:
        graphs: Graphs compiled since :meth:`take`.
    """

    def __init__(self, *, backend: str = "inductor") -> None:
        self._backend = backend
        self._function: Callable[..., StageValues] | None = None
        self._hooks: Any = None
        self._hooked = False
        self._failed = False
        self._worked: set[tuple[bool, bool]] = set()
        self._reported: set[str] = set()
        self.graphs, self._seconds_before = 0, 0.0

    def __call__(self, network: Network, x: Tensor, taps: Sequence[str]) -> StageValues:
        """Return what ``network.run_stages(x, taps)`` returns.

        Raises:
            UnsupportedError: The stages cannot be compiled.
        """
        # Modes that intercept operators, such as those that count MACs, see none in compiled code.
        if self._failed or self._hooked or _get_current_dispatch_mode() is not None:
            return network.run_stages(x, taps)
        from torch._dynamo.exc import TorchDynamoException

        if self._function is None:
            self._function = self._compile()
        # Dynamo would make the place of a part inside another tensor part of the code. Marks stay off the batch itself.
        x = x.clone() if x.storage_offset() else x.detach()
        torch._dynamo.maybe_mark_dynamic(x, 0)
        mode = network.training, torch.is_grad_enabled()
        try:
            found = self._function(network, x, taps)
        except TorchDynamoException as error:
            reason = reason_of(error, most=200)
            if mode not in self._worked:
                raise UnsupportedError(
                    f"trainer.compile: found true, but the backbone cannot be compiled as one graph ({reason}); set "
                    f"trainer.compile=false"
                ) from error
            self._failed = True
            self._report(f"the stages can no longer be compiled ({reason})")
            return network.run_stages(x, taps)
        self._worked.add(mode)
        return found

    def watch(self, network: Network) -> None:
        """Run the stages uncompiled while they have other hooks than at first, which compiled code would not call.

        Called when an epoch or an evaluation begins. Reports what runs uncompiled.
        """
        hooks = [(*part._forward_pre_hooks, *part._forward_hooks, *part._backward_pre_hooks, *part._backward_hooks)
                 for part in network.backbone.modules()]  # fmt: skip
        if self._hooks is None:
            self._hooks = hooks
        self._hooked = hooks != self._hooks
        if self._hooked:
            self._report("a plugin or callback observes layers of the network by hooks")
        if network.choice is not None:
            self._report(f"{network.choice.owner} chooses between weights", continues="evaluations run uncompiled")

    def take(self) -> tuple[int, float]:
        """Return the graphs compiled since the last call, and the seconds that took."""
        graphs, self.graphs = self.graphs, 0
        if not graphs:
            return 0, 0.0
        before, self._seconds_before = self._seconds_before, _seconds()
        return graphs, max(self._seconds_before - before, 0.0)

    def _compile(self) -> Callable[..., StageValues]:
        self._seconds_before = _seconds()
        run = Network.run_stages
        # Dynamo limits the graphs of a code object, which networks that are trained one after the other would share.
        own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, run.__defaults__, run.__closure__)
        compiled: Callable[..., StageValues] = torch.compile(own, backend=self._count, fullgraph=True)
        return compiled

    def _count(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        """Compile one graph: a backend of ``torch.compile`` that counts."""
        self.graphs += 1
        with warnings.catch_warnings():
            # Advice on a setting that trainer.deterministic decides.
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            return torch._dynamo.lookup_backend(self._backend)(graph, inputs)

    def _report(self, reason: str, *, continues: str = "the run continues uncompiled") -> None:
        """Log once why the stages run uncompiled."""
        if reason not in self._reported:
            self._reported.add(reason)
            _log.warning("trainer.compile: %s; %s", reason, continues)


def _seconds() -> float:
    """Return the seconds that this process has spent compiling."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent()["total_wall_time"])


def refuse_to_compile(composition: Composition, device: torch.device) -> None:
    """Refuse components and devices whose stages cannot run as compiled code.

    Raises:
        UnsupportedError: One of them, by name.
    """
    named = ", ".join(component.name for component in composition if not component.compilable)
    if named:
        raise UnsupportedError(
            f"trainer.compile: found true with {named}, which decides on the host inside the network; set "
            f"trainer.compile=false"
        )
    if device.type not in DEVICES:
        raise UnsupportedError(
            f"trainer.compile: found true on a {device.type} device, but it needs {' or '.join(DEVICES)}; set "
            f"trainer.compile=false"
        )


def require_compiler(*, cuda: bool) -> None:
    """Check that there is a compiler for what ``torch.compile`` generates: C++ on a CPU, C around Triton's kernels.

    Raises:
        UnsupportedError: None is found.
    """
    if cuda:
        kind, variable, names = "C", "CC", ["cc", "gcc", "clang"]
    else:
        kind, variable, names = "C++", "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    given = os.environ.get(variable)
    wanted = [given] if given else names
    if not any(shutil.which(name) for name in wanted):
        raise UnsupportedError(
            f"trainer.compile: found no {kind} compiler ({', '.join(wanted)}), which torch.compile needs; install one, "
            f"name it in the environment variable {variable}, or set trainer.compile=false"
        )
