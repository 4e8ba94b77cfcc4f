"""Figures of a run, as files."""

from __future__ import annotations

from pathlib import Path

from clframe.files import write_atomically
from clframe.reporting.results import Result


def write_figures(result: Result, folder: Path) -> None:
    """``accuracy_matrix.png``, and where there is more than one exit ``exits_*.png``.

    The matrix has rows after experience i, columns on test experience j.
    """
    from clframe.training.drawings import png
    from clframe.training.exit_figures import exit_images
    from clframe.training.tensorboard import matrix_image  # here, because training brings Avalanche with it

    folder.mkdir(exist_ok=True)
    pictures = {"accuracy_matrix": matrix_image(result.accuracy_matrix)}
    if len(result.exit_names) > 1:
        images = exit_images(result.exits, names=result.exit_names)
        pictures.update({f"exits_{name}": image for name, image in images.items()})
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", png(picture))
