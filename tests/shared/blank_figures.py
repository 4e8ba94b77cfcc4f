"""Reports and studies without their figures, which are most of the time that one takes."""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType

import numpy as np
import pytest

from clframe.plotting.style import Picture, RenderedPicture, encode_png
from clframe.report import content

BLANK = "<svg></svg>"
PIXEL = encode_png(np.zeros((1, 1, 3), dtype=np.uint8))


def leave_figures_blank(patch: pytest.MonkeyPatch, module: ModuleType = content, *, but: Collection[str] = ()) -> None:
    """Leave all figures that a module renders blank, except those named."""
    draw = module.render_picture

    def render(picture: Picture) -> RenderedPicture:
        return draw(picture) if picture.name in but else RenderedPicture(picture.name, picture.caption, BLANK, BLANK, PIXEL)

    patch.setattr(module, "render_picture", render)
