"""Drawing in reports: labels that do not overlap, and the colors of a page."""

from __future__ import annotations

from clframe.plotting.style import Picture, annotate_apart, render_picture, styled


def test_labels_of_budgets_do_not_overlap():
    """Two budgets with nearly equal cost and accuracy, as in runs whose thresholds are close to each other."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(4.7, 3.1), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1])
        annotate_apart(figure, axes, {(0.5, 0.5): "50 %", (0.51, 0.505): "75 %, 100 %, max"}, color="black")
        figure.draw_without_rendering()
        first, second = (text.get_window_extent() for text in axes.texts)
    assert not first.overlaps(second)


def test_labels_of_two_curves_cover_neither_each_other_nor_a_point():
    """Three close budgets of each of two curves, labeled one curve after the other."""
    from matplotlib.figure import Figure

    first = {(0.50, 0.500): "25 %", (0.51, 0.505): "50 %", (0.52, 0.510): "75 %, 100 %"}
    second = {(0.50, 0.503): "25 %", (0.515, 0.506): "50 %", (0.98, 0.990): "a long name of a point"}
    with styled():
        figure = Figure(figsize=(4.7, 3.1), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        for texts in (first, second):
            annotate_apart(figure, axes, texts, color="black")
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.texts]
        points = [axes.transData.transform(point) for point in (*first, *second)]
    assert [text.get_text() for text in axes.texts] == [*first.values(), *second.values()]
    assert not [1 for n, box in enumerate(boxes) for other in boxes[:n] if box.overlaps(other)]
    for n, box in enumerate(boxes):
        own = points[:3] if n < 3 else points[3:]
        assert not [1 for point in own if box.contains(*point)]
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1


def test_a_figure_on_the_page_follows_the_scheme_and_its_file_does_not():
    def draw(figure):
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color="#0072b2")
        axes.set_title("http://x.org/<&>")

    found = render_picture(Picture("p", "", draw))
    assert "var(--s0)" in found.inline and "#0072b2" not in found.inline
    assert "#0072b2" in found.svg and "var(" not in found.svg
    assert found.png.startswith(b"\x89PNG")
    assert "&lt;&amp;&gt;" in found.inline
