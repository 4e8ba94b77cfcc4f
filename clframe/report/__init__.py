"""Reports: HTML page, tables and figures of runs, and text for the terminal."""

from clframe.report.writing import write_report

__all__ = ["write_report"]
