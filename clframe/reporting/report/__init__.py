"""A report people want to read: ``clframe report RUN [RUN ...]`` as one HTML page, tables and figures."""

from clframe.reporting.report.writing import write_report

__all__ = ["write_report"]
