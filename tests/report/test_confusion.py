"""The confusion matrix in files, tables and on the page."""

from __future__ import annotations

import math

import pytest

from clframe.errors import RunFolderError
from clframe.report.confusion import FILE, confused_table, merge_confusions, read_confusion, write_confusion
from clframe.report.loading import load_run
from clframe.report.writing import write_report
from clframe.results import Result

COUNTS = ((15, 5), (8, 12))


def test_it_is_on_the_page_and_in_tables(make_run, without_figures, read_table):
    folder = make_run("a", (15, 12), change={"confusion": COUNTS}, classes=(7, 4))
    page = write_report([folder])
    assert "<h2>Confusion matrix</h2>" in page.read_text()
    assert "2 classes, in the order in which they are learned." in page.read_text()
    rows = read_table(page, "confused_classes")
    assert [list(row.values()) for row in rows] == [["4", "7", "0.4", "8.0"], ["7", "4", "0.25", "5.0"]]
    assert [list(row.values()) for row in read_table(page, "confusion_matrix")] == [["7", "15.0", "5.0"], ["4", "8.0", "12.0"]]


def test_classes_have_their_names(make_run, without_figures, read_table):
    names = ["a", "b", "c", "d", "elk", "f", "g", "hen"]
    page = write_report([make_run("a", (15, 12), change={"confusion": COUNTS, "class_names": names}, classes=(7, 4))])
    assert [row["true class"] for row in read_table(page, "confusion_matrix")] == ["hen", "elk"]


def test_a_run_without_it_has_no_section(make_run, without_figures):
    assert "Confusion matrix" not in write_report([make_run("a", (15, 12))]).read_text()


def test_a_figure_is_drawn(make_run):
    page = write_report([make_run("a", (15, 12), change={"confusion": COUNTS})])
    assert (page.parent / "figures" / "confusion_matrix.svg").read_text().count(">75<") == 1  # 15 of 20, in percent


def test_seeds_of_different_orders_are_averaged_by_class():
    shares, counts, order = merge_confusions([((15, 5), (8, 12)), ((1, 0), (3, 1))], [(7, 4), (4, 7)])
    assert order == [4, 7]
    assert counts == [[12 + 1, 8 + 0], [5 + 3, 15 + 1]]
    assert shares == [[(0.6 + 1) / 2, (0.4 + 0) / 2], [(0.25 + 0.75) / 2, (0.75 + 0.25) / 2]]
    assert merge_confusions([COUNTS, COUNTS], [(7, 4), (7, 4)])[2] == [7, 4]


def test_a_class_without_samples_is_not_confused():
    table = confused_table([[math.nan, math.nan], [0.25, 0.75]], [[0, 0], [1, 3]], ["a", "b"])
    assert [(row[0], row[1], row[2].value, row[3].value) for row in table.rows] == [("b", "a", 0.25, 1)]
    assert confused_table([[1.0]], [[3]], ["a"]).note == "No test sample is predicted as a wrong class."


def test_many_classes_are_in_a_file_of_their_own(make_run):
    folder = make_run("a", (15, 12))
    result = Result.from_json(folder / "results.json")
    assert read_confusion(folder, result) == ()
    write_confusion(COUNTS, result.class_order, folder)
    assert load_run(folder).confusion == [[15, 5], [8, 12]]
    (folder / FILE).write_bytes(b"PK torn")
    with pytest.raises(RunFolderError, match=r"confusion\.npz: is damaged; delete it"):
        load_run(folder)


@pytest.mark.parametrize("counts", [((1, 2),), ((1, 2, 3), (1, 2, 3)), ((1, -2), (3, 4))])
def test_a_matrix_that_does_not_fit_is_refused(counts, make_run):
    folder = make_run("a", (15, 12), change={"confusion": counts})
    with pytest.raises(RunFolderError, match="does not fit class_order; restore the file or run again"):
        load_run(folder)
