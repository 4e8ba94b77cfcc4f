"""Figures of a run, as files."""

from __future__ import annotations

from pathlib import Path

from clframe.files import write_atomically
from clframe.reporting.results import Result


def write_figures(result: Result, folder: Path) -> None:
    """``accuracy_matrix.png``; of several experiences ``neurons.png``; of more than one exit ``exits_*.png``.

    The matrix has rows after experience i, columns on test experience j.
    """
    from clframe.training.activity_figures import activity_image
    from clframe.training.drawings import png
    from clframe.training.exit_figures import exit_images  # here, because training brings Avalanche with it
    from clframe.training.matrix_drawing import matrix_image

    folder.mkdir(exist_ok=True)
    pictures = {"accuracy_matrix": matrix_image(result.accuracy_matrix)}
    neurons = activity_image(result.activity) if result.activity else None
    if neurons is not None:
        pictures["neurons"] = neurons
    if len(result.exit_names) > 1:
        images = exit_images(result.exits, names=result.exit_names)
        pictures.update({f"exits_{name}": image for name, image in images.items()})
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", png(picture))
