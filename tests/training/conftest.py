"""Fixtures of the toy stream."""

from toy_stream import toy, warning_filters_stay_ours  # noqa: F401  # fixtures are found by their names
