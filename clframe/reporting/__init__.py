"""What a run comes to: the results object and its file, and tables for the terminal."""

from clframe.reporting.results import SCHEMA_VERSION, Aggregate, Result, aggregate, summarize
from clframe.reporting.tables import accuracy_table, seeds_table, summary

__all__ = [
    "SCHEMA_VERSION", "Aggregate", "Result", "accuracy_table", "aggregate", "seeds_table", "summarize",
    "summary",
]  # fmt: skip
