"""Figures of a run, as files."""

from __future__ import annotations

import io
from pathlib import Path

from clframe.files import write_atomically
from clframe.reporting.results import Result


def write_figures(result: Result, folder: Path) -> None:
    """``accuracy_matrix.png``: rows after experience i, columns on test experience j."""
    from PIL import Image

    from clframe.training.tensorboard import matrix_image  # here, because it brings Avalanche with it

    folder.mkdir(exist_ok=True)
    image = io.BytesIO()
    Image.fromarray(matrix_image(result.accuracy_matrix)).save(image, format="PNG")
    write_atomically(folder / "accuracy_matrix.png", image.getvalue())
