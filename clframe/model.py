"""Trained models as users handle them: predict, learn more, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.data.benchmark import Benchmark
from clframe.data.source import Source
from clframe.results import Result
from clframe.targets.loading import RunModel, load_run

if TYPE_CHECKING:
    import torch

    from clframe.targets.export import Format
    from clframe.targets.prediction import Predictions
    from clframe.targets.text_generation import Continuations
    from clframe.targets.text_scoring import ScoredTexts


@dataclass(frozen=True, eq=False, kw_only=True)
class Model(RunModel):
    """The trained model of a run, as returned by ``clframe.load(run)``.

    Inputs of the methods of :class:`~clframe.training.trained.TrainedModel` are tensors or arrays as the data set
    stores them; :meth:`predict` takes files as well. Parameters are frozen: to learn more, use :meth:`extend`.
    """

    def __repr__(self) -> str:
        """The folder, the strategy, the number of learned classes and the names of the exits, in one line."""
        classes, exits = len(self.learner.past), ", ".join(self.network.exit_names)
        return f"Model({str(self.folder)!r}, strategy={self.config.strategy!r}, {classes} classes, exits: {exits})"

    def predict(
        self,
        inputs: Any,
        *,
        threshold: float | None = None,
        budget: float | None = None,
        top: int = 1,
        batch_size: int = 64,
        graphs: bool = True,
    ) -> Predictions:
        """Predict files, folders, arrays or texts; see :func:`clframe.targets.prediction.predict`."""
        from clframe.targets.prediction import predict

        return predict(
            self, inputs, threshold=threshold, budget=budget, top=top, batch_size=batch_size, graphs=graphs
        )  # fmt: skip

    def generate(
        self,
        prompts: Sequence[str] | str,
        *,
        tokens: int = 32,
        threshold: float | None = None,
        budget: float | None = None,
        draft: int = 0,
        draft_exit: str | None = None,
        domain: str | None = None,
    ) -> Continuations:
        """Continue prompts by a language model; see :func:`clframe.targets.text_generation.continue_prompts`."""
        from clframe.targets.text_generation import continue_prompts

        return continue_prompts(
            self, prompts, tokens=tokens, threshold=threshold, budget=budget, draft=draft, draft_exit=draft_exit,
            domain=domain,
        )  # fmt: skip

    def score(
        self,
        texts: Sequence[str] | Mapping[str, str] | str,
        *,
        threshold: float | None = None,
        budget: float | None = None,
        stride: int | None = None,
        batch_size: int = 64,
        domain: str | None = None,
    ) -> ScoredTexts:
        """Score texts by a language model; see :func:`clframe.targets.text_scoring.score_texts`."""
        from clframe.targets.text_scoring import score_texts

        return score_texts(
            self, texts, threshold=threshold, budget=budget, stride=stride, batch_size=batch_size, domain=domain
        )  # fmt: skip

    def extend(
        self,
        data: Source | Benchmark | Sequence[str] | str,
        overrides: Sequence[str] = (),
        *,
        output: str | Path | None = None,
    ) -> Result:
        """Learn new experiences on top of the run, in a new run folder; see :func:`clframe.api.extend`."""
        from clframe.api import extend

        return extend(self.folder, data, overrides, output=output)

    def export(
        self,
        folder: str | Path,
        *,
        format: Format = "onnx",
        staged: bool = False,
        threshold: float | None = None,
        opset: int | None = None,
        dtype: str | None = None,
    ) -> Path:
        """Write the model in another format; see :func:`clframe.targets.export.export`."""
        from clframe.targets.export import export

        return export(
            self, folder, format=format, staged=staged, threshold=threshold, opset=opset, dtype=dtype
        )  # fmt: skip


def load(run: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """Load the trained model of a run; no data and no code are read.

    Args:
        run: A run folder, finished or not, or the folder of a model converted by ``clframe moefy`` or written by
            ``clframe card`` or ``clframe export --format safetensors``.
        device: Device of the model: cpu, cuda, cuda:N, mps, or auto for the best available.

    Raises:
        RunFolderError: No run folder, or no readable checkpoint in it.
        UnsupportedError: A device that is not available.
    """
    return load_run(run, kind=Model, device=device)
